"""Samplers against exact solutions, against diffusers' own loops, and against themselves in other batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_shards.labels import AMOS
from data_shards.records import MODALITIES
from segdiff_dist.config import validate
from segdiff_dist.denoising.conditioning import Conditions, class_ids
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.noise_levels import spaced_timesteps
from segdiff_dist.denoising.sampler_config import PRESETS, SamplerConfig, guidance_digest, guidance_problems
from segdiff_dist.denoising.samplers import clear_air, num_evaluations, sample, segmenter_guide, thresholded
from segdiff_dist.denoising.schedule import make_scheduler
from segdiff_dist.denoising.task import DiceTerm
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import save_segmenter
from segdiff_kernels.noising import prediction_target

SOLVERS = ("ddim", "dpm_solver_pp_2m", "unipc", "heun")
PROCESSES = (
    DiffusionConfig(),
    DiffusionConfig(prediction_type="v", zero_terminal_snr=True),
    DiffusionConfig(prediction_type="x0", zero_terminal_snr=True, beta_schedule="cosine"),
    DiffusionConfig(prediction_type="v", snr_shift=0.25),
)
# The toy's images: every pixel drawn from N(MEAN, STD^2).
MEAN, STD = 0.2, 0.4
Predict = Callable[[Tensor, Tensor], Tensor]


def toy(diffusion: DiffusionConfig) -> Predict:
    """The best prediction for the toy's images: x_0 is their posterior mean."""
    a_T = make_scheduler(diffusion).alphas_cumprod.double()

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        a = a_T[t][:, None, None, None]
        x_0 = (MEAN * (1 - a) + STD**2 * a.sqrt() * x_t) / (a * STD**2 + 1 - a)
        return prediction_target(diffusion.prediction_type, x_0, (x_t - a.sqrt() * x_0) / (1 - a).sqrt(), a_T[t])

    return predict


def error(diffusion: DiffusionConfig, solver: Any, evaluations: int, spacing: Any) -> float:
    """Distance from where the probability-flow ODE takes the same noise, with so many evaluations of the network."""
    steps = evaluations
    if solver == "heun":
        steps = next(n for n in range(2, evaluations) if num_evaluations(_heun(n), diffusion) >= evaluations - 1)
    config = SamplerConfig(solver=solver, num_steps=steps, timestep_spacing=spacing, clip_sample=False)
    assert num_evaluations(config, diffusion) <= evaluations
    x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = make_scheduler(diffusion).alphas_cumprod[-1].double()
    # Gaussians flow into Gaussians: a pixel stays as many deviations from the mean as it was.
    exact = MEAN + STD * (x_T - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()
    return float((sample(toy(diffusion), diffusion, config, x_T) - exact).abs().mean())


def _heun(num_steps: int) -> SamplerConfig:
    return SamplerConfig(solver="heun", num_steps=num_steps, timestep_spacing="trailing")


@pytest.mark.parametrize("diffusion", PROCESSES[:3], ids=lambda d: f"{d.prediction_type}-{d.beta_schedule}")
def test_ddim_is_of_first_order_and_the_others_of_second(diffusion: DiffusionConfig) -> None:
    for solver, (low, high) in zip(SOLVERS, [(0.8, 1.2), (1.7, 2.6), (1.7, 2.6), (1.7, 2.6)], strict=True):
        halved = error(diffusion, solver, 80, "linspace") / error(diffusion, solver, 160, "linspace")
        assert low < math.log2(halved) < high, solver


@pytest.mark.parametrize("diffusion", PROCESSES[:3], ids=lambda d: f"{d.prediction_type}-{d.beta_schedule}")
def test_higher_orders_beat_ddim_at_equal_evaluations(diffusion: DiffusionConfig) -> None:
    for solver, evaluations, gain in (("dpm_solver_pp_2m", 20, 2.0), ("unipc", 20, 2.0), ("heun", 80, 2.0)):
        ddim, other = (error(diffusion, s, evaluations, "trailing") for s in ("ddim", solver))
        assert other * gain < ddim, solver


def curved(x_t: Tensor, t: Tensor) -> Tensor:
    """Some network: not linear in x_t, and of t."""
    return torch.tanh(x_t.roll(1, -1) + 0.3 * x_t) * (0.5 + t[:, None, None, None] / 1000)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize(
    ("spacing", "steps", "eta"), [("leading", 50, 0.0), ("trailing", 20, 0.0), ("trailing", 10, 0.7)]
)
def test_ddim_is_the_loop_of_diffusers(prediction: Any, spacing: Any, steps: int, eta: float) -> None:
    from diffusers import DDIMScheduler

    zero_snr = prediction != "epsilon" and spacing == "trailing"
    diffusion = DiffusionConfig(prediction_type=prediction, zero_terminal_snr=zero_snr)
    kind = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    scheduler = DDIMScheduler(prediction_type=kind, timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr)
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    noise_S = torch.randn(steps, 2, 1, 8, 8)
    expected = x_T = torch.randn(2, 1, 8, 8)
    for i, t in enumerate(scheduler.timesteps):
        prediction_BCHW = curved(expected, t.expand(2))
        expected = scheduler.step(prediction_BCHW, t, expected, eta=eta, variance_noise=noise_S[i]).prev_sample
    sampler = SamplerConfig(num_steps=steps, timestep_spacing=spacing, eta=eta)
    found = sample(curved, diffusion, sampler, x_T, lambda i: noise_S[i])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ddim", "eta": 0.5},
        {"solver": "ddim", "dynamic_threshold": 0.9},
        {"solver": "dpm_solver_pp_2m", "clip_sample": False},
    ],
)
def test_the_fused_step_makes_the_same_images(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x_T, noise_S = torch.randn(2, 1, 4, 4), torch.randn(6, 2, 1, 4, 4)
    sampler = SamplerConfig(num_steps=6, timestep_spacing="trailing", **settings)
    diffusion = DiffusionConfig(prediction_type="v", zero_terminal_snr=True)
    plain, fused = (sample(curved, diffusion, sampler, x_T, lambda i: noise_S[i], fused=f) for f in (False, True))
    torch.testing.assert_close(fused, plain, atol=2e-4, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS[1:])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_others_are_the_loops_of_diffusers(solver: Any, prediction: Any) -> None:
    import diffusers

    name = {"dpm_solver_pp_2m": "DPMSolverMultistep", "unipc": "UniPCMultistep", "heun": "HeunDiscrete"}[solver]
    diffusion = DiffusionConfig(prediction_type=prediction)
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(20)
    torch.manual_seed(0)
    x_T = torch.randn(2, 1, 8, 8)
    # Heun's scheduler works on x_t / sqrt(a), in which its sigmas are the noise.
    expected = x_T * (1 + scheduler.sigmas[0] ** 2).sqrt() if solver == "heun" else x_T
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(expected, t)
        expected = scheduler.step(curved(x_t, t.expand(2)), t, expected).prev_sample
    sampler = SamplerConfig(solver=solver, num_steps=20, timestep_spacing="trailing", clip_sample=False)
    found = sample(curved, diffusion, sampler, x_T)
    # The last steps of such a network leave [-1, 1] far behind.
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_with_a_perfect_network_all_arrive_at_the_image(solver: Any, prediction: Any, spacing: Any) -> None:
    zero_snr = prediction != "epsilon" and spacing != "leading"
    diffusion = DiffusionConfig(prediction_type=prediction, zero_terminal_snr=zero_snr, snr_shift=0.5)
    torch.manual_seed(0)
    x_0, a_T = torch.rand(3, 1, 8, 8) * 1.8 - 0.9, make_scheduler(diffusion).alphas_cumprod

    def perfect(x_t: Tensor, t: Tensor) -> Tensor:
        a = a_T[t][:, None, None, None]
        return prediction_target(prediction, x_0, (x_t - a.sqrt() * x_0) / (1 - a).sqrt(), a_T[t])

    for steps in (2, 7):
        sampler = SamplerConfig(solver=solver, num_steps=steps, timestep_spacing=spacing)
        found = sample(perfect, diffusion, sampler, torch.randn_like(x_0))
        torch.testing.assert_close(found, x_0, atol=2e-3, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 40, 150, 1000])
def test_grids_with_alpha_bars_near_0_are_walked(solver: Any, num_steps: int) -> None:
    """The second alpha_bar of such a grid is below what stands in for the first, which is 0."""
    diffusion = DiffusionConfig(prediction_type="v", zero_terminal_snr=True, snr_shift=0.125)
    sampler = SamplerConfig(solver=solver, num_steps=num_steps, timestep_spacing="trailing")
    x_0, a_T = torch.rand(1, 1, 4, 4) * 1.8 - 0.9, make_scheduler(diffusion).alphas_cumprod

    def perfect(x_t: Tensor, t: Tensor) -> Tensor:
        a = a_T[t][:, None, None, None]
        return prediction_target("v", x_0, (x_t - a.sqrt() * x_0) / (1 - a).sqrt(), a_T[t])

    found = sample(perfect, diffusion, sampler, torch.randn_like(x_0))
    torch.testing.assert_close(found, x_0, atol=1e-2, rtol=0)


def test_timesteps_fall_for_any_number_of_steps() -> None:
    from diffusers import DDIMScheduler

    for spacing in ("leading", "trailing", "linspace"):
        for steps in (2, 3, 7, 30, 333, 600, 999, 1000):
            timestep_S = spaced_timesteps(1000, steps, spacing)  # type: ignore[arg-type]
            assert len(timestep_S) == steps
            assert (np.diff(timestep_S) < 0).all()
            assert timestep_S[-1] >= 0
            assert timestep_S[0] == 999 or spacing == "leading"
        scheduler = DDIMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(50)
        assert scheduler.timesteps.tolist() == spaced_timesteps(1000, 50, spacing).tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("diffusion", PROCESSES[:2], ids=["epsilon", "zero-snr"])
def test_evaluations_are_those_that_happen(solver: Any, diffusion: DiffusionConfig) -> None:
    calls = []

    def counted(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return curved(x_t, t)

    for steps in (1, 2, 5):
        calls.clear()
        sampler = SamplerConfig(solver=solver, num_steps=steps, timestep_spacing="trailing")
        assert sample(counted, diffusion, sampler, torch.randn(2, 1, 4, 4)).isfinite().all()
        assert calls[0] == 999
        assert len(calls) == num_evaluations(sampler, diffusion)
    guided = SamplerConfig(solver=solver, num_steps=5, timestep_spacing="trailing", guidance=2.0)
    assert num_evaluations(guided, diffusion) == 2 * len(calls)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_does_not_depend_on_its_batch(solver: Any) -> None:
    diffusion = PROCESSES[1]
    torch.manual_seed(0)
    x_T, noise_S = torch.randn(3, 1, 8, 8), torch.randn(6, 3, 1, 8, 8)
    x_T[1] *= 5  # whose threshold is another
    eta = 0.5 if solver == "ddim" else 0.0
    sampler = SamplerConfig(solver=solver, num_steps=6, timestep_spacing="trailing", eta=eta, dynamic_threshold=0.9)
    together = sample(curved, diffusion, sampler, x_T, lambda i: noise_S[i])
    for k in range(3):
        alone = sample(curved, diffusion, sampler, x_T[k : k + 1], lambda i, k=k: noise_S[i, k : k + 1])  # type: ignore[misc]
        assert torch.equal(alone[0], together[k])
    assert torch.equal(sample(curved, diffusion, sampler, x_T, lambda i: noise_S[i]), together)


def test_eta_uses_the_noise_it_is_given() -> None:
    torch.manual_seed(0)
    x_T, first_S, second_S = torch.randn(2, 1, 8, 8), torch.randn(4, 2, 1, 8, 8), torch.randn(4, 2, 1, 8, 8)
    sampler = SamplerConfig(num_steps=4, eta=1.0)
    runs = [sample(curved, DiffusionConfig(), sampler, x_T, lambda i, n=n: n[i]) for n in (first_S, second_S)]  # type: ignore[misc]
    assert not torch.equal(*runs)
    with pytest.raises(ValueError, match="step_noise"):
        sample(curved, DiffusionConfig(), sampler, x_T)
    # Where nothing is left of the image, the two parts of the noise add up to all of it, but for rounding.
    for diffusion in PROCESSES:
        for steps in (1, 2, 25):
            sampler = SamplerConfig(num_steps=steps, timestep_spacing="trailing", eta=1.0)
            found = sample(curved, diffusion, sampler, x_T, lambda i: first_S[i % 4])
            assert found.isfinite().all()


def test_dynamic_thresholding_by_hand() -> None:
    x_0 = torch.stack((torch.linspace(-2, 2, 101), torch.linspace(-0.5, 0.5, 101))).reshape(2, 1, 1, 101)
    found = thresholded(x_0, SamplerConfig(dynamic_threshold=0.5))
    # The median of |x| is 1 in the first image, so it is clipped; in the second nothing is above 1.
    torch.testing.assert_close(found[0], x_0[0].clamp(-1, 1))
    assert torch.equal(found[1], x_0[1])
    wide = thresholded(4 * x_0, SamplerConfig(dynamic_threshold=0.5))
    torch.testing.assert_close(wide[0], x_0[0].clamp(-1, 1))
    assert float(thresholded(x_0, SamplerConfig(clip_sample=False)).abs().max()) == 2.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_keep_to_their_range(solver: Any) -> None:
    def loud(x_t: Tensor, t: Tensor) -> Tensor:
        return 5 * x_t

    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"dynamic_threshold": 0.99}):
        sampler = SamplerConfig(solver=solver, num_steps=5, timestep_spacing="trailing", **settings)  # type: ignore[arg-type]
        assert sample(loud, DiffusionConfig(prediction_type="x0"), sampler, x_T).abs().max() <= 1 + 1e-5


# Segmenter guidance


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained net: whatever it takes for an organ, its gradient must lead to more of that."""
    folder = tmp_path_factory.mktemp("segmenter") / "weights"
    torch.manual_seed(0)
    config = SegmenterConfig(channels=(8, 16), first_stride=1)
    save_segmenter(folder, SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    return folder


def masks() -> Conditions:
    """A spleen on the left, a liver on the right, and a mask without organs; CT and MR."""
    mask_BHW = torch.zeros(3, 32, 32, dtype=torch.uint8)
    mask_BHW[0, 8:24, 4:12], mask_BHW[1, 8:24, 20:28] = 1, 6
    modality_B = torch.tensor([0, 1, 0])
    assert len(MODALITIES) == 2
    return Conditions(mask_BHW, class_ids(modality_B, torch.zeros(3, dtype=torch.int64)))


def dice_loss(term: DiceTerm, x_0: Tensor, conditions: Conditions) -> Tensor:
    from data_shards.records import Batch

    modality_B = conditions.class_B // 3
    return term(x_0, Batch(conditions.mask_BHW, conditions.mask_BHW, modality_B, modality_B, modality_B))[0]


def test_guidance_leads_to_the_mask(segmenter: Path) -> None:
    term, conditions = DiceTerm(segmenter, AMOS, torch.device("cpu")), masks()
    x_0 = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    guide = segmenter_guide(term, conditions, weight=0.05)
    with torch.inference_mode():
        moved = guide(x_0 + 0.0, 0.2)
    before, after = dice_loss(term, x_0, conditions), dice_loss(term, moved, conditions)
    assert (after[:2] < before[:2]).all()
    rms = (moved - x_0).square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(rms[:2], 0.05 * 0.8 * before[:2], rtol=1e-3, atol=0)
    assert torch.equal(moved[2], x_0[2])  # nothing to find in it
    assert torch.equal(guide(x_0, 1.0), x_0)  # an image without noise is left alone
    assert all(p.grad is None for p in term.net.parameters())


@pytest.mark.parametrize("solver", SOLVERS)
def test_guided_samples_hold_more_of_the_mask(segmenter: Path, solver: Any) -> None:
    term, conditions, diffusion = DiceTerm(segmenter, AMOS, torch.device("cpu")), masks(), PROCESSES[1]
    x_T = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    sampler = SamplerConfig(solver=solver, num_steps=6, timestep_spacing="trailing")
    guide = segmenter_guide(term, conditions, weight=0.1)
    plain, led = (sample(toy(diffusion), diffusion, sampler, x_T.double(), guide=g).float() for g in (None, guide))
    assert (dice_loss(term, led, conditions) < dice_loss(term, plain, conditions))[:2].all()
    assert torch.equal(led[2], plain[2])


# Configuration


def test_explicit_keys_override_the_preset_and_nothing_is_left_open() -> None:
    assert asdict(SamplerConfig().resolved()) | PRESETS["paper"] == asdict(SamplerConfig().resolved())
    fast = SamplerConfig(preset="fast", num_steps=17).resolved()
    assert (fast.num_steps, fast.solver) == (17, PRESETS["fast"]["solver"])
    assert validate(SamplerConfig, json.loads(json.dumps(asdict(fast))), "job") == fast == fast.resolved()


def test_fast_is_at_least_three_times_cheaper() -> None:
    for diffusion in PROCESSES:
        paper, fast = (num_evaluations(SamplerConfig(preset=name), diffusion) for name in ("paper", "fast"))  # type: ignore[arg-type]
        assert paper >= 3 * fast
        assert SamplerConfig(preset="fast").problems(diffusion) == []
        assert SamplerConfig(preset="best").problems(diffusion) == []


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 101}, "num_steps"),
        ({"num_steps": 1, "timestep_spacing": "leading"}, "num_steps"),
        ({"eta": 1.5}, "eta"),
        ({"eta": 0.5, "solver": "unipc"}, "eta"),
        ({"dynamic_threshold": 99.5}, "dynamic_threshold"),
        ({"guidance": -1.0}, "guidance"),
        ({"segmenter_guidance": -1.0}, "segmenter_guidance"),
        ({"segmenter_guidance": 1.0}, "guidance_segmenter"),
        ({"segmenter_guidance": 1.0, "guidance_segmenter": "nowhere"}, "guidance_segmenter"),
        ({"timestep_spacing": "leading"}, "timestep_spacing"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], field: str) -> None:
    diffusion = DiffusionConfig(num_train_timesteps=100, prediction_type="v", zero_terminal_snr=True)
    sampler = SamplerConfig(**{"timestep_spacing": "trailing", **settings})
    assert f"sample.sampler.{field}" in [problem.field for problem in sampler.problems(diffusion)]
    assert SamplerConfig(timestep_spacing="trailing").problems(diffusion) == []


def test_a_segmenter_of_other_labels_cannot_guide(segmenter: Path) -> None:
    from data_shards.labels import LABEL_TABLES

    sampler = SamplerConfig(segmenter_guidance=0.1, guidance_segmenter=str(segmenter))
    assert sampler.problems() == []
    assert guidance_problems(sampler, AMOS) == []
    other = next(table for table in LABEL_TABLES.values() if table != AMOS)
    (problem,) = guidance_problems(sampler, other)
    assert other.name in problem.remedy
    assert guidance_digest(sampler) == DiceTerm(segmenter, AMOS, torch.device("cpu")).weights_sha256
    assert guidance_digest(SamplerConfig()) is None


def test_cleared_images_are_black_where_the_mask_has_air() -> None:
    images = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 9, 9, dtype=torch.uint8)
    mask[0, 3, 4], mask[0, 4, 4] = 16, 1  # body and an organ
    mask[1, 2, 2] = 1  # no body
    found = clear_air(images, mask, 16)
    kept = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    kept[0, :, 2:6, 3:6] = kept[1] = True
    assert torch.equal(found[kept], images[kept])
    assert bool((found[~kept] == -1.0).all())
