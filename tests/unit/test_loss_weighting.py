"""The weights of timesteps: as the papers give them, and alike whatever the net predicts."""

from __future__ import annotations

import pytest
import torch
from recipes_support import ALPHAS_CUMPROD
from torch import Tensor

from segdiff_dist.denoising.config import DiffusionConfig, LossWeighting, PredictionType
from segdiff_dist.denoising.loss_weighting import (
    lognormal_timesteps,
    loss_weights,
    prediction_error_per_x0_error,
    sums_by_timestep,
)
from segdiff_dist.denoising.schedule import make_scheduler
from segdiff_kernels.noising import predicted_x_0, prediction_target, q_sample

PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v", "x0")


def weights_of(weighting: LossWeighting, prediction: PredictionType, alphas_cumprod: Tensor = ALPHAS_CUMPROD) -> Tensor:
    return loss_weights(weighting, prediction, alphas_cumprod, min_snr_gamma=5.0, edm_sigma_data=0.5).double()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_error_of_x_0_shows_in_the_prediction_by_the_stated_factor(prediction: PredictionType) -> None:
    """Take a wrong x_0 at a given x_t, express both as predictions, and compare the squared errors."""
    torch.manual_seed(0)
    timestep = torch.tensor([1, 300, 700, 999])
    a = ALPHAS_CUMPROD[timestep].double()
    a4 = a[:, None, None, None]
    x_0, noise = torch.rand(4, 1, 8, 8).double() * 2 - 1, torch.randn(4, 1, 8, 8).double()
    x_t, wrong_x_0 = q_sample(x_0, noise, a), x_0 + 0.1 * torch.randn_like(x_0)
    wrong_noise = (x_t - a4.sqrt() * wrong_x_0) / (1 - a4).sqrt()
    target, wrong = (prediction_target(prediction, x, n, a) for x, n in ((x_0, noise), (wrong_x_0, wrong_noise)))
    torch.testing.assert_close(predicted_x_0(prediction, wrong, x_t, a), wrong_x_0)
    measured = (wrong - target).square().mean((1, 2, 3)) / (wrong_x_0 - x_0).square().mean((1, 2, 3))
    torch.testing.assert_close(measured, prediction_error_per_x0_error(prediction, ALPHAS_CUMPROD)[timestep])


@pytest.mark.parametrize("weighting", ["min_snr", "edm"])
def test_the_same_x_0_error_costs_the_same_whatever_is_predicted(weighting: LossWeighting) -> None:
    costs = [weights_of(weighting, p) * prediction_error_per_x0_error(p, ALPHAS_CUMPROD) for p in PREDICTIONS]
    for cost in costs[1:]:
        torch.testing.assert_close(cost, costs[0], rtol=1e-6, atol=0)


def test_weights_are_those_of_the_papers() -> None:
    snr = ALPHAS_CUMPROD.double() / (1 - ALPHAS_CUMPROD.double())
    assert (weights_of("none", "v") == 1).all()
    # Hang et al. 2023: min(SNR, gamma) / SNR for the noise, which never exceeds 1 and is 1 where SNR < gamma.
    min_snr = weights_of("min_snr", "epsilon")
    assert (min_snr[snr < 5] == 1).all()
    torch.testing.assert_close(min_snr[0], 5 / snr[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(weights_of("min_snr", "x0"), snr.clamp(max=5), rtol=1e-6, atol=0)
    # Karras et al. 2022, table 1, with sigma = sqrt(1 / SNR) and sigma_data = 0.5.
    sigma = (1 / snr).sqrt()
    expected = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    torch.testing.assert_close(weights_of("edm", "x0"), expected, rtol=1e-5, atol=0)


def test_pure_noise_has_finite_weights() -> None:
    a = make_scheduler(DiffusionConfig(prediction_type="v", zero_terminal_snr=True)).alphas_cumprod
    for prediction in ("v", "x0"):
        for weighting, last in (("min_snr", 0.0), ("edm", 4.0), ("none", 1.0)):
            weights = weights_of(weighting, prediction, a)  # type: ignore[arg-type]
            assert torch.isfinite(weights).all()
            assert float(weights[-1]) == last


def test_lognormal_timesteps_have_the_wanted_noise_levels() -> None:
    position = torch.arange(20_000)
    t = lognormal_timesteps(3, position, ALPHAS_CUMPROD, -1.2, 1.2)
    assert torch.equal(t[4_000:4_010], lognormal_timesteps(3, position[4_000:4_010], ALPHAS_CUMPROD, -1.2, 1.2))
    log_sigma = 0.5 * ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).log()
    drawn = log_sigma[t]
    assert abs(float(drawn.mean()) + 1.2) < 0.02
    assert abs(float(drawn.std()) - 1.2) < 0.02
    assert float((drawn < -1.2).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert 0 <= int(t.min()) <= int(t.max()) <= 999


def test_sums_by_timestep_are_of_quarters() -> None:
    error, t = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 249, 250, 999, 750])
    sums = sums_by_timestep(error, t, 1000)
    assert {name: s.tolist() for name, s in sums.items()} == {
        "loss_t_0_250": [3.0, 2.0],
        "loss_t_250_500": [4.0, 1.0],
        "loss_t_500_750": [0.0, 0.0],
        "loss_t_750_1000": [24.0, 2.0],
    }
    odd = sums_by_timestep(torch.ones(10), torch.arange(10), 10)
    assert [(name, int(s[1])) for name, s in odd.items()] == [
        ("loss_t_0_3", 3),
        ("loss_t_3_5", 2),
        ("loss_t_5_8", 3),
        ("loss_t_8_10", 2),
    ]
