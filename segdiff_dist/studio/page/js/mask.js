// Changes of the mask. A picture shows a plane the radiological way: the patient's right on its left, the front up, so
// pixel (x, y) is voxel (width - 1 - x, height - 1 - y).

import { bodyId, planeAt, shownPlane, state, announce } from "./state.js";
import { spacing } from "./nifti.js";

const MOST_STEPS = 80;
const BODY_SHAPE = [0.42, 0.31]; // half axes of a new outline, of the picture's sides
const before = [];
const after = [];
let started = null;
let asked = 0;

export const indexOf = (x, y) => {
  const [width, height] = state.volume.dims;
  return width * height - 1 - (x + width * y);
};

export function labelAt(x, y) {
  const [width, height] = state.volume.dims;
  return x < 0 || y < 0 || x >= width || y >= height ? 0 : shownPlane()[indexOf(x, y)];
}

/** Begin what one undo takes back. */
export function begin() {
  started = { plane: state.plane, voxels: shownPlane().slice() };
}

/** End it. */
export function end() {
  const now = started && planeAt(started.plane);
  if (started && started.voxels.some((label, k) => label !== now[k])) {
    before.push(started);
    if (before.length > MOST_STEPS) before.shift();
    after.length = 0;
    state.version++;
    announce("mask", "tool");
  }
  started = null;
}

export const canUndo = () => before.length > 0;
export const canRedo = () => after.length > 0;
export const undo = () => step(before, after);
export const redo = () => step(after, before);

function step(from, to) {
  const kept = from.pop();
  if (!kept) return;
  if (state.plane !== kept.plane) {
    state.plane = kept.plane;
    announce("volume");
  }
  to.push({ plane: kept.plane, voxels: shownPlane().slice() });
  shownPlane().set(kept.voxels);
  state.version++;
  announce("mask", "tool");
}

/** A mask is asked for: a function that says whether none was asked for or shown since. */
export function awaitMask() {
  const own = ++asked;
  return () => own === asked;
}

/** Show another mask. */
export function replaceVolume(volume, name) {
  asked++;
  state.opened++;
  started = null;
  state.volume = { ...volume, voxels: Uint8Array.from(volume.voxels) };
  state.name = name;
  state.plane = fullestPlane(state.volume);
  state.version++;
  before.length = after.length = 0;
  announce("volume", "mask", "tool");
}

/** The plane that shows most labels, of those the middle one. */
export function fullestPlane({ dims: [width, height, depth], voxels }) {
  const labels = Array.from({ length: depth }, (_, plane) =>
    new Set(voxels.subarray(plane * width * height, (plane + 1) * width * height)).size);
  const most = Math.max(...labels);
  const best = labels.flatMap((number, plane) => (number === most ? [plane] : []));
  return best[Math.floor((best.length - 1) / 2)];
}

/** A new mask of the model's size: an ellipse of the patient's outline, or nothing where the model has none. */
export function newBody(model) {
  const [size, side] = [model.size, model.pixel_mm];
  const centre = (-side * (size - 1)) / 2;
  const affine = [[side, 0, 0, centre], [0, side, 0, centre], [0, 0, 5, 0]];
  replaceVolume({ dims: [size, size, 1], affine, voxels: new Uint8Array(size * size) }, "drawn");
  if (bodyId() === null) return;
  const [half, tall] = BODY_SHAPE.map((part) => part * size);
  ellipse(size / 2 - half, size / 2 - tall, size / 2 + half, size / 2 + tall, bodyId());
  announce("mask");
}

/** What a tool writes over `old`. Erasing organs leaves the patient; begun on the patient, it leaves background. */
export function eraserFor(x, y) {
  const body = bodyId();
  const begun = labelAt(x, y);
  const clears = body === null || begun === 0 || begun === body;
  return (old) => (clears || old === 0 ? 0 : body);
}

/** What a tool that draws writes over `old`. */
export function writer(label) {
  const body = bodyId();
  return (old) => (state.protects && old !== 0 && old !== body && label !== body ? old : label);
}

/** Change all pixels of a disc. */
export function disc(x, y, radius, write) {
  const [width, height] = state.volume.dims;
  const aspect = aspectOf(state.volume);
  const tall = radius / aspect;
  const plane = shownPlane();
  for (let row = Math.max(0, Math.floor(y - tall)); row <= Math.min(height - 1, Math.ceil(y + tall)); row++)
    for (let column = Math.max(0, Math.floor(x - radius)); column <= Math.min(width - 1, Math.ceil(x + radius)); column++) {
      const isInside = Math.hypot(column + 0.5 - x, (row + 0.5 - y) * aspect) <= Math.max(radius, 0.5);
      if (isInside) change(plane, column, row, write);
    }
}

/** Discs along a line, so that fast strokes have no gaps. */
export function line(from, to, radius, write) {
  const steps = Math.max(1, Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / Math.max(0.5, radius / 3)));
  for (let k = 1; k <= steps; k++)
    disc(from.x + ((to.x - from.x) * k) / steps, from.y + ((to.y - from.y) * k) / steps, radius, write);
}

/** The ellipse in a box. */
export function ellipse(left, top, right, bottom, label) {
  const [width, height] = state.volume.dims;
  const [x0, y0, half, tall] = [(left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2];
  const [plane, write] = [shownPlane(), writer(label)];
  if (half < 0.5 || tall < 0.5) return;
  for (let y = Math.max(0, Math.floor(top)); y < Math.min(height, bottom); y++)
    for (let x = Math.max(0, Math.floor(left)); x < Math.min(width, right); x++)
      if (Math.hypot((x + 0.5 - x0) / half, (y + 0.5 - y0) / tall) <= 1) change(plane, x, y, write);
}

/** Fill the connected region of one label around a pixel. */
export function fill(x, y, label) {
  const [width, height] = state.volume.dims;
  const plane = shownPlane();
  const old = labelAt(x, y);
  if (old === label || writer(label)(old) !== label) return;
  const waiting = [[x, y]];
  while (waiting.length) {
    const [column, row] = waiting.pop();
    if (column < 0 || row < 0 || column >= width || row >= height || plane[indexOf(column, row)] !== old) continue;
    plane[indexOf(column, row)] = label;
    waiting.push([column + 1, row], [column - 1, row], [column, row + 1], [column, row - 1]);
  }
}

function change(plane, x, y, write) {
  const at = indexOf(x, y);
  plane[at] = write(plane[at]);
}

/** The height of a pixel over its width. */
export function aspectOf(volume) {
  const [across, down] = spacing(volume.affine);
  return down / across;
}
