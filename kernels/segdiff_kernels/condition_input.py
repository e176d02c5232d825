"""The network's input and target, from grey values and a position, in one pass.

Grey values to [-1, 1], noise and timestep from Philox, x_t, and the target. The noise level is that of a timestep or,
for objectives with continuous levels, four numbers a sample. The labels are encoded by label_conv_in or by the network.

Dimensions: B batch, H, W, T training timesteps.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from segdiff_kernels import philox
from segdiff_kernels.backend import why_not_triton
from segdiff_kernels.checks import check_dtype, check_same_device, check_shape, refuse
from segdiff_kernels.noising import PredictionType, mixed, prediction_target, q_sample

_NAME = "condition_input"


class ConditionedInput(NamedTuple):
    """input_B1HW: x_t; target_B1HW; both float32. timestep_B int64, 0 with levels."""

    input_B1HW: Tensor
    target_B1HW: Tensor
    timestep_B: Tensor


def condition_input(
    image_BHW: Tensor,
    position_B: Tensor,
    alphas_cumprod_T: Tensor | None,
    *,
    seed: int,
    prediction_type: PredictionType | None,
    timestep_B: Tensor | None = None,
    levels_B4: Tensor | None = None,
) -> ConditionedInput:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise, and the target of the prediction.

    image uint8 or uint16, position int64, alphas_cumprod float32. Noise is philox.normal(seed, STREAM_NOISE, position,
    (1, H, W)) from the same bits; its float32 value may differ by rounding (4e-6, and more if it is near 0). The
    timestep is that of philox.timesteps unless given; a timestep outside [0, T) is clamped. The equations are in
    noising.py.

    Instead of alphas_cumprod, levels (float32, contiguous) gives each sample its own signal, spread, target_from_x0 and
    target_from_noise:

        x_t    = signal x_0 + spread noise
        target = target_from_x0 x_0 + target_from_noise noise

    as Karras et al. 2022, table 1 (a sigma a sample) and Liu et al. 2022 (rectified flow) need it. There are no
    timesteps then: timestep must be None, the result's timestep_B is int64 zeros, and prediction_type is not used.
    Raises ValueError for unsupported input.
    """
    given = {"image": image_BHW, "position": position_B, "alphas_cumprod": alphas_cumprod_T}
    check_same_device(_NAME, **given, levels=levels_B4, timestep=timestep_B)
    _check_image(image_BHW)
    for argument, tensor in (("position", position_B), ("timestep", timestep_B)):
        if tensor is not None:
            check_dtype(_NAME, argument, tensor, (torch.int64,))
            check_shape(_NAME, argument, tensor, image_BHW.shape[:1])
    _check_noise_levels(len(image_BHW), alphas_cumprod_T, levels_B4, timestep_B, prediction_type)
    if not -(2**63) <= seed < 2**63:
        raise refuse(_NAME, "seed", seed, "a number of 64 bits, with sign")
    if image_BHW.device.type != "meta" and (why := why_not_triton(image_BHW.device)):
        raise refuse(_NAME, "image", why, "a GPU, or use condition_input_reference")
    prediction = prediction_type if levels_B4 is None else None
    return ConditionedInput(
        *_condition_input(image_BHW, position_B, alphas_cumprod_T, levels_B4, timestep_B, seed, prediction)
    )


def condition_input_reference(
    image_BHW: Tensor,
    position_B: Tensor,
    alphas_cumprod_T: Tensor | None,
    *,
    seed: int,
    prediction_type: PredictionType | None,
    timestep_B: Tensor | None = None,
    levels_B4: Tensor | None = None,
) -> ConditionedInput:
    """The same in torch, on any device."""
    _check_noise_levels(len(image_BHW), alphas_cumprod_T, levels_B4, timestep_B, prediction_type)
    x_0_B1HW = image_BHW[:, None].float() / (torch.iinfo(image_BHW.dtype).max / 2.0) - 1.0
    noise_B1HW = philox.normal(seed, philox.STREAM_NOISE, position_B, x_0_B1HW.shape[1:])
    if levels_B4 is not None:
        signal_B, spread_B, from_x_0_B, from_noise_B = levels_B4.unbind(1)
        x_t_B1HW = mixed(x_0_B1HW, noise_B1HW, signal_B, spread_B)
        target_B1HW = mixed(x_0_B1HW, noise_B1HW, from_x_0_B, from_noise_B)
        return ConditionedInput(x_t_B1HW, target_B1HW, torch.zeros_like(position_B))
    assert alphas_cumprod_T is not None  # checked above
    assert prediction_type is not None
    if timestep_B is None:
        timestep_B = philox.timesteps(seed, position_B, len(alphas_cumprod_T))
    a_B = alphas_cumprod_T[timestep_B.clamp(0, len(alphas_cumprod_T) - 1)]
    target_B1HW = prediction_target(prediction_type, x_0_B1HW, noise_B1HW, a_B)
    return ConditionedInput(q_sample(x_0_B1HW, noise_B1HW, a_B), target_B1HW, timestep_B)


@torch.library.custom_op("segdiff::condition_input", mutates_args=())
def _condition_input(
    image_BHW: Tensor,
    position_B: Tensor,
    alphas_cumprod_T: Tensor | None,
    levels_B4: Tensor | None,
    timestep_B: Tensor | None,
    seed: int,
    prediction_type: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from segdiff_kernels._condition_input_triton import launch

    outputs = _outputs(image_BHW)
    with torch.cuda.device_of(image_BHW):
        launch(outputs, image_BHW, position_B, (alphas_cumprod_T, levels_B4), timestep_B, seed, prediction_type)
    return outputs


@_condition_input.register_fake
def _(
    image_BHW: Tensor,
    position_B: Tensor,
    alphas_cumprod_T: Tensor | None,
    levels_B4: Tensor | None,
    timestep_B: Tensor | None,
    seed: int,
    prediction_type: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(image_BHW)


def _outputs(image_BHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten x_t, target and timestep."""
    batch, height, width = image_BHW.shape
    x_t_B1HW, target_B1HW = (image_BHW.new_empty((batch, 1, height, width), dtype=torch.float32) for _ in range(2))
    return x_t_B1HW, target_B1HW, image_BHW.new_empty((batch,), dtype=torch.int64)


def _check_image(image_BHW: Tensor) -> None:
    check_dtype(_NAME, "image", image_BHW, (torch.uint8, torch.uint16))
    if image_BHW.dim() != 3 or image_BHW.numel() == 0:
        raise refuse(_NAME, "image", f"shape {tuple(image_BHW.shape)}", "a non-empty tensor [B, H, W]")
    if not image_BHW.is_contiguous():
        raise refuse(_NAME, "image", f"strides {image_BHW.stride()}", "a contiguous tensor")


def _check_noise_levels(
    batch: int,
    alphas_cumprod_T: Tensor | None,
    levels_B4: Tensor | None,
    timestep_B: Tensor | None,
    prediction_type: str | None,
) -> None:
    """Exactly one of a schedule by timestep and four numbers a sample."""
    if prediction_type not in get_args(PredictionType) and (prediction_type is not None or levels_B4 is None):
        raise refuse(_NAME, "prediction_type", repr(prediction_type), " or ".join(get_args(PredictionType)))
    if levels_B4 is None:
        if alphas_cumprod_T is None:
            raise refuse(_NAME, "alphas_cumprod", "None, as levels", "one of the two")
        check_dtype(_NAME, "alphas_cumprod", alphas_cumprod_T, (torch.float32,))
        if alphas_cumprod_T.dim() != 1 or alphas_cumprod_T.numel() == 0:
            raise refuse(_NAME, "alphas_cumprod", f"shape {tuple(alphas_cumprod_T.shape)}", "a value a timestep, [T]")
        return
    if alphas_cumprod_T is not None:
        raise refuse(_NAME, "levels", "a tensor, as alphas_cumprod", "one of the two")
    if timestep_B is not None:
        raise refuse(_NAME, "timestep", "a tensor, with levels", "None: levels are the noise of each sample")
    check_dtype(_NAME, "levels", levels_B4, (torch.float32,))
    check_shape(_NAME, "levels", levels_B4, (batch, 4))
    if not levels_B4.is_contiguous():
        raise refuse(_NAME, "levels", f"strides {levels_B4.stride()}", "a contiguous tensor")
