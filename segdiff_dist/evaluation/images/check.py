"""All problems of an evaluation of a folder's images, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.problems import InputProblems, Problem, refuse
from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.images.config import ImagesConfig
from segdiff_dist.evaluation.images.folder import ImageFolder
from segdiff_dist.evaluation.measure.checks import (
    cannot_judge,
    needs_real_images,
    open_segmenter,
    rows_of,
    unlike,
    unreadable,
)
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.subject import with_modalities
from segdiff_dist.sampling.store import SampleStore


def check_images(run: Path, images: ImagesConfig, config: EvaluateConfig) -> ImageFolder:
    """The images, all read once. `run`: the folder of the result. Raises InputProblems together as far as possible: of
    settings, segmenter and set; of the files; and of conflicts between them."""
    problems: list[Problem] = [*config.problems(), *unreadable(config), *needs_real_images(config)]
    opened: dict[str, Any] = {}

    def attempt(name: str, open_it: Callable[[], Any]) -> None:
        try:
            opened[name] = open_it()
        except InputProblems as error:
            problems.extend(error.problems)

    weights = config.segmenter
    if weights is None:
        remedy = "name the one that labels the images: --evaluate.segmenter RUN/segmenter/weights"
        problems.append(Problem("command line", "--evaluate.segmenter", "not given", remedy))
    else:
        attempt("segmenter", lambda: open_segmenter(weights))
    if config.downstream:
        remedy = "leave it out: it trains on images that this system samples"
        problems.append(Problem("command line", "--downstream", "not for images of a folder", remedy))
    if config.real is not None:
        attempt("shards", lambda: ShardSet.open(str(config.real)))
    refuse(problems)
    shards, segmenter = opened.get("shards"), opened["segmenter"]
    folder = ImageFolder(images, segmenter.label_table, shards)
    problems += segmenter.problems(segmenter.label_table, [folder.modality], folder.window)
    problems += [*cannot_judge(segmenter, folder.size, config), *unlike(segmenter.label_table, folder.size, shards)]
    if shards is not None:
        attempt("rows", lambda: rows_of(with_modalities(folder.items), shards, config))
    attempt("store", lambda: SampleStore.reopen(run / "samples", folder.job))
    refuse(problems)
    return folder
