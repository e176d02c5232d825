"""All problems of an evaluation of a folder's images, before anything is written."""

from __future__ import annotations

from pathlib import Path

from data_shards.problems import Attempts, Problem, refuse
from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.images.config import ImagesConfig
from segdiff_dist.evaluation.images.folder import ImageFolder
from segdiff_dist.evaluation.measure.checks import (
    cannot_extract,
    cannot_segment,
    needs_real_images,
    open_segmenter,
    rows_of,
    unlike,
    unreadable,
)
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.subject import with_modalities
from segdiff_dist.sampling.mask_patients import mask_patients
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.segmentation.tools import ToolSegmenter


def check_images(run: Path, images: ImagesConfig, config: EvaluateConfig) -> ImageFolder:
    """The images, all read once. `run`: the folder of the result. Raises InputProblems together as far as possible: of
    settings, segmenter and set; of the files; and of conflicts between them."""
    attempts = Attempts([*config.problems(), *unreadable(config), *needs_real_images(config)])
    problems, opened = attempts.problems, attempts.results

    weights = config.segmenter
    if weights is None:
        remedy = "name the one that labels the images: --evaluate.segmenter RUN/segmenter/weights"
        problems.append(Problem("command line", "--evaluate.segmenter", "not given", remedy))
    else:
        attempts.make("segmenter", lambda: open_segmenter(weights))
    if config.downstream:
        remedy = "leave it out: it trains on images that this system samples"
        problems.append(Problem("command line", "--downstream", "not for images of a folder", remedy))
    if config.real is not None:
        attempts.make("shards", lambda: ShardSet.open(str(config.real)))
    if isinstance(opened.get("segmenter"), ToolSegmenter):
        remedy = "give a segmenter of slices: RUN/segmenter/weights, a TorchScript file or a MONAI bundle"
        problems.append(
            Problem("command line", "--evaluate.segmenter", f"{weights} labels volumes, not slices", remedy)
        )
    refuse(problems)
    shards, segmenter = opened.get("shards"), opened["segmenter"]
    folder = ImageFolder(images, segmenter.label_table, shards)
    problems += segmenter.problems(segmenter.label_table, [folder.modality], folder.window)
    problems += [*cannot_segment(segmenter, folder.size, config), *cannot_extract(folder.size, config)]
    problems += [*unlike(segmenter.label_table, folder.size, shards)]
    if shards is not None:
        attempts.make("rows", lambda: rows_of(with_modalities(folder.items), shards, config))
    attempts.make("patients", lambda: mask_patients(folder.items, folder.job, config.patient))
    attempts.make("store", lambda: SampleStore.reopen(run / "samples", folder.job))
    refuse(problems)
    return folder
