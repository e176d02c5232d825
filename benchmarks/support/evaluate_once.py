"""One evaluation of a run in pieces, with the segdiff that PYTHONPATH names, so that two codes can take turns.

Each line of stdin asks for the next so many triples, or for the `summary`. Each answer is the CPU seconds that it took.
A worker's tasks and the driver's sums in this process, without Ray, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import zarr

from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.measure.summary import Evaluated, summarise
from segdiff_dist.evaluation.measure.worker import Chunk, Evaluator, Inputs
from segdiff_dist.evaluation.metrics.sums import Interval
from segdiff_dist.sampling.store import SampleStore

_ITEMS = 64


def cpu_seconds(run: Path, pieces: Iterable[str]) -> Iterator[float]:
    """CPU seconds of each piece on one thread; not of opening the networks."""
    torch.set_num_threads(1)
    store = SampleStore.open(run / "samples")
    shards = ShardSet.open(store.job["shards"])
    predictions = Path(tempfile.mkdtemp(dir=run)) / "predictions.zarr"
    group = zarr.create_group(predictions)
    for side in ("real", "gen"):
        group.create_array(side, shape=store.image.shape, chunks=(16, *store.image.shape[1:]), dtype="uint8")
    weights = run / "segmenter" / "weights"
    inputs = Inputs(run / "samples", str(shards.root), weights, predictions, None, None, frozenset(), False, 16, "cpu")
    evaluator, done = Evaluator(inputs), 0
    measured = Evaluated.empty(shards.label_table, store.items, {})
    for piece in pieces:
        start = time.process_time()
        if piece.strip() == "summary":
            summarise(measured, Interval(1000, 0))
        else:
            end = done + int(piece)
            for first in range(done, end, _ITEMS):
                last = min(first + _ITEMS, end)
                measured.add(first, last, evaluator.run(Chunk(first, last)))
            done = end
        yield time.process_time() - start


if __name__ == "__main__":
    for seconds in cpu_seconds(Path(sys.argv[1]), sys.stdin):
        print(seconds, flush=True)
