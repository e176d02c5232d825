// Keyboard: one table, which the help sheet shows too.

import { $, element } from "./dom.js";
import { redo, undo } from "./mask.js";
import { drawByKeys } from "./pen.js";
import { chooseLabel, chooseTool, resize, showPlane } from "./rail.js";
import { stop } from "./rounds.js";
import { state } from "./state.js";
import { showNext } from "./strip.js";
import { resetCamera } from "./view.js";

const press = (id) => () => $(id).hidden || $(id).click();
// [shown keys, meaning, keys as the browser names them, action]
const KEYS = [
  ["Enter", "paint", ["Enter"], press("#paint")],
  ["B", "brush", ["b"], () => chooseTool("brush")],
  ["E", "erase", ["e"], () => chooseTool("erase")],
  ["F", "fill a region", ["f"], () => chooseTool("fill")],
  ["L", "ellipse (with Ctrl: circle)", ["l"], () => chooseTool("ellipse")],
  ["[  ]", "smaller, larger brush", ["[", "]"], (key) => resize(key === "[" ? -2 : 2)],
  ["1 … 9", "an organ of the list", [..."123456789"], (key) => organ(Number(key))],
  ["K", "draw by keys: a cursor on the mask", ["k"], drawByKeys],
  ["P", "protect other organs", ["p"], press("#protect")],
  ["Z", "undo (also Ctrl+Z)", ["z"], undo],
  ["Y", "redo (also Ctrl+Shift+Z)", ["y"], redo],
  ["R", "a random seed", ["r"], press("#dice")],
  ["D", "four seeds", ["d"], press("#four")],
  ["← →", "earlier, later seed", ["ArrowLeft", "ArrowRight"], (key) => showNext(key === "ArrowLeft" ? -1 : 1)],
  ["O", "outlines of the segmenter", ["o"], press("#outlines")],
  ["V", "the volume, of several slices", ["v"], press("#volume")],
  ["U", "the mask over the image", ["u"], press("#underlay")],
  [",  .", "the slice below, above", [",", "."], (key) => showPlane(state.plane + (key === "," ? -1 : 1))],
  ["0", "whole picture", ["0"], resetCamera],
  ["Esc", "stop painting", ["Escape"], stop],
  ["?", "this sheet", ["?"], press("#help")],
];
const OTHERS = [
  ["Arrows", "on the mask after K or Tab: move the cursor; with Shift by a pixel"],
  ["Space", "there: draw; held with arrows: draw a line, an ellipse"],
  ["Ctrl + wheel", "enlarge; two fingers on a touch screen"],
  ["Shift + drag", "move; also the right button"],
  ["Alt + press", "take the organ under the pointer"],
];

function organ(number) {
  const button = document.querySelectorAll("#organs button")[number - 1];
  if (button) chooseLabel(Number(button.dataset.label));
}

export function startKeys() {
  addEventListener("keydown", (event) => {
    const isWriting = event.target.matches?.("input:not([type=range]):not([type=checkbox]), select, textarea");
    const paintsFromField = ["Enter", "Escape"].includes(event.key) && event.target.matches?.(".paint-bar input");
    if ((isWriting && !paintsFromField) || document.querySelector("dialog[open]")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (event.ctrlKey || event.metaKey) {
      if (key !== "z" && key !== "y") return;
      event.preventDefault();
      return void (key === "y" || event.shiftKey ? redo() : undo());
    }
    if (event.altKey || (key === "Enter" && event.target.matches?.("button"))) return;
    const found = KEYS.find(([, , keys]) => keys.includes(key));
    if (!found || (!state.volume && key !== "?")) return;
    if (event.repeat && key === "Enter") return; // held, it would paint and stop in turns
    if (event.target.matches?.("input[type=range]") && key.startsWith("Arrow")) return;
    event.preventDefault();
    found[3](key);
  });
  const rows = [...KEYS, ...OTHERS].map(([keys, meaning]) => [element("dt", {}, element("kbd", {}, keys)), element("dd", {}, meaning)]);
  $("#keys").replaceChildren(...rows.flat());
  $("#help").addEventListener("click", () => $("#sheet").showModal());
  $("#sheet").addEventListener("click", (event) => event.target === $("#sheet") && $("#sheet").close());
}
