"""`segdiff evaluate`: every sample of a run measured on Ray; rows, summary, predictions, figures and report.

RUN/evaluation/samples.parquet       a row a sample
RUN/evaluation/summary.json          value, 95 % interval and n: overall, by modality, axis and organ
RUN/evaluation/predictions.zarr      label maps of the real and the generated images, uint8 [N, H, W]
RUN/evaluation/figures/*.png, report.html
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_shards.fan_out import TaskFailure, fan_out
from data_shards.problems import InputProblems, Problem, refuse
from data_shards.store.set_index import file_sha256
from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation import inception
from segdiff_dist.evaluation.metrics import pixel_std
from segdiff_dist.evaluation.summary import HEADLINE_METRICS, Evaluated, Interval, summarise
from segdiff_dist.evaluation.summary import scalars as scalars
from segdiff_dist.evaluation.worker import SIDES, Chunk, ChunkResult, Inputs, make_worker

if TYPE_CHECKING:
    from segdiff_dist.sampling.store import SampleStore

FOLDER = "evaluation"
# Items a task takes: long enough to drown Ray's overhead, short enough for a progress bar that moves.
_ITEMS_A_TASK = 64
# More workers than this wait for each other's memory bandwidth and hold a segmenter each.
_MOST_DEFAULT_WORKERS = 16


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and on what."""

    segmenter: Path | None = None
    """Exported weights of the auxiliary segmenter; RUN/segmenter/weights by default."""
    fid_weights: Literal["download"] | Path | None = None
    """torch-fidelity's Inception weights for `fid`: their file, or 'download' for torch-fidelity's own download."""
    batch_size: int = 16
    num_workers: int | None = None
    """Ray workers; by default one a GPU, or one a core where there is none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    bootstrap_samples: int = 1000
    """How often the patients are redrawn for a 95 % interval."""
    seed: int = 0
    """Of the redrawing."""
    ray_address: str | None = None
    """A Ray cluster to join; by default Ray is started on this machine."""

    def problems(self) -> list[Problem]:
        """What is out of range or not there."""
        found = [
            Problem("config", f"evaluate.{name}", str(value), "give a whole number of at least 1")
            for name in ("batch_size", "num_workers", "bootstrap_samples")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if isinstance(self.fid_weights, Path) and not self.fid_weights.is_file():
            found.append(
                Problem("config", "evaluate.fid_weights", f"{self.fid_weights}: no such file", "give the file")
            )
        if self.fid_weights is not None and (reason := inception.missing_for_fid(str(self.fid_weights))):
            found.append(Problem("config", "evaluate.fid_weights", str(self.fid_weights), reason))
        if self.device == "cuda" and not _num_gpus():
            found.append(Problem("config", "evaluate.device", "cuda: no GPU found", "use auto or cpu"))
        return found


class EvaluationFailed(RuntimeError):
    """Some items could not be measured; says which and why. Nothing of an earlier evaluation was touched."""


def evaluate(
    run: Path, config: EvaluateConfig, *, amos_root: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Measure all samples of `run`, draw the figures, write the report; returns what summary.json holds.

    `amos_root`: the archive the shards were made from, for the figure of intensities before clipping; where it is
    not given or gone, that figure is drawn from the stored slices and says so.
    InputProblems, all at once, before any work: no or unfinished samples, no segmenter or one trained on another
    label table, a shard set that is not the one sampled from. EvaluationFailed when items cannot be read.
    """
    from segdiff_dist.evaluation.figures import draw_figures
    from segdiff_dist.evaluation.report import write_report

    run = Path(run)
    inputs, store, shards, segmenter_sha256 = _check(run, config)
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    measured = _measure(inputs, config, store, shards, progress)
    spread = dict(_spread_of_masks(store))
    summary = summarise(measured, spread, Interval(config.bootstrap_samples, config.seed))
    summary["not_available"] = _not_available(summary, config)
    summary["provenance"] = _provenance(inputs, store, shards, config)
    summary["provenance"]["segmenter_sha256"] = segmenter_sha256
    _write_samples(folder / "samples.parquet", measured, spread)
    _replace(inputs.predictions, folder / "predictions.zarr")
    # Last, so that a summary never stands beside older rows.
    _write_text(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    draw_figures(run, amos_root=amos_root, progress=progress)
    write_report(run)
    return summary


def _check(run: Path, config: EvaluateConfig) -> tuple[Inputs, SampleStore, ShardSet, str]:
    """Open everything once here, so that what is wrong is said before Ray starts; last, the segmenter's digest."""
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.segmentation import Segmenter

    problems = config.problems()
    opened: dict[str, Any] = {}

    def attempt(name: str, open_it: Any) -> None:
        try:
            opened[name] = open_it()
        except InputProblems as error:
            problems.extend(error.problems)

    weights = config.segmenter or run / "segmenter" / "weights"
    attempt("segmenter", lambda: Segmenter.load(weights))
    attempt("store", lambda: SampleStore.open(run / "samples"))
    if "store" in opened:
        attempt("shards", lambda: ShardSet.open(opened["store"].job["shards"]))
    problems += _mismatches(run, **opened)
    refuse(problems)
    inputs = Inputs(
        # Absolute, since a worker may not start in this folder.
        samples=(run / "samples").resolve(),
        shards=opened["shards"].resolved,
        segmenter=weights.resolve(),
        predictions=(run / FOLDER / "predictions.zarr.partial").resolve(),
        fid_weights=_fid_weights(config),
        batch_size=config.batch_size,
        device=("cuda" if _num_gpus() else "cpu") if config.device == "auto" else config.device,
    )
    return inputs, opened["store"], opened["shards"], opened["segmenter"].weights_sha256


def _mismatches(
    run: Path, segmenter: Any = None, store: SampleStore | None = None, shards: ShardSet | None = None
) -> Iterator[Problem]:
    if store is not None and (missing := store.missing()):
        value = f"{len(missing)} of {store.items.num_rows} not made yet"
        yield Problem(str(run / "samples"), "samples", value, "run the same `segdiff sample` again, it goes on")
    if store is not None and not store.items.num_rows:
        yield Problem(str(run / "samples"), "samples", "none", "run `segdiff sample`")
    if store is not None and shards is not None and shards.digest != store.job["shards_digest"]:
        yield Problem(shards.root, "digest", "not the shard set sampled from", "restore it, or sample again")
    if segmenter is not None and shards is not None and segmenter.label_table != shards.label_table:
        value = f"segmenter {segmenter.label_table.name!r}, shard set {shards.label_table.name!r}"
        yield Problem(shards.root, "label table", value, "train the segmenter on shards with these labels")


def _measure(inputs: Inputs, config: EvaluateConfig, store: SampleStore, shards: ShardSet, progress: bool) -> Evaluated:
    from tqdm import tqdm

    num_items = store.items.num_rows
    _create_predictions(inputs.predictions, (num_items, *store.image.shape[1:]))
    chunks = [Chunk(start, min(start + _ITEMS_A_TASK, num_items)) for start in range(0, num_items, _ITEMS_A_TASK)]
    num_gpus = _num_gpus() if inputs.device == "cuda" else 0
    num_workers = config.num_workers or num_gpus or min(os.cpu_count() or 1, _MOST_DEFAULT_WORKERS)
    results = fan_out(
        make_worker(inputs),
        chunks,
        num_workers=num_workers,
        gpus_per_worker=num_gpus / num_workers,
        address=config.ray_address,
    )
    measured = Evaluated.empty(shards.label_table, store.items.to_pydict())
    failures: list[str] = []
    waiting: dict[int, tuple[Chunk, ChunkResult]] = {}
    expected = iter(chunks)
    following = next(expected, None)
    with tqdm(total=num_items, desc="evaluate", unit="image", disable=not progress) as bar:
        for done in results:
            bar.update(done.task.stop - done.task.start)
            if isinstance(done.result, TaskFailure):
                failures.append(f"items {done.task.start} to {done.task.stop - 1}: {done.result.error}")
                continue
            waiting[done.task.start] = (done.task, done.result)
            while following is not None and following.start in waiting:
                chunk, result = waiting.pop(following.start)
                measured.add(chunk.start, chunk.stop, result)
                following = next(expected, None)
    if failures:
        raise EvaluationFailed("could not be measured: " + "; ".join(failures))
    return measured


def _create_predictions(path: Path, shape: tuple[int, int, int]) -> None:
    import zarr

    shutil.rmtree(path, ignore_errors=True)
    group = zarr.create_group(path)
    for side in SIDES:
        # A task's items are whole chunks: no two workers ever write to one.
        group.create_array(side, shape=shape, chunks=(min(16, _ITEMS_A_TASK), *shape[1:]), dtype="uint8", fill_value=0)


def _spread_of_masks(store: SampleStore) -> Iterator[tuple[int, float]]:
    """For each mask with several images in its own modality: the first image's item id and their pixel_std."""
    items = store.items.to_pydict()
    by_row: dict[int, list[int]] = {}
    for i, row in enumerate(items["row"]):
        if items["source_modality"][i] == items["target_modality"][i]:
            by_row.setdefault(row, []).append(i)
    for ids in by_row.values():
        if len(ids) >= 2:
            ids.sort(key=lambda i: items["seed_index"][i])
            images = np.stack([np.asarray(store.image[i]) for i in ids])
            spread = pixel_std(images, np.asarray(store.mask[ids[0]]))
            if np.isfinite(spread):
                yield ids[0], spread


def _not_available(summary: dict[str, Any], config: EvaluateConfig) -> dict[str, str]:
    """Metrics that have no value, each with its reason."""
    reasons = {}
    few = f"a distribution needs at least 2 samples, there are {summary['num_samples']}"
    if "segmenter_frechet" not in summary["metrics"]:
        reasons["segmenter_frechet"] = few
    if "fid" not in summary["metrics"]:
        given = None if config.fid_weights is None else str(config.fid_weights)
        reasons["fid"] = inception.missing_for_fid(given) or few
    for name in HEADLINE_METRICS:
        if name not in summary["metrics"]:
            reasons[name] = "no sample gives it a finite value"
    return reasons


def _provenance(inputs: Inputs, store: SampleStore, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:
    """What the numbers were made from, so that they can be made again."""
    weights = None
    if inputs.fid_weights is not None:
        file = inception.downloaded_weights() if inputs.fid_weights == inception.DOWNLOAD else Path(inputs.fid_weights)
        weights = {"file": file.name, "sha256": file_sha256(file)}
    return {
        "shards": shards.root,
        "shards_digest": shards.digest,
        "label_table": shards.label_table.name,
        "fid_weights": weights,
        "sample_job": store.job,
        "bootstrap": {"resamples": config.bootstrap_samples, "seed": config.seed, "unit": "patient"},
        "device": inputs.device,
        "versions": {"python": sys.version.split()[0], **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("segdiff-dist", "torch", "torchmetrics", "monai", "diffusers", "numpy", "scipy", "zarr", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write_samples(path: Path, measured: Evaluated, spread: dict[int, float]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = dict(measured.items)
    columns["headline"] = measured.headline
    columns |= measured.columns
    columns["pixel_std"] = [spread.get(i, float("nan")) for i in range(len(measured.items["item_id"]))]
    partial = path.with_suffix(".partial")
    pq.write_table(pa.table(columns), partial, compression="zstd")
    partial.replace(path)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _replace(new: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    new.rename(old)


def _fid_weights(config: EvaluateConfig) -> str | None:
    return str(config.fid_weights.resolve()) if isinstance(config.fid_weights, Path) else config.fid_weights


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
