"""Memory of batches: used again when nobody holds the batch, and never while somebody does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.feed.batch_memory import BatchMemory
from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Sequential, Shuffled, rank_positions, sequential_positions
from data_shards.records import Batch
from data_shards.store.shards import ShardSet

# What a consumer may keep of a batch of pixels instead of the batch itself.
KEPT: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda x: x,
    "slice": lambda x: x[1:, ..., ::2],
    "row of a row": lambda x: x[2][0],
    "other dtype": lambda x: x.view(np.int8).reshape(-1),
    "transposed": lambda x: x.swapaxes(0, 1),
    "memoryview": lambda x: x.data[3:],
    "tensor": torch.from_numpy,
    "slice of a tensor": lambda x: torch.from_numpy(x)[1:, 0],
    "storage": lambda x: torch.from_numpy(x).untyped_storage(),
    "array of a tensor": lambda x: torch.from_numpy(x).squeeze(1).numpy(),
    "dlpack": lambda x: torch.from_dlpack(np.from_dlpack(torch.from_numpy(x)).reshape(-1)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_anybody_holds_is_not_lent_again(kind: str) -> None:
    memory, shape = BatchMemory(2), (4, 1, 8, 8)
    pixels, rows = memory.lend(shape, np.dtype(np.uint8))
    for number, row in enumerate(rows):
        row[:] = number + 1
    assert pixels[:, 0, 5, 3].tolist() == [1, 2, 3, 4]
    address, kept = pixels.ctypes.data, KEPT[kind](pixels)
    del pixels
    others = [memory.lend(shape, np.dtype(np.uint8))[0] for _ in range(4)]
    assert address not in {other.ctypes.data for other in others}
    assert all(other.ctypes.data % 4096 == 0 for other in others)
    del kept
    assert memory.lend(shape, np.dtype(np.uint8))[0].ctypes.data == address


def test_a_smaller_and_a_larger_batch() -> None:
    memory = BatchMemory(1)
    for num, dtype in ((4, np.uint16), (3, np.uint16), (5, np.uint8), (40, np.uint16)):
        pixels, rows = memory.lend((num, 2, 8, 8), np.dtype(dtype))
        for number, row in enumerate(rows):
            row[:] = number
        assert (pixels.view(np.uint8) == np.arange(num).reshape(-1, 1, 1, 1)).all()
        assert len(rows) == num


@pytest.mark.parametrize("config", [LoaderConfig(), LoaderConfig(flip=True, crop="random", crop_size=24)], ids=str)
def test_a_loader_uses_memory_again_and_leaves_kept_batches_alone(shapes: Path, config: LoaderConfig) -> None:
    shards = ShardSet.open(shapes)
    order = Shuffled(shards.select(split="train"), 0)

    def batches() -> Any:
        positions = rank_positions(0, micro_batch_size=4, num_micro_batches=1, rank=0, world_size=1)
        return Loader(shards, order, positions, config, batch_size=4, seed=0)

    def dropped(batch: Batch) -> tuple[int, torch.Tensor, torch.Tensor]:
        return batch.image_BHW.data_ptr(), batch.image_BHW.clone(), batch.mask_BHW.clone()

    seen = list(map(dropped, islice(batches(), 40)))
    assert len({address for address, _, _ in seen}) <= 10
    kept = [(batch.image_BHW[1:], batch.mask_BHW.numpy()) for batch in islice(batches(), 40)]
    for (_, image, mask), (image_there, mask_there) in zip(seen, kept, strict=True):
        assert torch.equal(image[1:], image_there)
        assert np.array_equal(mask.numpy(), mask_there)


def test_a_whole_pass_can_be_kept_in_a_list(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    rows = shards.select(split="val")
    loader = Loader(shards, Sequential(rows), sequential_positions(len(rows), 2), LoaderConfig(), batch_size=2, seed=0)
    whole = list(loader)
    del loader
    gc.collect()
    masks = torch.cat([batch.mask_BHW for batch in whole])
    assert np.array_equal(masks.numpy(), np.stack([shards.read(int(row)).mask_HW for row in rows]))
