// A canvas that shows a picture, with a camera that all views share: what is compared stays side by side.

import { state, announce } from "./state.js";

const MOST_ZOOM = 12;

/** `x`, `y`: the point of the picture in the middle, of its sides. */
export const camera = { zoom: 1, x: 0.5, y: 0.5 };

export function resetCamera() {
  Object.assign(camera, { zoom: 1, x: 0.5, y: 0.5 });
  announce("camera");
}

export class View {
  /** `paint(context, view)` draws in pixels of the picture; `view.scale` is that of one in the canvas. */
  constructor(canvas, paint) {
    this.canvas = canvas;
    this.paint = paint;
    this.width = this.height = 1;
    this.aspect = 1;
    new ResizeObserver(() => this.request()).observe(canvas);
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("pointerleave", () => this.point(null));
  }

  setSize(width, height, aspect) {
    Object.assign(this, { width, height, aspect });
  }

  /** Draw at the next frame. */
  request() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.#draw();
    });
  }

  #draw() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth * ratio, this.canvas.clientHeight * ratio].map(Math.round);
    if (!width || !height) return;
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    this.scale = Math.min(width / this.width, height / (this.height * this.aspect)) * camera.zoom;
    const [x, y] = [camera.x * this.width, camera.y * this.height];
    context.setTransform(
      this.scale, 0, 0, this.scale * this.aspect,
      width / 2 - x * this.scale, height / 2 - y * this.scale * this.aspect,
    );
    this.toCanvas = context.getTransform();
    this.paint(context, this);
  }

  /** Where an event is, in pixels of the picture. */
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / box.width;
    const back = (this.toCanvas ?? new DOMMatrix()).inverse();
    const point = back.transformPoint({ x: (event.clientX - box.left) * ratio, y: (event.clientY - box.top) * ratio });
    return { x: point.x, y: point.y };
  }

  /** Move the camera to a point of the picture that is not seen. */
  reveal({ x, y }) {
    const point = this.toCanvas?.transformPoint({ x, y });
    if (!point || (point.x >= 0 && point.y >= 0 && point.x < this.canvas.width && point.y < this.canvas.height)) return;
    camera.x = limited(x / this.width, camera.zoom);
    camera.y = limited(y / this.height, camera.zoom);
    announce("camera");
  }

  /** Where the pointer is, for all views. */
  point(event) {
    const at = event && this.at(event);
    const isInside = at && at.x >= 0 && at.y >= 0 && at.x < this.width && at.y < this.height;
    state.pointer = isInside ? { x: Math.floor(at.x), y: Math.floor(at.y), canvas: this.canvas } : null;
    announce("pointer");
  }

  /** Move the camera so that what was at `from` is at `to` (events), and is `times` as large. */
  move(from, to, times = 1) {
    const point = this.at(from);
    const zoom = Math.min(MOST_ZOOM, Math.max(1, camera.zoom * times));
    const there = this.at(to);
    const change = camera.zoom / zoom;
    const keep = (middle, side, old, now) => limited((old - (now - middle * side) * change) / side, zoom);
    camera.x = keep(camera.x, this.width, point.x, there.x);
    camera.y = keep(camera.y, this.height, point.y, there.y);
    camera.zoom = zoom;
    announce("camera");
  }

  #wheel(event) {
    if (!event.ctrlKey && !event.altKey && this.canvas.dataset.wheel !== "zoom") return;
    event.preventDefault();
    this.move(event, event, Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)));
  }

  /** A small cross where the pointer is in another view. */
  drawCross(context) {
    const at = state.pointer;
    if (!at || at.canvas === this.canvas) return;
    const [x, y, arm] = [at.x + 0.5, at.y + 0.5, 7 / this.scale];
    for (const [width, colour] of [[3, "#0009"], [1.2, "#fff"]]) {
      context.beginPath();
      context.moveTo(x - arm, y);
      context.lineTo(x + arm, y);
      context.moveTo(x, y - arm / this.aspect);
      context.lineTo(x, y + arm / this.aspect);
      context.lineWidth = (width * (window.devicePixelRatio || 1)) / this.scale;
      context.strokeStyle = colour;
      context.stroke();
    }
  }
}

/** At zoom 1 the picture stays in the middle; larger, its edge stays at the canvas' edge. */
function limited(middle, zoom) {
  const margin = 0.5 / zoom;
  return Math.min(1 - margin, Math.max(margin, middle));
}

/** A canvas of `width` x `height` whose pixel (x, y) has the colour that `rgba(index)` gives for its voxel. */
export function picture(width, height, rgba, kept = null) {
  const canvas = kept ?? Object.assign(document.createElement("canvas"), { width, height });
  Object.assign(canvas, canvas.width === width && canvas.height === height ? {} : { width, height });
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  for (let pixel = 0, voxel = words.length - 1; voxel >= 0; pixel++, voxel--) words[pixel] = rgba(voxel);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Colours of the labels as words of ImageData: ABGR, as all browsers' machines are little-endian. */
export function wordOf(colour, alpha = 255) {
  const value = Number.parseInt(colour.slice(1), 16);
  return ((alpha << 24) | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
}

/** The borders of each label but those of `without`: [[label, Path2D]], in pixels of the picture. */
export function outlines(labels, width, height, without) {
  const paths = new Map();
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : labels[width * height - 1 - (x + width * y)]);
  const edge = (label, other, x0, y0, x1, y1) => {
    if (label === other || without.includes(label)) return;
    if (!paths.has(label)) paths.set(label, new Path2D());
    paths.get(label).moveTo(x0, y0);
    paths.get(label).lineTo(x1, y1);
  };
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const label = at(x, y);
      if (label === 0) continue;
      edge(label, at(x - 1, y), x, y, x, y + 1);
      edge(label, at(x + 1, y), x + 1, y, x + 1, y + 1);
      edge(label, at(x, y - 1), x, y, x + 1, y);
      edge(label, at(x, y + 1), x, y + 1, x + 1, y + 1);
    }
  return [...paths];
}
