"""`segdiff evaluate`: every sample of a run measured on Ray; rows, summary, predictions, figures and report.

RUN/evaluation/samples.parquet       a row a sample
RUN/evaluation/summary.json          value, 95 % interval and n: overall, by modality, axis and organ
RUN/evaluation/predictions.zarr      label maps of the real and the generated images, uint8 [N, H, W]
RUN/evaluation/figures/*.png, report.html
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.fan_out import Workers
from data_shards.feed.order import sample_at
from data_shards.files import remove_leftovers, unfinished_name
from data_shards.locks import lock_beside, locked
from data_shards.problems import explain_full_disk, removed_on_failure
from data_shards.store.set_index import file_sha256
from data_shards.store.shards import ShardSet
from data_shards.workers import WorkerPool
from segdiff_dist.evaluation.measure import trust
from segdiff_dist.evaluation.measure.checks import Checked, check
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.headline import headline_items
from segdiff_dist.evaluation.measure.memorisation import measure_memorisation
from segdiff_dist.evaluation.measure.partial_results import PartialResults, code_digest, samples_digest
from segdiff_dist.evaluation.measure.provenance import not_available, provenance
from segdiff_dist.evaluation.measure.publishing import finish, publish
from segdiff_dist.evaluation.measure.real_slices import RealSlices
from segdiff_dist.evaluation.measure.rows import RowWriter, with_patients
from segdiff_dist.evaluation.measure.segmenter_check import mark_unreliable
from segdiff_dist.evaluation.measure.subject import Subject
from segdiff_dist.evaluation.measure.summary import Evaluated, spread_columns, summarise
from segdiff_dist.evaluation.measure.task_runner import ITEMS_A_TASK, TaskRunner, split_up
from segdiff_dist.evaluation.measure.tool_labels import volume_tasks
from segdiff_dist.evaluation.measure.worker import Chunk, Inputs, make_worker
from segdiff_dist.evaluation.metrics.columns import SIDES
from segdiff_dist.evaluation.metrics.downloads import Weights, weights_for
from segdiff_dist.evaluation.metrics.sums import Interval
from segdiff_dist.segmentation.tools import is_tool

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "evaluation"


def measure(
    run: Path, config: EvaluateConfig, *, progress: bool = True, checked: Checked | None = None
) -> dict[str, Any]:
    """Write samples.parquet, predictions.zarr and summary.json of `run`; returns what the last of them holds.

    `checked`: what checks.check returned for the same run and config; without it the run is checked here.

    InputProblems, all at once, before any work: no or unfinished samples, samples without real images, no segmenter, a
    broken one, one for images of another size or trained on another label table, a shard set that is not that of the
    samples, weights that are missing or cannot be read; another process that writes RUN/evaluation, or a RUN that
    cannot be written. EvaluationFailed when items cannot be read.
    """
    run = Path(run)
    checked = checked or check(run, config)
    folder = run / FOLDER
    rows = unfinished_name(folder / "samples.parquet")
    with evaluation_lock(run), explain_full_disk(folder), removed_on_failure(rows):
        return _measure_checked(run, config, checked, rows, progress)


def evaluation_lock(run: Path, *, lends: bool = False) -> AbstractContextManager[None]:
    """While this process writes RUN/evaluation others are refused: data_shards.locks."""
    return locked(lock_beside(run / FOLDER), run / FOLDER, "is evaluating or drawing", lends=lends)


def _measure_checked(run: Path, config: EvaluateConfig, checked: Checked, rows: Path, progress: bool) -> dict[str, Any]:
    subject, folder = checked.subject, run / FOLDER
    folder.mkdir(exist_ok=True)
    finish(folder)
    remove_leftovers(folder)
    shared = folder / ".weights.unfinished" if config.ray_address is not None else None
    with weights_for(config.fid_weights, config.lpips_weights, shared) as weights:
        with config.workers.joined():
            pool = config.workers.pool()
            inputs = _inputs(run, config, checked, pool.device, weights)
            facts = provenance(inputs, subject) | {"segmenter_sha256": checked.segmenter_sha256}
            kept = PartialResults(folder, _dependencies(facts, inputs, subject))
            inputs = replace(inputs, predictions=kept.predictions.resolve())
            measured, trust_checks = measure_items(inputs, pool, config, subject, rows, progress, kept)
        summary = summarise(measured, Interval(config.bootstrap_samples, config.seed)) | {"trust": trust_checks}
        summary["not_available"] = (
            not_available(summary, inputs, subject, measured.distributions.failed) | weights.missing
        )
        named = {"patients": subject.patients.line} if subject.patients.line else {}
        summary["provenance"] = (
            facts
            | named
            | {
                "bootstrap": {"resamples": config.bootstrap_samples, "seed": config.seed, "unit": "patient"},
                "distribution_images": config.distribution_images,
            }
        )
    mark_unreliable(summary)
    summary["rows_sha256"] = file_sha256(rows)
    publish(folder, json.dumps(summary, indent=1, allow_nan=False) + "\n", rows, inputs.predictions)
    kept.remove()
    return summary


def _dependencies(facts: dict[str, Any], inputs: Inputs, subject: Subject) -> dict[str, Any]:
    """All that the results of tasks depend on."""
    others = {name: value for name, value in vars(inputs).items() if not isinstance(value, Path)}
    others |= {name: sorted(others[name]) for name in ("radiomics_items", "radiomics_rows")}
    return facts | others | {"samples": samples_digest(subject.store), "code": code_digest()}


def _inputs(run: Path, config: EvaluateConfig, checked: Checked, device: str, weights: Weights) -> Inputs:
    """The inputs of the workers, with absolute paths: a worker may start in another folder."""
    shards = checked.subject.shards
    return Inputs(
        samples=(run / "samples").resolve(),
        shards=None if shards is None else shards.resolved,
        segmenter=checked.segmenter if is_tool(checked.segmenter) else checked.segmenter.resolve(),
        predictions=unfinished_name((run / FOLDER).resolve() / "predictions.zarr"),
        fid_weights=weights.fid,
        lpips_weights=weights.lpips,
        radiomics_items=frozenset(headline_items(checked.store.items, config.frd_images, config.seed)),
        surface_dice=config.surface_dice,
        batch_size=config.batch_size,
        device=device,
        spacing_mm=config.spacing_mm,
        radiomics_rows=_some(checked.subject.real_rows, config.frd_images, config.seed),
        imagenet=config.imagenet,
        feature_network=None if config.feature_network is None else str(config.feature_network.resolve()),
    )


def _some(rows: Sequence[int], most: int, seed: int) -> frozenset[int]:
    """At most this many of the real slices without a counterpart, drawn by `seed`."""
    priority = sample_at(np.arange(len(rows)), max(len(rows), 1), seed)
    return frozenset(rows[i] for i in np.argsort(priority)[:most])


def measure_items(
    inputs: Inputs,
    pool: WorkerPool,
    config: EvaluateConfig,
    subject: Subject,
    rows: Path,
    progress: bool,
    kept: PartialResults,
) -> tuple[Evaluated, dict[str, Any]]:
    """Measure every chunk on a worker. Its rows go to the file `rows`, and its part of the summary into running sums.

    Returns the sums and the section "trust" of the summary.
    """
    store = subject.store
    num_items = store.items.num_rows
    chunks = [Chunk(start, min(start + ITEMS_A_TASK, num_items)) for start in range(0, num_items, ITEMS_A_TASK)]
    measured_before = [chunk for chunk in chunks if chunk in kept]
    _begin(inputs.predictions, (num_items, *store.image.shape[1:]), measured_before, progress)
    # The file of rows is closed before the workers stop; both are dropped when a task failed.
    with (
        Workers(
            make_worker(inputs),
            num_workers=pool.num_workers,
            num_tasks=len(chunks),
            gpus_per_worker=pool.gpus_per_worker,
            address=config.ray_address,
        ) as workers,
        RowWriter(rows) as writer,
    ):
        runner = TaskRunner(workers, kept)
        if is_tool(inputs.segmenter):
            _label_volumes(runner, inputs.predictions, store.items)
        measured = _measure_chunks(runner, chunks, config, subject, writer, progress)
        if subject.shards is None:
            return measured, {}
        _measure_real_alone(runner, subject, subject.shards, measured)
        queries = rows.with_name(".queries.unfinished.npz")
        return measured, _trust_checks(runner, queries, config, subject, subject.shards)


def _measure_chunks(
    runner: TaskRunner,
    chunks: list[Chunk],
    config: EvaluateConfig,
    subject: Subject,
    writer: RowWriter,
    progress: bool,
) -> Evaluated:
    """The sums over all items, whose rows go to `writer`."""
    from data_shards.progress import progress_bar

    store = subject.store
    spread = {task.ids[0]: result for task, result in runner.in_order(trust.images_of_masks(store.items))}
    items = with_patients(store.items, subject.patient_of)
    measured = Evaluated.empty(
        subject.label_table,
        items,
        spread,
        capacity=config.distribution_images,
        seed=config.seed,
        is_paired=subject.is_paired,
        patient_of={} if subject.shards is None else subject.shards.patient_of,
    )
    with progress_bar(total=items.num_rows, desc="evaluate", unit="image", disable=not progress) as bar:
        for chunk, result in runner.in_order(chunks, bar):
            measured.add(chunk.start, chunk.stop, result)
            columns = result.columns | spread_columns(spread, chunk.start, chunk.stop)
            writer.write(items.slice(chunk.start, chunk.stop - chunk.start), columns)
    return measured


def _begin(predictions: Path, shape: tuple[int, int, int], before: list[Chunk], progress: bool) -> None:
    """Create the array of label maps, or say how many images were measured before."""
    from tqdm import tqdm

    if not before:
        _create_predictions(predictions, shape)
    elif progress:
        num_before = sum(chunk.stop - chunk.start for chunk in before)
        tqdm.write(f"evaluate: {num_before:,} of {shape[0]:,} images were measured before; going on")


def _label_volumes(runner: TaskRunner, predictions: Path, items: pa.Table) -> None:
    """Label maps of a program, before the workers measure them."""
    import zarr

    group: Any = zarr.open_group(predictions, mode="r+")
    for task, labels_KHW in runner.in_order(volume_tasks(items)):
        for i, labels_HW in zip(task.ids, labels_KHW, strict=True):
            group[task.side][i] = labels_HW


def _measure_real_alone(runner: TaskRunner, subject: Subject, shards: ShardSet, measured: Evaluated) -> None:
    """Measure the real slices that have no generated counterpart."""
    tasks = [RealSlices(part) for part in split_up(list(subject.real_rows), ITEMS_A_TASK)]
    first = 0
    for task, result in runner.in_order(tasks):
        metas = [shards.meta(row) for row in task.rows]
        slices = [(meta.case_id, meta.modality, meta.axis) for meta in metas]
        measured.add_real(slices, first, len(subject.real_rows), result)
        first += len(slices)


def _trust_checks(
    runner: TaskRunner, queries: Path, config: EvaluateConfig, subject: Subject, shards: ShardSet
) -> dict[str, Any]:
    """The section "trust" of the summary; `queries`: the file that measure_memorisation writes and removes."""
    found: dict[str, Any] = {}
    if subject.is_paired:
        found["leakage"] = trust.leakage(subject.store.items, shards)
    if config.memorisation:
        found["memorisation"] = measure_memorisation(runner, queries, config, subject, shards)
    return found


def _create_predictions(path: Path, shape: tuple[int, int, int]) -> None:
    import zarr

    shutil.rmtree(path, ignore_errors=True)
    group = zarr.create_group(path)
    for side in SIDES:
        # The items of a task are complete chunks: no two workers write to the same one.
        group.create_array(side, shape=shape, chunks=(min(16, ITEMS_A_TASK), *shape[1:]), dtype="uint8", fill_value=0)
