"""The order contract: a pure function of (seed, position, number of samples), and every epoch a permutation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.order import rank_positions, sample_at, sequential_positions, uniform


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
