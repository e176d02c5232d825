"""The input kernel against the torch path that training takes without it, and against the loader's crops and flips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernels_support import DEVICE, TOLERANCE, assert_near, fresh_generator
from torch import Tensor

from data_shards.feed.augment import steering
from data_shards.feed.loader import LoaderConfig
from segdiff_dist.denoising.conditioning import NULL_MASK, MaskEncoder
from segdiff_dist.denoising.diffusion import DiffusionConfig, make_scheduler, prediction_target, q_sample
from segdiff_dist.denoising.loss_weighting import lognormal_timesteps
from segdiff_dist.pixels import to_model_range
from segdiff_kernels import philox
from segdiff_kernels.condition_input import Crop, condition_input, condition_input_reference

SEED = 0x1234_5678_9ABC_DEF1
NUM_CLASSES = 17
# Of two float32 evaluations of sqrt(-2 ln u) cos(2 pi v), of which philox.normal rounds the angle to 24 bits.
NOISE_TOLERANCE = 4e-6
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
    words = philox.bits(SEED, philox.STREAM_NOISE, x["position_B"], 64 * 33).view(2, -1, 2)
    unit = (words >> 8).double() * 2.0**-24 + 2.0**-25
    radius, angle = torch.sqrt(-2.0 * torch.log(unit[..., 0])), 2.0 * torch.pi * unit[..., 1]
    exact = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).view(2, 1, 64, 33)
    # Near 1 the uniform draw is rounded to float32 by up to 2^-25, in torch too; the radius has 1 / radius of that.
    rounding = 2.0**-25 / radius.clamp(min=2.0**-12)
    allowed = NOISE_TOLERANCE + torch.stack((rounding, rounding), dim=-1).view(2, 1, 64, 33)
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


def test_the_operator_is_one_that_torch_can_trace() -> None:
    x = batch(2, 4, 6)
    edge = torch.zeros(2, 2, 4, 6, dtype=torch.uint8, device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    flip = torch.ones(2, dtype=torch.uint8, device=DEVICE)
    told = (SEED, "v", "onehot", NUM_CLASSES, torch.bfloat16)
    operator = torch.ops.segdiff.condition_input.default
    for optional in (
        (None, None, None, None, None, 4, 6),
        (edge, zeros, zeros, zeros, flip, 3, 5),
    ):
        torch.library.opcheck(operator, (*x.values(), *optional, *told), test_utils=("test_schema", "test_faketensor"))


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


def test_without_an_engine_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="need a GPU"):
        condition_input(**batch(1, 4, 4), **choices())
