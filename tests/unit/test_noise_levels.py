"""Samplers on grids of noise levels: against formulas, exact solutions, and an exact predictor of a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.noise_levels import levels_of, sigma_bounds
from segdiff_dist.denoising.process import Process, SigmaProcess, TimestepProcess, make_process
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.samplers import num_evaluations, sample

SOLVERS = ("ddim", "dpm_solver_pp_2m", "unipc", "heun")
EDM = DiffusionConfig(objective="edm", sigma_data=0.4, lognormal=(-0.4, 1.4))
FLOW = DiffusionConfig(objective="flow", lognormal=(0.0, 1.0))
DDPM = DiffusionConfig(prediction_type="v", zero_terminal_snr=True)
# The toy's images: every pixel drawn from N(MEAN, STD^2).
MEAN, STD = 0.2, 0.4
Predict = Callable[[Tensor, Tensor], Tensor]


def sigmas(sampler: SamplerConfig, diffusion: DiffusionConfig) -> list[float]:
    return [level.sigma for level in levels_of(sampler.resolved(diffusion.objective), make_process(diffusion))]


def level_of_time(process: Process, time_B: Tensor) -> Tensor:
    """ln sigma that a network gets as this timestep."""
    if isinstance(process, TimestepProcess):
        log_sigma_T = process.log_sigma_T()
        return torch.from_numpy(np.interp(time_B.numpy(), np.arange(len(log_sigma_T)), log_sigma_T))
    if process.config.objective == "flow":
        return torch.logit(time_B.double() / 1000)
    return time_B.double() / 1000 * 12 - 7


def exact_predictor(diffusion: DiffusionConfig, posterior_mean: Callable[[Tensor, float], Tensor]) -> Predict:
    """The network whose predicted x_0 is posterior_mean(x_0 + sigma noise, sigma)."""
    process = make_process(diffusion)

    def predict(input_BCHW: Tensor, time_B: Tensor) -> Tensor:
        log_sigma = min(float(level_of_time(process, time_B)[0]), 16.0)
        sigma, a = math.exp(log_sigma), 1 / (1 + math.exp(2 * log_sigma))
        x_t = input_BCHW.double() / process.scale_at(a)
        x_0 = posterior_mean(x_t / math.sqrt(a), sigma)
        if isinstance(process, SigmaProcess):
            form = process.form_at(a)
            return (x_0 - form.x0_from_x * input_BCHW) / form.x0_from_prediction
        noise = (x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a)
        return {"x0": x_0, "epsilon": noise, "v": math.sqrt(a) * noise - math.sqrt(1 - a) * x_0}[
            diffusion.prediction_type
        ]

    return predict


def gaussian_mean(x: Tensor, sigma: float) -> Tensor:
    return (MEAN * sigma**2 + STD**2 * x) / (STD**2 + sigma**2)


def error(diffusion: DiffusionConfig, sampler: SamplerConfig) -> float:
    """Distance from where the probability-flow ODE takes the same noise: a Gaussian flows into a Gaussian, and a pixel
    stays as many deviations from the mean as it was."""
    x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = sigmas(sampler, diffusion)[0]
    exact = MEAN + STD * (sigma * x_T - MEAN) / math.sqrt(STD**2 + sigma**2)
    return float((sample(exact_predictor(diffusion, gaussian_mean), diffusion, sampler, x_T) - exact).abs().mean())


# Grids


def test_karras_grid_is_equation_5_of_its_paper() -> None:
    sampler = SamplerConfig(num_steps=18, timestep_spacing="karras", sigma_min=0.002, sigma_max=80.0, rho=7.0)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    for diffusion in (EDM, FLOW, replace(DDPM, snr_shift=4.0)):
        np.testing.assert_allclose(sigmas(sampler, diffusion)[:15], expected[:15], rtol=1e-3)
    assert sigmas(replace(sampler, num_steps=1), EDM) == pytest.approx([80.0], rel=1e-4)


def test_log_snr_grid_has_even_ratios() -> None:
    found = np.array(sigmas(SamplerConfig(num_steps=9, timestep_spacing="log_snr", sigma_min=0.05), EDM))
    np.testing.assert_allclose(found[1:] / found[:-1], (0.05 / 80) ** (1 / 8), rtol=1e-2)


def test_ends_of_a_grid_are_those_of_training_where_they_are_nearer() -> None:
    grid = SamplerConfig(timestep_spacing="karras")
    assert sigma_bounds(grid, make_process(EDM)) == (0.01, 80.0)
    assert sigma_bounds(grid, make_process(replace(EDM, snr_shift=0.5))) == (0.01, 160.0)  # twice the size
    narrow = make_process(replace(EDM, lognormal=(0.0, 0.5)))
    assert sigma_bounds(grid, narrow) == pytest.approx((math.exp(-2.5), math.exp(2.5)))
    low, high = sigma_bounds(grid, make_process(DiffusionConfig()))
    assert (low, high) == (pytest.approx(0.01, rel=0.01), 80.0)  # of the linear schedule: 0.01 to 157


def test_flow_walks_t_evenly_and_shifted_for_size() -> None:
    def t_of(diffusion: DiffusionConfig, spacing: Any) -> list[float]:
        found = sigmas(SamplerConfig(num_steps=4, timestep_spacing=spacing), diffusion)
        return [1.0 if sigma > 1e6 else sigma / (1 + sigma) for sigma in found]

    assert t_of(FLOW, "trailing") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    # Esser et al. 2024, eq. 23: t' = s t / (1 + (s - 1) t), here with s = 3.
    shifted = [3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)]
    assert t_of(replace(FLOW, snr_shift=1 / 3), "trailing") == pytest.approx(shifted)


def test_models_with_timesteps_get_those_between() -> None:
    """A noise level between two timesteps is a timestep between them, where ln sigma is linear."""
    process = make_process(DiffusionConfig())
    assert isinstance(process, TimestepProcess)
    log_sigma_T = process.log_sigma_T()
    for t in (0, 17, 500, 999):
        assert process.time_at(math.exp(log_sigma_T[t])) == pytest.approx(t, abs=1e-3)
    assert process.time_at(math.exp(0.25 * log_sigma_T[400] + 0.75 * log_sigma_T[401])) == pytest.approx(400.75)


# Solvers


@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_models_with_timesteps_are_walked_on_these_grids_too(spacing: Any) -> None:
    errors = {}
    for solver in SOLVERS:
        sampler = SamplerConfig(solver=solver, num_steps=60, timestep_spacing=spacing, clip_sample=False)  # type: ignore[arg-type]
        errors[solver] = error(DDPM, sampler)
    assert errors["ddim"] < 0.05
    assert max(errors[solver] for solver in SOLVERS[1:]) < errors["ddim"] / 5


@pytest.mark.parametrize("diffusion", [EDM, FLOW], ids=["edm", "flow"])
@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_ddim_is_of_first_order_and_the_others_of_second(diffusion: DiffusionConfig, spacing: Any) -> None:
    for solver, (low, high) in zip(SOLVERS, [(0.8, 1.2), (1.6, 3.6), (1.6, 3.6), (1.6, 2.6)], strict=True):
        sampler = SamplerConfig(
            solver=solver,  # type: ignore[arg-type]
            timestep_spacing=spacing,
            clip_sample=False,
            sigma_min=0.001,  # the last step, from there to the image, is of first order
            sigma_max=40.0,
        )
        few, many = (error(diffusion, replace(sampler, num_steps=steps)) for steps in (60, 120))
        assert low < math.log2(few / many) < high, (solver, few, many)


def test_a_straight_line_is_solved_in_one_step() -> None:
    """Flow's velocity does not change along a path to one image: any step of DDIM follows it to its end."""
    x_0, x_T = torch.rand(2, 1, 4, 4) * 1.8 - 0.9, torch.randn(2, 1, 4, 4)
    for steps in (1, 3):
        sampler = SamplerConfig(num_steps=steps, timestep_spacing="trailing")
        torch.testing.assert_close(sample(lambda x, t: x_T - x_0, FLOW, sampler, x_T), x_0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("diffusion", [EDM, FLOW, DDPM], ids=["edm", "flow", "ddpm"])
def test_with_a_perfect_network_all_arrive_at_the_image(solver: Any, diffusion: DiffusionConfig) -> None:
    x_0 = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 1.8 - 0.9
    predict = exact_predictor(diffusion, lambda x, sigma: x_0)
    for steps in (1, 2, 9):
        sampler = SamplerConfig(solver=solver, num_steps=steps, timestep_spacing="karras")
        found = sample(predict, diffusion, sampler, torch.randn_like(x_0))
        torch.testing.assert_close(found.double(), x_0, atol=5e-3, rtol=0)


def test_unipc_is_four_times_nearer_to_a_mixture_on_karras_grid() -> None:
    """One dimension, two narrow modes; the flow keeps the order of its points, so quantiles are the exact solution."""
    means, width = np.array([-0.5, 0.4]), 0.05

    def mixture_mean(x: Tensor, sigma: float) -> Tensor:
        spread = math.sqrt(width**2 + sigma**2)
        logits = torch.stack([-((x - m) ** 2) / (2 * spread**2) for m in means])
        each = torch.stack([m + width**2 / spread**2 * (x - m) for m in means])
        return (logits.softmax(0) * each).sum(0)

    def exact(x_T: np.ndarray, sigma: float) -> np.ndarray:
        spread = math.sqrt(width**2 + sigma**2)
        share = np.mean([norm.cdf(sigma * x_T, m, spread) for m in means], axis=0)
        low, high = np.full_like(x_T, -2.0), np.full_like(x_T, 2.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = np.mean([norm.cdf(middle, m, width) for m in means], axis=0) < share
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return low

    x_T = norm.ppf((np.arange(400) + 0.5) / 400)
    errors = {}
    for spacing in ("trailing", "karras"):
        sampler = SamplerConfig(solver="unipc", num_steps=20, timestep_spacing=spacing, clip_sample=False)  # type: ignore[arg-type]
        noise = torch.from_numpy(x_T).reshape(1, 1, 20, 20)
        found = sample(exact_predictor(DDPM, mixture_mean), DDPM, sampler, noise).numpy().ravel()
        errors[spacing] = float(np.abs(found - exact(x_T, min(sigmas(sampler, DDPM)[0], 1e4))).mean())
    assert errors["karras"] * 4 < errors["trailing"], errors


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("diffusion", [EDM, FLOW, DDPM], ids=["edm", "flow", "ddpm"])
def test_a_shifted_level_gives_the_mean_for_more_noise(solver: Any, diffusion: DiffusionConfig) -> None:
    """One step from sigma leads to the predicted x_0 itself, here the mean for images with 1.3 sigma."""
    x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = SamplerConfig(solver=solver, num_steps=1, timestep_spacing="karras", sigma_max=0.5, clip_sample=False)
    sampler = replace(sampler, sigma_shift=1.3)
    predict = exact_predictor(diffusion, gaussian_mean)
    found = sample(predict, diffusion, sampler, x_T)
    torch.testing.assert_close(found, gaussian_mean(0.5 * x_T, 1.3 * 0.5), atol=1e-4, rtol=0)
    for outside in ((0.0, 0.4), (0.6, 2.0)):
        found = sample(predict, diffusion, replace(sampler, sigma_shift_interval=outside), x_T)
        torch.testing.assert_close(found, gaussian_mean(0.5 * x_T, 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 1.3])
@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_pp_2m"])
@pytest.mark.parametrize("diffusion", [EDM, FLOW, DDPM], ids=["edm", "flow", "ddpm"])
def test_the_fused_step_makes_the_same_images(solver: Any, diffusion: DiffusionConfig, shift: float) -> None:
    def curved(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.roll(1, -1) + 0.3 * x) * (0.5 + t[:, None, None, None] / 1000)

    x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sampler = SamplerConfig(solver=solver, num_steps=6, timestep_spacing="karras", sigma_shift=shift)
    plain, fused = (sample(curved, diffusion, sampler, x_T, fused=f) for f in (False, True))
    torch.testing.assert_close(fused, plain, atol=2e-4, rtol=0)


# Churn and guidance


def test_churn_adds_the_noise_that_it_is_given_and_keeps_the_distribution() -> None:
    noise = torch.Generator().manual_seed(1)
    x_T = torch.randn(1, 1, 100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = SamplerConfig(solver="heun", num_steps=120, timestep_spacing="karras", churn=20.0, clip_sample=False)
    predict = exact_predictor(EDM, gaussian_mean)
    found = sample(predict, EDM, sampler, x_T, lambda step: torch.randn(x_T.shape, dtype=x_T.dtype, generator=noise))
    still = sample(predict, EDM, replace(sampler, churn=0.0), x_T)
    assert float((found - still).abs().mean()) > 0.1
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.std()) == pytest.approx(STD, rel=0.03)
    with pytest.raises(ValueError, match="step_noise"):
        sample(predict, EDM, sampler, x_T)
    nowhere = replace(sampler, churn_interval=(100.0, 200.0))
    assert torch.equal(sample(predict, EDM, nowhere, x_T, lambda step: x_T), still)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("diffusion", [EDM, DDPM], ids=["edm", "ddpm"])
def test_guidance_acts_in_its_interval_alone(solver: Any, diffusion: DiffusionConfig) -> None:
    process, guided_at, plain_at = make_process(diffusion), [], []
    exact = exact_predictor(diffusion, gaussian_mean)

    def net(seen: list[float]) -> Predict:
        def predict(x: Tensor, t: Tensor) -> Tensor:
            seen.append(math.exp(float(level_of_time(process, t)[0])))
            return exact(x, t)

        return predict

    sampler = SamplerConfig(
        solver=solver, num_steps=12, timestep_spacing="karras", guidance=2.0, guidance_interval=(0.3, 5.0)
    )
    x_T = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    sample(net(guided_at), diffusion, sampler, x_T, unguided=net(plain_at))
    assert guided_at
    assert all(0.3 < sigma <= 5.0 * 1.001 for sigma in guided_at)
    assert plain_at
    assert all(sigma <= 0.3 or sigma > 5.0 * 0.999 for sigma in plain_at)
    assert num_evaluations(sampler, diffusion) == 2 * len(guided_at) + len(plain_at)
    with pytest.raises(ValueError, match="unguided"):
        sample(exact, diffusion, sampler, x_T)


# Configuration


def test_presets_go_with_every_objective() -> None:
    for objective, spacing in (("ddpm", "leading"), ("edm", "karras"), ("flow", "trailing")):
        assert SamplerConfig().resolved(objective).timestep_spacing == spacing  # type: ignore[arg-type]
    for preset in ("paper", "fast", "best"):
        for diffusion in (EDM, FLOW):
            assert SamplerConfig(preset=preset).problems(diffusion) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "diffusion", "field"),
    [
        ({"timestep_spacing": "trailing"}, EDM, "timestep_spacing"),
        ({"timestep_spacing": "leading"}, FLOW, "timestep_spacing"),
        ({"timestep_spacing": "karras", "sigma_max": 1000.0}, EDM, "sigma_max"),
        ({"timestep_spacing": "karras", "sigma_min": 0.002}, replace(EDM, lognormal=(0.0, 1.0)), "sigma_min"),
        ({"timestep_spacing": "karras", "sigma_min": 90.0}, EDM, "sigma_min"),
        ({"timestep_spacing": "karras", "sigma_max": 200.0}, DiffusionConfig(), "sigma_max"),
        ({"sigma_max": 0.0}, None, "sigma_max"),
        ({"rho": 0.0}, None, "rho"),
        ({"churn": 5.0}, None, "churn"),
        ({"solver": "heun", "churn": -1.0}, None, "churn"),
        ({"guidance_interval": (2.0, 1.0)}, None, "guidance_interval"),
        ({"churn_interval": (2.0, 1.0)}, None, "churn_interval"),
        ({"sigma_shift": 0.9}, None, "sigma_shift"),
        ({"sigma_shift_interval": (2.0, 1.0)}, None, "sigma_shift_interval"),
    ],
)
def test_what_no_net_can_be_sampled_with_is_refused(
    given: dict[str, Any], diffusion: DiffusionConfig | None, field: str
) -> None:
    found = SamplerConfig(**given).problems(diffusion)
    assert [problem.field for problem in found] == [f"sample.sampler.{field}"]
    assert found[0].remedy
