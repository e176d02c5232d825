"""What the network reads and what it should answer, from grey values, labels and a position, in one pass.

Crop and flip, grey values to [-1, 1], noise and timestep from Philox, x_t, the mask as channels, and the target. The
noise level is a timestep's or, where objectives have continuous levels, four numbers a sample.

Dimensions: B batch, C = 1 + mask channels, H, W of the result, R, S of the stored slice, T training timesteps.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from segdiff_kernels import philox
from segdiff_kernels.backend import why_not_triton
from segdiff_kernels.checks import FLOATS, check_dtype, check_same_device, check_shape, refuse

PredictionType = Literal["epsilon", "v", "x0"]
MaskChannels = Literal["none", "onehot", "scalar_255", "scalar_signed"]

_NAME = "condition_input"


class Crop(NamedTuple):
    """The window of each slice once it is flipped: int64 [B] of its first row and column, and its sides in pixels.

    A window that leaves the slice is moved back to its edge.
    """

    top_B: Tensor
    left_B: Tensor
    height: int
    width: int


class ConditionedInput(NamedTuple):
    """input_BCHW: x_t and the mask's channels, channels-last; target_B1HW float32; timestep_B int64, 0 with levels.

    mask_BHW, edge_B2HW: the labels as they lie under x_t: what was given where nothing was cropped or flipped.
    """

    input_BCHW: Tensor
    target_B1HW: Tensor
    timestep_B: Tensor
    mask_BHW: Tensor
    edge_B2HW: Tensor | None


def condition_input(
    image_BRS: Tensor,
    mask_BRS: Tensor,
    position_B: Tensor,
    alphas_cumprod_T: Tensor | None,
    *,
    seed: int,
    prediction_type: PredictionType | None,
    mask_encoding: MaskChannels,
    num_classes: int,
    dtype: torch.dtype = torch.bfloat16,
    edge_B2RS: Tensor | None = None,
    timestep_B: Tensor | None = None,
    levels_B4: Tensor | None = None,
    crop: Crop | None = None,
    flip_B: Tensor | None = None,
) -> ConditionedInput:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise with the encoded mask beside it, in `dtype`, and what is to be predicted.

    image uint8 or uint16, mask uint8, position int64, alphas_cumprod float32, flip uint8 (not 0 mirrors left and
    right). Noise is philox.normal(seed, STREAM_NOISE, position, (1, H, W)) from the same bits; its float32 value may
    differ by rounding (4e-6, and more where it is near 0). The timestep is philox.timesteps' unless given; one outside
    [0, T) counts as the nearest.

    onehot         C = 1 + num_classes; ids from num_classes on (255: a mask not shown) are 0 in every channel
    scalar_255     C = 2, id / 255; scalar_signed 2 id / 255 - 1
    none           C = 1, x_t alone, for label_conv_in

    Soft edges (one-hot only; segdiff's Batch.edge_B2HW) mix two classes by the first one's share, rounded to `dtype`.
    Ho et al. 2020, eq. 4; v: Salimans and Ho 2022, section 4. Raises ValueError for what is not supported.

    Instead of alphas_cumprod, levels (float32, contiguous) gives each sample its own signal, spread, target_from_x0 and
    target_from_noise:

        x_t    = signal x_0 + spread noise
        target = target_from_x0 x_0 + target_from_noise noise

    as Karras et al. 2022, table 1 (a sigma a sample) and Liu et al. 2022 (rectified flow) need it. There are no
    timesteps then: timestep must be None, the result's timestep_B is int64 zeros, and prediction_type is not used.
    """
    given = {"image": image_BRS, "mask": mask_BRS, "position": position_B, "alphas_cumprod": alphas_cumprod_T}
    window = {} if crop is None else {"crop.top": crop.top_B, "crop.left": crop.left_B}
    check_same_device(_NAME, **given, levels=levels_B4, edge=edge_B2RS, timestep=timestep_B, flip=flip_B, **window)
    _check_pixels(image_BRS, mask_BRS, edge_B2RS)
    _check_per_sample(image_BRS.shape[0], position_B, timestep_B, flip_B, crop)
    _check_noise_levels(image_BRS.shape[0], alphas_cumprod_T, levels_B4, timestep_B, prediction_type)
    _check_choices(seed, mask_encoding, num_classes, dtype, edge_B2RS)
    height, width = image_BRS.shape[1:] if crop is None else (crop.height, crop.width)
    if not (1 <= height <= image_BRS.shape[1] and 1 <= width <= image_BRS.shape[2]):
        raise refuse(_NAME, "crop", f"{height}x{width}", f"sides within {tuple(image_BRS.shape[1:])}")
    if image_BRS.device.type != "meta" and (why := why_not_triton(image_BRS.device)):
        raise refuse(_NAME, "image", why, "a GPU, or use condition_input_reference")
    outputs = _condition_input(
        *(image_BRS, mask_BRS, position_B, alphas_cumprod_T, levels_B4, edge_B2RS, timestep_B),
        *(None if crop is None else crop.top_B, None if crop is None else crop.left_B, flip_B),
        *(height, width, seed, prediction_type if levels_B4 is None else None, mask_encoding, num_classes, dtype),
    )
    input_BCHW, target_B1HW, timestep_B, mask_BHW, edge_B2HW = outputs
    if crop is None and flip_B is None:  # an operator may not return what it was given
        mask_BHW, edge_B2HW = mask_BRS, edge_B2RS
    return ConditionedInput(input_BCHW, target_B1HW, timestep_B, mask_BHW, None if edge_B2RS is None else edge_B2HW)


def condition_input_reference(
    image_BRS: Tensor,
    mask_BRS: Tensor,
    position_B: Tensor,
    alphas_cumprod_T: Tensor | None,
    *,
    seed: int,
    prediction_type: PredictionType | None,
    mask_encoding: MaskChannels,
    num_classes: int,
    dtype: torch.dtype = torch.bfloat16,
    edge_B2RS: Tensor | None = None,
    timestep_B: Tensor | None = None,
    levels_B4: Tensor | None = None,
    crop: Crop | None = None,
    flip_B: Tensor | None = None,
) -> ConditionedInput:
    """The same in torch, on any device."""
    _check_noise_levels(image_BRS.shape[0], alphas_cumprod_T, levels_B4, timestep_B, prediction_type)
    mask_BHW = _windowed(mask_BRS, crop, flip_B)
    edge_B2HW = None if edge_B2RS is None else _windowed(edge_B2RS, crop, flip_B)
    image_B1HW = _windowed(image_BRS, crop, flip_B)[:, None]
    x_0_B1HW = image_B1HW.float() / (torch.iinfo(image_BRS.dtype).max / 2.0) - 1.0
    noise_B1HW = philox.normal(seed, philox.STREAM_NOISE, position_B, x_0_B1HW.shape[1:])
    if levels_B4 is None:
        assert alphas_cumprod_T is not None  # checked above
        if timestep_B is None:
            timestep_B = philox.timesteps(seed, position_B, len(alphas_cumprod_T))
        a_B111 = alphas_cumprod_T[timestep_B.clamp(0, len(alphas_cumprod_T) - 1)][:, None, None, None]
        signal_B111, spread_B111 = a_B111.sqrt(), (1.0 - a_B111).sqrt()
        target_B1HW = noise_B1HW if prediction_type == "epsilon" else x_0_B1HW
        if prediction_type == "v":
            target_B1HW = signal_B111 * noise_B1HW - spread_B111 * x_0_B1HW
    else:
        timestep_B = torch.zeros_like(position_B)
        signal_B111, spread_B111, from_x_0_B111, from_noise_B111 = levels_B4[:, :, None, None, None].unbind(1)
        target_B1HW = from_x_0_B111 * x_0_B1HW + from_noise_B111 * noise_B1HW
    x_t_B1HW = signal_B111 * x_0_B1HW + spread_B111 * noise_B1HW
    input_BCHW = x_t_B1HW.to(dtype)
    if mask_encoding != "none":
        mask_BKHW = _mask_channels(mask_BHW, edge_B2HW, mask_encoding, num_classes, dtype)
        input_BCHW = torch.cat((input_BCHW, mask_BKHW), dim=1).contiguous(memory_format=torch.channels_last)
    return ConditionedInput(input_BCHW, target_B1HW, timestep_B, mask_BHW, edge_B2HW)


def num_channels(mask_encoding: MaskChannels, num_classes: int) -> int:
    """C of the result."""
    return {"none": 1, "onehot": 1 + num_classes}.get(mask_encoding, 2)


def _windowed(ids: Tensor, crop: Crop | None, flip_B: Tensor | None) -> Tensor:
    """[B, ..., R, S] flipped, then cropped."""
    if flip_B is not None:
        mirrored_B = (flip_B != 0).view(-1, *[1] * (ids.dim() - 1))
        ids = torch.where(mirrored_B, ids.to(torch.int32).flip(-1), ids.to(torch.int32)).to(ids.dtype)
    if crop is None:
        return ids
    top_B, left_B = crop.top_B.tolist(), crop.left_B.tolist()
    room_y, room_x = ids.shape[-2] - crop.height, ids.shape[-1] - crop.width
    starts = [(min(max(y, 0), room_y), min(max(x, 0), room_x)) for y, x in zip(top_B, left_B, strict=True)]
    cut = [ids[i, ..., y : y + crop.height, x : x + crop.width] for i, (y, x) in enumerate(starts)]
    return torch.stack(cut)


def _mask_channels(
    mask_BHW: Tensor, edge_B2HW: Tensor | None, mask_encoding: MaskChannels, num_classes: int, dtype: torch.dtype
) -> Tensor:
    """The mask as channels [B, C - 1, H, W]."""
    if mask_encoding != "onehot":
        value_B1HW = mask_BHW[:, None].to(dtype) / 255.0
        return value_B1HW if mask_encoding == "scalar_255" else 2.0 * value_B1HW - 1.0
    ids_K11 = torch.arange(num_classes, device=mask_BHW.device)[:, None, None]
    first_BKHW = (mask_BHW[:, None] == ids_K11).to(dtype)
    if edge_B2HW is None:
        return first_BKHW
    share_B1HW = edge_B2HW[:, 1:].float() / 255.0
    second_BKHW = (edge_B2HW[:, :1] == ids_K11).to(dtype)
    return first_BKHW * share_B1HW.to(dtype) + second_BKHW * (1.0 - share_B1HW).to(dtype)


@torch.library.custom_op("segdiff::condition_input", mutates_args=())
def _condition_input(
    image_BRS: Tensor,
    mask_BRS: Tensor,
    position_B: Tensor,
    alphas_cumprod_T: Tensor | None,
    levels_B4: Tensor | None,
    edge_B2RS: Tensor | None,
    timestep_B: Tensor | None,
    top_B: Tensor | None,
    left_B: Tensor | None,
    flip_B: Tensor | None,
    height: int,
    width: int,
    seed: int,
    prediction_type: str | None,
    mask_encoding: str,
    num_classes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from segdiff_kernels._condition_input_triton import launch

    outputs = _outputs(image_BRS, edge_B2RS, top_B, flip_B, height, width, mask_encoding, num_classes, dtype)
    per_sample = (timestep_B, top_B, left_B, flip_B)
    pixels = (image_BRS, mask_BRS, edge_B2RS)
    levels = (alphas_cumprod_T, levels_B4)
    with torch.cuda.device_of(image_BRS):
        launch(outputs, pixels, position_B, levels, per_sample, seed, prediction_type, mask_encoding)
    return outputs


@_condition_input.register_fake
def _(
    image_BRS: Tensor,
    mask_BRS: Tensor,
    position_B: Tensor,
    alphas_cumprod_T: Tensor | None,
    levels_B4: Tensor | None,
    edge_B2RS: Tensor | None,
    timestep_B: Tensor | None,
    top_B: Tensor | None,
    left_B: Tensor | None,
    flip_B: Tensor | None,
    height: int,
    width: int,
    seed: int,
    prediction_type: str | None,
    mask_encoding: str,
    num_classes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(image_BRS, edge_B2RS, top_B, flip_B, height, width, mask_encoding, num_classes, dtype)


def _outputs(
    image_BRS: Tensor,
    edge_B2RS: Tensor | None,
    top_B: Tensor | None,
    flip_B: Tensor | None,
    height: int,
    width: int,
    mask_encoding: Any,
    num_classes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unwritten input, target, timestep, and the labels where they move (else of no elements)."""
    batch = image_BRS.shape[0]
    moves = top_B is not None or flip_B is not None
    channels_last = image_BRS.new_empty(
        (batch, height, width, num_channels(mask_encoding, num_classes)), dtype=dtype
    ).permute(0, 3, 1, 2)
    target_B1HW = image_BRS.new_empty((batch, 1, height, width), dtype=torch.float32)
    timestep_B = image_BRS.new_empty((batch,), dtype=torch.int64)
    mask_BHW = image_BRS.new_empty((batch if moves else 0, height, width), dtype=torch.uint8)
    edge_B2HW = image_BRS.new_empty(
        (batch if moves and edge_B2RS is not None else 0, 2, height, width), dtype=torch.uint8
    )
    return channels_last, target_B1HW, timestep_B, mask_BHW, edge_B2HW


def _check_pixels(image_BRS: Tensor, mask_BRS: Tensor, edge_B2RS: Tensor | None) -> None:
    check_dtype(_NAME, "image", image_BRS, (torch.uint8, torch.uint16))
    if image_BRS.dim() != 3 or image_BRS.numel() == 0:
        raise refuse(_NAME, "image", f"shape {tuple(image_BRS.shape)}", "a non-empty tensor [B, H, W]")
    labels = [("mask", mask_BRS, image_BRS.shape)]
    if edge_B2RS is not None:
        labels.append(("edge", edge_B2RS, torch.Size((image_BRS.shape[0], 2, *image_BRS.shape[1:]))))
    for argument, ids, shape in labels:
        check_dtype(_NAME, argument, ids, (torch.uint8,))
        check_shape(_NAME, argument, ids, shape)
    pixels: dict[str, Tensor | None] = {"image": image_BRS, "mask": mask_BRS, "edge": edge_B2RS}
    for argument, tensor in pixels.items():
        if tensor is not None and not tensor.is_contiguous():
            raise refuse(_NAME, argument, f"strides {tensor.stride()}", "a contiguous tensor")


def _check_per_sample(
    batch: int, position_B: Tensor, timestep_B: Tensor | None, flip_B: Tensor | None, crop: Crop | None
) -> None:
    int64s = {"position": position_B, "timestep": timestep_B}
    if crop is not None:
        int64s |= {"crop.top": crop.top_B, "crop.left": crop.left_B}
    for argument, tensor in (int64s | {"flip": flip_B}).items():
        if tensor is not None:
            check_dtype(_NAME, argument, tensor, (torch.uint8,) if argument == "flip" else (torch.int64,))
            check_shape(_NAME, argument, tensor, (batch,))


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


def _check_choices(
    seed: int, mask_encoding: str, num_classes: int, dtype: torch.dtype, edge_B2RS: Tensor | None
) -> None:
    if not -(2**63) <= seed < 2**63:
        raise refuse(_NAME, "seed", seed, "a number of 64 bits, with sign")
    if mask_encoding not in get_args(MaskChannels):
        raise refuse(_NAME, "mask_encoding", repr(mask_encoding), " or ".join(get_args(MaskChannels)))
    if not 1 <= num_classes <= 255:
        raise refuse(_NAME, "num_classes", num_classes, "1 to 255: id 255 stands for a mask that is not shown")
    if dtype not in FLOATS:
        raise refuse(_NAME, "dtype", dtype, "float32, bfloat16 or float16")
    if edge_B2RS is not None and mask_encoding.startswith("scalar"):
        raise refuse(_NAME, "edge", mask_encoding, "edges with onehot or none: a scalar can hold one class only")
