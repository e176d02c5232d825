// A mask of several slices as a volume, and the images of all its slices: shown by NiiVue, which is loaded on first use.

import { paint } from "./api.js";
import { $, element, save } from "./dom.js";
import { fromBase64, labelFile } from "./nifti.js";
import { chosenSeed, settingsOf } from "./rounds.js";
import { on, state } from "./state.js";

const LIBRARY = "vendor/niivue/niivue.umd.js";
let viewer = null;
let stopping = null;
let made = null; // {modality, bytes, name} of the last volume
let version = null; // of the mask that is shown

export function startVolume() {
  on("volume", () => ($("#volume").hidden = state.volume.dims[2] < 2));
  $("#volume").addEventListener("click", () => open().catch(showError));
  $("#volume-sheet").addEventListener("close", () => stopping?.abort());
  $("#volume-save").addEventListener("click", () => save(new Blob([made.bytes], { type: "application/gzip" }), made.name));
  $("#volume-opacity").addEventListener("input", () => viewer?.setOpacity(viewer.volumes.length - 1, Number($("#volume-opacity").value)));
}

async function open() {
  $("#volume-sheet").showModal();
  viewer ??= await newViewer();
  if (version !== state.version) made = null;
  version = state.version;
  const buttons = state.model.modalities.map((modality) => {
    const button = element("button", { type: "button" }, `Paint all slices: ${modality}`);
    button.addEventListener("click", () => (stopping ? stopping.abort() : paintAll(modality, button)));
    return button;
  });
  $("#volume-buttons").replaceChildren(...buttons);
  await showVolumes();
}

async function newViewer() {
  await new Promise((resolve, reject) => {
    const script = element("script", { src: LIBRARY, onload: resolve, onerror: () => reject(new Error("NiiVue is missing")) });
    document.head.append(script);
  });
  const { Niivue, SHOW_RENDER } = globalThis.niivue;
  const options = { isRadiologicalConvention: true, dragAndDropEnabled: false, backColor: [0, 0, 0, 1], show3Dcrosshair: false };
  const thin = { crosshairWidth: 0.4, crosshairColor: [0.85, 0.9, 0.95, 0.5] };
  const shown = new Niivue({ ...options, ...thin, multiplanarShowRender: SHOW_RENDER.ALWAYS, logLevel: "error" });
  await shown.attachToCanvas($("#volume-canvas"));
  shown.setSliceType(shown.sliceTypeMultiplanar);
  return shown;
}

/** The image, if there is one, and the mask over it in the organs' colours. */
async function showVolumes() {
  const { NVImage } = globalThis.niivue;
  for (const volume of [...viewer.volumes]) viewer.removeVolume(volume);
  if (made) viewer.addVolume(await NVImage.new(bufferOf(made.bytes), "image.nii.gz", "gray", 1));
  const bytes = await labelFile(state.volume);
  const mask = await NVImage.new(bufferOf(bytes), "mask.nii.gz", "gray", made ? Number($("#volume-opacity").value) : 1);
  viewer.addVolume(mask);
  mask.setColormapLabel(colours());
  viewer.updateGLVolume();
  $("#volume-save").hidden = !made;
  $("#volume-about").textContent = made
    ? `synthetic ${made.modality} of ${state.volume.dims[2]} slices`
    : `mask of ${state.volume.dims.join(" × ")} voxels. Every slice is an image of its own: neighbours share their noise.`;
}

/** A colour table of NiiVue. */
function colours() {
  const table = { R: [], G: [], B: [], A: [], I: [], labels: [] };
  for (const { id, name, color } of [...state.model.labels].sort((a, b) => a.id - b.id)) {
    [1, 3, 5].forEach((at, k) => table["RGB"[k]].push(Number.parseInt(color.slice(at, at + 2), 16)));
    table.A.push(id === 0 ? 0 : name === "body" ? 5 : 255);
    table.I.push(id);
    table.labels.push(name);
  }
  return table;
}

/** In the sheet: what lies below it cannot be read. */
function showError(error) {
  $("#volume-about").textContent = `The volume cannot be shown: ${error.message}`;
}

async function paintAll(modality, button) {
  const [words, of] = [button.textContent, state.version];
  button.textContent = "Stop";
  const bar = $("#volume-bar");
  stopping = new AbortController();
  Object.assign(bar, { hidden: false, value: 0 });
  const onEvent = (name, data) => {
    if (name === "progress") bar.value = data.step / data.steps;
  };
  try {
    const settings = { ...settingsOf(chosenSeed()), modality };
    const answer = await paint(await labelFile(state.volume), settings, { signal: stopping.signal, onEvent });
    if (of !== state.version) throw new Error("another mask was opened: close this, and press volume again");
    made = { modality, bytes: fromBase64(answer.image), name: `${state.name}_${modality}_volume_synthetic.nii.gz` };
    await showVolumes();
  } catch (error) {
    if (error.name !== "AbortError") $("#volume-about").textContent = error.message;
  }
  button.textContent = words;
  bar.hidden = true;
  stopping = null;
}

const bufferOf = (bytes) => bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
