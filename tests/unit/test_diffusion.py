"""The diffusion mathematics against diffusers and against cases with a known answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.schedule import make_scheduler
from segdiff_dist.pixels import to_model_range, to_uint8
from segdiff_kernels.noising import meaning, predicted_x_0, prediction_target, q_sample


def test_q_sample_and_v_agree_with_diffusers() -> None:
    torch.manual_seed(0)
    config = DiffusionConfig(prediction_type="v")
    scheduler = make_scheduler(config)
    x_0, noise, t = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    a = scheduler.alphas_cumprod[t]
    torch.testing.assert_close(q_sample(x_0, noise, a), scheduler.add_noise(x_0, noise, t))
    torch.testing.assert_close(prediction_target("v", x_0, noise, a), scheduler.get_velocity(x_0, noise, t))


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    x_0, noise = torch.ones(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for zero, expected in ((True, 0.0), (False, 1.0)):
        config = DiffusionConfig(prediction_type="v", zero_terminal_snr=zero)
        a = make_scheduler(config).alphas_cumprod[-1:]
        left = (q_sample(x_0, noise, a) - noise).abs().max()
        assert (left < 1e-4) == (expected == 0.0)


def test_schedules_are_the_published_ones() -> None:
    def alphas_cumprod(schedule: Any) -> torch.Tensor:
        return make_scheduler(DiffusionConfig(beta_schedule=schedule)).alphas_cumprod.double()

    step = torch.arange(1000, dtype=torch.float64)
    # Ho et al. 2020, section 4: betas from 1e-4 to 0.02.
    betas = 1e-4 + (0.02 - 1e-4) * step / 999
    torch.testing.assert_close(alphas_cumprod("linear"), (1 - betas).cumprod(0), rtol=1e-4, atol=0)
    # Rombach et al. 2022 take the same of their square roots.
    roots = 1e-2 + (math.sqrt(0.02) - 1e-2) * step / 999
    torch.testing.assert_close(alphas_cumprod("scaled_linear"), (1 - roots**2).cumprod(0), rtol=1e-4, atol=0)
    # Nichol and Dhariwal 2021, eq. 17, s = 0.008; their betas are capped at 0.999, which touches the last step.
    f = ((torch.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(
        0.008 / 1.008 * math.pi / 2
    ) ** 2
    torch.testing.assert_close(alphas_cumprod("cosine")[:-1], f[:-1].double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_shift_moves_log_snr_by_twice_its_logarithm(schedule: Any, zero: bool) -> None:
    """Hoogeboom et al. 2023: from 64 to 256 pixels, log SNR moves by 2 ln(64 / 256)."""
    config = DiffusionConfig(beta_schedule=schedule, prediction_type="v", zero_terminal_snr=zero)
    shifted = DiffusionConfig(beta_schedule=schedule, prediction_type="v", zero_terminal_snr=zero, snr_shift=64 / 256)
    a, b = (make_scheduler(c).alphas_cumprod.double() for c in (config, shifted))
    difference = torch.logit(b) - torch.logit(a)
    torch.testing.assert_close(difference[:-1], torch.full((999,), 2 * math.log(0.25)).double(), atol=2e-3, rtol=0)
    if zero:
        assert float(a[-1]) == float(b[-1]) == 0.0
    assert (b.diff() < 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_x_0_is_found_back(prediction: str) -> None:
    torch.manual_seed(0)
    a = make_scheduler(DiffusionConfig()).alphas_cumprod[torch.tensor([0, 400, 999])]
    x_0, noise = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 1, 8, 8)
    target = prediction_target(prediction, x_0, noise, a)
    found = predicted_x_0(prediction, target, q_sample(x_0, noise, a), a)
    torch.testing.assert_close(found, x_0, atol=1e-3 if prediction == "epsilon" else 1e-5, rtol=0)


def test_uint8_there_and_back() -> None:
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    x = to_model_range(image)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), image)


def test_both_depths_fill_the_model_s_range() -> None:
    """A 16-bit grey value that is 257 times an 8-bit one is the same brightness."""
    eight = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    sixteen = (eight.to(torch.int32) * 257).to(torch.uint16)
    x = to_model_range(sixteen)
    assert x.dtype == torch.float32
    assert x.shape == (1, 1, 16, 16)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    torch.testing.assert_close(x, to_model_range(eight))


def test_epsilon_with_zero_terminal_snr_is_refused() -> None:
    assert DiffusionConfig(zero_terminal_snr=True).problems()[0].field == "diffusion.zero_terminal_snr"
    assert DiffusionConfig().problems() == []


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("a", [0.01, 0.5, 0.999])
def test_the_coefficients_of_a_prediction_are_those_of_its_equations(prediction: str, a: float) -> None:
    """What the fused samplers multiply by is what predicted_x_0 computes, and gives the noise back too."""
    x_0, noise = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    a_B = torch.tensor([a], dtype=torch.float64)
    x_t, p = q_sample(x_0, noise, a_B), prediction_target(prediction, x_0, noise, a_B)
    c = meaning(a, prediction)
    torch.testing.assert_close(c.x0_from_x * x_t + c.x0_from_prediction * p, predicted_x_0(prediction, p, x_t, a_B))
    torch.testing.assert_close(c.noise_from_x * x_t + c.noise_from_prediction * p, noise)
