// Painting: a round is one seed, with a job for each modality.

import { paint } from "./api.js";
import { $, say } from "./dom.js";
import { fromBase64, labelFile, planeOf, readNifti } from "./nifti.js";
import { bodyId, modalities, state, announce } from "./state.js";
import { outlines, picture } from "./view.js";

const MOST_ROUNDS = 32;
let stopping = null;

export const isPainting = () => stopping !== null;
export const stop = () => stopping?.abort();

/** Paint the plane that is shown, with each of `seeds`. */
export async function paintSeeds(seeds) {
  if (isPainting() || !state.volume) return;
  const mask = planeOf(state.volume, state.plane);
  if (!mask.voxels.some(Boolean)) return say("The mask is empty: draw an organ, or the patient's outline, first.", { isError: true });
  stopping = new AbortController();
  try {
    // All as it is now: the mask may be drawn on while its file is packed.
    const rounds = seeds.map((seed) => newRound(seed, mask)).filter((round) => !isKnown(round));
    const maskBytes = await labelFile(mask);
    if (stopping.signal.aborted) return;
    rounds.forEach((round) => (round.maskBytes = maskBytes));
    state.rounds = [...state.rounds, ...rounds].slice(-MOST_ROUNDS);
    state.round = rounds[0] ?? state.round;
    announce("rounds", "progress");
    await Promise.all(rounds.flatMap((round) => Object.values(round.jobs).map((job) => run(job, round))));
  } catch (error) {
    say(`The image cannot be made: ${error.message}`, { isError: true });
  } finally {
    stopping = null;
    announce("rounds", "progress");
  }
}

function newRound(seed, mask) {
  const settings = settingsOf(seed);
  const jobs = Object.fromEntries(modalities().map((modality) => [modality, { modality, status: "queued", step: 0 }]));
  const { version, plane, opened, name, model } = state;
  return { seed, mask, settings, jobs, version, plane, opened, name, model };
}

/** The settings of the fields above the pictures. Throws Error. */
export function settingsOf(seed) {
  return { model: state.model.name, steps: numberOf("#steps"), guidance: numberOf("#guidance"), seed };
}

/** The seed of its field. Throws Error. */
export function chosenSeed() {
  const seed = numberOf("#seed");
  if (seed === null) throw new Error("seed: (not given): give a whole number from 0 on");
  return seed;
}

/** Whether the same images are there already: that round is shown instead. */
function isKnown(round) {
  const text = ({ settings, jobs, version }) => JSON.stringify([settings, Object.keys(jobs), version]);
  const isDone = ({ jobs }) => Object.values(jobs).every(({ status }) => status === "done");
  const same = state.rounds.find((one) => isDone(one) && one.plane === round.plane && text(one) === text(round));
  if (same) state.round = same;
  return same !== undefined;
}

/** The value of a field; null (the model's own) where it is empty. */
function numberOf(field) {
  const { value, validity, validationMessage, min, max } = $(field);
  // The value of a field that holds no number is empty.
  if (!validity.valid) throw new Error(`${field.slice(1)}: ${value || "no number"}: ${validationMessage} (${min} to ${max})`);
  return value === "" ? null : Number(value);
}

async function run(job, round) {
  const onEvent = (name, data) => {
    if (name === "progress") Object.assign(job, { status: "running", step: data.step, steps: data.steps });
    if (name === "queued") Object.assign(job, { status: "queued", position: data.position });
    announce("progress");
  };
  try {
    const settings = { ...round.settings, modality: job.modality };
    const answer = await paint(round.maskBytes, settings, { signal: stopping.signal, onEvent });
    await finish(job, round, answer);
  } catch (error) {
    job.status = error.name === "AbortError" ? "stopped" : "failed";
    job.error = job.status === "stopped" ? "" : error.message;
    if (job.error) say(`${job.modality}: ${job.error}`, { isError: true });
  }
  announce("rounds", "progress");
}

async function finish(job, round, answer) {
  job.bytes = fromBase64(answer.image);
  const image = await readNifti(job.bytes);
  const prediction = answer.prediction ? await readNifti(fromBase64(answer.prediction)) : null;
  const [width, height] = image.dims;
  const [low, high] = (answer.hu && round.model.hu_range) || [0, 255];
  const grey = (voxel) => {
    const value = Math.min(255, Math.max(0, ((image.voxels[voxel] - low) / (high - low)) * 255));
    return 0xff000000 | (Math.round(value) * 0x010101);
  };
  Object.assign(job, {
    status: "done",
    image,
    isHU: answer.hu,
    dice: answer.dice,
    seconds: answer.seconds,
    notes: answer.notes ?? [],
    picture: picture(width, height, grey),
    edges: prediction ? outlines(prediction.voxels, width, height, [bodyId()]) : [],
  });
}
