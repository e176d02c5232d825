// The left side: masks to start from, tools, organs.

import { getBytes, getExamples } from "./api.js";
import { $, element, say, shown } from "./dom.js";
import { awaitMask, canRedo, canUndo, fullestPlane, newBody, redo, replaceVolume, undo } from "./mask.js";
import { readNifti } from "./nifti.js";
import { bodyId, on, shownPlane, state, announce } from "./state.js";
import { picture, wordOf } from "./view.js";

const SIZES = [1, 64];
// Pixels at the end of the list that style.css fades.
const FADE = 26;

export function startRail() {
  for (const button of document.querySelectorAll("[data-tool]"))
    button.addEventListener("click", () => choose("tool", button.dataset.tool));
  $("#size").addEventListener("input", () => resize(0));
  $("#undo").addEventListener("click", undo);
  $("#redo").addEventListener("click", redo);
  $("#protect").addEventListener("change", () => choose("protects", $("#protect").checked));
  $("#plane").addEventListener("input", () => showPlane(Number($("#plane").value)));
  on("tool", update);
  on("mask volume", markShown);
  on("volume", updatePlane);
  on("model", listOrgans);
}

function choose(name, value) {
  state[name] = value;
  announce("tool");
}

export const chooseTool = (tool) => choose("tool", tool);

/** Take an organ; an eraser becomes a brush. */
export function chooseLabel(id) {
  if (state.tool === "erase") state.tool = "brush";
  choose("label", id);
}

/** A larger or smaller brush. */
export function resize(step) {
  const size = Number($("#size").value) + step;
  choose("size", Math.min(SIZES[1], Math.max(SIZES[0], size)));
}

export function showPlane(plane) {
  state.plane = Math.min(state.volume.dims[2] - 1, Math.max(0, plane));
  announce("volume", "mask");
}

function updatePlane() {
  const depth = state.volume.dims[2];
  $("#planes").hidden = depth < 2;
  Object.assign($("#plane"), { max: depth - 1, value: state.plane });
  $("#plane-number").textContent = `${state.plane + 1} / ${depth}`;
}

function update() {
  for (const button of document.querySelectorAll("[data-tool]"))
    button.setAttribute("aria-pressed", button.dataset.tool === state.tool);
  for (const button of document.querySelectorAll("#organs button")) {
    const isChosen = Number(button.dataset.label) === state.label;
    if (isChosen && button.ariaPressed !== "true") reveal(button);
    button.setAttribute("aria-pressed", isChosen);
  }
  $("#size").value = state.size;
  $("#size-number").textContent = `${state.size} px`;
  $("#protect").checked = state.protects;
  $("#undo").disabled = !canUndo();
  $("#redo").disabled = !canRedo();
}

/** Scroll the list of organs, and not the page, to a button. */
function reveal(button) {
  const [own, list] = [button, $("#organs")].map((one) => one.getBoundingClientRect());
  if (own.left < list.left || own.right > list.right - FADE) $("#organs").scrollLeft += own.left - list.left - FADE;
  if (own.top < list.top || own.bottom > list.bottom - FADE) $("#organs").scrollTop += own.top - list.top - FADE;
}

function listOrgans() {
  const labels = state.model.labels.filter(({ id, name }) => id !== 0 && name !== "unused");
  const body = bodyId();
  labels.sort((a, b) => (b.id === body) - (a.id === body));
  state.label = labels.find((one) => one.name === "liver")?.id ?? labels.find((one) => one.id !== body)?.id ?? 0;
  $("#organs").replaceChildren(...labels.map((label, k) => organ(label, k)));
  markShown();
  update();
}

function organ({ id, name, color }, k) {
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = color;
  const key = k < 9 ? element("kbd", {}, String(k + 1)) : "";
  const button = element("button", { type: "button", "data-label": id, title: shown(name) }, swatch, element("span", {}, shown(name)), key);
  button.addEventListener("click", () => chooseLabel(id));
  return element("li", {}, button);
}

/** Organs that the plane shows are written brighter. */
function markShown() {
  if (!state.volume) return;
  const present = new Set(shownPlane());
  for (const button of document.querySelectorAll("#organs button"))
    button.classList.toggle("present", present.has(Number(button.dataset.label)));
}

/** The masks to begin with: an ellipse, then the phantom's slices. Shows one from the middle of the trunk. */
export async function listStarts() {
  const { model } = state;
  const isNewest = awaitMask();
  const blank = startButton("outline", "A new outline of the patient", element("span", { className: "oval" }));
  blank.addEventListener("click", () => newBody(state.model));
  $("#starts").replaceChildren(blank);
  let examples = [];
  try {
    examples = (await Promise.all((await getExamples(model.name)).map(read))).filter(Boolean);
  } catch (error) {
    say(`The examples cannot be read: ${error.message}`, { isError: true });
  }
  if (state.model !== model) return;
  $("#starts").append(...examples.map(exampleButton));
  if (!isNewest()) return;
  const flat = examples.filter((one) => one.volume.dims[2] === 1);
  const first = flat[Math.floor((flat.length - 1) / 2)];
  if (first) replaceVolume(first.volume, first.name);
  else newBody(state.model);
}

async function read({ name, url }) {
  try {
    return { name, volume: await readNifti(await getBytes(url)) };
  } catch {
    return null;
  }
}

function exampleButton(example) {
  const colours = new Uint32Array(256);
  for (const { id, color } of state.model.labels) colours[id] = id === 0 ? 0 : wordOf(color);
  const { dims: [width, height, depth], voxels } = example.volume;
  const start = fullestPlane(example.volume) * width * height;
  const image = picture(width, height, (voxel) => colours[voxels[start + voxel]]);
  const title = depth > 1 ? `${shown(example.name)}: a volume of ${depth} slices` : `A slice of the phantom: ${shown(example.name)}`;
  const button = startButton(depth > 1 ? "volume" : inShort(example.name), title, image);
  button.addEventListener("click", () => replaceVolume(example.volume, example.name));
  return button;
}

/** One word: "kidney" of kidney_left, "bladder" of urinary_bladder. */
const inShort = (name) => name.split("_").filter((word) => !["left", "right"].includes(word)).at(-1) ?? name;

function startButton(text, title, image) {
  return element("button", { type: "button", className: "start", title }, image, element("small", {}, text));
}
