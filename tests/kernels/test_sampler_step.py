"""sampler_step against diffusers' schedulers along whole trajectories, and against float64; what it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from kernels_support import DEVICE, assert_near, fresh_generator, randn
from torch import Tensor

from segdiff_kernels.sampler_step import (
    ddim_coefficients,
    ddim_schedule,
    ddim_step,
    dynamic_limit,
    multistep_coefficients,
    multistep_schedule,
    multistep_step,
    sampler_step_reference,
)

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SHAPE = (2, 3, 7, 5)


def predict(x_BCHW: Tensor, timestep: int) -> Tensor:
    """What a net might say: bounded, and different at every pixel and timestep."""
    return torch.sin(1.7 * x_BCHW + 0.01 * timestep) * 0.9


def scheduler_settings(prediction_type: str, zero_snr: bool) -> dict[str, Any]:
    spacing = "trailing" if zero_snr else "leading"
    return {
        "prediction_type": PREDICTION_TYPES[prediction_type],
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
    }


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr", "eta", "clip"),
    [("epsilon", False, 0.0, True), ("epsilon", False, 0.7, False), ("v", True, 0.5, True), ("x0", True, 0.0, False)],
)
def test_ddim_follows_diffusers(prediction_type: str, zero_snr: bool, eta: float, clip: bool) -> None:
    generator = fresh_generator()
    scheduler = DDIMScheduler(clip_sample=clip, **scheduler_settings(prediction_type, zero_snr))
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps.tolist()
    steps = ddim_schedule(scheduler.alphas_cumprod, timesteps, prediction_type, eta)
    ours = theirs = randn(generator, *SHAPE)
    limit = torch.ones(SHAPE[0], device=DEVICE) if clip else None
    for timestep, step in zip(timesteps, steps, strict=True):
        noise = randn(generator, *SHAPE) if step.prev_from_noise else None
        ours = ddim_step(ours, predict(ours, timestep), step, noise, limit_B=limit)
        told = {"eta": eta, "variance_noise": noise if eta else None}
        if eta and noise is None:  # the last step: its noise has no variance
            told["variance_noise"] = torch.zeros_like(theirs)
        theirs = scheduler.step(predict(theirs, timestep), timestep, theirs, **told).prev_sample
        assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize(("prediction_type", "zero_snr"), [("epsilon", False), ("v", True), ("x0", False)])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_multistep_follows_diffusers(prediction_type: str, zero_snr: bool, num_steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(**scheduler_settings(prediction_type, zero_snr))
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.tolist()
    steps = multistep_schedule(scheduler.alphas_cumprod, timesteps, prediction_type)
    ours = theirs = randn(fresh_generator(), *SHAPE)
    x0 = None
    for timestep, step in zip(timesteps, steps, strict=True):
        ours, x0 = multistep_step(ours, predict(ours, timestep), x0, step)
        theirs = scheduler.step(predict(theirs, timestep), timestep, theirs).prev_sample
        assert_near(ours, theirs, 1e-4)


def test_dynamic_thresholding_is_diffusers() -> None:
    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    scheduler.set_timesteps(10)
    timestep = 500
    x_t = randn(fresh_generator(), *SHAPE) * 3
    prediction = predict(x_t, timestep)
    a_t, a_prev = scheduler.alphas_cumprod[[timestep, timestep - 100]].tolist()
    step = ddim_coefficients(a_t, a_prev, "epsilon")
    limit = dynamic_limit(x_t, prediction, step, 0.9)
    assert (limit > 1).all()
    expected = scheduler.step(prediction, timestep, x_t).prev_sample
    assert_near(ddim_step(x_t, prediction, step, limit_B=limit), expected, 1e-5)
    assert torch.equal(dynamic_limit(x_t * 1e-3, prediction * 1e-3, step, 0.9), torch.ones_like(limit))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 683), (3, 4, 32, 37)])
@pytest.mark.parametrize(
    ("dtype", "prediction_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_everything_at_once_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype, prediction_dtype: torch.dtype
) -> None:
    generator = fresh_generator()
    x_t, noise, previous = (randn(generator, *shape, dtype=dtype) for _ in range(3))
    prediction, unconditional = (randn(generator, *shape, dtype=prediction_dtype) for _ in range(2))
    limit = torch.rand(shape[0], generator=generator).to(DEVICE) + 0.5
    shared = {"unconditional_BCHW": unconditional, "guidance": 2.5, "limit_B": limit}
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in shared.items()}

    step = ddim_coefficients(0.3, 0.5, "epsilon", eta=0.5)
    found = ddim_step(x_t, prediction, step, noise, **shared)
    expected, _ = sampler_step_reference(x_t.double(), prediction.double(), step, noise_BCHW=noise.double(), **exact)
    assert (found.dtype, found.stride()) == (dtype, x_t.stride())
    assert_near(found, expected)

    step = multistep_coefficients(0.3, 0.5, 0.2, "v")
    for mine, reference in zip(
        multistep_step(x_t, prediction, previous, step, **shared),
        sampler_step_reference(x_t.double(), prediction.double(), step, previous.double(), **exact),
        strict=True,
    ):
        assert mine.dtype == dtype
        assert_near(mine, reference)


def test_the_second_order_is_of_second_order() -> None:
    """Exact data predictions of x' in lambda: halving the steps divides the error by about four, and by two in DDIM."""

    def error(num_steps: int, second_order: bool) -> float:
        # Data N(0, s^2): x0_pred = s^2 alpha / (s^2 a + 1 - a) x, and x scales with sqrt(s^2 a + 1 - a). In float64.
        s2 = 0.25
        angles = [math.pi / 2 * (1 - i / num_steps) * 0.8 + 0.1 for i in range(num_steps + 1)]
        path = [math.cos(angle) ** 2 for angle in angles]
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        x0, before = None, None
        for a_t, a_prev in itertools.pairwise(path):
            step = multistep_coefficients(a_t, a_prev, before if second_order else None, "x0")
            prediction = s2 * math.sqrt(a_t) / (s2 * a_t + 1 - a_t) * x
            x, x0 = sampler_step_reference(x, prediction, step, x0)
            before = a_t
        exact = math.sqrt((s2 * path[-1] + 1 - path[-1]) / (s2 * path[0] + 1 - path[0]))
        return abs(float(x) - exact)

    assert 1.8 < error(40, False) / error(80, False) < 2.2
    assert 3.4 < error(40, True) / error(80, True) < 4.6


def test_pure_noise_and_the_last_step() -> None:
    # From pure noise eta = 1 leaves nothing of the predicted noise. diffusers takes the root of a rounding error there.
    for a_prev in (0.0047, 0.1, 0.5):
        assert ddim_coefficients(0.0, a_prev, "v", eta=1.0)[2:4] == pytest.approx((0.0, 0.0), abs=1e-7)
        assert all(map(math.isfinite, multistep_coefficients(0.0, a_prev, None, "v")))
    # After pure noise the step before says nothing of the curve: first order.
    assert multistep_coefficients(0.2, 0.5, 0.0, "v").prev_from_previous_x0 == 0.0
    assert multistep_coefficients(0.2, 1.0, 0.1, "v")[2:] == (0.0, 0.0, 1.0, 0.0, 0.0)


def test_a_prediction_that_is_no_number_stays_so() -> None:
    x_t = torch.zeros(1, 1, 2, 2, device=DEVICE)
    prediction = torch.tensor([0.0, math.nan, math.inf, 5.0], device=DEVICE).reshape(1, 1, 2, 2)
    step = ddim_coefficients(0.5, 0.9, "x0")
    found = ddim_step(x_t, prediction, step, limit_B=torch.ones(1, device=DEVICE)).flatten()
    assert found[1].isnan()
    assert not found[[0, 3]].isnan().any()


def test_torch_library_finds_nothing_wrong() -> None:
    x_t, prediction, noise = (randn(fresh_generator(), *SHAPE) for _ in range(3))
    step = [*ddim_coefficients(0.3, 0.5, "epsilon", eta=0.5)]
    limit = torch.ones(SHAPE[0], device=DEVICE)
    torch.library.opcheck(
        torch.ops.segdiff.sampler_step.default, (x_t, prediction, None, noise, None, limit, step, 1.0, True)
    )


def test_what_it_refuses() -> None:
    x = torch.zeros(2, 3, 4, 4, device=DEVICE)
    step, noisy = ddim_coefficients(0.3, 0.5, "v"), ddim_coefficients(0.3, 0.5, "v", eta=1.0)
    second = multistep_coefficients(0.3, 0.5, 0.2, "v")
    bad = [
        ("noise: None", lambda: ddim_step(x, x, noisy)),
        ("noise: a tensor", lambda: ddim_step(x, x, step, x)),
        ("coefficients: ", lambda: ddim_step(x, x, second)),
        ("coefficients: ", lambda: multistep_step(x, x, None, noisy)),
        ("previous_x0: None", lambda: multistep_step(x, x, None, second)),
        ("unconditional: None, with guidance 2.0", lambda: ddim_step(x, x, step, guidance=2.0)),
        ("prediction: ", lambda: ddim_step(x, x[:1], step)),
        ("prediction: ", lambda: ddim_step(x, x.contiguous(memory_format=torch.channels_last), step)),
        ("prediction: requires a gradient", lambda: ddim_step(x, x.clone().requires_grad_(), step)),
        ("x_t: float64", lambda: ddim_step(x.double(), x, step)),
        ("limit: ", lambda: ddim_step(x, x, step, limit_B=torch.ones(1, device=DEVICE))),
        ("limit: float64", lambda: ddim_step(x, x, step, limit_B=torch.ones(2, device=DEVICE).double())),
        ("a_t, a_prev: ", lambda: ddim_coefficients(0.5, 0.3, "v")),
        ("a_t, a_prev: ", lambda: ddim_coefficients(float("nan"), 0.3, "v")),
        ("a_t: 0 with epsilon", lambda: ddim_coefficients(0.0, 0.3, "epsilon")),
        ("a_before: 0.4", lambda: multistep_coefficients(0.3, 0.5, 0.4, "v")),
        ("prediction_type: 'sample'", lambda: ddim_coefficients(0.3, 0.5, "sample")),
        ("eta: 2", lambda: ddim_coefficients(0.3, 0.5, "v", eta=2)),
        ("timesteps: ", lambda: ddim_schedule(torch.tensor([0.9, 0.5]), [2, 1], "v")),
        ("timesteps: ", lambda: multistep_schedule(torch.tensor([0.9, 0.5]), [], "v")),
        ("percentile: 0", lambda: dynamic_limit(x, x, step, 0)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=f"sampler_step: {message}"):
            call()


def test_without_gpu_or_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="sampler_step: device: Triton's kernels need a GPU, and this is cpu"):
        ddim_step(x, x, ddim_coefficients(0.3, 0.5, "v"))
