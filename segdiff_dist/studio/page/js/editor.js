// The mask: drawing with a mouse, a pen, a finger or by keys (pen.js); two fingers move and enlarge the picture.

import { $, shown } from "./dom.js";
import { begin, disc, ellipse, end, eraserFor, fill, labelAt, line, aspectOf, undo, writer } from "./mask.js";
import { startPen } from "./pen.js";
import { labelOf, on, shownPlane, state, announce } from "./state.js";
import { outlines, picture, View, wordOf } from "./view.js";

const UNDERLAY_ALPHA = 110;
let view = null;
let drawn = null; // the mask as a picture
let stroke = null; // what the pointer that is down does
const fingers = new Map();

export function startEditor() {
  const canvas = $("#mask-canvas");
  view = new View(canvas, paint);
  for (const [name, act] of Object.entries({ pointerdown: down, pointermove: move, pointerup: up, pointercancel: cancel }))
    canvas.addEventListener(name, act);
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  startPen(view, { isDrawing: () => stroke !== null, begin: beginStroke, drag, end: endStroke, cancel: finish });
  on("volume", leave);
  on("volume mask model options rounds", redraw);
  on("camera pointer tool", () => view.request());
  on("pointer mask volume", readOut);
}

function redraw() {
  if (!state.volume || !state.model) return;
  const [width, height] = state.volume.dims;
  const image = state.underlay ? shownImage() : null;
  const colours = new Uint32Array(256);
  for (const { id, color } of state.model.labels) colours[id] = id === 0 ? 0 : wordOf(color, image ? UNDERLAY_ALPHA : 255);
  const plane = shownPlane();
  drawn = picture(width, height, (voxel) => colours[plane[voxel]], drawn);
  view.setSize(width, height, aspectOf(state.volume));
  view.underlay = image;
  view.edges = outlines(plane, width, height, []);
  view.request();
}

/** The first finished image of the shown round, if it is of this mask and slice. */
function shownImage() {
  const { round } = state;
  if (!round || round.opened !== state.opened || round.plane !== state.plane) return null;
  return Object.values(round.jobs).find((one) => one.image)?.picture ?? null;
}

function paint(context, { scale, width, height }) {
  if (!drawn) return;
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingEnabled = true;
  if (view.underlay) context.drawImage(view.underlay, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(drawn, 0, 0);
  context.lineWidth = (window.devicePixelRatio || 1) / scale;
  context.strokeStyle = "#0006";
  for (const [, path] of view.edges) context.stroke(path);
  view.drawCross(context);
  drawTool(context);
}

function drawTool(context) {
  const ratio = window.devicePixelRatio || 1;
  const colour = state.tool === "erase" ? "#fff" : (labelOf(state.label)?.color ?? "#fff");
  const ring = (x, y, across, down) => {
    for (const [width, ink] of [[3, "#000a"], [1.5, colour]]) {
      context.beginPath();
      context.ellipse(x, y, across, down, 0, 0, 2 * Math.PI);
      context.lineWidth = (width * ratio) / view.scale;
      context.strokeStyle = ink;
      context.stroke();
    }
  };
  if (stroke?.box) {
    const { from, to } = stroke.box;
    ring((from.x + to.x) / 2, (from.y + to.y) / 2, Math.abs(to.x - from.x) / 2, Math.abs(to.y - from.y) / 2);
  } else if (view.cursor && ["brush", "erase"].includes(state.tool)) {
    ring(view.cursor.x, view.cursor.y, state.size / 2, state.size / 2 / view.aspect);
  }
}

function down(event) {
  if (!state.volume) return;
  view.canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, event);
  if (fingers.size === 2) return beginPinch();
  if (fingers.size > 2) return;
  if (event.button === 1 || event.button === 2 || event.shiftKey) {
    stroke = { pan: event };
    return;
  }
  const at = view.at(event);
  if (event.altKey) return pick(Math.floor(at.x), Math.floor(at.y));
  beginStroke(at);
}

function beginStroke(at) {
  const [x, y] = [Math.floor(at.x), Math.floor(at.y)];
  begin();
  stroke = { last: at };
  if (state.tool === "ellipse") stroke.box = { from: at, to: at };
  else if (state.tool === "fill") {
    if (labelAt(x, y) !== state.label) fill(x, y, state.label);
    finish();
  } else {
    stroke.write = state.tool === "erase" ? eraserFor(x, y) : writer(state.label);
    disc(at.x, at.y, state.size / 2, stroke.write);
    announce("mask");
  }
}

/** Take the organ under the pointer. */
function pick(x, y) {
  const label = labelAt(x, y);
  if (label) state.label = label;
  announce("tool");
}

function move(event) {
  view.cursor = view.at(event);
  if (fingers.has(event.pointerId)) {
    const old = fingers.get(event.pointerId);
    fingers.set(event.pointerId, event);
    if (fingers.size === 2) return pinch(old, event);
  }
  if (stroke?.pan) {
    view.move(stroke.pan, event);
    stroke.pan = event;
  } else if (stroke?.box) {
    stroke.box.to = squared(stroke.box.from, view.at(event), event.ctrlKey);
  } else if (stroke?.write) {
    for (const each of event.getCoalescedEvents?.() ?? [event]) follow(view.at(each));
    announce("mask");
  }
  view.point(event);
}

/** The same by keys, without circles. */
function drag(at) {
  if (stroke.box) stroke.box.to = at;
  else if (stroke.write) follow(at);
  announce("mask");
}

function follow(at) {
  line(stroke.last, at, state.size / 2, stroke.write);
  stroke.last = at;
}

/** The corner of a circle's box, if it is to be one. */
function squared(from, to, isCircle) {
  if (!isCircle) return to;
  const side = Math.max(Math.abs(to.x - from.x), Math.abs(to.y - from.y));
  return { x: from.x + Math.sign(to.x - from.x) * side, y: from.y + Math.sign(to.y - from.y) * side };
}

function up(event) {
  fingers.delete(event.pointerId);
  endStroke();
  if (event.pointerType !== "mouse") {
    view.cursor = null;
    view.request();
  }
}

function endStroke() {
  if (stroke?.box) {
    const { from, to } = stroke.box;
    const [left, right] = [from.x, to.x].sort((a, b) => a - b);
    const [top, bottom] = [from.y, to.y].sort((a, b) => a - b);
    ellipse(left, top, right, bottom, state.label);
  }
  finish();
}

function finish() {
  if (stroke && !stroke.pan && !stroke.pinch) end();
  stroke = null;
  announce("mask");
}

/** Another mask or slice is shown: what is drawn ends with the one that it was begun on. */
function leave() {
  if (!stroke || stroke.pan || stroke.pinch) return;
  stroke = null;
  end();
}

function cancel(event) {
  fingers.delete(event.pointerId);
  finish();
}

/** A second finger: what the first one drew so far was not meant. */
function beginPinch() {
  if (stroke && !stroke.pan) {
    const version = state.version;
    end();
    if (state.version !== version) undo();
  }
  stroke = { pinch: true };
}

function pinch(old, event) {
  const [other] = [...fingers.values()].filter((one) => one.pointerId !== event.pointerId);
  const length = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
  const middle = (one) => ({ clientX: (one.clientX + other.clientX) / 2, clientY: (one.clientY + other.clientY) / 2 });
  view.move(middle(old), middle(event), length(event) / length(old));
}

function readOut() {
  const at = state.pointer;
  const label = at && state.volume ? labelOf(labelAt(at.x, at.y)) : null;
  $("#mask-readout").textContent = label ? shown(label.name) : "";
  if (!at) view.cursor = null;
}
