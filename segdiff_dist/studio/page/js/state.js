// What the page shows, in one object, and who wants to know of changes.

export const state = {
  models: [],
  model: null, // of GET /models
  volume: null, // the mask: {dims, affine, voxels}, canonical (right, anterior, superior), model's ids
  plane: 0, // the axial slice that is shown
  name: "mask", // for file names
  version: 0, // counts changes of the mask
  opened: 0, // counts masks that were begun or opened
  label: 0,
  tool: "brush",
  size: 12, // of the brush, in pixels
  protects: false, // whether tools leave other organs as they are
  underlay: false, // whether the image is shown below the mask
  outlines: true, // whether the segmenter's outlines are shown
  pointer: null, // {x, y} in pixels of the picture, shared by all views
  rounds: [], // one for each seed that was painted, newest last
  round: null, // the one that is shown
};

const bus = new EventTarget();

/** Call `listener` when one of `names` is announced: model, volume, mask, tool, options, pointer, rounds, progress. */
export function on(names, listener) {
  for (const name of names.split(" ")) bus.addEventListener(name, () => listener());
}

export function announce(...names) {
  for (const name of names) bus.dispatchEvent(new Event(name));
}

/** The ids of background and of the patient's outline (null: the model has none). */
export const bodyId = () => state.model?.labels.find((one) => one.name === "body")?.id ?? null;
export const labelOf = (id) => state.model?.labels.find((one) => one.id === id);
export const modalities = () => {
  const chosen = document.querySelector("#modalities [aria-pressed=true]")?.dataset.modality;
  return chosen ? [chosen] : (state.model?.modalities ?? []);
};

/** A plane of the mask: a view into it. */
export function planeAt(plane) {
  const [width, height] = state.volume.dims;
  const length = width * height;
  return state.volume.voxels.subarray(plane * length, (plane + 1) * length);
}

/** The plane that is shown. */
export const shownPlane = () => planeAt(state.plane);

/** Why a round is not of what is shown now: words, or nothing. */
export function otherThanShown(round) {
  if (round.version !== state.version) return "of an earlier mask";
  return round.plane === state.plane ? "" : `of slice ${round.plane + 1}`;
}
