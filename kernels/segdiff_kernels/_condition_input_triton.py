"""The Triton side of segdiff_kernels.condition_input: one program a run of pixels of one sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels import philox
from segdiff_kernels.compile_cases import CompileCase

_STREAM_NOISE = tl.constexpr(philox.STREAM_NOISE)
_STREAM_TIMESTEP = tl.constexpr(philox.STREAM_TIMESTEP)
_ENCODINGS = {"none": 0, "onehot": 1, "scalar_255": 2, "scalar_signed": 3}
_PREDICTIONS = {"epsilon": 0, "v": 1, "x0": 2}


@triton.jit
def words(seed, stream, position, index):  # type: ignore[no-untyped-def]
    """Words 4i .. 4i + 3 of philox.bits for a block of i."""
    c0 = index.to(tl.uint32)
    c1 = tl.zeros_like(c0) + stream
    c2 = tl.zeros_like(c0) + (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.zeros_like(c0) + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed.to(tl.uint64), c0, c1, c2, c3, 10)


@triton.jit
def box_muller(word_0, word_1):  # type: ignore[no-untyped-def]
    """Two standard normal numbers from two words, as philox.normal takes them.

    sin and cos by quadrants: the angle is 2 pi of a turn, so its reduction is exact, and the library's, which holds
    local memory for angles beyond 10^5, is not needed. Taylor series to 2^-25 over an eighth of a turn either way.
    """
    u = (word_0 >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    turn = (word_1 >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    quadrant = tl.floor(4.0 * turn + 0.5)
    t = 6.283185307179586 * (turn - 0.25 * quadrant)
    t2 = t * t
    sine = t + t * t2 * (-1.0 / 6.0 + t2 * (1.0 / 120.0 + t2 * (-1.0 / 5040.0 + t2 * (1.0 / 362880.0))))
    cosine = 1.0 + t2 * (-0.5 + t2 * (1.0 / 24.0 + t2 * (-1.0 / 720.0 + t2 * (1.0 / 40320.0 - t2 * (1.0 / 3628800.0)))))
    q = quadrant.to(tl.int32) & 3
    odd = (q & 1) == 1
    cos_size, sin_size = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    cos_sign = tl.where((q == 1) | (q == 2), -1.0, 1.0)
    return radius * cos_size * cos_sign, radius * sin_size * tl.where(q >= 2, -1.0, 1.0)


@triton.jit(do_not_specialize=["seed"])
def condition_input_kernel(  # type: ignore[no-untyped-def]
    input_ptr,
    target_ptr,
    timestep_out_ptr,
    mask_out_ptr,
    edge_out_ptr,
    image_ptr,
    mask_ptr,
    position_ptr,
    alphas_cumprod_ptr,
    levels_ptr,
    edge_ptr,
    timestep_ptr,
    top_ptr,
    left_ptr,
    flip_ptr,
    seed,
    num_timesteps,
    height,
    width,
    stored_height,
    stored_width,
    half_range,
    HAS_LEVELS: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    HAS_TIMESTEP: tl.constexpr,
    HAS_CROP: tl.constexpr,
    HAS_FLIP: tl.constexpr,
    ENCODING: tl.constexpr,
    PREDICTION: tl.constexpr,
    C: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything of BLOCK pixels of a sample: window, noise, x_t, target, the mask's channels, in that order."""
    sample = tl.program_id(1).to(tl.int64)
    num_pixels = height * width
    stored_pixels = stored_height * stored_width
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    position = tl.load(position_ptr + sample)

    source = pixel
    if HAS_CROP or HAS_FLIP:
        row, column = pixel // width, pixel % width
        if HAS_CROP:
            top, left = tl.load(top_ptr + sample), tl.load(left_ptr + sample)
            row += tl.minimum(tl.maximum(top, 0), stored_height - height).to(tl.int32)
            column += tl.minimum(tl.maximum(left, 0), stored_width - width).to(tl.int32)
        if HAS_FLIP:
            column = tl.where(tl.load(flip_ptr + sample) != 0, stored_width - 1 - column, column)
        source = row * stored_width + column
    x_0 = tl.div_rn(tl.load(image_ptr + sample * stored_pixels + source, inside, 0).to(tl.float32), half_range) - 1.0

    # Block i of Philox gives pixels 4i .. 4i + 3.
    index = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    word_0, word_1, word_2, word_3 = words(seed, _STREAM_NOISE, position, index)
    noise_0, noise_1 = box_muller(word_0, word_1)
    noise_2, noise_3 = box_muller(word_2, word_3)
    noise = tl.reshape(tl.join(tl.join(noise_0, noise_2), tl.join(noise_1, noise_3)), (BLOCK,))

    if HAS_LEVELS:
        timestep = tl.zeros((), tl.int64)
    elif HAS_TIMESTEP:
        timestep = tl.load(timestep_ptr + sample)
    else:
        word, _1, _2, _3 = words(seed, _STREAM_TIMESTEP, position, tl.zeros((1,), tl.uint32))
        timestep = tl.sum((word.to(tl.uint64) * num_timesteps) >> 32, 0).to(tl.int64)
    if tl.program_id(0) == 0:
        tl.store(timestep_out_ptr + sample, timestep)
    if HAS_LEVELS:
        signal, spread = tl.load(levels_ptr + 4 * sample), tl.load(levels_ptr + 4 * sample + 1)
    else:
        a = tl.load(alphas_cumprod_ptr + tl.minimum(tl.maximum(timestep, 0), num_timesteps - 1))
        signal, spread = tl.sqrt_rn(a), tl.sqrt_rn(1.0 - a)
    x_t = signal * x_0 + spread * noise
    if HAS_LEVELS:
        target = tl.load(levels_ptr + 4 * sample + 2) * x_0 + tl.load(levels_ptr + 4 * sample + 3) * noise
    elif PREDICTION == 0:
        target = noise
    elif PREDICTION == 1:
        target = signal * noise - spread * x_0
    else:
        target = x_0
    tl.store(target_ptr + sample * num_pixels + pixel, target, inside)

    MOVES: tl.constexpr = HAS_CROP or HAS_FLIP
    if MOVES or ENCODING != 0:
        label = tl.load(mask_ptr + sample * stored_pixels + source, inside, 255)
        if MOVES:
            tl.store(mask_out_ptr + sample * num_pixels + pixel, label, inside)
    if HAS_EDGE and (MOVES or ENCODING != 0):
        second = tl.load(edge_ptr + 2 * sample * stored_pixels + source, inside, 255)
        share = tl.load(edge_ptr + (2 * sample + 1) * stored_pixels + source, inside, 255)
        if MOVES:
            tl.store(edge_out_ptr + 2 * sample * num_pixels + pixel, second, inside)
            tl.store(edge_out_ptr + (2 * sample + 1) * num_pixels + pixel, share, inside)

    dtype = input_ptr.dtype.element_ty
    first = tl.program_id(0) * BLOCK
    out_ptr = input_ptr + (sample * num_pixels + first) * C
    if ENCODING == 0:
        tl.store(out_ptr + tl.arange(0, BLOCK), x_t.to(dtype), inside)
    elif ENCODING == 1:
        channel = tl.arange(0, CHANNEL_TILE)[None, :]
        is_first = label[:, None].to(tl.int32) + 1 == channel
        if HAS_EDGE:
            part = tl.div_rn(share.to(tl.float32), 255.0)
            rest = (1.0 - part).to(dtype).to(tl.float32)
            is_second = second[:, None].to(tl.int32) + 1 == channel
            value = tl.where(is_first, part.to(dtype).to(tl.float32)[:, None], 0.0)
            value += tl.where(is_second, rest[:, None], 0.0)
        else:
            value = tl.where(is_first, 1.0, 0.0)
        value = tl.where(channel == 0, x_t[:, None], value)
        tl.store(out_ptr + tl.arange(0, BLOCK)[:, None] * C + channel, value.to(dtype), inside[:, None] & (channel < C))
    else:
        scalar = tl.div_rn(label.to(tl.float32), 255.0).to(dtype)
        if ENCODING == 3:
            scalar = ((2.0 * scalar.to(tl.float32)).to(dtype).to(tl.float32) - 1.0).to(dtype)
        pair = tl.reshape(tl.join(x_t.to(dtype), scalar), (2 * BLOCK,))
        element = tl.arange(0, 2 * BLOCK)
        tl.store(out_ptr + element, pair, element < 2 * (num_pixels - first))


def config(mask_encoding: str, channels: int) -> tuple[int, int]:
    """BLOCK and num_warps: 16 pixels a thread, so that uint8 is read 16 bytes at once; one-hot as registers allow."""
    if mask_encoding == "onehot":
        return max(32, 8192 // triton.next_power_of_2(channels)), 4
    return 2048, 4


def launch(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    pixels: tuple[Tensor, Tensor, Tensor | None],
    position_B: Tensor,
    levels: tuple[Tensor | None, Tensor | None],
    per_sample: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    seed: int,
    prediction_type: str | None,
    mask_encoding: str,
) -> None:
    """Fill the outputs of the operator.

    pixels: image, mask, edge; levels: alphas_cumprod and levels, of which one is None; per_sample: timestep, top, left,
    flip. prediction_type is None with levels.
    """
    alphas_cumprod_T, levels_B4 = (None if t is None else t.contiguous() for t in levels)
    image_BRS, mask_BRS, edge_B2RS = pixels
    input_BCHW = outputs[0]
    timestep_B, top_B, left_B, flip_B = (None if t is None else t.contiguous() for t in per_sample)
    batch, channels, height, width = input_BCHW.shape
    block, num_warps = config(mask_encoding, channels)
    condition_input_kernel[triton.cdiv(height * width, block), batch](
        *outputs,
        *(image_BRS, mask_BRS, position_B.contiguous(), alphas_cumprod_T, levels_B4),
        *(edge_B2RS, timestep_B, top_B, left_B, flip_B),
        *(seed, 0 if alphas_cumprod_T is None else alphas_cumprod_T.numel(), height, width, *image_BRS.shape[1:]),
        torch.iinfo(image_BRS.dtype).max / 2.0,
        HAS_LEVELS=levels_B4 is not None,
        HAS_EDGE=edge_B2RS is not None,
        HAS_TIMESTEP=timestep_B is not None,
        HAS_CROP=top_B is not None,
        HAS_FLIP=flip_B is not None,
        ENCODING=_ENCODINGS[mask_encoding],
        PREDICTION=None if prediction_type is None else _PREDICTIONS[prediction_type],
        C=channels,
        CHANNEL_TILE=triton.next_power_of_2(channels),
        BLOCK=block,
        num_warps=num_warps,
    )


def compile_cases() -> list[CompileCase]:
    """256x256, 17 classes: x_t alone from 8 and 16 bits, one-hot channels, a scalar; with levels, alone and one-hot."""
    cases = []
    for mask_encoding, channels, dtype, image, noise_by in (
        ("none", 1, "bf16", "u8", "alphas_cumprod"),
        ("none", 1, "fp32", "u16", "alphas_cumprod"),
        ("onehot", 18, "bf16", "u8", "alphas_cumprod"),
        ("scalar_255", 2, "bf16", "u8", "alphas_cumprod"),
        ("none", 1, "bf16", "u8", "levels"),
        ("onehot", 18, "bf16", "u8", "levels"),
    ):
        has_levels = noise_by == "levels"
        block, num_warps = config(mask_encoding, channels)
        pointers = {"input_ptr": f"*{dtype}", "target_ptr": "*fp32", "timestep_out_ptr": "*i64"}
        pointers |= {"mask_out_ptr": "*u8", "edge_out_ptr": "*u8", "image_ptr": f"*{image}", "mask_ptr": "*u8"}
        pointers |= {"position_ptr": "*i64", f"{noise_by}_ptr": "*fp32"}
        other = "alphas_cumprod_ptr" if has_levels else "levels_ptr"
        absent = ("edge_ptr", "timestep_ptr", "top_ptr", "left_ptr", "flip_ptr", other)
        sides = ("height", "width", "stored_height", "stored_width")
        case = CompileCase(
            name=f"condition_input/{mask_encoding} {dtype} from {image}{' by levels' if has_levels else ''}",
            function=condition_input_kernel,
            signature=pointers | dict.fromkeys(("seed", "num_timesteps", *sides), "i32") | {"half_range": "fp32"},
            constants=dict.fromkeys(absent)
            | dict.fromkeys(("HAS_EDGE", "HAS_TIMESTEP", "HAS_CROP", "HAS_FLIP"), False)
            | {"HAS_LEVELS": has_levels, "PREDICTION": None if has_levels else _PREDICTIONS["v"]}
            | {"ENCODING": _ENCODINGS[mask_encoding], "C": channels}
            | {"CHANNEL_TILE": triton.next_power_of_2(channels), "BLOCK": block},
            num_warps=num_warps,
            divisible_by_16=(*pointers, *sides),
            # A program reads its sample's position and noise, which is one number of alphas_cumprod or four of levels.
            # With one-hot channels a thread holds two pixels, as it has 32 channels of each to keep: 2 of 43 bytes a
            # pixel are then read narrowly.
            narrow_loads=(5 if has_levels else 2) + (2 if mask_encoding == "onehot" else 0),
        )
        cases.append(case)
    return cases
