"""The data path once, with the segdiff that PYTHONPATH names: prints units done and the CPU seconds that they took.

    prepare ARCHIVE: headers checked, volumes cut, slices written, a shard written; slices
    load SET PAIRS: batches of the loader, in order of the shuffle; pairs

Everything in this process, without Ray or workers, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np

_BATCH = 32
_BATCHES_BEFORE = 8


def prepare_archive(archive: Path) -> tuple[int, float]:
    """Slices of all volumes, and the CPU seconds from headers to shards."""
    import webdataset
    from scipy import ndimage, sparse

    del webdataset, ndimage, sparse  # loaded before the clock runs
    from data_shards.ingest import case_slices, partials
    from data_shards.ingest.archive import read_archive
    from data_shards.ingest.prepare import PrepareConfig, check
    from data_shards.store.shard_writer import ShardTask, write_shard

    config, folder = PrepareConfig(), Path(tempfile.mkdtemp(dir=archive.parent))
    num_slices, start = 0, time.process_time()
    check(archive, folder / "set", config)
    for case in read_archive(archive):
        partial = folder / case.case_id
        slices = ((one.meta, config.format.payloads(one)) for one in case_slices.slices_of(case, config, None))
        partials.write_partial(partial, slices, "stamp")
        num = partials.summarise(partial).num_samples
        run = partials.PartialRun(partial, 0, num, "stamp", config.format)
        (folder / f"{case.case_id}-shards" / ".done").mkdir(parents=True)
        write_shard(ShardTask(folder / f"{case.case_id}-shards", "train", 0, config.format, (run,)), run.samples())
        num_slices += num
    seconds = time.process_time() - start
    shutil.rmtree(folder)
    return num_slices, seconds


def load_set(path: Path, num_pairs: int) -> tuple[int, float]:
    """Pairs of image and mask, and the CPU seconds of all threads, once batches that were made ahead are consumed."""
    from data_shards.feed.config import LoaderConfig
    from data_shards.feed.loader import Loader
    from data_shards.feed.order import Shuffled
    from data_shards.store.shards import ShardSet

    shards = ShardSet.open(path)
    order = Shuffled(shards.select(split="train"), 0)
    positions = (np.arange(step * _BATCH, (step + 1) * _BATCH) for step in count())
    batches = iter(Loader(shards, order, positions, LoaderConfig(), batch_size=_BATCH, seed=0))
    for _ in range(_BATCHES_BEFORE):
        next(batches)
    done, start = 0, time.process_time()
    for _ in range(num_pairs // _BATCH):
        done += len(next(batches))
    seconds = time.process_time() - start
    batches.close()
    return done, seconds


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    print(*(prepare_archive(folder) if what == "prepare" else load_set(folder, int(sys.argv[3]))))
