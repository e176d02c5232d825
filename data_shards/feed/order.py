"""The order of samples: pure functions of (seed, position, number of samples) alone.

A run is one endless sequence of positions 0, 1, 2, ... Epoch e holds positions e*n to (e+1)*n - 1 and is a true
permutation of the n samples, computed in O(1) a position by a keyed Feistel network with cycle walking (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains"), so nothing is stored and nothing depends on ranks.
torch.randperm and the shuffles of MosaicML streaming and WebDataset are not used: they hold the order of an epoch or a
buffer in memory, or depend on the number of ranks, so that a resumed run must replay it.

An Order gives the row of a shard set at each position. Mixing gives every group of rows such a sequence and interleaves
these. Dimensions: P positions, G groups, R rows, E epochs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, islice
from typing import Protocol

import numpy as np

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1
# SplitMix64's constants (Steele et al. 2014).
_GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2 = (
    np.array(x, np.uint64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_SHIFT_30, _SHIFT_27, _SHIFT_31 = (np.array(x, np.uint64) for x in (30, 27, 31))
# Entries a round of a table: the table takes 0.8 MB, enough for one epoch of 268 million samples.
MAX_TABLE = 1 << 14
# With at most this many values left to walk, Python is faster than NumPy; measured.
_FEW = 16
# Batches whose rows are looked up together.
_BATCHES_AT_ONCE = 4

# Streams keep draws for different purposes independent under one seed.
STREAM_ORDER = 1
STREAM_AUGMENT = 2
STREAM_SLOTS = 3
STREAM_GROUP = 4

# Largest ratio of two weights. A sample of the lightest group then comes once in 10,000; a larger ratio is a typing
# error.
_MAX_WEIGHT_RATIO = 10_000
# If exact proportions need more samples than this, weights are rounded to a hundredth of the lightest.
_MAX_PERIOD = 100_000


class Order(Protocol):
    """The row at each position of an endless run: a pure function, the same on every rank."""

    num_samples: int
    """Number of different rows, which is the length of one epoch."""

    def rows_at(self, position_P: np.ndarray) -> np.ndarray:
        """int64 [P] rows of the shard set for int64 [P] positions, in any order."""

    def stand_ins(self, position_P: np.ndarray, attempt: int) -> np.ndarray | None:
        """int64 [P] rows to use instead of unreadable rows at these positions: the rows at the same place `attempt`
        epochs later, in a mix of the same group. None if there is no replacement."""


class Shuffled:
    """Every row once an epoch, in a different order each epoch."""

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        self._rows, self._seed = _checked_rows(rows, "rows"), seed
        self.num_samples = len(self._rows)

    def rows_at(self, position_P: np.ndarray) -> np.ndarray:
        """See Order."""
        return self._rows[sample_at(position_P, self.num_samples, self._seed)]

    def stand_ins(self, position_P: np.ndarray, attempt: int) -> np.ndarray:
        """See Order."""
        return self.rows_at(np.asarray(position_P, dtype=np.int64) + attempt * self.num_samples)


class Sequential:
    """The rows in the given order, once: for evaluation."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = _checked_rows(rows, "rows")
        self.num_samples = len(self._rows)

    def rows_at(self, position_P: np.ndarray) -> np.ndarray:
        """See Order. Raises ValueError for a position outside of the rows."""
        position_P = np.asarray(position_P, dtype=np.int64)
        outside_P = position_P[(position_P < 0) | (position_P >= self.num_samples)]
        if len(outside_P):
            raise ValueError(f"position {outside_P[0]}: there are {self.num_samples} samples, each seen once")
        return self._rows[position_P]

    def stand_ins(self, position_P: np.ndarray, attempt: int) -> None:
        """See Order. A single pass leaves unreadable rows out, since no row may be seen twice."""
        return


class Mixed:
    """Groups of rows in exact proportions; each group has its own epochs.

    The weights become whole numbers (`counts`), and every period of sum(counts) positions holds counts[g] samples of
    group g, at places that change from period to period. So position p is the q-th sample of a group, computed in O(1),
    and that group's q-th sample is the one that a run over the group alone would see: a permutation an epoch, for any
    ranks.

    Groups of very different sizes: an epoch of a group takes num_rows / share positions. So 1,000 MR slices at half of
    the mixture with 100,000 CT slices are seen 100 times while the CT is seen once. Weights in proportion to the sizes
    give the proportions of Shuffled; their square roots are a usual compromise. Raises ValueError for an empty group,
    and for a weight that is not a positive finite number or 10,000 times below another.
    """

    def __init__(self, groups: tuple[np.ndarray, ...], weights: tuple[float, ...], seed: int) -> None:
        self.counts = mix_counts(weights)
        if len(groups) != len(weights):
            raise ValueError(f"weights: {len(weights)} for {len(groups)} groups; give one for each")
        self._groups = [_checked_rows(rows, f"groups[{g}]") for g, rows in enumerate(groups)]
        self._ends_G = np.cumsum(self.counts)
        self._period = int(self._ends_G[-1])
        self._slot_seed = int(hash_u64(seed, STREAM_SLOTS, np.zeros(1))[0])
        self._seeds = [int(x) for x in hash_u64(seed, STREAM_GROUP, np.arange(len(groups)))]
        self.num_samples = sum(len(rows) for rows in self._groups)

    def rows_at(self, position_P: np.ndarray) -> np.ndarray:
        """See Order."""
        return self.stand_ins(position_P, 0)

    def stand_ins(self, position_P: np.ndarray, attempt: int) -> np.ndarray:
        """See Order."""
        group_P, ordinal_P = self.groups_at(position_P)
        row_P = np.empty_like(ordinal_P)
        for g, (rows, seed) in enumerate(zip(self._groups, self._seeds, strict=True)):
            at = np.flatnonzero(group_P == g)
            row_P[at] = rows[sample_at(ordinal_P[at] + attempt * len(rows), len(rows), seed)]
        return row_P

    def groups_at(self, position_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [P], int64 [P]: the group at each position, and the index in the group's own sequence."""
        position_P = np.asarray(position_P, dtype=np.int64)
        slot_P = sample_at(position_P, self._period, self._slot_seed)
        group_P = np.searchsorted(self._ends_G, slot_P, side="right")
        count_P = np.asarray(self.counts)[group_P]
        return group_P, position_P // self._period * count_P + slot_P - (self._ends_G[group_P] - count_P)


def mix_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in proportion to the weights: (0.7, 0.3) -> (7, 3). Raises ValueError, see Mixed."""
    if not weights:
        raise ValueError("weights: none; give one for each group")
    for g, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weights[{g}]: {weight}; give a finite number above 0")
    lightest = min(weights)
    for g, weight in enumerate(weights):
        if weight > _MAX_WEIGHT_RATIO * lightest:
            at = list(weights).index(lightest)
            raise ValueError(f"weights[{at}]: {lightest} is less than 1/{_MAX_WEIGHT_RATIO} of weights[{g}]: {weight}")
    # A thousand: distinguishes 0.333 from 1/3, and ignores the rounding of decimal numbers to binary ones.
    ratios = [Fraction(weight / lightest).limit_denominator(1000) for weight in weights]
    scale = math.lcm(*(ratio.denominator for ratio in ratios))
    counts = [int(ratio * scale) for ratio in ratios]
    if sum(counts) > _MAX_PERIOD:
        counts = [round(100 * weight / lightest) for weight in weights]
    common = math.gcd(*counts)
    return tuple(count // common for count in counts)


def sample_at(position_P: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """The sample index in [0, num_samples) at each global position (int64 [P], any order).

    Each sample is equally likely at each position; pairs of samples too, from 17 samples on (with fewer, some
    orders come up to a third more often than others).
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples}; there must be at least one sample")
    epoch_P, index_P = np.divmod(np.asarray(position_P, dtype=np.int64), num_samples)
    if not len(index_P):
        return index_P
    half_bits = _half_bits(num_samples)
    first, last = int(epoch_P.min()), int(epoch_P.max())
    if (last - first + 1) << half_bits <= MAX_TABLE:
        table = _round_table(seed, first, last, half_bits)
        return _walk_by_table(index_P, epoch_P - first, table, num_samples, half_bits)
    key_P = hash_u64(seed, STREAM_ORDER, epoch_P)
    value_P = _feistel(index_P.astype(np.uint64), key_P, half_bits)
    outside_P = np.flatnonzero(value_P >= num_samples)
    while len(outside_P):  # walks four steps on average at most: the domain is less than four times num_samples
        value_P[outside_P] = _feistel(value_P[outside_P], key_P[outside_P], half_bits)
        outside_P = outside_P[value_P[outside_P] >= num_samples]
    return value_P.astype(np.int64)


def position_of(sample_P: np.ndarray, num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The inverse of sample_at within one epoch: the global position (int64 [P]) at which each sample comes in it."""
    half_bits = _half_bits(num_samples)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    key = hash_u64(seed, STREAM_ORDER, np.array([epoch]))
    value_P, inside_P = np.asarray(sample_P).astype(np.uint64), np.zeros(len(sample_P), bool)
    while not inside_P.all():
        left_P, right_P = value_P >> shift, value_P & mask
        for round_index in reversed(range(_ROUNDS)):
            left_P, right_P = right_P ^ _round(left_P, key, round_index, mask), left_P
        value_P = np.where(inside_P, value_P, left_P << shift | right_P)
        inside_P = value_P < num_samples
    return epoch * num_samples + value_P.astype(np.int64)


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


def with_rows(positions: Iterable[np.ndarray], order: Order) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The positions of each batch, and their rows. A few batches are looked up at once: for one of 32 samples, NumPy's
    fixed costs are a microsecond a sample."""
    batches = iter(positions)
    while together := list(islice(batches, _BATCHES_AT_ONCE)):
        row_P = order.rows_at(np.concatenate(together))
        ends = list(accumulate(map(len, together)))
        yield from ((p, row_P[end - len(p) : end]) for p, end in zip(together, ends, strict=True))


def uniform(seed: int, stream: int, position_P: np.ndarray, num: int) -> np.ndarray:
    """float64 [P, num] in [0, 1), a pure function of (seed, stream, position): the draws of an augmentation."""
    stream_C1 = stream * 1000 + np.arange(num)[:, None]
    return (hash_u64(seed, stream_C1, position_P) >> np.uint64(11)).T * 2.0**-53


def hash_u64(seed: int, stream: int | np.ndarray, value_P: np.ndarray) -> np.ndarray:
    """uint64 [P]: SplitMix64's finaliser (Steele et al. 2014) over seed, stream and value, which are broadcast."""
    base = _mix(np.asarray([seed & _MASK_64], dtype=np.uint64))
    base = _mix(base ^ np.asarray(stream).astype(np.uint64))
    return _mix(base ^ np.asarray(value_P).astype(np.uint64))


def _checked_rows(rows: np.ndarray, name: str) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.int64)
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"{name}: {rows.shape} rows; there must be at least one, in one dimension")
    return rows


def _half_bits(num_samples: int) -> int:
    """Bits of either half of a value in the Feistel network, which permutes the numbers below 2^(2 half_bits)."""
    return max(1, ((num_samples - 1).bit_length() + 1) // 2)


def _feistel(value_P: np.ndarray, key_P: np.ndarray, half_bits: int) -> np.ndarray:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left_P, right_P = value_P >> shift, value_P & mask
    for round_index in range(_ROUNDS):
        left_P, right_P = right_P, left_P ^ _round(right_P, key_P, round_index, mask)
    return (left_P << shift) | right_P


def _round(right_P: np.ndarray, key_P: np.ndarray, round_index: int, mask: np.uint64) -> np.ndarray:
    return _mix(key_P ^ _mix(right_P ^ np.uint64(round_index << 32))) & mask


@functools.lru_cache(maxsize=16)
def _round_table(seed: int, first_epoch: int, last_epoch: int, half_bits: int) -> np.ndarray:
    """int64 [epochs, rounds, 2^half_bits]: the round function for every right half. Six numbers for each of about
    sqrt(num_samples) to 2 sqrt(num_samples) halves an epoch, for batch after batch of the same epoch."""
    key_E1 = hash_u64(seed, STREAM_ORDER, np.arange(first_epoch, last_epoch + 1))[:, None]
    right_N, mask = np.arange(1 << half_bits, dtype=np.uint64), np.uint64((1 << half_bits) - 1)
    rounds = [_round(right_N, key_E1, round_index, mask) for round_index in range(_ROUNDS)]
    return np.stack(rounds, axis=1).astype(np.int64)


def _walk_by_table(
    value_P: np.ndarray, epoch_P: np.ndarray, table: np.ndarray, num_samples: int, half_bits: int
) -> np.ndarray:
    """The same as _feistel with cycle walking, a lookup instead of two hashes a round."""
    mask, flat = (1 << half_bits) - 1, table.reshape(-1)
    rounds = [flat[round_index << half_bits :] for round_index in range(_ROUNDS)]
    base_P = epoch_P * (_ROUNDS << half_bits)
    result_P = np.empty_like(value_P)
    left_in = np.arange(len(value_P))
    while len(left_in) > _FEW:
        left_P, right_P = value_P >> half_bits, value_P & mask
        for of_round in rounds:
            at_P = right_P if len(table) == 1 else right_P + base_P
            left_P, right_P = right_P, left_P ^ of_round.take(at_P)
        value_P = (left_P << half_bits) | right_P
        result_P[left_in] = value_P
        outside_P = value_P >= num_samples
        left_in, value_P, base_P = left_in[outside_P], value_P[outside_P], base_P[outside_P]
    for at, value, base in zip(left_in.tolist(), value_P.tolist(), base_P.tolist(), strict=True):
        result_P[at] = _walk_one(value, base, flat.data, num_samples, half_bits)
    return result_P


def _walk_one(value: int, base: int, lookup: memoryview, num_samples: int, half_bits: int) -> int:
    """The same for one value: where few are left, an array's fixed costs are too high. `base`: of its epoch's table."""
    mask, step = (1 << half_bits) - 1, 1 << half_bits
    while True:
        left, right = value >> half_bits, value & mask
        for start in range(base, base + _ROUNDS * step, step):
            left, right = right, left ^ lookup[start + right]
        value = left << half_bits | right
        if value < num_samples:
            return value


def _mix(x: np.ndarray) -> np.ndarray:
    # Arrays of uint64 wrap around without a warning; scalars would not.
    x = x + _GOLDEN
    x ^= x >> _SHIFT_30
    x *= _MULTIPLIER_1
    x ^= x >> _SHIFT_27
    x *= _MULTIPLIER_2
    x ^= x >> _SHIFT_31
    return x
