"""One training and its test, in a Ray worker: rows to weights to a table of Dice on real slices.

FOLDER/NAME/weights        the segmenter
FOLDER/NAME/log.jsonl      its training, output.txt beside it
FOLDER/NAME/scores.parquet a row a real slice; exists when the training is done
Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.feed.config import LoaderConfig
from data_shards.files import new_file
from data_shards.store.shards import ShardSet
from segdiff_dist.downstream.arms import Training, rows_of
from segdiff_dist.evaluation.metrics import overlaps
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.segmenter import Segmenter

if TYPE_CHECKING:
    import pyarrow as pa

SCORES, OUTPUT = "scores.parquet", "output.txt"


@dataclass(frozen=True)
class Inputs:
    """The inputs of a worker that trains and tests. Paths and settings only, so that any machine can read it."""

    real: str
    generated: Path
    folder: Path
    """Gets one folder for each training."""
    segmenter: SegmenterConfig
    loader: LoaderConfig
    test_split: str
    device: str


class Trainer:
    """The state of a worker, which does one training after another."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.cache = inputs, inputs.loader.cache

    def __call__(self, training: Training) -> None:
        """Train, test, and write scores.parquet; it continues where an earlier try stopped."""
        folder = self.inputs.folder / training.name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "checkpoints").is_dir():  # it was finished, and its scores are gone
            shutil.rmtree(folder / "weights", ignore_errors=True)
        with _output_into(folder / OUTPUT):
            self._train(training, folder)
            table = self._test(folder / "weights")
        _write(table, folder / SCORES)
        # Checkpoints hold the optimiser's state, several times the weights. A finished training does not need them.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _train(self, training: Training, folder: Path) -> None:
        import torch

        from segdiff_dist.segmentation.task import SegmenterTask
        from segdiff_dist.tracking.config import TrackingConfig
        from segdiff_dist.tracking.tracker import Tracker
        from segdiff_dist.training.loop import TrainingJob, train

        inputs, device = self.inputs, torch.device(self.inputs.device)
        both = ShardSet.open([inputs.real, inputs.generated], cache=self.cache)
        rows = rows_of(training, both, training_rows(both, inputs.loader))
        config = replace(inputs.segmenter, train=replace(inputs.segmenter.train, seed=training.seed))
        task = SegmenterTask(both, config, inputs.loader, folder / "weights", device)
        if inputs.test_split == "val":
            task.score = None
        settings = {"training": {"name": training.name}}
        loader = config.augmented(replace(inputs.loader, mix={}))
        with Tracker(folder, TrackingConfig(enabled=False), "downstream") as tracker:
            train(TrainingJob(task, both, rows, loader, config.train, folder, tracker, device, settings))

    def _test(self, weights: Path) -> pa.Table:
        shards = ShardSet.open(self.inputs.real, cache=self.cache)
        rows = test_rows(shards, self.inputs.loader, self.inputs.test_split)
        segmenter = Segmenter.load(weights, self.inputs.device)
        return score(segmenter, shards, rows, self.inputs.segmenter.validation_batch_size)


def training_rows(shards: ShardSet, loader: LoaderConfig) -> np.ndarray:
    """The real slices that may be trained on, of the set or of the first of two."""
    rows = shards.select(split="train", modalities=loader.modalities, axes=loader.axes)
    return rows[shards.member_N[rows] == 0]


def test_rows(shards: ShardSet, loader: LoaderConfig, split: str) -> np.ndarray:
    """The real slices that all segmenters are tested on."""
    return shards.select(split=split, modalities=loader.modalities, axes=loader.axes)


def score(segmenter: Segmenter, shards: ShardSet, rows: np.ndarray, batch_size: int) -> pa.Table:
    """Dice(mask, prediction on real) of each of these slices: row, case_id, modality, axis, `dice`, the mean over the
    organs present, and `dice/ORGAN`. At 8 bits, as `dice_mask_real` of `segdiff evaluate`."""
    import pyarrow as pa
    import torch

    table, columns = shards.label_table, []
    for start in range(0, len(rows), batch_size):
        records = [shards.read(int(row)) for row in rows[start : start + batch_size]]
        image_BHW = torch.from_numpy(np.stack([record.image_uint8() for record in records]))
        modality_B = torch.tensor([segmenter.modalities.index(record.meta.modality) for record in records])
        predicted_BHW = segmenter.predict(image_BHW, modality_B).cpu().numpy()
        mask_BHW = np.stack([record.mask_HW for record in records])
        columns.append(overlaps.dice_per_class(overlaps.confusion(mask_BHW, predicted_BHW, table.num_classes)))
    dice_NK = np.concatenate(columns)
    columns_by_name: dict[str, Any] = {"row": rows}
    columns_by_name |= {name: shards.samples[name].take(rows).to_pylist() for name in ("case_id", "modality", "axis")}
    if shards.patient_of:
        columns_by_name["patient"] = shards.patients(rows)
    columns_by_name |= {"dice": overlaps.mean_over_organs(dice_NK, table.organ_ids)}
    columns_by_name |= {f"dice/{table.names[i]}": dice_NK[:, i] for i in table.organ_ids}
    return pa.table(columns_by_name)


@contextmanager
def _output_into(file: Path) -> Iterator[None]:
    """The output of this process and its children goes into `file`: Ray would copy it to the terminal of the job."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with file.open("ab") as output:
        _redirect([output.fileno()] * 2)
    try:
        yield
    finally:
        _redirect(kept)
        for descriptor in kept:
            os.close(descriptor)


def _redirect(descriptors: list[int]) -> None:
    """Let descriptors 1 and 2 be copies of these."""
    for stream, descriptor, target in zip((sys.stdout, sys.stderr), (1, 2), descriptors, strict=True):
        stream.flush()
        os.dup2(target, descriptor)


def _write(table: pa.Table, file: Path) -> None:
    import pyarrow.parquet as pq

    with new_file(file) as unfinished:
        pq.write_table(table, unfinished)
