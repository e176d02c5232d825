"""The search for training images among generated ones, on the workers of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_shards.store.shards import ShardSet
from segdiff_dist.config import read_yaml
from segdiff_dist.evaluation.measure import copies, trust
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.headline import headline_items
from segdiff_dist.evaluation.measure.subject import Subject
from segdiff_dist.evaluation.measure.task_runner import ITEMS_A_TASK, TaskRunner, split_up

_TRAINING_SLICES_A_TASK = 256


def measure_memorisation(
    runner: TaskRunner, file: Path, config: EvaluateConfig, subject: Subject, shards: ShardSet
) -> dict[str, Any]:
    """The nearest training image of every generated one, and of real ones that training has not seen; `file` passes
    them to the workers."""
    ids, rows, unseen = memorisation_search(config, subject, shards)
    if reason := trust.why_not_checked(ids, rows, unseen):
        return trust.not_searched(reason)
    asked: list[Any] = [trust.Queries(part) for part in split_up(ids, ITEMS_A_TASK)]
    asked += [trust.UnseenQueries(part) for part in split_up(unseen, ITEMS_A_TASK)]
    parts = list(runner.results(asked))
    keys = dict.fromkeys(key for part in parts for key in part)
    queries: dict[str, Any] = {"_".join(k): np.concatenate([part[k] for part in parts if k in part]) for k in keys}
    np.savez(file, **queries)
    training = [trust.NearestInTraining(file.resolve(), part) for part in split_up(rows, _TRAINING_SLICES_A_TASK)]
    try:
        nearest = trust.nearest_over_parts(runner.results(training))
        nearest |= _nearest_copies(runner, file.resolve(), rows)
    finally:
        file.unlink()
    return trust.memorisation(ids, subject.store.items, shards, nearest, config.most_memorised, unseen)


def memorisation_search(
    config: EvaluateConfig, subject: Subject, shards: ShardSet
) -> tuple[list[int], list[int], list[int]]:
    """The search for training images: the ids of the generated images, the rows of the training slices, and the rows
    of real slices that training has not seen."""
    store = subject.store
    ids = headline_items(store.items, config.memorisation_images, config.seed)
    rows = shards.select(split="train", labelled_only=False).tolist()
    real_rows = store.items["row"].to_numpy()[ids] if subject.is_paired else np.array(subject.real_rows, np.int64)
    return ids, rows, trust.unseen_rows(real_rows[: config.memorisation_images], shards, config.seed)


def memorisation_cost(run: Path, config: EvaluateConfig, subject: Subject) -> tuple[str, float] | None:
    """What the search for training images will compare, and the seconds that one core takes; None without it."""
    if not config.memorisation or subject.shards is None:
        return None
    ids, rows, unseen = memorisation_search(config, subject, subject.shards)
    size = subject.store.image.shape[1]
    room = subject.shards.size / size - 1
    seconds = _ranges(run).seconds(len(ids) + len(unseen), len(rows), size, room)
    return f"{len(ids):,} images and {len(unseen):,} unseen real ones against {len(rows):,} training slices", seconds


def _nearest_copies(
    runner: TaskRunner, file: Path, rows: list[int]
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """The same where training images may be mirrored, turned, scaled, cropped or changed in brightness."""
    ranges = _ranges(file.parents[1])
    asked = [copies.CopyCandidates(file, part, ranges) for part in split_up(rows, _TRAINING_SLICES_A_TASK)]
    candidates = copies.best_candidates(runner.results(asked))
    nearest = {}
    for side, (rows_QC, changes_QC5) in candidates.items():
        parts = []
        for start in range(0, len(rows_QC), ITEMS_A_TASK):
            part = slice(start, start + ITEMS_A_TASK)
            parts.append(copies.NearestCopy(file, side, start, rows_QC[part], changes_QC5[part]))
        distances, nearest_rows = zip(*runner.results(parts), strict=True)
        nearest["copies", side] = (np.concatenate(distances), np.concatenate(nearest_rows))
    return nearest


def _ranges(run: Path) -> copies.Ranges:
    config = run / "config.yaml"
    loader = read_yaml(config).get("loader") if config.is_file() else None
    return copies.Ranges.of(loader if isinstance(loader, dict) else None)
