// Start: the models, the masks to begin with, and what the buttons below the pictures do.

import { getModels } from "./api.js";
import { $, element, say } from "./dom.js";
import { startEditor } from "./editor.js";
import { startFiles } from "./files.js";
import { startKeys } from "./keys.js";
import { listStarts, startRail } from "./rail.js";
import { startResults } from "./results.js";
import { chosenSeed, isPainting, paintSeeds, stop } from "./rounds.js";
import { modalities, on, state, announce } from "./state.js";
import { startStrip } from "./strip.js";
import { startVolume } from "./volume.js";

const SEEDS = 4;

function startPaintBar() {
  $("#paint").addEventListener("click", () => (isPainting() ? stop() : paintAndShow(1)));
  $("#four").addEventListener("click", () => paintAndShow(SEEDS));
  $("#dice").addEventListener("click", () => ($("#seed").value = Math.floor(Math.random() * 100_000)));
  for (const name of ["outlines", "underlay"])
    $(`#${name}`).addEventListener("click", () => {
      state[name] = !state[name];
      $(`#${name}`).setAttribute("aria-pressed", state[name]);
      announce("options");
    });
  on("progress rounds options model", updatePaint);
}

/** On a small screen the results are below what is seen. */
function paintAndShow(number) {
  try {
    const seed = chosenSeed();
    paintSeeds(Array.from({ length: number }, (_, k) => seed + k));
  } catch (error) {
    return say(error.message, { isError: true });
  }
  if ($("#results").getBoundingClientRect().top > innerHeight * 0.8) $("#results").scrollIntoView({ behavior: "smooth", block: "center" });
}

function updatePaint() {
  $("#paint-text").textContent = isPainting() ? "Stop" : `Paint ${modalities().join(" and ")}`;
  $("#paint-key").textContent = isPainting() ? "Esc" : "Enter";
  $("#paint").classList.toggle("running", isPainting());
  $("#four").disabled = isPainting();
}

function listModalities() {
  const each = state.model.modalities;
  const choices = each.length > 1 ? [["", each.length === 2 ? each.join(" + ") : "all"], ...each.map((one) => [one, one])] : [];
  const buttons = choices.map(([modality, text], k) => {
    const button = element("button", { type: "button", "aria-pressed": k === 0, "data-modality": modality }, text);
    button.addEventListener("click", () => {
      buttons.forEach((one) => one.setAttribute("aria-pressed", one === button));
      if (!isPainting()) state.round = null;
      announce("options", "rounds");
    });
    return button;
  });
  $("#modalities").replaceChildren(...buttons);
}

function useModel(model) {
  stop();
  state.model = model;
  state.rounds = [];
  state.round = null;
  $("#about").textContent = [model.synthetic, model.licence && `Licence: ${model.licence}`].filter(Boolean).join(" ");
  Object.assign($("#steps"), { value: model.steps, placeholder: model.steps });
  Object.assign($("#guidance"), { value: model.guidance, placeholder: model.guidance });
  listModalities();
  announce("model", "rounds", "options");
}

async function start() {
  [startEditor, startResults, startRail, startStrip, startFiles, startKeys, startVolume, startPaintBar].forEach((each) => each());
  try {
    state.models = await getModels();
  } catch (error) {
    return say(error.message, { isError: true, actions: [["Try again", () => location.reload()]] });
  }
  const chooser = $("#model");
  chooser.replaceChildren(...state.models.map(({ name }) => element("option", { value: name }, name)));
  chooser.addEventListener("change", async () => {
    useModel(state.models.find(({ name }) => name === chooser.value));
    await listStarts();
  });
  const first = state.models.find((one) => one.default) ?? state.models[0];
  chooser.value = first.name;
  useModel(first);
  await listStarts();
  document.body.dataset.ready = "yes";
}

start();
