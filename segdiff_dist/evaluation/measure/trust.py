"""Checks beside the metrics: copies of training images, differences between images of one mask, and patients that are
in two splits.

Tasks here run on the workers of measure/worker.py. Dimensions: B batch, Q queries, N training images,
D features, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.feed.order import sample_at
from segdiff_dist.evaluation.metrics import similarity
from segdiff_dist.evaluation.metrics.columns import SIDES
from segdiff_dist.evaluation.metrics.feature_sets import nearest

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.store.shards import ShardSet
    from segdiff_dist.evaluation.measure.worker import Evaluator

SPACES = ("segmenter", "pixels")
# An image is near to training where fewer than this share of unseen real images are nearer.
_QUANTILE = 0.01
# The third space, segdiff_dist.evaluation.measure.copies. It decides alone, so its limit is lower.
COPIES = "copies"
_COPY_SHARE = 0.9
# At most this many images of one mask are compared in pairs: 28 pairs.
_MOST_IMAGES = 8
# Pixel space is the image as means over a grid of this side: shifts and noise of one or two pixels do not count.
_SMALL_SIDE = 32
_MOST_LISTED = 50


@dataclass(frozen=True)
class Spread:
    """How much images of one mask differ: similarity.pixel_std over all, and means over pairs of the first eight."""

    pixel_std: float
    pairwise_ssim: float = float("nan")
    pairwise_ms_ssim: float = float("nan")
    pairwise_feature_distance: float = float("nan")


@dataclass(frozen=True)
class ImagesOfAMask:
    """A worker's task: the spread of these items, which are of one mask and modality."""

    ids: tuple[int, ...]

    def run(self, evaluator: Evaluator) -> Spread:
        """MS-SSIM is left out (NaN) where the images are too small for it; feature distances are the segmenter's."""
        images_BHW = np.stack([np.asarray(evaluator.store.image[i]) for i in self.ids])
        pixel_std = similarity.pixel_std(images_BHW, np.asarray(evaluator.store.mask[self.ids[0]]))
        few_BHW = evaluator.on_device(images_BHW[:_MOST_IMAGES])
        pairs = np.array(list(combinations(range(len(few_BHW)), 2)))
        first, second = few_BHW[pairs[:, 0]], few_BHW[pairs[:, 1]]
        ms_ssim = np.array([np.nan])
        if min(images_BHW.shape[1:]) >= similarity.MS_SSIM_SMALLEST_SIDE:
            ssim, ms_ssim = similarity.ssim_and_ms_ssim(first, second)
        else:
            ssim = similarity.ssim(first, second)
        if not evaluator.has_features:
            return Spread(pixel_std, float(ssim.mean()), float(ms_ssim.mean()))
        features_BD = evaluator.features(few_BHW, self.ids[:_MOST_IMAGES])
        distance = np.linalg.norm(features_BD[pairs[:, 0]] - features_BD[pairs[:, 1]], axis=1)
        return Spread(pixel_std, float(ssim.mean()), float(ms_ssim.mean()), float(distance.mean()))


def images_of_masks(items: pa.Table) -> list[ImagesOfAMask]:
    """The masks that have several images in their own modality."""
    names = ("row", "seed_index", "source_modality", "target_modality")
    row, seed_index, source, target = (items[name].to_numpy() for name in names)
    own = np.flatnonzero(source == target)
    # By mask, and within a mask by seed.
    own = own[np.lexsort((seed_index[own], row[own]))]
    several = np.split(own, np.flatnonzero(np.diff(row[own])) + 1)
    return [ImagesOfAMask(tuple(ids.tolist())) for ids in several if len(ids) >= 2]


@dataclass(frozen=True)
class Queries:
    """A worker's task: the points of items' generated images in each space; float32 [B, D] by (space, side)."""

    ids: tuple[int, ...]

    def run(self, evaluator: Evaluator) -> dict[tuple[str, str], np.ndarray]:
        """The generated side alone."""
        images_BHW = np.stack([np.asarray(evaluator.store.image[i]) for i in self.ids])
        features_BD = evaluator.features(evaluator.on_device(images_BHW), self.ids)
        return {("segmenter", "gen"): features_BD, ("pixels", "gen"): downscaled(images_BHW)}


@dataclass(frozen=True)
class UnseenQueries:
    """A worker's task: the same for these real slices of the shard set."""

    rows: tuple[int, ...]

    def run(self, evaluator: Evaluator) -> dict[tuple[str, str], np.ndarray]:
        """The real side alone."""
        return {(space, "real"): points for space, points in _in_each_space(self.rows, evaluator).items()}


@dataclass(frozen=True)
class NearestInTraining:
    """A worker's task: for each query in the file `queries` the nearest among these rows of the shard set."""

    queries: Path
    rows: tuple[int, ...]

    def run(self, evaluator: Evaluator) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """Distance [Q] and row [Q] by (space, side)."""
        training = _in_each_space(self.rows, evaluator)
        by_side = {}
        with np.load(self.queries) as queries:
            for space in SPACES:
                for side in SIDES:
                    distance_Q, index_Q = nearest(queries[f"{space}_{side}"], training[space])
                    by_side[space, side] = (distance_Q, np.asarray(self.rows)[index_Q])
        return by_side


def _in_each_space(rows: Sequence[int], evaluator: Evaluator) -> dict[str, np.ndarray]:
    """The points of slices of the shard set, cropped like the generated images: float32 [N, D] by space."""
    records = [evaluator.shards.read(row).cropped(evaluator.store.image.shape[1]) for row in rows]
    images_NHW = np.stack([record.image_uint8() for record in records])
    modality = [record.meta.modality for record in records]
    features_ND = evaluator.features_of(evaluator.on_device(images_NHW), modality)
    return {"segmenter": features_ND, "pixels": downscaled(images_NHW)}


def unseen_rows(rows: np.ndarray, shards: ShardSet, seed: int) -> list[int]:
    """The real slices that images of the masks `rows` are compared with: slices that training has not seen.

    These are the slices of `rows`. One whose patient or source file is in the train split is replaced by another slice
    of the same modalities and axes that is not in it, drawn by `seed`. Empty where training has seen all slices.
    """
    own = np.unique(rows)
    unseen = own[~_in_training(own, shards)]
    if len(unseen) == len(own):
        return own.tolist()
    alike = np.isin(shards.modality_N, shards.modality_N[own]) & np.isin(shards.axis_N, shards.axis_N[own])
    others = np.setdiff1d(np.flatnonzero(alike), own)
    others = others[~_in_training(others, shards)]
    order = sample_at(np.arange(len(others)), max(len(others), 1), seed)
    return np.sort(np.concatenate((unseen, others[order[: len(own) - len(unseen)]]))).tolist()


def _in_training(rows: np.ndarray, shards: ShardSet) -> np.ndarray:
    """bool [len(rows)]: whether a slice's patient or source file is in the train split."""
    training = shards.select(split="train", labelled_only=False)
    is_seen = np.zeros(len(rows), dtype=bool)
    for values_of in (shards.patients, lambda some: _files(shards, some)):
        known = set(values_of(training))
        is_seen |= np.array([value in known for value in values_of(rows)], dtype=bool)
    return is_seen


def _files(shards: ShardSet, rows: np.ndarray) -> list[str]:
    """SHA-256 of the source files of these rows."""
    sums: list[str] = shards.samples["source_sha256"].take(rows).to_pylist()
    return sums


def downscaled(images_BHW: np.ndarray) -> np.ndarray:
    """float32 [B, 1024] in [0, 1]: means over a grid of 32x32 (of every pixel where the image is smaller)."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    sides = (min(_SMALL_SIDE, images_BHW.shape[1]), min(_SMALL_SIDE, images_BHW.shape[2]))
    pooled = adaptive_avg_pool2d(torch.from_numpy(images_BHW)[:, None].float() / similarity.GREY_RANGE, sides)
    return np.asarray(pooled.flatten(1).numpy())


def nearest_over_parts(
    parts: Iterable[dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]],
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """The nearest over all parts of the training set."""
    nearest_yet: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for part in parts:
        for key, (distance_Q, row_Q) in part.items():
            before_Q, kept_Q = nearest_yet.get(key, (np.full(len(distance_Q), np.inf), row_Q))
            # If two are equally near, the lower row counts, so that the order of the parts does not matter.
            new_Q = (distance_Q < before_Q) | ((distance_Q == before_Q) & (row_Q < kept_Q))
            nearest_yet[key] = (np.where(new_Q, distance_Q, before_Q), np.where(new_Q, row_Q, kept_Q))
    return nearest_yet


def memorisation(
    ids: Sequence[int],
    items: pa.Table,
    shards: ShardSet,
    nearest_by: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
    most: float,
    unseen: Sequence[int] = (),
) -> dict[str, Any]:
    """How near generated images are to training images, compared with real images that training has not seen.

    A suspect is at most as far as the first percentile of the unseen real images, in both spaces; without copies about
    1 % would be in each. An image is also a suspect where it is nearer than _COPY_SHARE of the first percentile to a
    training image that may be mirrored, turned, shifted, scaled or changed in brightness (("copies", side) of
    `nearest_by`). `passed`: at most the share `most` are suspects. `nearer`: median distance of the generated divided
    by that of the real; a value well below 1 is a sign of copies. After Meehan et al. 2020. `unseen`: the rows of the
    unseen real images, for `false_alarms`.
    """
    spaces = (*SPACES, COPIES) if (COPIES, "gen") in nearest_by else SPACES
    of_side = {side: {space: nearest_by[space, side][0] for space in spaces} for side in ("real", "gen")}
    limits = _limits(of_side["real"])
    is_suspect = _within(limits, of_side["gen"])
    medians = {key: float(np.median(distance_Q)) for key, (distance_Q, _) in nearest_by.items()}
    # Suspects first, then by how near they are to a training image, changed or not.
    order = np.lexsort((nearest_by[spaces[-1], "gen"][0], ~is_suspect))

    def described(q: int) -> dict[str, Any]:
        entry = {"item_id": int(ids[q]), "key": items["key"][int(ids[q])].as_py(), "suspect": bool(is_suspect[q])}
        for space in spaces:
            distance_Q, row_Q = nearest_by[space, "gen"]
            entry[f"distance_{space}"] = float(distance_Q[q])
            entry[f"training_row_{space}"] = int(row_Q[q])
            entry[f"training_key_{space}"] = shards.samples["key"][int(row_Q[q])].as_py()
        return entry

    share = float(is_suspect.mean())
    return {
        "memorised_share": share,
        "most_allowed": most,
        "passed": share <= most,
        "num_images": len(ids),
        "num_suspects": int(is_suspect.sum()),
        "num_unseen": len(nearest_by["pixels", "real"][0]),
        "limits": limits,
        "false_alarms": _false_alarms(of_side["real"], np.array(shards.patients(unseen))),
        "nearer": {s: medians[s, "gen"] / medians[s, "real"] if medians[s, "real"] else None for s in spaces},
        "nearest": [described(int(q)) for q in order[:_MOST_LISTED]],
    }


def _limits(real_by: dict[str, np.ndarray]) -> dict[str, float]:
    """The distances below which an image is near to training, by space, from those of unseen real images."""
    limits = {space: float(np.quantile(distance_U, _QUANTILE)) for space, distance_U in real_by.items()}
    return limits | ({COPIES: _COPY_SHARE * limits[COPIES]} if COPIES in limits else {})


def _within(limits: dict[str, float], distances: dict[str, np.ndarray]) -> np.ndarray:
    """bool [Q]: whether images are suspects. Equal counts too: where unseen images have a twin in training, the limit
    is 0, and so is a copy's distance."""
    is_near = np.logical_and.reduce([distances[space] <= limits[space] for space in SPACES])
    return is_near | (distances[COPIES] <= limits[COPIES]) if COPIES in limits else is_near


def _false_alarms(real_by: dict[str, np.ndarray], case_id_U: np.ndarray) -> dict[str, Any] | None:
    """How many unseen real images would be suspects: each patient's with limits from the other patients' images. None
    where there is one patient."""
    patients = np.unique(case_id_U)
    if len(patients) < 2:
        return None
    is_alarm = np.zeros(len(case_id_U), dtype=bool)
    for patient in patients:
        own = case_id_U == patient
        limits = _limits({space: distance_U[~own] for space, distance_U in real_by.items()})
        is_alarm[own] = _within(limits, {space: distance_U[own] for space, distance_U in real_by.items()})
    return {
        "rate": float(is_alarm.mean()),
        "num_images": len(is_alarm),
        "num_patients": len(patients),
        "num_patients_with_alarms": len(np.unique(case_id_U[is_alarm])),
    }


def not_searched(reason: str) -> dict[str, Any]:
    """The result in place of `memorisation` where nothing is known: neither passed nor failed."""
    return {"passed": None, "reason": reason, "nearest": []}


def why_not_checked(ids: Sequence[int], training: Sequence[int], unseen: Sequence[int]) -> str | None:
    """Why copies of `training` (rows) cannot be found among `ids` (items); None if they can."""
    if not ids:
        return "no sample is the first of its mask in the modality of the mask's own slice"
    if not training:
        return "the shard set has no train split"
    if not unseen:
        return "the shard set has no slice to compare with: all patients or files are in the train split"
    return None


def warnings(summary: dict[str, Any]) -> list[str]:
    """Messages that matter before a set of samples is released, from summary.json."""
    leaked, memorised = summary["trust"].get("leakage"), summary["trust"].get("memorisation")
    messages = []
    if leaked is not None and leaked["num_leaked"]:
        names = leaked["patients"] or leaked["files"]
        messages.append(f"{leaked['num_leaked']} patients or files are in the train split too: {', '.join(names[:5])}")
    if memorised is not None and memorised["passed"] is None:
        messages.append(f"whether training images are among the samples is not known: {memorised['reason']}")
    if memorised is not None and memorised["passed"] is False:
        share, most = memorised["memorised_share"], memorised["most_allowed"]
        messages.append(
            f"{share:.1%} of the images look like training images, more than {most:.1%}: see trust.memorisation"
        )
    return messages


def leakage(items: pa.Table, shards: ShardSet) -> dict[str, Any]:
    """Patients and source files (by SHA-256) of the sampled masks that are in the train split too."""
    rows = np.unique(items["row"].to_numpy())
    training = shards.select(split="train", labelled_only=False)
    shared = {
        name: sorted(set(values_of(rows)) & set(values_of(training)))
        for name, values_of in (("patients", shards.patients), ("files", lambda some: _files(shards, some)))
    }
    return {"num_leaked": max(map(len, shared.values())), **shared}
