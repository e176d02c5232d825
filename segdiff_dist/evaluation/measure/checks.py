"""All problems of an evaluation, before Ray starts. Everything that it needs is opened here once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.files import first_line
from data_shards.problems import InputProblems, Problem, problem, refuse
from data_shards.store.shards import ShardSet
from segdiff_dist.config import how_to_make
from segdiff_dist.evaluation.metrics import inception, perceptual

if TYPE_CHECKING:
    from segdiff_dist.evaluation.measure.config import EvaluateConfig
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.segmentation.segmenter import Segmenter


@dataclass(frozen=True)
class Checked:
    """The inputs of an evaluation: samples, their slices, and the segmenter's weights with their digest."""

    store: SampleStore
    shards: ShardSet
    segmenter: Path
    segmenter_sha256: str


def check(run: Path, config: EvaluateConfig) -> Checked:
    """Raises InputProblems: see measure in job.py."""
    from segdiff_dist.sampling.store import SampleStore

    problems = [*config.problems(), *_unreadable(config)]
    opened: dict[str, Any] = {}

    def attempt(name: str, open_it: Callable[[], Any]) -> None:
        try:
            opened[name] = open_it()
        except InputProblems as error:
            problems.extend(error.problems)

    weights = config.segmenter or run / "segmenter" / "weights"
    attempt("segmenter", lambda: _open_segmenter(weights))
    attempt("store", lambda: SampleStore.open(run / "samples"))
    if "store" in opened and "shards" in opened["store"].job:
        attempt("shards", lambda: ShardSet.open(opened["store"].job["shards"]))
    problems += _mismatches(run, **opened)
    refuse(problems)
    return Checked(opened["store"], opened["shards"], weights, opened["segmenter"].weights_sha256)


def _open_segmenter(weights: Path) -> Segmenter:
    from segdiff_dist.segmentation.segmenter import Segmenter

    try:
        return Segmenter.load(weights)
    except InputProblems:
        raise
    except (KeyError, TypeError, ValueError) as error:  # of segdiff.json
        remedy = f"copy the folder again, or train again: {how_to_make('train-segmenter', weights)}"
        raise problem(weights, "segmenter", f"cannot be read: {first_line(error)}", remedy) from error


def _unreadable(config: EvaluateConfig) -> Iterator[Problem]:
    """Files that are not the right weights. Each network is built once, as every worker will build it."""
    checks: tuple[tuple[str, Callable[[str], str | None], Callable[[str, str], Any], str], ...] = (
        ("fid_weights", inception.missing_for_fid, inception.load_inception, inception.WEIGHTS_FILE),
        ("lpips_weights", perceptual.missing_for_lpips, perceptual.load_lpips, perceptual.WEIGHTS_FILE),
    )
    for name, missing, load, file_name in checks:
        file = getattr(config, name)
        if not isinstance(file, Path) or not file.is_file() or missing(str(file)):
            continue  # config.problems says so
        try:
            load(str(file), "cpu")
        except Exception as error:  # of pickle, zip, torch, or of a network with other weights
            value = f"{file}: cannot be read: {first_line(error)}"
            yield Problem("config", f"evaluate.{name}", value, f"give the file {file_name}")


def _mismatches(
    run: Path, segmenter: Segmenter | None = None, store: SampleStore | None = None, shards: ShardSet | None = None
) -> Iterator[Problem]:
    if store is not None and (missing := store.missing()):
        value = f"{len(missing)} of {store.items.num_rows} not made yet"
        yield Problem(str(run / "samples"), "samples", value, "run the same `segdiff sample` again; it continues")
    if store is not None:
        for damage in store.damaged():
            yield Problem(str(run / "samples"), "samples", str(damage), "run the same `segdiff sample` again")
    if store is not None and "shards" not in store.job:
        value = "made from masks without images, so there are no real images to compare them with"
        yield Problem(str(run / "samples"), "samples", value, "evaluate samples whose masks come from a shard set")
    if store is not None and not store.items.num_rows:
        yield Problem(
            str(run / "samples"), "samples", "none", f"sample again: {how_to_make('sample', run / 'samples')}"
        )
    if store is not None and shards is not None and shards.digest != store.job["shards_digest"]:
        yield Problem(shards.root, "digest", "not the shard set of the samples", "restore it, or sample again")
    if segmenter is not None and shards is not None and segmenter.label_table != shards.label_table:
        value = f"segmenter {segmenter.label_table.name!r}, shard set {shards.label_table.name!r}"
        yield Problem(shards.root, "label table", value, "train the segmenter on shards with these labels")
    if segmenter is not None and store is not None and not _takes(segmenter, store.image.shape[1]):
        value = f"its levels do not halve the images' {store.image.shape[1]} pixels evenly"
        yield Problem(
            "segmenter", "levels", value, "train one on slices of that size; `segdiff train-segmenter --help` says how"
        )


def _takes(segmenter: Segmenter, side: int) -> bool:
    """Whether the segmenter labels images of `side` x `side` pixels: tried on one."""
    import torch

    image_1HW, modality_1 = torch.zeros(1, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    try:
        labels_1HW, _ = segmenter.predict_and_features(image_1HW, modality_1)
    except (RuntimeError, ValueError):  # levels that are joined differ in size
        return False
    return labels_1HW.shape == image_1HW.shape
