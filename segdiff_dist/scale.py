"""How a run scales: pure arithmetic."""

from __future__ import annotations


def most_ranks(global_batch_size: int, micro_batch_size: int, available: int) -> int:
    """The largest number of ranks, up to `available`, by which the global batch divides into whole micro-batches.

    0 where the global batch is no multiple of the micro-batch.
    """
    if global_batch_size % micro_batch_size:
        return 0
    micro_batches = global_batch_size // micro_batch_size
    return max((ranks for ranks in range(1, available + 1) if micro_batches % ranks == 0), default=0)
