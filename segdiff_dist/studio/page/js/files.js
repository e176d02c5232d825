// Files in and out: masks that are opened or dropped, images that are downloaded.

import { paintDicom, readMask } from "./api.js";
import { $, save, say } from "./dom.js";
import { maskAmong, startDrop } from "./drop.js";
import { awaitMask, replaceVolume } from "./mask.js";
import { fromBase64, labelFile, readNifti } from "./nifti.js";
import { state } from "./state.js";

const NO_FILE = "Nothing that can be read: drop a file.";
const ONE_MASK = "drop one mask. Several files are taken only if one of them is a DICOM SEG: a series and its SEG.";

export function startFiles() {
  const chooser = $("#file");
  $("#open").addEventListener("click", () => chooser.click());
  chooser.addEventListener("change", () => {
    if (chooser.files[0]) open(chooser.files[0]);
    chooser.value = "";
  });
  $("#save-mask").addEventListener("click", downloadMask);
  startDrop(async (dropped) => {
    try {
      const files = await dropped;
      const file = await maskAmong(files);
      if (file) open(file);
      else say(files.length === 0 ? NO_FILE : `${files.length} files: ${ONE_MASK}`, { isError: true });
    } catch (error) {
      say(`What was dropped cannot be read: ${error.message}`, { isError: true });
    }
  });
}

/** Read a mask through the service, which knows all kinds, and show it. */
async function open(file, otherLabels) {
  const isNewest = awaitMask();
  try {
    const { mask, notes } = await readMask(file, state.model?.name, otherLabels);
    const volume = await readNifti(fromBase64(mask));
    if (!isNewest()) return;
    replaceVolume(volume, plainName(file.name));
    say([`${file.name} is open.`, ...(notes ?? [])].join(" "));
  } catch (error) {
    if (!isNewest()) return;
    const isLabels = error.status === 422 && !otherLabels && /other.labels/.test(error.message);
    const again = (choice) => () => open(file, choice);
    const actions = isLabels ? [["Take them as body", again("body")], ["Leave them out", again("background")]] : [];
    say(`${file.name}: ${error.message}`, { isError: true, actions });
  }
}

/** A name without its ending, of letters that every system takes. */
export const plainName = (name) =>
  name.replace(/(\.nii)?\.[^.]*$/, "").replaceAll(/[^\p{L}\p{N}_.-]+/gu, "_").slice(0, 80) || "mask";

async function downloadMask() {
  if (!state.volume) return;
  save(new Blob([await labelFile(state.volume)], { type: "application/gzip" }), `${state.name}_mask.nii.gz`);
}

const nameOf = (round, job) => `${round.name}_${job.modality}_seed${round.seed}_synthetic`;

export function downloadNifti(round, job) {
  save(new Blob([job.bytes], { type: "application/gzip" }), `${nameOf(round, job)}.nii.gz`);
}

export function downloadPng(round, job) {
  job.picture.toBlob((blob) => save(blob, `${nameOf(round, job)}.png`), "image/png");
}

/** The service makes the same image again, as DICOM. */
export async function downloadDicom(round, job) {
  say("The DICOM series is being made.");
  try {
    const settings = { ...round.settings, modality: job.modality };
    save(await paintDicom(round.maskBytes, settings), `${nameOf(round, job)}_dicom.zip`);
  } catch (error) {
    say(`DICOM: ${error.message}`, { isError: true });
  }
}
