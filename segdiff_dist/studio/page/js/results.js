// The finished images of the shown round, side by side.

import { $, element, shown } from "./dom.js";
import { downloadDicom, downloadNifti, downloadPng } from "./files.js";
import { aspectOf } from "./mask.js";
import { labelOf, modalities, on, otherThanShown, state } from "./state.js";
import { View } from "./view.js";

const KINDS = [["PNG", downloadPng], ["NIfTI", downloadNifti], ["DICOM", downloadDicom]];
// Those of the reports (segdiff_dist/evaluation/report/figure_style.py).
const COLOURS = { CT: "#2b6cb0", MR: "#b7791f" };
let panels = [];

export function startResults() {
  on("model options", rebuild);
  on("rounds progress volume mask", rebuild);
  on("camera pointer", () => panels.forEach((panel) => panel.view.request()));
  on("pointer", () => panels.forEach(readOut));
}

/** One panel for each modality that the shown round has, or the next one will have. */
function rebuild() {
  const wanted = state.round ? Object.keys(state.round.jobs) : modalities();
  if (panels.map((panel) => panel.modality).join() !== wanted.join()) {
    panels = wanted.map(newPanel);
    $("#results").replaceChildren(...panels.map((panel) => panel.root));
    $("#results").dataset.number = wanted.length;
  }
  panels.forEach(show);
}

function newPanel(modality) {
  const panel = {
    modality,
    canvas: element("canvas", { role: "img", "aria-label": `generated ${modality} image`, "data-modality": modality }),
    readout: element("output", { className: "readout", "aria-live": "off" }),
    empty: element("p", { className: "empty" }),
    bar: element("progress", { max: 1, value: 0, "aria-label": `progress of ${modality}` }),
    dice: element("ul", { className: "dice", "aria-label": "Dice of each organ" }),
    note: element("p", { className: "note" }),
    remark: element("p", { className: "remark" }),
    files: element("div", { className: "files" }),
  };
  const dot = element("span", { className: "dot" });
  dot.style.background = COLOURS[modality] ?? "#0e7c86";
  for (const [kind, download] of KINDS) {
    const name = `Download ${modality} as ${kind}`;
    const button = element("button", { type: "button", className: "quiet", title: name, "aria-label": name }, kind);
    button.addEventListener("click", () => download(state.round, state.round.jobs[modality]));
    panel.files.append(button);
  }
  const head = element("header", {}, dot, element("h2", {}, modality), element("small", {}, "synthetic"), panel.readout);
  const stage = element("div", { className: "stage" }, panel.canvas, panel.empty, panel.bar);
  const foot = element("div", { className: "foot" }, panel.note, panel.files, panel.remark);
  panel.root = element("figure", { className: "panel", "data-panel": modality }, head, stage, foot, panel.dice);
  panel.view = new View(panel.canvas, (context, view) => draw(context, view, panel));
  panel.canvas.addEventListener("pointermove", (event) => panel.view.point(event));
  panel.canvas.addEventListener("pointerdown", (event) => panel.view.point(event));
  return panel;
}

const jobOf = (panel) => state.round?.jobs[panel.modality];

function show(panel) {
  const job = jobOf(panel);
  const isDone = job?.status === "done";
  panel.root.dataset.status = job?.status ?? "none";
  panel.files.hidden = !isDone;
  panel.bar.hidden = !["queued", "running"].includes(job?.status);
  panel.bar.value = job?.steps ? job.step / job.steps : 0;
  panel.empty.textContent = isDone ? "" : words(job);
  panel.note.textContent = isDone ? aboutImage(job) : "";
  panel.remark.textContent = isDone ? job.notes.filter((note) => !note.startsWith("labels: by the model's table")).join(" ") : "";
  if (panel.listed !== job?.dice) panel.dice.replaceChildren(...chips(job?.dice));
  panel.listed = job?.dice;
  if (isDone) panel.view.setSize(job.image.dims[0], job.image.dims[1], aspectOf(state.round.mask));
  panel.view.request();
}

function words(job) {
  if (!job) return "Press Paint";
  if (job.status === "running") return `step ${job.step} of ${job.steps}`;
  if (job.status === "queued") return job.position > 1 ? `waiting, place ${job.position}` : "waiting";
  return job.status === "failed" ? job.error : "stopped";
}

function aboutImage(job) {
  const parts = [`seed ${state.round.seed}`, `${job.seconds.toFixed(1)} s`, otherThanShown(state.round)];
  return parts.filter(Boolean).join(" · ");
}

/** Organs with their Dice, by name. Low ones are marked by words too, not only by colour. */
function chips(dice) {
  if (!dice) return [];
  return Object.entries(dice).filter(([, value]) => Number.isFinite(value)).map(([name, value]) => {
    const dot = element("span", { className: "dot" });
    dot.style.background = state.model.labels.find((one) => one.name === name)?.color ?? "#888";
    return element("li", { className: value < 0.5 ? "low" : "" }, dot, element("span", {}, shown(name)), element("b", {}, value.toFixed(2)));
  });
}

function draw(context, view, panel) {
  const job = jobOf(panel);
  if (!job?.picture) return;
  context.imageSmoothingEnabled = view.scale < 4 * (window.devicePixelRatio || 1);
  context.drawImage(job.picture, 0, 0);
  if (state.outlines) {
    context.lineWidth = (1.6 * (window.devicePixelRatio || 1)) / view.scale;
    for (const [label, path] of job.edges) {
      context.strokeStyle = labelOf(label)?.color ?? "#fff";
      context.stroke(path);
    }
  }
  view.drawCross(context);
}

/** HU or the grey value under the pointer, and the organ of the mask that the image was made of. */
function readOut(panel) {
  const [job, at] = [jobOf(panel), state.pointer];
  if (!job?.image || !at || at.x >= job.image.dims[0] || at.y >= job.image.dims[1]) return void (panel.readout.textContent = "");
  const voxel = job.image.dims[0] * job.image.dims[1] - 1 - (at.x + job.image.dims[0] * at.y);
  const value = Math.round(job.image.voxels[voxel]);
  const name = labelOf(state.round.mask.voxels[voxel])?.name ?? "";
  panel.readout.textContent = `${job.isHU ? `${value} HU` : `grey ${value}`} · ${shown(name)}`;
}
