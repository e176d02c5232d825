// Drawing by keys: with the focus on the mask, arrows move a cursor, and Space is what pressing a pointer is.

import { $ } from "./dom.js";
import { state, announce } from "./state.js";

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEPS_A_BRUSH = 4;
let view = null;
let tool = null; // {isDrawing, begin(at), drag(at), end, cancel} of the editor
let at = null; // in pixels of the picture, the middle of one
let isOn = false; // after a click arrows still choose seeds
let held = null; // while Space is down: whether the cursor moved

export function startPen(ownView, ownTool) {
  [view, tool] = [ownView, ownTool];
  view.canvas.addEventListener("focus", () => view.canvas.matches(":focus-visible") && turnOn());
  view.canvas.addEventListener("blur", turnOff);
  view.canvas.addEventListener("pointerdown", () => (isOn = false));
  view.canvas.addEventListener("keydown", press);
  view.canvas.addEventListener("keyup", release);
}

/** Show the cursor. */
export function drawByKeys() {
  $("#mask-canvas").focus();
  turnOn();
}

function turnOn() {
  if (!state.volume) return;
  isOn = true;
  const [width, height] = state.volume.dims;
  moveTo(at ?? { x: width / 2, y: height / 2 });
}

function turnOff() {
  if (!isOn) return;
  isOn = false;
  held = null;
  if (tool.isDrawing()) tool.cancel();
  state.pointer = view.cursor = null;
  announce("pointer");
}

function moveTo({ x, y }) {
  const [width, height] = state.volume.dims;
  const within = (value, side) => Math.min(side - 1, Math.max(0, Math.floor(value))) + 0.5;
  at = { x: within(x, width), y: within(y, height) };
  view.cursor = at;
  view.reveal(at);
  state.pointer = { x: Math.floor(at.x), y: Math.floor(at.y), canvas: null }; // a cross in all pictures
  announce("pointer");
}

function press(event) {
  if (!state.volume || event.ctrlKey || event.metaKey || event.altKey) return;
  const move = isOn && MOVES[event.key];
  if (event.key !== " " && !move) {
    if (held === null && !["Shift", "Tab"].includes(event.key) && tool.isDrawing()) tool.cancel();
    return;
  }
  event.preventDefault();
  event.stopPropagation(); // arrows choose no seed here
  if (move) return step(move, event.shiftKey);
  if (event.repeat) return;
  if (!isOn) return turnOn(); // after a click nobody knows where it would draw
  if (tool.isDrawing()) return tool.end();
  tool.begin(at);
  held = false;
}

function step([across, down], isFine) {
  const pixels = isFine ? 1 : Math.max(1, Math.round(state.size / STEPS_A_BRUSH));
  moveTo({ x: at.x + across * pixels, y: at.y + down * pixels });
  if (tool.isDrawing()) tool.drag(at);
  if (held === false) held = true;
}

/** An ellipse that was begun without moving waits for its other corner: Space again. */
function release(event) {
  if (event.key !== " " || held === null) return;
  event.preventDefault();
  if (tool.isDrawing() && (held || state.tool !== "ellipse")) tool.end();
  held = null;
}
