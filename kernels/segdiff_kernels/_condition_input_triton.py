"""The Triton side of segdiff_kernels.condition_input: a program computes consecutive pixels of one sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels import philox
from segdiff_kernels.compile_cases import CompileCase

_STREAM_NOISE = tl.constexpr(philox.STREAM_NOISE)
_STREAM_TIMESTEP = tl.constexpr(philox.STREAM_TIMESTEP)
# 16 pixels a thread, so that uint8 is read 16 bytes at once.
_BLOCK, _NUM_WARPS = 2048, 4
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
    """Two standard normal numbers from two words, as in philox.normal.

    sin and cos by quadrants: the angle is a fraction of a turn, so its reduction is exact. The library's functions,
    which use local memory for angles beyond 10^5, are not needed. Taylor series to 2^-25 over an eighth of a turn on
    either side.
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
    x_t_ptr,
    target_ptr,
    timestep_out_ptr,
    image_ptr,
    position_ptr,
    alphas_cumprod_ptr,
    levels_ptr,
    timestep_ptr,
    seed,
    num_timesteps,
    num_pixels,
    half_range,
    HAS_LEVELS: tl.constexpr,
    HAS_TIMESTEP: tl.constexpr,
    PREDICTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The whole computation for BLOCK pixels of a sample: noise, x_t and target, in that order."""
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    position = tl.load(position_ptr + sample)
    x_0 = tl.div_rn(tl.load(image_ptr + sample * num_pixels + pixel, inside, 0).to(tl.float32), half_range) - 1.0

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
    tl.store(x_t_ptr + sample * num_pixels + pixel, x_t, inside)


def launch(
    outputs: tuple[Tensor, Tensor, Tensor],
    image_BHW: Tensor,
    position_B: Tensor,
    levels: tuple[Tensor | None, Tensor | None],
    timestep_B: Tensor | None,
    seed: int,
    prediction_type: str | None,
) -> None:
    """Fill the outputs of the operator. One of alphas_cumprod and levels is None; prediction_type is None with
    levels."""
    alphas_cumprod_T, levels_B4 = (None if t is None else t.contiguous() for t in levels)
    batch, num_pixels = len(image_BHW), image_BHW[0].numel()
    condition_input_kernel[triton.cdiv(num_pixels, _BLOCK), batch](
        *(*outputs, image_BHW, position_B.contiguous(), alphas_cumprod_T, levels_B4),
        None if timestep_B is None else timestep_B.contiguous(),
        seed,
        0 if alphas_cumprod_T is None else alphas_cumprod_T.numel(),
        num_pixels,
        torch.iinfo(image_BHW.dtype).max / 2.0,
        HAS_LEVELS=levels_B4 is not None,
        HAS_TIMESTEP=timestep_B is not None,
        PREDICTION=None if prediction_type is None else _PREDICTIONS[prediction_type],
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


def compile_cases() -> list[CompileCase]:
    """256x256: by a schedule from 8 and 16 bits, at given timesteps, and with levels."""
    cases = []
    for image, noise_by, has_timestep in (
        ("u8", "alphas_cumprod", False),
        ("u16", "alphas_cumprod", False),
        ("u8", "alphas_cumprod", True),
        ("u8", "levels", False),
    ):
        has_levels = noise_by == "levels"
        pointers = {"x_t_ptr": "*fp32", "target_ptr": "*fp32", "timestep_out_ptr": "*i64", "image_ptr": f"*{image}"}
        pointers |= {"position_ptr": "*i64", f"{noise_by}_ptr": "*fp32"}
        absent = ["alphas_cumprod_ptr" if has_levels else "levels_ptr"]
        if has_timestep:
            pointers["timestep_ptr"] = "*i64"
        else:
            absent.append("timestep_ptr")
        how = " by levels" if has_levels else " at given timesteps" if has_timestep else ""
        case = CompileCase(
            name=f"condition_input/from {image}{how}",
            function=condition_input_kernel,
            signature=pointers | dict.fromkeys(("seed", "num_timesteps", "num_pixels"), "i32") | {"half_range": "fp32"},
            constants=dict.fromkeys(absent)
            | {"HAS_LEVELS": has_levels, "HAS_TIMESTEP": has_timestep, "BLOCK": _BLOCK}
            | {"PREDICTION": None if has_levels else _PREDICTIONS["v"]},
            num_warps=_NUM_WARPS,
            divisible_by_16=(*pointers, "num_pixels"),
            # A program reads its sample's position and noise: one number of alphas_cumprod, after the timestep where
            # it is given, or four of levels.
            narrow_loads=5 if has_levels else 2 + has_timestep,
        )
        cases.append(case)
    return cases
