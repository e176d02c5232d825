"""One evaluation of a run, with the segdiff that PYTHONPATH names: prints the CPU seconds of its tasks and of its
summary.

A worker's tasks and the driver's sums in this process, without Ray, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import zarr

from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.measure.summary import Evaluated, summarise
from segdiff_dist.evaluation.measure.worker import Chunk, Evaluator, Inputs
from segdiff_dist.evaluation.metrics.sums import Interval
from segdiff_dist.sampling.store import SampleStore

_ITEMS = 64


def cpu_seconds(run: Path) -> tuple[float, float]:
    """CPU seconds of all tasks, and of the summary, on one thread; not of opening the networks."""
    torch.set_num_threads(1)
    store = SampleStore.open(run / "samples")
    shards = ShardSet.open(store.job["shards"])
    num, predictions = len(store), run / "evaluation" / "predictions.zarr"
    group = zarr.create_group(predictions)
    for side in ("real", "gen"):
        group.create_array(side, shape=store.image.shape, chunks=(16, *store.image.shape[1:]), dtype="uint8")
    weights = run / "segmenter" / "weights"
    inputs = Inputs(run / "samples", str(shards.root), weights, predictions, None, None, frozenset(), False, 16, "cpu")
    evaluator = Evaluator(inputs)
    start = time.process_time()
    measured = Evaluated.empty(shards.label_table, store.items, {})
    for first in range(0, num, _ITEMS):
        last = min(first + _ITEMS, num)
        measured.add(first, last, evaluator.run(Chunk(first, last)))
    done = time.process_time()
    summarise(measured, Interval(1000, 0))
    return done - start, time.process_time() - done


if __name__ == "__main__":
    print(*cpu_seconds(Path(sys.argv[1])))
