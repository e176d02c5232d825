"""The batches of a validation that the ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Sequential, sequential_positions
from data_shards.records import Batch
from segdiff_dist.ranks.distributed import rank, world_size

if TYPE_CHECKING:
    import torch

    from data_shards.store.shards import ShardSet


def held_out_batches(
    shards: ShardSet, rows: np.ndarray, loader: LoaderConfig, batch_size: int, device: torch.device
) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches of the slices `rows`, without augmentation, and whether each counts.

    With sharded weights every rank must call the network equally often. So a rank with a batch less repeats one, which
    does not count.
    """
    all_positions = list(sequential_positions(len(rows), min(batch_size, len(rows))))
    mine = all_positions[rank() :: world_size()]
    most = -(-len(all_positions) // world_size())
    plain = LoaderConfig(crop_size=loader.crop_size, num_threads=loader.num_threads, on_corrupt=loader.on_corrupt)
    positions = iter([*mine, *all_positions[: most - len(mine)]])
    size = min(batch_size, len(rows))
    batches = Loader(shards, Sequential(rows), positions, plain, batch_size=size, seed=0, device=device)
    for number, batch in enumerate(batches):
        yield batch, number < len(mine)
