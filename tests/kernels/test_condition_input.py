"""The input kernel against the torch path that training takes without it, and against the loader's crops and flips."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kernels_support import DEVICE, TOLERANCE, assert_near, fresh_generator
from torch import Tensor

from data_shards.feed.augment import steering
from data_shards.feed.config import LoaderConfig
from segdiff_dist.denoising.conditioning import NULL_MASK, MaskEncoder
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.diffusion import make_scheduler, prediction_target, q_sample
from segdiff_dist.denoising.loss_weighting import lognormal_timesteps
from segdiff_dist.pixels import to_model_range
from segdiff_kernels import philox
from segdiff_kernels.condition_input import Crop, condition_input, condition_input_reference

SEED = 0x1234_5678_9ABC_DEF1
NUM_CLASSES = 17
# Of two float32 evaluations of sqrt(-2 ln u) cos(2 pi v), of which philox.normal rounds the angle to 24 bits.
NOISE_TOLERANCE = 4e-6
# What a call by levels has in place of a schedule.
LEVELS = {"alphas_cumprod_T": None, "levels_B4": torch.zeros(2, 4)}
ALPHAS_CUMPROD = make_scheduler(DiffusionConfig()).alphas_cumprod.to(DEVICE)


def batch(size: int, height: int, width: int, dtype: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """Random grey values and labels, null masks among them, at positions of either half of 64 bits."""
    generator = fresh_generator()
    grey = torch.randint(0, torch.iinfo(dtype).max + 1, (size, height, width), generator=generator)
    mask = torch.randint(0, NUM_CLASSES, (size, height, width), generator=generator)
    mask[-1] = NULL_MASK
    position = torch.randint(0, 2**40, (size,), generator=generator)
    return {
        "image_BRS": grey.to(dtype).to(DEVICE),
        "mask_BRS": mask.to(torch.uint8).to(DEVICE),
        "position_B": position.to(DEVICE),
        "alphas_cumprod_T": ALPHAS_CUMPROD,
    }


def choices(**others: Any) -> dict[str, Any]:
    """Settings of a call, v and one-hot channels unless told."""
    about = {"seed": SEED, "prediction_type": "v", "mask_encoding": "onehot", "num_classes": NUM_CLASSES}
    return about | {"dtype": torch.float32} | others


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


@pytest.mark.parametrize(
    ("mask_encoding", "prediction_type", "dtype"),
    [
        ("onehot", "v", torch.float32),
        ("onehot", "epsilon", torch.bfloat16),
        ("scalar_255", "x0", torch.float16),
        ("scalar_signed", "v", torch.bfloat16),
        ("none", "epsilon", torch.float32),
    ],
)
def test_the_batch_is_what_training_makes_without_it(
    mask_encoding: Any, prediction_type: Any, dtype: torch.dtype
) -> None:
    x = batch(3, 23, 13)
    about = choices(mask_encoding=mask_encoding, prediction_type=prediction_type, dtype=dtype)
    found, reference = condition_input(**x, **about), condition_input_reference(**x, **about)

    x_0 = to_model_range(x["image_BRS"])
    noise = philox.normal(SEED, philox.STREAM_NOISE, x["position_B"], x_0.shape[1:])
    timestep = philox.timesteps(SEED, x["position_B"], len(ALPHAS_CUMPROD))
    a = ALPHAS_CUMPROD[timestep]
    assert torch.equal(found.timestep_B, timestep)
    assert_near(found.target_B1HW, prediction_target(prediction_type, x_0, noise, a), NOISE_TOLERANCE)
    assert_near(found.input_BCHW[:, :1], q_sample(x_0, noise, a), max(TOLERANCE[dtype], NOISE_TOLERANCE))
    assert found.input_BCHW.dtype == dtype
    assert found.input_BCHW.is_contiguous(memory_format=torch.channels_last)
    if mask_encoding != "none":
        encoded = MaskEncoder(mask_encoding, NUM_CLASSES, 1)(x["mask_BRS"], dtype)
        assert torch.equal(found.input_BCHW[:, 1:], encoded)
    assert found.mask_BHW is x["mask_BRS"]
    assert torch.equal(reference.target_B1HW, prediction_target(prediction_type, x_0, noise, a))
    assert torch.equal(reference.input_BCHW[:, :1], q_sample(x_0, noise, a).to(dtype))
    assert torch.equal(reference.input_BCHW[:, 1:], found.input_BCHW[:, 1:])


def test_the_noise_is_drawn_from_the_same_bits() -> None:
    # At an alphas_cumprod of 0 x_t is noise alone. A wrong bit above the lowest few would show far beyond rounding.
    x = batch(2, 64, 33) | {"alphas_cumprod_T": torch.zeros(1, device=DEVICE)}
    found = condition_input(**x, **choices(mask_encoding="none", prediction_type="epsilon"))
    exact, allowed = exact_noise(x["position_B"], 1, 64, 33)
    for tensor in (found.target_B1HW, found.input_BCHW):
        assert ((tensor.double() - exact).abs() < allowed).all()
    assert torch.equal(found.target_B1HW, found.input_BCHW)


def test_a_sample_depends_on_its_position_alone() -> None:
    x = batch(4, 9, 11)
    whole = condition_input(**x, **choices())
    alone = {name: tensor[2:3] if name != "alphas_cumprod_T" else tensor for name, tensor in x.items()}
    for one, all_of_them in zip(condition_input(**alone, **choices())[:4], whole[:4], strict=True):
        assert torch.equal(one[0], all_of_them[2])


def test_sixteen_bits_keep_their_depth() -> None:
    x = batch(1, 8, 8, torch.uint16)
    found = condition_input(**x, **choices(mask_encoding="none", prediction_type="x0"))
    assert torch.equal(found.target_B1HW, to_model_range(x["image_BRS"]))


@pytest.mark.parametrize("mask_encoding", ["onehot", "none"])
def test_crop_and_flip_are_the_loaders(mask_encoding: Any) -> None:
    stored, size = 21, 12
    x = batch(6, stored, stored)
    edge = torch.randint(0, 17, (6, 2, stored, stored), dtype=torch.uint8, device=DEVICE)
    config = LoaderConfig(crop="random", crop_size=size, flip=True)
    numbers = steering(x["position_B"].cpu().numpy(), 3, config, stored)
    crop = Crop(torch.from_numpy(numbers.top).to(DEVICE), torch.from_numpy(numbers.left).to(DEVICE), size, size)
    flip = torch.from_numpy(numbers.flip).to(DEVICE, torch.uint8)
    window = numbers.window(stored, size)

    def loaded(pixels: Tensor) -> Tensor:
        """What the loader does: the window is cut where it lies in the stored slice, then mirrored."""
        cut = [
            pixels[i, ..., top : top + size, left : left + size].cpu().numpy()
            for i, (top, left) in enumerate(zip(window.top_B, window.left_B, strict=True))
        ]
        flipped = [a[..., ::-1] if mirrored else a for a, mirrored in zip(cut, numbers.flip, strict=True)]
        return torch.from_numpy(np.stack(flipped)).to(DEVICE)

    about = choices(mask_encoding=mask_encoding)
    found = condition_input(**x, **about, edge_B2RS=edge, crop=crop, flip_B=flip)
    early = x | {"image_BRS": loaded(x["image_BRS"]), "mask_BRS": loaded(x["mask_BRS"])}
    expected = condition_input(**early, **about, edge_B2RS=loaded(edge))
    reference = condition_input_reference(**x, **about, edge_B2RS=edge, crop=crop, flip_B=flip)
    for name in ("input_BCHW", "target_B1HW", "mask_BHW", "edge_B2HW"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert_near(getattr(found, name).float(), getattr(reference, name).float(), NOISE_TOLERANCE)


def test_a_window_beyond_the_slice_is_moved_back() -> None:
    x = batch(2, 10, 8)
    beyond = Crop(torch.tensor([-5, 9], device=DEVICE), torch.tensor([99, -1], device=DEVICE), 4, 5)
    within = Crop(torch.tensor([0, 6], device=DEVICE), torch.tensor([3, 0], device=DEVICE), 4, 5)
    found, expected = (condition_input(**x, **choices(), crop=crop) for crop in (beyond, within))
    assert torch.equal(found.input_BCHW, expected.input_BCHW)
    assert torch.equal(expected.mask_BHW[0], x["mask_BRS"][0, :4, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_edges_mix_two_classes(dtype: torch.dtype) -> None:
    x = batch(2, 7, 10)
    edge = torch.randint(0, 256, (2, 2, 7, 10), dtype=torch.uint8, device=DEVICE)
    edge[:, 0] %= NUM_CLASSES
    edge[0, :, 0] = 255
    found = condition_input(**x, **choices(dtype=dtype), edge_B2RS=edge)
    expected = MaskEncoder("onehot", NUM_CLASSES, 1)(x["mask_BRS"], dtype, edge)
    assert_near(found.input_BCHW[:, 1:], expected)  # not equal: the interpreter rounds to bfloat16 towards zero
    assert found.edge_B2HW is edge


def test_given_timesteps_are_taken() -> None:
    x = batch(3, 4, 4)
    timestep = lognormal_timesteps(SEED, x["position_B"], ALPHAS_CUMPROD, -1.2, 1.2)
    found = condition_input(**x, **choices(), timestep_B=timestep)
    expected = condition_input_reference(**x, **choices(), timestep_B=timestep)
    assert torch.equal(found.timestep_B, timestep)
    assert_near(found.input_BCHW, expected.input_BCHW)
    outside = condition_input(**x, **choices(), timestep_B=torch.tensor([-1, 1000, 2**40], device=DEVICE))
    nearest = condition_input(**x, **choices(), timestep_B=torch.tensor([0, 999, 999], device=DEVICE))
    assert torch.equal(outside.input_BCHW, nearest.input_BCHW)


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

    x_0 = x["image_BRS"][:, None].double() / 127.5 - 1.0
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
        (found.input_BCHW[:, :1], c_in * noised, signal, spread),
        (found.target_B1HW, target, from_x_0, from_noise),
    ):
        bound = of_noise * allowed + rounding * (of_x_0 + of_noise * noise.abs())
        assert ((tensor.double() - expected).abs() <= bound).all()
    assert found.timestep_B.dtype == torch.int64
    assert torch.equal(found.timestep_B, torch.zeros_like(x["position_B"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_encoding", ["onehot", "scalar_255", "scalar_signed", "none"])
def test_levels_with_every_encoding_cropped_and_flipped(mask_encoding: Any, dtype: torch.dtype) -> None:
    x = batch(4, 15, 11, torch.uint16)
    edge = None
    if not mask_encoding.startswith("scalar"):
        edge = torch.randint(0, 256, (4, 2, 15, 11), generator=fresh_generator()).to(DEVICE, torch.uint8)
    top, left = torch.tensor([0, 3, 8, 6], device=DEVICE), torch.tensor([4, 0, 1, 2], device=DEVICE)
    flip = torch.tensor([0, 1, 1, 0], dtype=torch.uint8, device=DEVICE)
    window = {"crop": Crop(top, left, 7, 6), "flip_B": flip, "edge_B2RS": edge}
    sigma = torch.tensor([0.002, 0.4, 3.0, 500.0])
    by_sigma = by_levels(x, edm_levels(sigma, 0.5)) | window | choices(mask_encoding=mask_encoding, dtype=dtype)
    found, reference = condition_input(**by_sigma), condition_input_reference(**by_sigma)
    assert found.input_BCHW.is_contiguous(memory_format=torch.channels_last)
    for sample in range(4):  # each against its own largest value
        assert_near(found.target_B1HW[sample], reference.target_B1HW[sample])
        assert_near(found.input_BCHW[sample], reference.input_BCHW[sample], max(TOLERANCE[dtype], NOISE_TOLERANCE))
    assert torch.equal(found.timestep_B, reference.timestep_B)
    # What is beside x_t does not depend on how its noise is given.
    by_timestep = condition_input(**x, **window, **choices(mask_encoding=mask_encoding, dtype=dtype))
    assert torch.equal(found.input_BCHW[:, 1:], by_timestep.input_BCHW[:, 1:])
    assert torch.equal(found.mask_BHW, by_timestep.mask_BHW)
    assert edge is None or torch.equal(found.edge_B2HW, by_timestep.edge_B2HW)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0"])
def test_levels_of_a_timestep_are_the_timestep(prediction_type: Any) -> None:
    x = batch(3, 8, 5)
    expected = condition_input_reference(**x, **choices(prediction_type=prediction_type))
    a = ALPHAS_CUMPROD[expected.timestep_B]
    signal, spread, zero, one = a.sqrt(), (1.0 - a).sqrt(), torch.zeros_like(a), torch.ones_like(a)
    target = {"epsilon": (zero, one), "v": (-spread, signal), "x0": (one, zero)}[prediction_type]
    given = by_levels(x, torch.stack((signal, spread, *target), dim=1)) | choices(prediction_type=prediction_type)
    found, reference = condition_input(**given), condition_input_reference(**given)
    assert torch.equal(reference.input_BCHW, expected.input_BCHW)
    assert torch.equal(reference.target_B1HW, expected.target_B1HW)
    assert_near(found.input_BCHW, expected.input_BCHW)
    assert_near(found.target_B1HW, expected.target_B1HW)


def test_rectified_flow_by_levels() -> None:
    """Liu et al. 2022: x_t = (1 - t) x_0 + t noise, whose velocity is noise - x_0; exact at both ends."""
    x = batch(3, 6, 10)
    t = torch.tensor([0.0, 0.375, 1.0])
    levels = torch.stack((1 - t, t, -torch.ones(3), torch.ones(3)), dim=1)
    found = condition_input(**by_levels(x, levels), **choices(mask_encoding="none", prediction_type=None))
    x_0 = to_model_range(x["image_BRS"])
    noise, _ = exact_noise(x["position_B"], 1, 6, 10)
    assert_near(found.target_B1HW, noise - x_0.double(), NOISE_TOLERANCE)
    assert torch.equal(found.input_BCHW[0], x_0[0])
    assert_near(found.input_BCHW[2], noise[2], NOISE_TOLERANCE)
    # x_t - t velocity is the image at every t.
    straight = found.input_BCHW - t.to(DEVICE)[:, None, None, None] * found.target_B1HW
    assert_near(straight, x_0, NOISE_TOLERANCE)


def test_with_levels_too_a_sample_depends_on_its_position_alone() -> None:
    x = by_levels(batch(4, 9, 11), edm_levels(torch.tensor([0.01, 1.0, 7.0, 90.0]), 0.5))
    full = condition_input(**x, **choices())
    alone = {name: None if tensor is None else tensor[2:3].clone() for name, tensor in x.items()}
    for one, all_samples in zip(condition_input(**alone, **choices())[:4], full[:4], strict=True):
        assert torch.equal(one[0], all_samples[2])


def test_the_operator_is_one_that_torch_can_trace() -> None:
    x = batch(2, 4, 6)
    edge = torch.zeros(2, 2, 4, 6, dtype=torch.uint8, device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    flip = torch.ones(2, dtype=torch.uint8, device=DEVICE)
    told = (SEED, "v", "onehot", NUM_CLASSES, torch.bfloat16)
    operator = torch.ops.segdiff.condition_input.default
    *pixels, alphas_cumprod = x.values()
    by_sigma = (SEED, None, "onehot", NUM_CLASSES, torch.bfloat16)
    for optional, settings in (
        ((alphas_cumprod, None, None, None, None, None, None, 4, 6), told),
        ((alphas_cumprod, None, edge, zeros, zeros, zeros, flip, 3, 5), told),
        ((None, torch.ones(2, 4, device=DEVICE), None, None, None, None, None, 4, 6), by_sigma),
        ((None, torch.ones(2, 4, device=DEVICE), edge, None, zeros, zeros, flip, 3, 5), by_sigma),
    ):
        torch.library.opcheck(operator, (*pixels, *optional, *settings), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image_BRS": torch.zeros(2, 4, 6)}, "image: float32"),
        ({"image_BRS": torch.zeros(2, 1, 4, 6, dtype=torch.uint8)}, "image: shape"),
        ({"image_BRS": torch.zeros(2, 6, 4, dtype=torch.uint8).mT}, "image: strides"),
        ({"mask_BRS": torch.zeros(2, 4, 6, dtype=torch.int64)}, "mask: int64"),
        ({"mask_BRS": torch.zeros(2, 4, 5, dtype=torch.uint8)}, r"mask: \(2, 4, 5\)"),
        ({"edge_B2RS": torch.zeros(2, 4, 6, dtype=torch.uint8)}, "edge"),
        ({"position_B": torch.zeros(2, dtype=torch.int32)}, "position: int32"),
        ({"position_B": torch.zeros(3, dtype=torch.int64)}, "position"),
        ({"timestep_B": torch.zeros(2)}, "timestep: float32"),
        ({"flip_B": torch.zeros(2, dtype=torch.bool)}, "flip: bool"),
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
        ({"crop": Crop(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 4, 7)}, "crop: 4x7"),
        ({"crop": Crop(torch.zeros(2), torch.zeros(2, dtype=torch.int64), 4, 4)}, "crop.top: float32"),
        ({"seed": 2**63}, "seed"),
        ({"prediction_type": "sample"}, "prediction_type: 'sample'"),
        ({"mask_encoding": "embedding"}, "mask_encoding: 'embedding'"),
        ({"num_classes": 256}, "num_classes: 256"),
        ({"dtype": torch.float64}, "dtype"),
        ({"mask_encoding": "scalar_255", "edge_B2RS": torch.zeros(2, 2, 4, 6, dtype=torch.uint8)}, "edge"),
        ({"position_B": torch.zeros(2, dtype=torch.int64, device="meta")}, "position: meta"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changed: dict[str, Any], named: str) -> None:
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for k, v in changed.items()}
    if isinstance(changed.get("crop"), Crop):
        crop = changed["crop"]
        on_device["crop"] = crop._replace(top_B=crop.top_B.to(DEVICE), left_B=crop.left_B.to(DEVICE))
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
