"""Which differences of two runs are larger than chance: their 95 % bootstrap intervals over patients.

Where runs have images of the same masks, a difference is paired: it is of these images alone, and each bootstrap sample
of the patients is the same for both runs. What makes one patient harder than another then cancels. Otherwise each run
has bootstrap samples of its own patients.

Dimensions: N images, C columns, P patients, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.modalities import in_order
from segdiff_dist.evaluation.measure.result_files import read_rows, row_columns
from segdiff_dist.evaluation.measure.rows import PATIENT
from segdiff_dist.evaluation.measure.segmenter_check import is_unreliable
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.metrics.estimates import bootstrap_counts
from segdiff_dist.evaluation.metrics.organ_texture import NOISE_METRICS, noise_std
from segdiff_dist.evaluation.metrics.sharpness import SHARPNESS_BANDS
from segdiff_dist.evaluation.report.comparison import Disagreement, EvaluatedRun, is_comparable
from segdiff_dist.evaluation.report.entry_text import DASH, format_number
from segdiff_dist.evaluation.report.tables import Cell, Row, Table, headline_metrics
from segdiff_dist.spectra import BAND_NAMES, ratio, sharpness

RESAMPLES = 1000
# What a sentence names.
_MAIN = ("dice_either_mask_gen", "dice_mask_gen", "sharpness", "texture", "psnr_db", "ssim", "lpips")
_KEYS = ("row", "target_modality", "case_id", "headline")
_Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Images:
    """Headline images of a run: the place in the shard set or folder of masks and the modality of each, its patient,
    and its columns. `masks`: which folder of masks, see EvaluatedRun."""

    keys: list[tuple[int, str]]
    patients: np.ndarray
    columns: dict[str, np.ndarray]
    masks: str = ""

    def at(self, chosen: Sequence[int]) -> Images:
        """Some of them, in this order."""
        places = np.asarray(chosen, dtype=np.int64)
        columns = {name: values_N[places] for name, values_N in self.columns.items()}
        return Images([self.keys[i] for i in chosen], self.patients[places], columns, self.masks)


@dataclass(frozen=True)
class Difference:
    """A metric of the other run less that of the first; `interval` is None for fewer than two patients."""

    value: float
    interval: tuple[float, float] | None
    num_images: int
    num_patients: int

    @property
    def is_larger(self) -> bool:
        """Whether it is larger than its interval: 0 is outside."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def difference_tables(runs: Sequence[EvaluatedRun], disagreements: Sequence[Disagreement]) -> list[Table]:
    """Differences of every run to the first, of all images and by modality; empty if none can be compared."""
    first, others = runs[0], runs[1:]
    blocking = [difference for difference in disagreements if not difference.of_slices]
    columns = set.intersection(*(set(row_columns(run.folder)) for run in runs))
    metrics = [m for m in _metrics(columns, runs) if is_comparable(m, blocking)]
    if not metrics:
        return []
    images = [_images(run, columns) for run in runs]
    pairs = [_paired(images[0], other) for other in images[1:]]
    groups: list[str | None] = [None, *in_order(m for run in runs for m in run.summary["by_modality"])]
    tables = [_table(first, others, pairs, metrics, group) for group in groups]
    tables = [table for table in tables if table.rows]
    return tables[1:] if len(tables) == 2 else tables


def sentences(tables: Sequence[Table]) -> list[str]:
    """For each run which of the headline's differences are larger than their intervals, and which are not."""
    if not tables:
        return []
    table, found = tables[0], []
    for k, column in enumerate(table.columns[::2]):
        top = [row for row in table.rows if row.name in _MAIN and row.cells[2 * k].entry is not None]
        cells = [(row, row.cells[2 * k]) for row in top]
        larger = [f"{row.label} {_signed(cell)}" for row, cell in cells if cell.best]
        others = [row.label for row, cell in cells if not cell.best]
        text = f"{column}: larger than their intervals are the differences of {'; '.join(larger)}" if larger else ""
        text = text or f"{column}: no difference of the headline is larger than its interval"
        rest = f"; not larger are those of {'; '.join(others)}" if larger and others else ""
        found.append(f"{text}{rest}.")
    return found


def difference(
    first: Images, other: Images, metric: str, *, is_paired: bool, resamples: int = RESAMPLES
) -> Difference | None:
    """Other less first; None if an image has no finite value. Paired: both hold images of the same masks, in order.

    Field and Welsh 2007 (cluster bootstrap), of the difference.
    """
    names, statistic = _statistic(metric)
    values = [np.stack([of.columns[name] for name in names], axis=1) for of in (first, other)]
    known = [np.isfinite(values_NC).all(axis=1) for values_NC in values]
    patients = [of.patients for of in (first, other)]
    if is_paired:
        known = [known[0] & known[1]] * 2
        # An earlier evaluation may name cases where a later one names patients, who have several.
        patients = [min(patients, key=lambda names_N: len(set(names_N)))] * 2
    if not known[0].any() or not known[1].any():
        return None
    estimates, resampled, num_patients = [], [], []
    for k, (names_N, values_NC, known_N) in enumerate(zip(patients, values, known, strict=True)):
        names_P, patient_N = np.unique(names_N[known_N], return_inverse=True)
        sums_PC = np.stack([np.bincount(patient_N, column, len(names_P)) for column in values_NC[known_N].T], axis=1)
        counts_P = np.bincount(patient_N, minlength=len(names_P)).astype(np.float64)
        draws_RP = bootstrap_counts(len(names_P), resamples, 0 if is_paired else k)
        estimates.append(float(statistic(sums_PC.sum(axis=0)[None], counts_P.sum()[None])[0]))
        resampled.append(statistic(draws_RP @ sums_PC, draws_RP @ counts_P))
        num_patients.append(len(names_P))
    value, interval = estimates[1] - estimates[0], None
    change_R = resampled[1] - resampled[0]
    change_R = change_R[np.isfinite(change_R)]
    if min(num_patients) >= 2 and len(change_R):
        low, high = np.percentile(change_R, (2.5, 97.5))
        interval = (float(low), float(high))
    return Difference(value, interval, int(min(of.sum() for of in known)), min(num_patients))


def _statistic(metric: str) -> tuple[tuple[str, ...], _Statistic]:
    """The columns of a metric, and the metric [R] from their sums [R, C] over images and the number of images [R]."""
    bands = dict(zip(SHARPNESS_BANDS, BAND_NAMES, strict=True))
    if metric == "sharpness":
        names = tuple(f"power_{side}_{band}" for side in ("gen", "real") for band in BAND_NAMES)
        half = len(BAND_NAMES)
        return names, lambda sums_RC, _: sharpness(ratio(sums_RC[:, :half], sums_RC[:, half:]))
    if metric in bands or metric == "texture":
        names = tuple(
            f"power_{side}_{bands[metric]}" if metric in bands else f"texture_{side}" for side in ("gen", "real")
        )
        return names, lambda sums_RC, _: ratio(sums_RC[:, 0], sums_RC[:, 1])
    if metric in NOISE_METRICS:
        name = metric.replace("noise_std", "texture")
        return (name,), lambda sums_RC, count_R: noise_std(sums_RC[:, 0] / count_R)
    return (metric,), lambda sums_RC, count_R: np.asarray(sums_RC[:, 0] / count_R)


def _metrics(columns: set[str], runs: Sequence[EvaluatedRun]) -> list[str]:
    """Metrics of the generated images that all runs have and that are computed from the rows; the headline first."""
    shared = [
        name
        for name in DEFINITIONS
        if all(name in run.summary["metrics"] for run in runs)
        and not name.endswith(("mask_real", "_real"))
        and not any(is_unreliable(run.summary["metrics"][name]) for run in runs)
        and set(_statistic(name)[0]) <= columns
    ]
    first = [name for name in headline_metrics({"All": runs[0].summary["metrics"]}) if name in shared]
    return list(dict.fromkeys([*first, *shared]))


def _images(run: EvaluatedRun, columns: set[str]) -> Images:
    areas = sorted(name for name in columns if name.startswith("area_mm2_mask/"))
    needed = sorted({name for m in DEFINITIONS for name in _statistic(m)[0]} & columns)
    named = [PATIENT] if PATIENT in row_columns(run.folder) else []
    rows = {
        n: np.asarray(v)
        for n, v in read_rows(run.folder, [*_KEYS, *named, *areas, *needed], run.summary).to_pydict().items()
    }
    chosen = np.flatnonzero(rows["headline"])
    keys = [(int(rows["row"][i]), str(rows["target_modality"][i])) for i in chosen]
    values = {name: rows[name][chosen].astype(np.float64) for name in (*areas, *needed)}
    return Images(keys, rows[[*named, "case_id"][0]][chosen].astype(str), values, run.masks)


def _paired(first: Images, other: Images) -> tuple[Images, Images, bool]:
    """Both runs' images of the same masks, in order, and True; all of both and False where there are too few.

    A mask is the same where slice and area of each organ are: a job may leave organs out. Areas say nothing of other
    folders of masks, where they may be unknown, or 0 in both.
    """
    if first.masks != other.masks:
        return first, other, False
    place = {key: i for i, key in enumerate(other.keys)}
    both = [(i, place[key]) for i, key in enumerate(first.keys) if key in place]
    areas = [name for name in first.columns if name.startswith("area_mm2_mask/") and name in other.columns]
    a, b = first.at([i for i, _ in both]), other.at([j for _, j in both])
    same_N = np.ones(len(both), dtype=bool)
    for name in areas:
        same_N &= np.nan_to_num(a.columns[name]) == np.nan_to_num(b.columns[name])
    chosen = np.flatnonzero(same_N).tolist()
    if min(len(set(of.patients[same_N])) for of in (a, b)) < 2:
        return first, other, False
    return a.at(chosen), b.at(chosen), True


def _table(
    first: EvaluatedRun,
    others: Sequence[EvaluatedRun],
    pairs: Sequence[tuple[Images, Images, bool]],
    metrics: Sequence[str],
    group: str | None,
) -> Table:
    chosen = [(_of_group(a, group), _of_group(b, group), is_paired) for a, b, is_paired in pairs]
    rows = []
    for metric in metrics:
        cells = []
        for a, b, is_paired in chosen:
            found = difference(a, b, metric, is_paired=is_paired) if a.keys and b.keys else None
            cells += [_cell(metric, found), Cell(text=str(found.num_images) if found else DASH)]
        if any(cell.entry for cell in cells):
            rows.append(Row(DEFINITIONS[metric].label, metric, tuple(cells), DEFINITIONS[metric].better))
    columns = [label for run in others for label in (f"{run.name} \u2212 {first.name}", "Images")]
    methods = [_method(run, pair, first) for run, pair in zip(others, chosen, strict=True)]
    caption = (
        f"Differences to {first.name}{f' on {group} images' if group else ''}, with their 95 % bootstrap intervals "
        f"over patients ({RESAMPLES:,} samples). {' '.join(methods)} Marked: larger than its interval, which does not "
        "include 0. Of twenty metrics without any difference about one would be marked by chance; this is not "
        "corrected for. Intervals of fewer than some ten patients are too narrow. Distances between distributions "
        "have no interval and are not listed."
    )
    name = f"differences_{(group or 'all').lower()}"
    title = f"Differences, {group}" if group else "Differences"
    return Table(name, title, caption, "Metric", tuple(columns), tuple(rows), group or "", "larger")


def _method(run: EvaluatedRun, pair: tuple[Images, Images, bool], first: EvaluatedRun) -> str:
    a, b, is_paired = pair
    if is_paired:
        num_patients = min(len(set(of.patients)) for of in (a, b))
        return (
            f"{run.name}: paired by patient, on {len(a.keys)} images of the same masks of {num_patients} "
            "patients; each bootstrap sample of the patients is the same for both runs."
        )
    return (
        f"{run.name}: not paired, since it has too few masks in common with {first.name}; {len(a.keys)} and "
        f"{len(b.keys)} images."
    )


def _of_group(images: Images, group: str | None) -> Images:
    return images.at([i for i, (_, modality) in enumerate(images.keys) if group in (None, modality)])


def _cell(metric: str, found: Difference | None) -> Cell:
    if found is None:
        return Cell(metric)
    entry: dict[str, Any] = {"value": found.value, "ci95": list(found.interval) if found.interval else None}
    entry |= {"n": found.num_images, "num_patients": found.num_patients}
    return Cell(metric, entry, best=found.is_larger)


def _signed(cell: Cell) -> str:
    assert cell.entry is not None
    sign = "+" if cell.entry["value"] > 0 else ""
    return f"{sign}{format_number(cell.entry['value'], cell.digits)} ({cell.interval()})"
