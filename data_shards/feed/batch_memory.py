"""Memory for batches, which is used again when nobody holds the batch any more.

malloc maps an array anew above 32 MiB, and smaller ones depending on what was freed before. The kernel then clears its
pages at their first touch: 55 microseconds for a pair of 256x256, where reading and checking it takes 20. And malloc's
large arrays begin sixteen bytes behind a page, where `preadv` takes 1 to 2 microseconds longer.

Dimensions: B batch.
"""

from __future__ import annotations

import math
import mmap
import weakref

import numpy as np


class BatchMemory:
    """Lends arrays that begin at a page. At most `most` blocks are kept; what is lent beyond them is new each time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._blocks: list[_Block] = []

    def lend(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, list[np.ndarray]]:
        """An array of any content, [B, ...], and the bytes of each of its B entries, uint8.

        It is the caller's as long as anything refers to it: a view, a slice, a tensor or a DLPack capsule of it. The
        arrays of bytes do not count: they must not outlive it.
        """
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        return self._free_block(shape[0] * row_bytes).lend(shape, dtype, row_bytes)

    def _free_block(self, num_bytes: int) -> _Block:
        # The first one that is free: so as few as possible are in use, and these stay in the processor's cache.
        for number, block in enumerate(self._blocks):
            if block.is_free():
                if len(block.memory) < num_bytes:
                    block = self._blocks[number] = _Block(num_bytes)
                return block
        block = _Block(num_bytes)
        if len(self._blocks) < self._most:
            self._blocks.append(block)
        return block


class _Block:
    """Pages, and a weak reference to the array of them that was lent."""

    def __init__(self, num_bytes: int) -> None:
        # Private: a process that forks must not share batches with its child.
        self.memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._rows: list[np.ndarray] = []
        self._row_bytes = -1
        self._lent: weakref.ref[np.ndarray] | None = None

    def is_free(self) -> bool:
        return self._lent is None or self._lent() is None

    def lend(self, shape: tuple[int, ...], dtype: np.dtype, row_bytes: int) -> tuple[np.ndarray, list[np.ndarray]]:
        # NumPy's views refer to the first array over foreign memory, this one, and all else refers to such a view.
        owner = np.frombuffer(self.memory, dtype, math.prod(shape))
        self._lent = weakref.ref(owner)
        if len(self._rows) < shape[0] or self._row_bytes != row_bytes:
            self._row_bytes = row_bytes
            self._rows = list(np.frombuffer(self.memory, np.uint8, shape[0] * row_bytes).reshape(shape[0], row_bytes))
        return owner.reshape(shape), self._rows[: shape[0]]
