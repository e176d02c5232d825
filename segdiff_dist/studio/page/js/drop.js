// What is dropped on the page: a mask, also beside other files or in a folder.

const MOST_FILES = 5000;
const HEAD_BYTES = 4096;
// "DICM" is at byte 128 (PS3.10, 7.1). The class of a Segmentation, and of one by labels (PS3.4, B.5).
const DICOM = [128, "DICM"];
const SEGMENTATION = /1\.2\.840\.10008\.5\.1\.4\.1\.1\.66\.[47](?![\d.])/;

/** Calls `onFiles` with the files of each drop, or a promise of them, and marks the page while something is held over it. */
export function startDrop(onFiles) {
  let inside = 0;
  const mark = (change) => {
    inside = Math.max(0, inside + change);
    document.body.classList.toggle("dropping", inside > 0);
  };
  addEventListener("dragenter", () => mark(1));
  addEventListener("dragleave", () => mark(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-inside);
    // Both are empty after the event.
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter((one) => one?.isDirectory);
    const files = [...event.dataTransfer.files];
    onFiles(entries.length > 0 ? below(entries) : files);
  });
}

/** The one file to read as a mask; null: there are several, and none of them is a DICOM SEG. A SEG has its own place, so
 *  the series that it was drawn on is not needed. */
export async function maskAmong(files) {
  if (files.length === 1) return files[0];
  const found = [];
  for (const file of files) if (await isSegmentation(file)) found.push(file);
  return found.length === 1 ? found[0] : null;
}

async function isSegmentation(file) {
  const head = new TextDecoder("latin1").decode(await file.slice(0, HEAD_BYTES).arrayBuffer());
  return head.startsWith(DICOM[1], DICOM[0]) && SEGMENTATION.test(head);
}

/** All files of folders; files beside the folders are left. */
async function below(entries) {
  const files = [];
  const open = [...entries];
  while (open.length > 0 && files.length < MOST_FILES) {
    const entry = open.pop();
    if (entry.isFile) files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    else open.push(...(await children(entry)));
  }
  return files;
}

async function children(folder) {
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    // A reader gives at most 100 at a time.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) return found;
    found.push(...some);
  }
}
