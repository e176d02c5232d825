"""Averages with power-function profiles: an update is the integral it stands for; lengths are made of others."""

from __future__ import annotations

import numpy as np
import pytest

from segdiff_dist.training import ema


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, ema.WIDEST])
def test_a_length_is_the_spread_of_its_profile(length: float) -> None:
    """sigma_rel by its definition: the standard deviation of tau / t under the profile, integrated numerically."""
    tau = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = tau ** ema.exponent(length)
    density /= density.sum()
    mean = (density * tau).sum()
    assert np.sqrt((density * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


def _averaged(weights_T: np.ndarray, length: float, images: int) -> dict[int, float]:
    average, found = 0.0, {}
    for step, weight in enumerate(weights_T, start=1):
        kept = ema.decay(length, step * images, images)
        average = kept * average + (1 - kept) * weight
        found[step * images] = average
    return found


@pytest.mark.parametrize("length", [0.05, 0.1])
def test_the_updates_add_up_to_the_integral(length: float) -> None:
    weights_T = np.sin(np.linspace(0, 9, 4_000)) + 3
    gamma = ema.exponent(length)
    tau_T = (np.arange(4_000) + 0.5) / 4_000
    wanted = (weights_T * tau_T**gamma).sum() / (tau_T**gamma).sum()
    assert _averaged(weights_T, length, 8)[32_000] == pytest.approx(wanted, rel=1e-3)


def test_the_first_step_takes_the_weights_whole_and_batches_of_other_sizes_agree() -> None:
    assert ema.decay(0.05, 64, 64) == 0.0
    assert ema.decay(0.1, 1000, 8) * ema.decay(0.1, 992, 8) == pytest.approx(ema.decay(0.1, 1000, 16))


@pytest.mark.parametrize("wanted", [0.04, 0.07, 0.1, 0.15])
def test_other_lengths_come_out_of_two(wanted: float) -> None:
    weights_T = 5 + np.cumsum(np.random.default_rng(0).normal(size=400)) * 0.01
    taken = range(400, 3_201, 400)
    stored = [(length, t) for t in taken for length in (0.05, 0.1)]
    kept = {length: _averaged(weights_T, length, 8) for length in (0.05, 0.1)}
    share_N = ema.reconstruct(stored, (wanted, 3_200))
    made = sum(share * kept[length][t] for share, (length, t) in zip(share_N, stored, strict=True))
    spread = weights_T.std()
    assert share_N.sum() == pytest.approx(1.0)
    assert abs(made - _averaged(weights_T, wanted, 8)[3_200]) < 0.01 * spread
    assert ema.misfit(stored, (wanted, 3_200)) < 0.05
    # From the end alone there is no making a wider one.
    assert ema.misfit([(0.05, 3_200)], (0.2, 3_200)) > 0.5
