"""Evaluations of several folds as one: each patient is held out once, so that all patients of an archive count.

Dimensions: B images of a run, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.records import MODALITIES
from segdiff_dist.evaluation.measure.result_files import read_rows, read_summary, row_columns
from segdiff_dist.evaluation.measure.rows import PATIENT
from segdiff_dist.evaluation.measure.summary import Evaluated, summarise
from segdiff_dist.evaluation.measure.worker import ChunkResult
from segdiff_dist.evaluation.metrics.columns import SIDES, column_names
from segdiff_dist.evaluation.metrics.estimates import Estimate, estimate
from segdiff_dist.evaluation.metrics.feature_sets import Extractor, neighbourhoods, patient_neighbourhoods
from segdiff_dist.evaluation.metrics.sums import Interval
from segdiff_dist.evaluation.report.pictures import Pictures
from segdiff_dist.segmentation.segmenter import Segmenter

_ITEMS = ("row", "case_id", "source_modality", "target_modality", "axis", "seed_index", "headline")
_BATCH = 64
_DIVISIONS = _DRAWS = 20
# Neighbouring slices make neighbourhoods small (docs/metrics.md). 200 slices of 14 patients have this density.
_OF_A_PATIENT = 14


@dataclass(frozen=True)
class Extractors:
    """Networks whose features are the same for all folds. `segmenter` may have seen patients that a fold holds out: as
    features only, its predictions do not count."""

    segmenter: Segmenter
    by_name: dict[str, Extractor]

    @classmethod
    def load(cls, segmenter: Path) -> Extractors:
        """The segmenter at a folder of weights, and ImageNet's network."""
        from segdiff_dist.evaluation.metrics.imagenet import load_imagenet

        network = Segmenter.load(segmenter)
        return cls(network, {"segmenter": network.features, "imagenet_lite": load_imagenet("cpu")})

    def __call__(self, images_BHW: np.ndarray, modalities: Sequence[str]) -> dict[str, np.ndarray]:
        import torch

        codes = torch.tensor([MODALITIES.index(name) for name in modalities])
        batches = [slice(start, start + _BATCH) for start in range(0, len(images_BHW), _BATCH)]
        images = torch.from_numpy(images_BHW)
        return {
            name: np.concatenate([extract(images[batch], codes[batch]).numpy() for batch in batches])
            for name, extract in self.by_name.items()
        }


@dataclass(frozen=True)
class Fold:
    """An evaluated run, with the features of its headline images; rows without a counterpart have NaN."""

    items: pa.Table
    columns: dict[str, np.ndarray]
    features: dict[tuple[str, str], np.ndarray]
    pictures: Pictures

    @classmethod
    def open(cls, run: Path, extract: Extractors) -> Fold:
        """The evaluation of a run folder. Its images must have counterparts."""
        pictures, summary = Pictures.open(run), read_summary(run)
        has = set(row_columns(run))
        measured = [name for name in column_names(pictures.label_table) if name in has]
        named = [PATIENT] if PATIENT in has else []
        rows = read_rows(run, list(dict.fromkeys([*_ITEMS, *named, *measured])), summary)
        columns = {name: rows[name].to_numpy().astype(float) for name in measured}
        shown = [i for i, is_shown in enumerate(rows["headline"].to_pylist()) if is_shown]
        modalities = rows["target_modality"].take(shown).to_pylist()
        sides = {
            "real": np.stack([pictures.real(i) for i in shown]),
            "gen": np.stack([pictures.generated(i) for i in shown]),
        }
        features: dict[tuple[str, str], np.ndarray] = {}
        for side in SIDES:
            for name, found_BD in extract(sides[side], modalities).items():
                filled_BD = np.full((len(rows), found_BD.shape[1]), np.nan, np.float32)
                filled_BD[shown] = found_BD
                features[name, side] = filled_BD
        return cls(rows.select([*_ITEMS, *named]), columns, features, pictures)

    @property
    def patients(self) -> list[str]:
        """Of each image."""
        name = PATIENT if PATIENT in self.items.column_names else "case_id"
        return [str(patient) for patient in self.items[name].to_pylist()]


def pool(folds: Sequence[Fold], interval: Interval) -> dict[str, Any]:
    """summary.json's metrics over the images of all folds, intervals over all patients. Diversity is left out."""
    items = pa.concat_tables([fold.items.select(_ITEMS) for fold in folds])
    patient_of = dict(zip(items["case_id"].to_pylist(), [p for fold in folds for p in fold.patients], strict=True))
    measured = Evaluated.empty(folds[0].pictures.label_table, items, {}, patient_of=patient_of)
    start = 0
    for fold in folds:
        num = len(fold.items)
        nothing_B = np.full(num, np.nan)
        columns = {name: fold.columns.get(name, nothing_B) for name in measured.sums.names}
        grey_counts = np.zeros((num, len(SIDES), 256), np.int64)
        measured.add(start, start + num, ChunkResult(columns, fold.features, grey_counts))
        start += num
    return summarise(measured, interval)


def difference(folds: Sequence[Fold], others: Sequence[Fold], column: str, interval: Interval) -> Estimate | None:
    """Mean over the images of `folds` of a column of samples.parquet, less that of the same masks in `others`: paired,
    with an interval over patients. None if no pair has a value."""
    values: list[np.ndarray] = []
    patients: list[str] = []
    for one, other in zip(folds, others, strict=True):
        if one.items["row"] != other.items["row"]:
            raise ValueError("the folds have other masks")
        values.append(one.columns[column] - other.columns[column])
        patients += one.patients
    value_N, shown_N = np.concatenate(values), _headline_of(folds)
    kept_N = shown_N & np.isfinite(value_N)
    if not kept_N.any():
        return None
    return estimate(value_N[kept_N], np.array(patients)[kept_N], resamples=interval.resamples, seed=interval.seed)


def between_patients(folds: Sequence[Fold], extractor: str, modality: str) -> dict[str, Any] | None:
    """Precision and recall between two halves of the patients: of real images, and of images from one half's masks
    against the other half's real ones. Means over random divisions; None with fewer than four patients.

    Both sides are of the same kind, so that what real images of other patients reach is what can be asked for.
    """
    chosen = [(f, i) for f in folds for i in _of(f, modality)]
    patients = np.array([f.patients[i] for f, i in chosen])
    sides = {side: np.stack([f.features[extractor, side][i] for f, i in chosen]) for side in SIDES}
    names = np.unique(patients)
    if len(names) < 4:
        return None
    draw, found = np.random.default_rng(0), {side: [] for side in SIDES}
    for _ in range(_DIVISIONS):
        first = np.isin(patients, draw.permutation(names)[: len(names) // 2])
        for side, of_side in sides.items():
            for half in (first, ~first):
                real_ND, other_MD = sides["real"][half], of_side[~half]
                plain = vars(neighbourhoods(real_ND, other_MD))
                wide = patient_neighbourhoods(real_ND, patients[half], other_MD, patients[~half])
                found[side].append(plain | (vars(wide) if wide else {}))
    return {"num_patients": len(names), "divisions": _DIVISIONS} | {
        side: {name: float(np.mean([one[name] for one in values])) for name in values[0]}
        for side, values in found.items()
    }


def spread_out(folds: Sequence[Fold], extractor: str, modality: str | None = None) -> dict[str, Any]:
    """Precision and recall of a few images of each patient: mean, lowest and highest of random draws."""
    chosen = [(f, i) for f in folds for i in _of(f, modality)]
    patients = np.array([f.patients[i] for f, i in chosen])
    real_ND, gen_ND = (np.stack([f.features[extractor, side][i] for f, i in chosen]) for side in SIDES)
    draw, found = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        parts = [draw.permutation(np.flatnonzero(patients == name))[:_OF_A_PATIENT] for name in np.unique(patients)]
        rows = np.concatenate(parts)
        found.append(neighbourhoods(real_ND[rows], gen_ND[rows]))
    values = {name: [getattr(one, name) for one in found] for name in ("precision", "recall")}
    return {"images": len(rows), "draws": _DRAWS} | {
        name: {"mean": float(np.mean(of)), "low": min(of), "high": max(of)} for name, of in values.items()
    }


def _headline_of(folds: Sequence[Fold]) -> np.ndarray:
    return np.concatenate([fold.items["headline"].to_numpy(zero_copy_only=False).astype(bool) for fold in folds])


def _of(fold: Fold, modality: str | None) -> list[int]:
    shown, of = fold.items["headline"].to_pylist(), fold.items["target_modality"].to_pylist()
    return [i for i in range(len(shown)) if shown[i] and modality in (None, of[i])]
