"""Several evaluated runs side by side: their settings and common masks, and the numbers that cannot be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.documents import read_json
from data_shards.problems import InputProblems, Problem
from segdiff_dist.config import flatten, next_command, read_yaml
from segdiff_dist.evaluation.measure.publishing import PREDICTIONS, SAMPLES, SUMMARY, place_of
from segdiff_dist.evaluation.measure.result_files import open_predictions, read_rows, read_summary
from segdiff_dist.evaluation.measure.segmenter_check import SEGMENTER_METRICS
from segdiff_dist.evaluation.measure.summary import FORMAT_VERSION
from segdiff_dist.evaluation.metrics.definition import Definition
from segdiff_dist.evaluation.metrics.distances import NEIGHBOURHOODS
from segdiff_dist.evaluation.report.pictures import Pictures
from segdiff_dist.evaluation.report.tracked import TrackedRun, tracked_run

_ALL = ("",)
_OF_INCEPTION = ("fid", "kid", "inception_")
# A key of summary.json's provenance, the message where runs differ in it, and the metrics (by their beginnings) that
# cannot be compared then.
_MUST_AGREE = (
    (
        "segmenter_sha256",
        "The runs were evaluated with different segmenters",
        SEGMENTER_METRICS,
    ),
    ("shards_digest", "The runs were sampled from different shard sets", _ALL),
    ("fid_weights", "The weights of Inception differ", _OF_INCEPTION),
    ("feature_network", "The given networks of features differ (evaluate.feature_network)", ("network_",)),
    ("lpips_weights", "The weights of LPIPS differ", ("lpips",)),
    ("frd_images", "FRD was computed on different numbers of images", ("frd",)),
    ("surface_dice_tolerance_mm", "The tolerances of surface Dice differ", ("surface_dice_",)),
    (
        "distribution_images",
        "Kernel distances and neighbourhoods use different numbers of images (evaluate.distribution_images)",
        (
            *("kid", "inception_"),
            *(
                f"{extractor}_{n}"
                for extractor in ("segmenter", "imagenet_lite", "network")
                for n in ("kernel", *NEIGHBOURHOODS)
            ),
        ),
    ),
)


@dataclass(frozen=True)
class EvaluatedRun:
    """A run folder that was evaluated.

    `name`: unique among the runs. `settings`: values of config.yaml by dotted key, empty if there is none. `slices`:
    row of the shard set and modality of each headline image. `side`: of the images, in pixels. `masks`: the digest
    of the folder of masks; empty for masks of the shard set.
    """

    name: str
    folder: Path
    summary: dict[str, Any]
    settings: dict[str, Any]
    slices: frozenset[tuple[int, str]]
    side: int
    tracked: TrackedRun | None
    masks: str = ""


@dataclass(frozen=True)
class Disagreement:
    """A difference of runs, and the beginnings of the names of the metrics that cannot be compared because of it."""

    text: str
    metrics: tuple[str, ...]
    of_slices: bool = False
    """Whether only the slices differ: those that the runs share can be compared."""


def open_runs(folders: Sequence[Path]) -> list[EvaluatedRun]:
    """Open evaluated runs. InputProblems, all at once: runs that are missing, not evaluated, of another version,
    or given twice."""
    problems: list[Problem] = []
    opened = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        try:
            opened.append(_open(folder, name))
        except InputProblems as error:
            problems += error.problems
    resolved = [folder.resolve() for folder in folders]
    twice = [str(folder) for i, folder in enumerate(folders) if resolved[i] in resolved[:i]]
    problems += [Problem("command line", "run", f"{folder} is named twice", "name each run once") for folder in twice]
    if problems:
        raise InputProblems(problems)
    return opened


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path: one, or as many as make all names different."""
    parts = [folder.resolve().parts for folder in folders]
    names = [path[-1] for path in parts]
    for num_parts in range(2, max(map(len, parts), default=0) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(path[-num_parts:]) for path in parts]
    return names


def disagreements(runs: Sequence[EvaluatedRun]) -> list[Disagreement]:
    """Why some or all numbers of the runs cannot be compared; empty if all can."""
    differences = []
    for key, text, metrics in _MUST_AGREE:
        values = [run.summary["provenance"].get(key) for run in runs]
        # Where a run lacks a metric, there is nothing to compare.
        if len({json.dumps(value, sort_keys=True) for value in values if value}) > 1:
            differences.append(
                Disagreement(text + (_one_segmenter(runs) if key == "segmenter_sha256" else ""), metrics)
            )
    if len({run.side for run in runs}) > 1:
        sides = ", ".join(str(side) for side in sorted({run.side for run in runs}))
        differences.append(Disagreement(f"The images have different sizes ({sides} pixels a side)", _ALL))
    if not any(d.metrics == _ALL for d in differences) and len({run.slices for run in runs}) > 1:
        shared = len(frozenset.intersection(*(run.slices for run in runs)))
        counts = ", ".join(f"{len(run.slices)} of {run.name}" for run in runs)
        differences.append(
            Disagreement(f"The runs were measured on different slices: {shared} in common, {counts}", _ALL, True)
        )
    return differences


def _one_segmenter(runs: Sequence[EvaluatedRun]) -> str:
    """The commands that evaluate all runs with the first one's segmenter, if it is in its run folder."""
    weights = runs[0].folder.resolve() / "segmenter" / "weights"
    if not weights.is_dir():
        return "; set evaluate.segmenter to the same one for all"
    digest = runs[0].summary["provenance"]["segmenter_sha256"]
    others = [run for run in runs if run.summary["provenance"]["segmenter_sha256"] != digest]
    flags = ("--evaluate.segmenter", str(weights))
    commands = ", ".join(next_command("evaluate", *flags, run=run.folder.resolve()) for run in others)
    return f"; to use that of {runs[0].name} for all: {commands}"


def is_comparable(metric: str, differences: Sequence[Disagreement]) -> bool:
    """Whether values of a metric may be compared."""
    return not any(metric.startswith(difference.metrics) for difference in differences)


def best_of(values: Sequence[float | None], definition: Definition, *, least: float = -math.inf) -> set[int]:
    """Which of the values are best: all that are shown with the same digits as the best one.

    A value is None if a run has none. None is best where neither higher nor lower is better, or where all are shown
    the same. Values below `least` count as `least`.
    """
    shown = {i: round(max(value, least), definition.digits) for i, value in enumerate(values) if value is not None}
    if not definition.better or len(set(shown.values())) < 2:
        return set()
    if definition.better == "one":
        # As a factor: half as much is as far from 1 as twice as much.
        distance = {i: abs(math.log(max(value, 1e-9))) for i, value in shown.items()}
        return {i for i, far in distance.items() if far == min(distance.values())}
    best = max(shown.values()) if definition.better == "higher" else min(shown.values())
    return {i for i, value in shown.items() if value == best}


def differing_settings(runs: Sequence[EvaluatedRun]) -> list[tuple[str, list[str]]]:
    """Dotted keys of config.yaml in which the runs differ, each with the value of every run as text."""
    keys = sorted({key for run in runs for key in run.settings} - {"run"})
    rows = [(key, [_as_text(run.settings[key]) if key in run.settings else "\u2013" for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def shared_masks(pictures: Sequence[Pictures], modality: str) -> list[tuple[int, ...]]:
    """Headline items of the same mask, one of each run; all runs are of one shard set.

    Of the masks that all runs have, those at the quartiles of the mean over the runs of Dice(mask, pred_gen), of
    different patients if possible.
    """
    items_by_row = [run.headline(modality) for run in pictures]
    rows = sorted(set.intersection(*(set(items) for items in items_by_row)))
    dice_by_row = {
        row: np.mean([p.rows["dice_mask_gen"][items[row]] for p, items in zip(pictures, items_by_row, strict=True)])
        for row in rows
    }
    rows = sorted((row for row in rows if np.isfinite(dice_by_row[row])), key=lambda row: dice_by_row[row])
    first = pictures[0]
    chosen = first.at_quartiles(np.array([items_by_row[0][row] for row in rows], dtype=np.int64))
    candidates = [tuple(items[int(first.rows["row"][i])] for items in items_by_row) for i in chosen]
    # A job may have left organs out, or cropped the slice.
    return [items for items in candidates if _same_mask(pictures, items)]


def _same_mask(pictures: Sequence[Pictures], items: Sequence[int]) -> bool:
    masks = [run.mask(i) for run, i in zip(pictures, items, strict=True)]
    return all(np.array_equal(masks[0], mask) for mask in masks)


def _open(folder: Path, name: str) -> EvaluatedRun:
    problems = list(_problems_of(folder))
    if problems:
        raise InputProblems(problems)
    columns = ["row", "target_modality", "headline"]
    summary = read_summary(folder)
    table = read_rows(folder, columns, summary)
    rows = table.to_pydict()
    summary = read_summary(folder)
    job = summary["provenance"].get("sample_job", {})
    # Rows of a folder of masks are its own: they are the same slices only where the masks are the same.
    of_masks = "" if "shards" in job else f" of masks {job.get('masks_digest')}"
    slices = {
        (row, f"{modality}{of_masks}")
        for row, modality, headline in zip(*(rows[c] for c in columns), strict=True)
        if headline
    }
    config = folder / "config.yaml"
    return EvaluatedRun(
        name=name,
        folder=folder,
        summary=summary,
        settings=flatten(read_yaml(config)) if config.is_file() else {},
        slices=frozenset(slices),
        side=int(open_predictions(folder, table.num_rows)["gen"].shape[1]),
        tracked=tracked_run(folder),
        masks=of_masks,
    )


def _problems_of(folder: Path) -> Iterator[Problem]:
    if not folder.is_dir():
        yield Problem(str(folder), "run", "no such folder", "give the folder that training and sampling wrote")
        return
    remedy = f"run {next_command('evaluate', run=folder)}"
    missing = [name for name in (SUMMARY, SAMPLES, PREDICTIONS) if not place_of(folder / "evaluation", name).exists()]
    if missing:
        yield Problem(str(folder), "evaluation", f"{', '.join(missing)} not there", remedy)
        return
    try:
        version = read_json(place_of(folder / "evaluation", SUMMARY), remedy).get("format_version")
    except InputProblems:
        yield Problem(str(folder / "evaluation" / SUMMARY), "evaluation", "not a summary", remedy)
        return
    if version != FORMAT_VERSION:
        value = f"{version}, this version of segdiff reads {FORMAT_VERSION}"
        yield Problem(str(folder / "evaluation" / SUMMARY), "format_version", value, remedy)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
