"""Which sample comes when: pure functions of (seed, position, number of samples), and of nothing else.

A run is one endless sequence of positions 0, 1, 2, ... Epoch e holds positions e*n to (e+1)*n - 1 and is a true
permutation of the n samples, computed in O(1) a position by a keyed Feistel network with cycle walking (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains"), so nothing is stored and nothing depends on ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1

# Streams keep draws for different purposes independent under one seed.
STREAM_ORDER = 1
STREAM_AUGMENT = 2


def sample_at(position_P: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """The sample index in [0, num_samples) at each global position (int64 [P], any order)."""
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples}; there must be at least one sample")
    position_P = np.asarray(position_P, dtype=np.int64)
    epoch_P, index_P = np.divmod(position_P, num_samples)
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    key_P = hash_u64(seed, STREAM_ORDER, epoch_P)
    value_P = _feistel(index_P.astype(np.uint64), key_P, half_bits)
    outside_P = value_P >= num_samples
    while outside_P.any():  # walks at most a few steps: the domain is less than four times num_samples
        value_P[outside_P] = _feistel(value_P[outside_P], key_P[outside_P], half_bits)
        outside_P = value_P >= num_samples
    return value_P.astype(np.int64)


def rank_positions(
    images_seen: int, *, micro_batch_size: int, num_micro_batches: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """Endless int64 [micro_batch_size] positions of one rank, from `images_seen` on.

    Each optimiser step takes the next micro_batch_size * num_micro_batches * world_size positions; micro-batch m of
    rank r is the (m * world_size + r)-th block of them. So the step's set of positions depends on its size alone.
    """
    block = np.arange(micro_batch_size, dtype=np.int64)
    while True:
        for micro in range(num_micro_batches):
            yield images_seen + (micro * world_size + rank) * micro_batch_size + block
        images_seen += micro_batch_size * num_micro_batches * world_size


def sequential_positions(num_samples: int, batch_size: int) -> Iterator[np.ndarray]:
    """Each of 0 .. num_samples - 1 once, in order; the last batch may be smaller."""
    for start in range(0, num_samples, batch_size):
        yield np.arange(start, min(start + batch_size, num_samples), dtype=np.int64)


def uniform(seed: int, stream: int, position_P: np.ndarray, num: int) -> np.ndarray:
    """float64 [P, num] in [0, 1), a pure function of (seed, stream, position): the augmentations' dice."""
    columns = [hash_u64(seed, stream * 1000 + i, position_P) for i in range(num)]
    return np.stack([(c >> np.uint64(11)) * 2.0**-53 for c in columns], axis=-1)


def hash_u64(seed: int, stream: int, value_P: np.ndarray) -> np.ndarray:
    """uint64 [P]: SplitMix64's finaliser (Steele et al. 2014) over seed, stream and value."""
    base = _mix(np.asarray([seed & _MASK_64], dtype=np.uint64))
    base = _mix(base ^ np.uint64(stream))
    return _mix(base ^ np.asarray(value_P).astype(np.uint64))


def _feistel(value_P: np.ndarray, key_P: np.ndarray, half_bits: int) -> np.ndarray:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left_P, right_P = value_P >> shift, value_P & mask
    for round_index in range(_ROUNDS):
        mixed_P = _mix(key_P ^ _mix(right_P ^ np.uint64(round_index << 32)))
        left_P, right_P = right_P, left_P ^ (mixed_P & mask)
    return (left_P << shift) | right_P


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
