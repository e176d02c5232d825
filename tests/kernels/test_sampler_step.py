"""sampler_step against diffusers' schedulers along whole trajectories, and against float64; what it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from kernels_support import DEVICE, assert_near, fresh_generator, randn
from torch import Tensor

from segdiff_kernels.noising import LinearPrediction
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
        options = {"eta": eta, "variance_noise": noise if eta else None}
        if eta and noise is None:  # the last step: its noise has no variance
            options["variance_noise"] = torch.zeros_like(theirs)
        theirs = scheduler.step(predict(theirs, timestep), timestep, theirs, **options).prev_sample
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


def named(prediction_type: str, a: float) -> LinearPrediction:
    """A prediction type as the x_0 that it means. Salimans and Ho 2022, section 4."""
    alpha, sigma = math.sqrt(a), math.sqrt(1 - a)
    meanings = {"v": (alpha, -sigma), "x0": (0.0, 1.0), "epsilon": (1 / alpha, -sigma / alpha) if a else (0.0, 0.0)}
    return LinearPrediction(*meanings[prediction_type])


def edm(sigma: float, sigma_data: float) -> tuple[float, LinearPrediction, float]:
    """alpha_bar, what the net predicts, and its input as a multiple of x_t. Karras et al. 2022, table 1."""
    total = math.hypot(sigma, sigma_data)
    scale = math.hypot(1.0, sigma)  # x_0 + sigma noise = scale x_t
    prediction = LinearPrediction(sigma_data**2 / total**2 * scale, sigma * sigma_data / total)
    return 1.0 / scale**2, prediction, scale / total


def flow(t: float) -> tuple[float, LinearPrediction, float]:
    """The same of rectified flow, x = (1 - t) x_0 + t noise, whose net predicts noise - x_0. Liu et al. 2022."""
    scale = math.hypot(1.0 - t, t)  # x = scale x_t
    return ((1.0 - t) / scale) ** 2, LinearPrediction(scale, -t), scale


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0"])
def test_a_linear_prediction_of_a_named_type_is_that_type(prediction_type: str) -> None:
    for a_t, a_prev in ((1e-4, 0.2), (0.3, 0.5), (0.5, 1.0), (0.9999, 0.99999), (0.0, 0.1)):
        if prediction_type == "epsilon" and a_t == 0.0:  # refused by name
            continue
        linear = named(prediction_type, a_t)
        for eta in (0.0, 0.6):
            expected = ddim_coefficients(a_t, a_prev, prediction_type, eta)
            assert ddim_coefficients(a_t, a_prev, linear, eta) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        for a_before in (None, a_t / 2):
            expected = multistep_coefficients(a_t, a_prev, a_before if a_t else None, prediction_type)
            found = multistep_coefficients(a_t, a_prev, a_before if a_t else None, linear)
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0"])
def test_schedules_take_one_prediction_a_step(prediction_type: str) -> None:
    alphas_cumprod = DDIMScheduler().alphas_cumprod
    timesteps = range(999, -1, -111)
    linear = [named(prediction_type, float(alphas_cumprod[t])) for t in timesteps]
    for schedule in (ddim_schedule, multistep_schedule):
        expected = schedule(alphas_cumprod, timesteps, prediction_type)
        for found, step in zip(schedule(alphas_cumprod, timesteps, linear), expected, strict=True):
            assert found == pytest.approx(step, rel=1e-9, abs=1e-9)
    alike = multistep_schedule(alphas_cumprod, timesteps, LinearPrediction(0.0, 1.0))
    assert [step[:2] for step in alike] == [(0.0, 1.0)] * len(timesteps)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edms_preconditioning_gives_its_image_and_its_euler_step(sigma_data: float) -> None:
    """Karras et al. 2022, eq. 7 and algorithm 1, from the most noise to the least; x_t and its own form in float64."""
    generator = fresh_generator()
    for sigma, sigma_next in itertools.pairwise((500.0, 80.0, 1.0, 0.02, 0.002, 0.0)):
        x = sigma * randn(generator, *SHAPE).double() + 0.5
        prediction = randn(generator, *SHAPE).double()
        total = math.hypot(sigma, sigma_data)
        c_skip, c_out = (sigma_data / total) ** 2, sigma * sigma_data / total
        image = c_skip * x + c_out * prediction
        expected = x + (sigma_next - sigma) * (x - image) / sigma

        a, meaning, _ = edm(sigma, sigma_data)
        a_next = 1.0 / (1.0 + sigma_next**2)
        step = ddim_coefficients(a, a_next, meaning)
        x_prev, x0 = sampler_step_reference(math.sqrt(a) * x, prediction, step)
        assert_near(x0, image, 1e-9)
        assert_near(x_prev / math.sqrt(a_next), expected, 1e-9)
        fused = ddim_step((math.sqrt(a) * x).float(), prediction.float(), step)
        assert_near(fused.double() / math.sqrt(a_next), expected, 2e-6)


@pytest.mark.parametrize(
    ("kind", "num_steps"), [(EDMEulerScheduler, 12), (EDMDPMSolverMultistepScheduler, 12), (EDMEulerScheduler, 1)]
)
def test_edm_follows_diffusers(kind: Any, num_steps: int) -> None:
    scheduler = kind(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.double().tolist()[:-1]
    alphas_cumprod, meanings, input_scales = zip(*(edm(sigma, 0.5) for sigma in sigmas), strict=True)
    path = torch.tensor(alphas_cumprod, dtype=torch.float64)
    is_ddim = kind is EDMEulerScheduler
    steps = (ddim_schedule if is_ddim else multistep_schedule)(path, range(num_steps), meanings)
    theirs = sigmas[0] * randn(fresh_generator(), *SHAPE)
    ours, x0 = math.sqrt(path[0]) * theirs, None
    for i, (timestep, step) in enumerate(zip(scheduler.timesteps, steps, strict=True)):
        prediction = predict(input_scales[i] * ours, 40 * i)
        if is_ddim:
            ours = ddim_step(ours, prediction, step)
        else:
            ours, x0 = multistep_step(ours, prediction, x0, step)
        prediction = predict(scheduler.scale_model_input(theirs, timestep), 40 * i)
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        a_prev = path[i + 1] if i + 1 < num_steps else torch.ones(())
        assert_near(ours, a_prev.sqrt() * theirs, 1e-4)


@pytest.mark.parametrize("second_order", [False, True])
def test_rectified_flow_follows_diffusers_from_pure_noise(second_order: bool) -> None:
    times = [1.0, 0.97, 0.9, 0.75, 0.5, 0.3, 0.1]
    if second_order:  # diffusers' log SNR has no end at t = 1
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", lower_order_final=False
        )
        scheduler.set_timesteps(7)
        times = scheduler.sigmas.double().tolist()[:-1]
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=times)
    alphas_cumprod, meanings, scales = zip(*(flow(t) for t in times), strict=True)
    path = torch.tensor(alphas_cumprod, dtype=torch.float64)
    steps = (multistep_schedule if second_order else ddim_schedule)(path, range(len(times)), meanings)
    theirs = randn(fresh_generator(), *SHAPE)
    ours, x0 = theirs / scales[0], None
    for i, (timestep, step) in enumerate(zip(scheduler.timesteps, steps, strict=True)):
        prediction = predict(scales[i] * ours, 40 * i)
        if second_order:
            ours, x0 = multistep_step(ours, prediction, x0, step)
        else:
            ours = ddim_step(ours, prediction, step)
        theirs = scheduler.step(predict(theirs, 40 * i), timestep, theirs).prev_sample
        assert_near(ours, theirs / (scales[i + 1] if i + 1 < len(times) else 1.0), 1e-4)


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
    prediction = randn(generator, *shape, dtype=prediction_dtype)
    limit = torch.rand(shape[0], generator=generator).to(DEVICE) + 0.5
    exact = {"limit_B": limit.double()}

    step = ddim_coefficients(0.3, 0.5, "epsilon", eta=0.5)
    found = ddim_step(x_t, prediction, step, noise, limit)
    expected, _ = sampler_step_reference(x_t.double(), prediction.double(), step, noise_BCHW=noise.double(), **exact)
    assert (found.dtype, found.stride()) == (dtype, x_t.stride())
    assert_near(found, expected)

    step = multistep_coefficients(0.3, 0.5, 0.2, "v")
    for mine, reference in zip(
        multistep_step(x_t, prediction, previous, step, limit),
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
    torch.library.opcheck(torch.ops.segdiff.sampler_step.default, (x_t, prediction, noise, None, limit, step, True))


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
        ("prediction_type: None", lambda: ddim_schedule(torch.tensor([0.9, 0.5]), [1, 0], None)),
        ("prediction_type: 0.5", lambda: multistep_schedule(torch.tensor([0.9, 0.5]), [1, 0], (0.5, 0.5))),
        ("prediction_type: 1 for 2 steps", lambda: ddim_schedule(torch.tensor([0.9, 0.5]), [1, 0], ["v"])),
        ("prediction_type: LinearPrediction", lambda: ddim_coefficients(0.3, 0.5, LinearPrediction(math.inf, 1.0))),
        ("prediction_type: LinearPrediction", lambda: ddim_coefficients(0.3, 0.5, LinearPrediction(1.0, math.nan))),
        ("eta: 2", lambda: ddim_coefficients(0.3, 0.5, "v", eta=2)),
        ("timesteps: ", lambda: ddim_schedule(torch.tensor([0.9, 0.5]), [2, 1], "v")),
        ("timesteps: ", lambda: multistep_schedule(torch.tensor([0.9, 0.5]), [], "v")),
        ("percentile: 0", lambda: dynamic_limit(x, x, step, 0)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_without_gpu_or_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="sampler_step: device: Triton's kernels need a GPU, and this is cpu"):
        ddim_step(x, x, ddim_coefficients(0.3, 0.5, "v"))
