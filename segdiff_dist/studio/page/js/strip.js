// All seeds that were painted, newest last: a press shows one.

import { $, element } from "./dom.js";
import { on, otherThanShown, state, announce } from "./state.js";

const SIDE = 72;

export function startStrip() {
  on("rounds progress", draw);
  on("mask volume", markEarlier);
}

function draw() {
  $("#strip").hidden = state.rounds.length === 0;
  const list = $("#strip-list");
  const focused = [...list.children].indexOf(document.activeElement);
  list.replaceChildren(...state.rounds.map(entry));
  list.children[focused]?.focus({ preventScroll: true });
  const shown = list.querySelector("[aria-pressed=true]");
  if (state.round !== draw.last && shown) list.scrollTo({ left: shown.offsetLeft - 40, behavior: "smooth" });
  draw.last = state.round;
  markEarlier();
}

/** Rounds of another mask or slice than the one that is shown now. */
function markEarlier() {
  const buttons = $("#strip-list").children;
  state.rounds.forEach((round, k) => {
    const other = otherThanShown(round);
    buttons[k]?.classList.toggle("earlier", other !== "");
    buttons[k]?.querySelector(".seed").setAttribute("data-other", other.replace(/^of (an )?/, ""));
  });
}

/** The earlier or later round. */
export function showNext(step) {
  const at = state.rounds.indexOf(state.round) + step;
  if (state.rounds[at]) show(state.rounds[at]);
}

function show(round) {
  state.round = round;
  $("#seed").value = round.seed;
  announce("rounds");
}

function entry(round) {
  const jobs = Object.values(round.jobs);
  const button = element(
    "button",
    { type: "button", className: "round", "aria-pressed": round === state.round, "data-seed": round.seed },
    element("span", { className: "pictures" }, ...jobs.map(thumbnail)),
    element("span", { className: "seed" }, `seed ${round.seed}`),
  );
  button.title = `seed ${round.seed}: ${jobs.map((job) => `${job.modality} ${job.status}`).join(", ")}`;
  button.addEventListener("click", () => show(round));
  return button;
}

function thumbnail(job) {
  if (!job.picture) {
    const part = job.steps ? job.step / job.steps : 0;
    const box = element("span", { className: `waiting ${job.status}` });
    const bar = element("progress", { max: 1, value: part, "aria-label": `${job.modality} ${job.status}` });
    if (["queued", "running"].includes(job.status)) box.append(bar);
    return box;
  }
  job.small ??= small(job);
  const canvas = element("canvas", { width: SIDE, height: SIDE });
  canvas.getContext("2d").drawImage(job.small, 0, 0);
  return canvas;
}

function small(job) {
  const canvas = element("canvas", { width: SIDE, height: SIDE });
  const { width, height } = job.picture;
  const scale = Math.min(SIDE / width, SIDE / height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(job.picture, (SIDE - width * scale) / 2, (SIDE - height * scale) / 2, width * scale, height * scale);
  return canvas;
}
