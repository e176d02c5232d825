"""The input kernel against the torch path that training takes without it, and against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernels_support import DEVICE, TOLERANCE, assert_near, fresh_generator
from torch import Tensor

from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.loss_weighting import lognormal_timesteps
from segdiff_dist.denoising.schedule import make_scheduler
from segdiff_dist.pixels import to_model_range
from segdiff_kernels import philox
from segdiff_kernels.condition_input import condition_input, condition_input_reference
from segdiff_kernels.noising import prediction_target, q_sample

SEED = 0x1234_5678_9ABC_DEF1
# Of two float32 evaluations of sqrt(-2 ln u) cos(2 pi v), of which philox.normal rounds the angle to 24 bits.
NOISE_TOLERANCE = 4e-6
# What a call by levels has in place of a schedule.
LEVELS = {"alphas_cumprod_T": None, "levels_B4": torch.zeros(2, 4)}
ALPHAS_CUMPROD = make_scheduler(DiffusionConfig()).alphas_cumprod.to(DEVICE)


def batch(size: int, height: int, width: int, dtype: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """Random grey values at positions of either half of 64 bits."""
    generator = fresh_generator()
    grey = torch.randint(0, torch.iinfo(dtype).max + 1, (size, height, width), generator=generator)
    position = torch.randint(0, 2**40, (size,), generator=generator)
    return {
        "image_BHW": grey.to(dtype).to(DEVICE),
        "position_B": position.to(DEVICE),
        "alphas_cumprod_T": ALPHAS_CUMPROD,
    }


def choices(**others: Any) -> dict[str, Any]:
    """Settings of a call: v unless given."""
    return {"seed": SEED, "prediction_type": "v"} | others


def by_levels(x: dict[str, Tensor], levels: Tensor) -> dict[str, Any]:
    """The same batch, its noise given for each sample in place of alphas_cumprod."""
    return x | {"alphas_cumprod_T": None, "levels_B4": levels.to(DEVICE, torch.float32)}


def edm_levels(sigma_B: Tensor, sigma_data: float) -> Tensor:
    """Karras et al. 2022, table 1: the net reads c_in (x_0 + sigma noise) and predicts (x_0 - c_skip x) / c_out."""
    total = torch.sqrt(sigma_B**2 + sigma_data**2)
    return torch.stack((1 / total, sigma_B / total, sigma_B / (sigma_data * total), -sigma_data / total), dim=1)


def exact_noise(position_B: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """philox.normal's noise in float64, and how far float32 may be from it: both [B, *shape]."""
    words = philox.bits(SEED, philox.STREAM_NOISE, position_B, math.prod(shape)).view(len(position_B), -1, 2)
    unit = (words >> 8).double() * 2.0**-24 + 2.0**-25
    radius, angle = torch.sqrt(-2.0 * torch.log(unit[..., 0])), 2.0 * torch.pi * unit[..., 1]
    noise = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    # Near 1 the uniform draw is rounded to float32 by up to 2^-25, in torch too; the radius has 1 / radius of that.
    rounding = 2.0**-25 / radius.clamp(min=2.0**-12)
    allowed = NOISE_TOLERANCE + torch.stack((rounding, rounding), dim=-1)
    return noise.view(-1, *shape), allowed.view(-1, *shape)


@pytest.mark.parametrize("grey", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("prediction_type", ["v", "epsilon", "x0"])
def test_the_batch_is_what_training_makes_without_it(prediction_type: Any, grey: torch.dtype) -> None:
    x = batch(3, 23, 13, grey)
    settings = choices(prediction_type=prediction_type)
    found, reference = condition_input(**x, **settings), condition_input_reference(**x, **settings)

    x_0 = to_model_range(x["image_BHW"])
    noise = philox.normal(SEED, philox.STREAM_NOISE, x["position_B"], x_0.shape[1:])
    timestep = philox.timesteps(SEED, x["position_B"], len(ALPHAS_CUMPROD))
    a = ALPHAS_CUMPROD[timestep]
    assert torch.equal(found.timestep_B, timestep)
    assert_near(found.target_B1HW, prediction_target(prediction_type, x_0, noise, a), NOISE_TOLERANCE)
    assert_near(found.input_B1HW, q_sample(x_0, noise, a), max(TOLERANCE[torch.float32], NOISE_TOLERANCE))
    assert torch.equal(reference.target_B1HW, prediction_target(prediction_type, x_0, noise, a))
    assert torch.equal(reference.input_B1HW, q_sample(x_0, noise, a))


def test_the_noise_is_drawn_from_the_same_bits() -> None:
    # At an alphas_cumprod of 0 x_t is noise alone. A wrong bit above the lowest few would show far beyond rounding.
    x = batch(2, 64, 33) | {"alphas_cumprod_T": torch.zeros(1, device=DEVICE)}
    found = condition_input(**x, **choices(prediction_type="epsilon"))
    exact, allowed = exact_noise(x["position_B"], 1, 64, 33)
    for tensor in (found.target_B1HW, found.input_B1HW):
        assert ((tensor.double() - exact).abs() < allowed).all()
    assert torch.equal(found.target_B1HW, found.input_B1HW)


def test_a_sample_depends_on_its_position_alone() -> None:
    x = batch(4, 9, 11)
    whole = condition_input(**x, **choices())
    alone = {name: tensor[2:3] if name != "alphas_cumprod_T" else tensor for name, tensor in x.items()}
    for one, all_of_them in zip(condition_input(**alone, **choices()), whole, strict=True):
        assert torch.equal(one[0], all_of_them[2])


def test_sixteen_bits_keep_their_depth() -> None:
    x = batch(1, 8, 8, torch.uint16)
    found = condition_input(**x, **choices(prediction_type="x0"))
    assert torch.equal(found.target_B1HW, to_model_range(x["image_BHW"]))


def test_given_timesteps_are_taken() -> None:
    x = batch(3, 4, 4)
    timestep = lognormal_timesteps(SEED, x["position_B"], ALPHAS_CUMPROD, -1.2, 1.2)
    found = condition_input(**x, **choices(), timestep_B=timestep)
    expected = condition_input_reference(**x, **choices(), timestep_B=timestep)
    assert torch.equal(found.timestep_B, timestep)
    assert_near(found.input_B1HW, expected.input_B1HW)
    outside = condition_input(**x, **choices(), timestep_B=torch.tensor([-1, 1000, 2**40], device=DEVICE))
    nearest = condition_input(**x, **choices(), timestep_B=torch.tensor([0, 999, 999], device=DEVICE))
    assert torch.equal(outside.input_B1HW, nearest.input_B1HW)


@pytest.mark.parametrize("sigma_data", [1.0, 0.3])
@pytest.mark.parametrize("preconditioned", [True, False])
def test_levels_against_float64_from_the_least_noise_to_the_most(sigma_data: float, preconditioned: bool) -> None:
    """EDM's levels as table 1 of Karras et al. 2022 has them, and x_0 + sigma noise itself; sigma 0.002 to 500."""
    sigma = torch.tensor([0.002, 0.05, sigma_data, 80.0, 500.0], dtype=torch.float64)
    x = batch(5, 9, 14)
    levels = edm_levels(sigma, sigma_data)
    if not preconditioned:
        levels = torch.stack((torch.ones(5), sigma, torch.zeros(5), torch.ones(5)), dim=1)
    found = condition_input(**by_levels(x, levels), **choices(prediction_type=None))

    x_0 = x["image_BHW"][:, None].double() / 127.5 - 1.0
    noise, allowed = exact_noise(x["position_B"], 1, 9, 14)
    sigma_B111 = sigma.to(DEVICE)[:, None, None, None]
    noised = x_0 + sigma_B111 * noise
    c_skip = sigma_data**2 / (sigma_B111**2 + sigma_data**2)
    c_out = sigma_B111 * sigma_data / torch.sqrt(sigma_B111**2 + sigma_data**2)
    c_in = 1 / torch.sqrt(sigma_B111**2 + sigma_data**2) if preconditioned else torch.ones_like(sigma_B111)
    target = (x_0 - c_skip * noised) / c_out if preconditioned else noise
    signal, spread, from_x_0, from_noise = levels.abs().to(DEVICE)[:, :, None, None, None].unbind(1)
    rounding = 2.0**-22  # of numbers of either term's size: x_0, two levels, two products and a sum
    for tensor, expected, of_x_0, of_noise in (
        (found.input_B1HW, c_in * noised, signal, spread),
        (found.target_B1HW, target, from_x_0, from_noise),
    ):
        bound = of_noise * allowed + rounding * (of_x_0 + of_noise * noise.abs())
        assert ((tensor.double() - expected).abs() <= bound).all()
    assert found.timestep_B.dtype == torch.int64
    assert torch.equal(found.timestep_B, torch.zeros_like(x["position_B"]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0"])
def test_levels_of_a_timestep_are_the_timestep(prediction_type: Any) -> None:
    x = batch(3, 8, 5)
    expected = condition_input_reference(**x, **choices(prediction_type=prediction_type))
    a = ALPHAS_CUMPROD[expected.timestep_B]
    signal, spread, zero, one = a.sqrt(), (1.0 - a).sqrt(), torch.zeros_like(a), torch.ones_like(a)
    target = {"epsilon": (zero, one), "v": (-spread, signal), "x0": (one, zero)}[prediction_type]
    given = by_levels(x, torch.stack((signal, spread, *target), dim=1)) | choices(prediction_type=prediction_type)
    found, reference = condition_input(**given), condition_input_reference(**given)
    assert torch.equal(reference.input_B1HW, expected.input_B1HW)
    assert torch.equal(reference.target_B1HW, expected.target_B1HW)
    assert_near(found.input_B1HW, expected.input_B1HW)
    assert_near(found.target_B1HW, expected.target_B1HW)


def test_rectified_flow_by_levels() -> None:
    """Liu et al. 2022: x_t = (1 - t) x_0 + t noise, whose velocity is noise - x_0; exact at both ends."""
    x = batch(3, 6, 10)
    t = torch.tensor([0.0, 0.375, 1.0])
    levels = torch.stack((1 - t, t, -torch.ones(3), torch.ones(3)), dim=1)
    found = condition_input(**by_levels(x, levels), **choices(prediction_type=None))
    x_0 = to_model_range(x["image_BHW"])
    noise, _ = exact_noise(x["position_B"], 1, 6, 10)
    assert_near(found.target_B1HW, noise - x_0.double(), NOISE_TOLERANCE)
    assert torch.equal(found.input_B1HW[0], x_0[0])
    assert_near(found.input_B1HW[2], noise[2], NOISE_TOLERANCE)
    # x_t - t velocity is the image at every t.
    straight = found.input_B1HW - t.to(DEVICE)[:, None, None, None] * found.target_B1HW
    assert_near(straight, x_0, NOISE_TOLERANCE)


def test_with_levels_too_a_sample_depends_on_its_position_alone() -> None:
    x = by_levels(batch(4, 9, 11), edm_levels(torch.tensor([0.01, 1.0, 7.0, 90.0]), 0.5))
    full = condition_input(**x, **choices())
    alone = {name: None if tensor is None else tensor[2:3].clone() for name, tensor in x.items()}
    for one, all_samples in zip(condition_input(**alone, **choices()), full, strict=True):
        assert torch.equal(one[0], all_samples[2])


def test_the_operator_is_one_that_torch_can_trace() -> None:
    operator = torch.ops.segdiff.condition_input.default
    image, position, alphas_cumprod = batch(2, 4, 6).values()
    levels = torch.ones(2, 4, device=DEVICE)
    for noise_by, prediction_type in (
        ((alphas_cumprod, None, None), "v"),
        ((alphas_cumprod, None, torch.zeros_like(position)), "epsilon"),
        ((None, levels, None), None),
    ):
        settings = (SEED, prediction_type)
        test_utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, (image, position, *noise_by, *settings), test_utils=test_utils)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image_BHW": torch.zeros(2, 4, 6)}, "image: float32"),
        ({"image_BHW": torch.zeros(2, 1, 4, 6, dtype=torch.uint8)}, "image: shape"),
        ({"image_BHW": torch.zeros(2, 6, 4, dtype=torch.uint8).mT}, "image: strides"),
        ({"position_B": torch.zeros(2, dtype=torch.int32)}, "position: int32"),
        ({"position_B": torch.zeros(3, dtype=torch.int64)}, "position"),
        ({"timestep_B": torch.zeros(2)}, "timestep: float32"),
        ({"alphas_cumprod_T": torch.zeros(5, dtype=torch.float64)}, "alphas_cumprod: float64"),
        ({"alphas_cumprod_T": torch.zeros(0)}, "alphas_cumprod: shape"),
        ({"alphas_cumprod_T": None}, "alphas_cumprod: None, as levels; give one of the two"),
        ({"levels_B4": torch.zeros(2, 4)}, "levels: a tensor, as alphas_cumprod; give one of the two"),
        ({**LEVELS, "levels_B4": torch.zeros(2, 4, dtype=torch.float64)}, "levels: float64; give float32"),
        ({**LEVELS, "levels_B4": torch.zeros(2, 3)}, r"levels: \(2, 3\); give shape \(2, 4\)"),
        ({**LEVELS, "levels_B4": torch.zeros(3, 4)}, r"levels: \(3, 4\)"),
        ({**LEVELS, "levels_B4": torch.zeros(4, 2).mT}, "levels: strides"),
        ({**LEVELS, "levels_B4": torch.zeros(2, 4, device="meta")}, "levels: meta"),
        ({**LEVELS, "timestep_B": torch.zeros(2, dtype=torch.int64)}, "timestep: a tensor, with levels; give None"),
        ({**LEVELS, "prediction_type": "sample"}, "prediction_type: 'sample'"),
        ({"prediction_type": None}, "prediction_type: None; give epsilon or v or x0"),
        ({"seed": 2**63}, "seed"),
        ({"prediction_type": "sample"}, "prediction_type: 'sample'"),
        ({"position_B": torch.zeros(2, dtype=torch.int64, device="meta")}, "position: meta"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changed: dict[str, Any], named: str) -> None:
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for k, v in changed.items()}
    with pytest.raises(ValueError, match=f"condition_input: {named}"):
        condition_input(**(batch(2, 4, 6) | choices() | on_device))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"alphas_cumprod_T": None}, "alphas_cumprod: None"),
        ({"levels_B4": torch.zeros(2, 4)}, "levels: a tensor, as alphas_cumprod"),
        ({**LEVELS, "timestep_B": torch.zeros(2, dtype=torch.int64)}, "timestep: a tensor, with levels"),
        ({"prediction_type": None}, "prediction_type: None"),
    ],
)
def test_the_reference_too_refuses_noise_that_is_not_clear(changed: dict[str, Any], named: str) -> None:
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changed.items()}
    with pytest.raises(ValueError, match=f"condition_input: {named}"):
        condition_input_reference(**(batch(2, 4, 6) | choices() | on_device))


def test_without_an_engine_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="need a GPU"):
        condition_input(**batch(1, 4, 4), **choices())
