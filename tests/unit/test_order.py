"""The order contract: a pure function of (seed, position, number of samples), and every epoch a permutation."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.feed import order as order_module
from data_shards.feed.order import (
    Mixed,
    Order,
    Sequential,
    Shuffled,
    mix_counts,
    position_of,
    rank_positions,
    sample_at,
    sequential_positions,
    uniform,
)


@settings(max_examples=60, deadline=None)
@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    positions = np.arange(num_samples) + epoch * num_samples
    assert sorted(sample_at(positions, num_samples, seed)) == list(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    first, second = sample_at(np.arange(100), 100, 0), sample_at(np.arange(100, 200), 100, 0)
    assert (first != second).mean() > 0.9
    assert (first != sample_at(np.arange(100), 100, 1)).mean() > 0.9


def test_a_position_needs_no_other() -> None:
    whole = sample_at(np.arange(1000), 77, 5)
    assert [int(sample_at(np.array([p]), 77, 5)[0]) for p in (0, 76, 77, 999)] == [
        int(whole[p]) for p in (0, 76, 77, 999)
    ]


def test_shuffled_order_is_spread_out() -> None:
    """The mean displacement of a random permutation of n is n / 3."""
    order = sample_at(np.arange(3000), 3000, 9)
    assert abs(np.abs(order - np.arange(3000)).mean() / 3000 - 1 / 3) < 0.03


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_ranks_share_out_each_step(world_size: int, num_micro_batches: int) -> None:
    micro = 48 // (world_size * num_micro_batches)
    for step in range(3):
        seen: list[int] = []
        for rank in range(world_size):
            stream = rank_positions(
                100 + step * 48,
                micro_batch_size=micro,
                num_micro_batches=num_micro_batches,
                rank=rank,
                world_size=world_size,
            )
            for _ in range(num_micro_batches):
                seen += next(stream).tolist()
        assert sorted(seen) == list(range(100 + step * 48, 100 + (step + 1) * 48))


def test_sequential_positions_end_with_a_smaller_batch() -> None:
    assert [p.tolist() for p in sequential_positions(5, 2)] == [[0, 1], [2, 3], [4]]


def test_uniform_draws_depend_on_position_alone() -> None:
    all_at_once = uniform(3, 2, np.arange(5000), 3)
    assert np.array_equal(uniform(3, 2, np.array([4321]), 3)[0], all_at_once[4321])
    assert np.allclose(all_at_once.mean(axis=0), 0.5, atol=0.02)
    assert np.abs(np.corrcoef(all_at_once.T) - np.eye(3)).max() < 0.05


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        sample_at(np.arange(3), 0, 0)


RECORDED_SMALL = [3, 9, 2, 6, 7, 0, 5, 1, 8, 4, 8, 9]
RECORDED_LARGE = [214282, 147306, 168984, 234314]
RECORDED_HUGE = [4504082124, 5952347656, 4209132152]
RECORDED_UNIFORM = [0.5794884937437544, 0.8585091179877349]


def test_recorded_values() -> None:
    """Recorded runs depend on these: an order that changes makes them irreproducible."""
    assert sample_at(np.arange(12), 10, 3).tolist() == RECORDED_SMALL
    assert sample_at(10**12 + np.arange(4), 262_145, 2**40).tolist() == RECORDED_LARGE
    assert sample_at(np.array([0, 2**33, 2**50]), 2**33, 7).tolist() == RECORDED_HUGE
    assert uniform(1, 2, np.array([5]), 2)[0].tolist() == RECORDED_UNIFORM


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.sampled_from([1, 2, 3, 5, 17, 64, 65, 1000, 4097, 65_537, 300_000, 2**28]),
    seed=st.integers(0, 2**63 - 1),
    start=st.integers(0, 2**40),
    num=st.integers(1, 300),
)
def test_the_table_gives_what_the_hashes_give(num_samples: int, seed: int, start: int, num: int) -> None:
    positions = start + np.arange(num)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "MAX_TABLE", 0)
        direct = sample_at(positions, num_samples, seed)
    assert np.array_equal(sample_at(positions, num_samples, seed), direct)


# A run in legs: after each the job may come back with another number of ranks and other batches.
Leg = tuple[int, int, int, int]  # ranks, micro-batch, accumulation, steps
LEGS = st.lists(
    st.tuples(
        st.one_of(st.integers(1, 9), st.sampled_from([64, 100, 1000, 1023, 4096])),
        st.integers(1, 5),
        st.integers(1, 3),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=4,
)


def run_in_legs(order: Order, legs: list[Leg]) -> np.ndarray:
    """The rows of the whole run by global position, each step's fetched by its ranks; what a leg hands to the next is
    images_seen. Fails where a step's ranks leave out or share a position."""
    images_seen, rows = 0, []
    for num_ranks, micro_batch, accumulation, steps in legs:
        ranks = [
            rank_positions(
                images_seen,
                micro_batch_size=micro_batch,
                num_micro_batches=accumulation,
                rank=rank,
                world_size=num_ranks,
            )
            for rank in range(num_ranks)
        ]
        for _ in range(steps):
            position_P = np.concatenate([next(rank) for rank in ranks for _ in range(accumulation)])
            row_P = order.rows_at(position_P)
            by_position = np.argsort(position_P)
            global_batch = num_ranks * micro_batch * accumulation
            assert np.array_equal(position_P[by_position], images_seen + np.arange(global_batch))
            rows.append(row_P[by_position])
            images_seen += global_batch
    return np.concatenate(rows)


@settings(max_examples=40, deadline=None)
@given(legs=LEGS, num_samples=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_any_mix_of_ranks_sees_each_epoch_once(legs: list[Leg], num_samples: int, seed: int) -> None:
    order = Shuffled(np.arange(num_samples) * 3 + 1, seed)
    seen = run_in_legs(order, legs)
    assert np.array_equal(seen, order.rows_at(np.arange(len(seen))))
    for start in range(0, len(seen), num_samples):
        epoch = seen[start : start + num_samples]
        assert len(np.unique(epoch)) == len(epoch)


@settings(max_examples=40, deadline=None)
@given(
    legs=LEGS,
    groups=st.lists(
        st.tuples(st.integers(1, 400), st.sampled_from([0.1, 0.25, 1 / 3, 1, 2, 7.5])), max_size=4, min_size=1
    ),
    seed=st.integers(0, 2**32),
)
def test_any_mix_of_ranks_sees_each_group_in_proportion(
    legs: list[Leg], groups: list[tuple[int, float]], seed: int
) -> None:
    """Over whole periods a group's samples have come equally often, or once more those of an epoch under way."""
    sizes, weights = zip(*groups, strict=True)
    rows = tuple(1000 * g + np.arange(size) for g, size in enumerate(sizes))
    order = Mixed(rows, weights, seed)
    seen = run_in_legs(order, legs)
    assert np.array_equal(seen, order.rows_at(np.arange(len(seen))))
    num_periods = len(seen) // sum(order.counts)
    seen = seen[: num_periods * sum(order.counts)]
    for g, (size, count) in enumerate(zip(sizes, order.counts, strict=True)):
        times_seen = np.bincount(seen[seen // 1000 == g] - 1000 * g, minlength=size)
        assert times_seen.sum() == num_periods * count
        epochs, under_way = divmod(num_periods * count, size)
        assert sorted(times_seen) == [epochs] * (size - under_way) + [epochs + 1] * under_way


def test_mixed_periods_differ_and_are_exact() -> None:
    order = Mixed((np.arange(100), 100 + np.arange(7)), (0.7, 0.3), 5)
    assert order.counts == (7, 3)
    group_P, ordinal_P = order.groups_at(np.arange(10_000))
    by_period = group_P.reshape(-1, 10)
    assert (by_period.sum(axis=1) == 3).all()
    assert len(np.unique(by_period, axis=0)) == 120  # all of the ways to place 3 of 10
    for g in (0, 1):
        assert np.array_equal(np.sort(ordinal_P[group_P == g]), np.arange((7_000, 3_000)[g]))


def test_groups_of_a_mixture_are_shuffled_apart() -> None:
    """Two groups of one size under one seed are not in step."""
    order = Mixed((np.arange(500), np.arange(500)), (1, 1), 0)
    group_P, ordinal_P = order.groups_at(np.arange(1000))
    row_P = order.rows_at(np.arange(1000))
    first, second = (row_P[group_P == g][np.argsort(ordinal_P[group_P == g])] for g in (0, 1))
    assert (first == second).mean() < 0.05


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((5,), (1,)),
        ((0.7, 0.3), (7, 3)),
        ((0.1, 0.2, 0.3, 0.4), (1, 2, 3, 4)),
        ((260_000, 40_000), (13, 2)),
        ((1 / 3, 2 / 3), (1, 2)),
        ((1e-4, 1), (1, 10_000)),
    ],
)
def test_weights_become_whole_numbers(weights: tuple[float, ...], counts: tuple[int, ...]) -> None:
    assert mix_counts(weights) == counts


def test_awkward_weights_are_kept_to_a_hundredth_of_the_lightest() -> None:
    weights = (3.14159, 2.71828, 1.41421, 1.0)
    shares = np.array(mix_counts(weights)) / sum(mix_counts(weights))
    assert np.allclose(shares, np.array(weights) / sum(weights), atol=0.005 / sum(weights))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((), "none"),
        ((1, 0), r"weights\[1\]: 0"),
        ((float("nan"), 1), r"weights\[0\]: nan"),
        ((1, 2, float("inf")), r"weights\[2\]: inf"),
        ((1, 1e-5), r"weights\[1\]: 1e-05 is less than 1/10000 of weights\[0\]"),
        ((1, 1, 1), "3 for 2 groups"),
    ],
)
def test_weights_that_cannot_be(weights: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixed((np.arange(3), np.arange(4)), weights, 0)


def test_empty_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"groups\[1\].*at least one"):
        Mixed((np.arange(3), np.arange(0)), (1, 1), 0)
    for kind in (lambda: Shuffled(np.arange(0), 0), lambda: Sequential(np.arange(0))):
        with pytest.raises(ValueError, match=r"rows.*at least one"):
            kind()


def test_sequential_ends() -> None:
    order = Sequential(np.array([5, 3, 8]))
    assert order.rows_at(np.array([2, 0])).tolist() == [8, 5]
    for position in (3, -1):
        with pytest.raises(ValueError, match=f"position {position}: there are 3"):
            order.rows_at(np.array([0, position]))


@pytest.mark.parametrize("num_samples", [10_000_000, 2**24, 2**24 + 1, 2**40])
def test_ten_million_samples_need_no_list_of_them(num_samples: int) -> None:
    """200,000 positions of one epoch come from 200,000 samples, each of which knows its position."""
    index_P = np.unique(np.random.default_rng(0).integers(num_samples, size=200_000))
    sample_P = sample_at(3 * num_samples + index_P, num_samples, 11)
    assert (sample_P >= 0).all()
    assert (sample_P < num_samples).all()
    assert np.array_equal(position_of(sample_P, num_samples, 11, 3), 3 * num_samples + index_P)
    tracemalloc.start()
    sample_at(5 * num_samples + np.arange(64), num_samples, 11)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("num_samples", [2, 3, 5, 10, 17, 300_000])
def test_the_first_samples_are_uniform_over_epochs_and_over_seeds(num_samples: int) -> None:
    from scipy.stats import chisquare

    bins = min(num_samples, 20)
    first_E = sample_at(np.arange(20_000) * num_samples, num_samples, 0)
    first_S = np.array([sample_at(np.zeros(1), num_samples, seed)[0] for seed in range(2_000)])
    for sample in (first_E, first_S):
        assert chisquare(np.bincount(sample * bins // num_samples, minlength=bins)).pvalue > 1e-3


@pytest.mark.parametrize("num_samples", [17, 30, 100, 1025])
def test_pairs_of_samples_are_uniform(num_samples: int) -> None:
    """What comes second does not depend on what came first."""
    from scipy.stats import chisquare

    position_E2 = np.arange(40_000)[:, None] * num_samples + np.arange(2)
    first_E, second_E = sample_at(position_E2.ravel(), num_samples, 1).reshape(-1, 2).T
    bins = min(num_samples, 30)
    distance_E = (second_E - first_E) % num_samples - 1
    together = np.bincount(first_E * bins // num_samples * bins + distance_E * bins // (num_samples - 1))
    sizes = [np.bincount(np.arange(n) * bins // n, minlength=bins) for n in (num_samples, num_samples - 1)]
    expected = np.outer(*sizes).ravel() / (num_samples * (num_samples - 1)) * 40_000
    together = np.pad(together, (0, len(expected) - len(together)))[expected > 0]
    assert chisquare(together, expected[expected > 0]).pvalue > 1e-3


def test_every_order_of_a_few_samples_comes_up() -> None:
    """Six rounds over halves of one bit are not enough for chi-square; within a few per cent they are."""
    for num_samples, num_orders in ((3, 6), (4, 24)):
        epochs = sample_at(np.arange(40_000 * num_samples), num_samples, 1).reshape(-1, num_samples)
        counts = np.unique(epochs, axis=0, return_counts=True)[1]
        assert len(counts) == num_orders
        assert np.abs(counts / counts.mean() - 1).max() < 0.15
