"""Means and M2 of slices of pixels (partials.py): by Welford's update along the slice, then merged across rows.

Dimensions in names of tiles: P pixels, C channels. A tile's rows are pixels, so a warp reads whole channel rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.partials import new_partials, num_slices, slice_pixels
from segdiff_kernels.tiles import channel_tile, pixel_tile


@triton.jit
def where_in_grid(program, S, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """(sample as int64, slice, tile of channels) of a program: neighbours share pixels, then samples."""
    return (program // (TILES * S)).to(tl.int64), (program // TILES) % S, program % TILES


@triton.jit
def welford(x_PC, keep_PC, mean_PC, m2_PC, count):  # type: ignore[no-untyped-def]
    """Adds the `count`-th value of every row and channel to the running (mean, M2). Welford 1962."""
    delta_PC = tl.where(keep_PC, x_PC - mean_PC, 0.0)
    mean_PC += delta_PC * (1.0 / count)
    return mean_PC, m2_PC + delta_PC * (x_PC - mean_PC)


@triton.jit
def merge_rows(mean_PC, m2_PC, num_pixels, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """(mean, M2) of a slice's `num_pixels`; row p has every BLOCK_P-th of them. Chan et al. 1983, eq. 2.1.

    Means are averaged as differences from the first one, which keeps the digits if the mean is large.
    """
    p_P1 = tl.arange(0, BLOCK_P)[:, None]
    count_P1 = ((num_pixels - p_P1 + BLOCK_P - 1) // BLOCK_P).to(tl.float32)
    pivot_C = tl.sum(tl.where(p_P1 == 0, mean_PC, 0.0), axis=0)
    from_pivot_PC = tl.where(count_P1 > 0, mean_PC - pivot_C[None, :], 0.0)
    mean_C = pivot_C + tl.sum(count_P1 * from_pivot_PC, axis=0) / num_pixels
    spread_PC = tl.where(count_P1 > 0, mean_PC - mean_C[None, :], 0.0)
    return mean_C, tl.sum(m2_PC + count_P1 * spread_PC * spread_PC, axis=0)


@triton.jit
def moments_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    partials_ptr,
    n,
    s,
    c_C,
    HW,
    S,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partials of a slice of x, for the channels `c_C`."""
    in_channels_1C = (c_C < C)[None, :]
    num_pixels = tl.minimum(HW - s * P, P)
    x_ptr += (n * HW + s * P) * C
    mean_PC = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    m2_PC = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for start in range(0, P, BLOCK_P):
        p_P1 = (start + tl.arange(0, BLOCK_P))[:, None]
        keep_PC = (p_P1 < num_pixels) & in_channels_1C
        x_PC = tl.load(x_ptr + p_P1 * C + c_C[None, :], mask=keep_PC, other=0.0).to(tl.float32)
        mean_PC, m2_PC = welford(x_PC, keep_PC, mean_PC, m2_PC, start // BLOCK_P + 1)
    mean_C, m2_C = merge_rows(mean_PC, m2_PC, num_pixels, BLOCK_P)
    partials_ptr += (n * S + s) * 2 * C
    tl.store(partials_ptr + c_C, mean_C, mask=c_C < C)
    tl.store(partials_ptr + C + c_C, m2_C, mask=c_C < C)


@triton.jit
def moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr, partials_ptr, HW, S, C: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Partials [N, S, 2, C] of x [N, HW, C]; a program for each sample, slice and tile of channels."""
    n, s, tile = where_in_grid(tl.program_id(0), S, (C + BLOCK_C - 1) // BLOCK_C)
    moments_tile(x_ptr, partials_ptr, n, s, tile * BLOCK_C + tl.arange(0, BLOCK_C), HW, S, C, P, BLOCK_P, BLOCK_C)


def launch_moments(x_NCHW: Tensor) -> Tensor:
    """Partials of a channels-last activation, with one launch that reads it once."""
    n, c, h, w = x_NCHW.shape
    partials_NS2C = new_partials(x_NCHW)
    slices, block_c = num_slices(h * w), channel_tile(c)
    moments_kernel[(n * slices * triton.cdiv(c, block_c),)](
        x_NCHW,
        partials_NS2C,
        h * w,
        slices,
        C=c,
        P=slice_pixels(h * w),
        BLOCK_P=pixel_tile(h * w, block_c, x_NCHW.element_size()),
        BLOCK_C=block_c,
    )
    return partials_NS2C


TRITON_NAME = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_cases() -> list[CompileCase]:
    """The real UNet's largest image and its smallest, which differ in their tiles."""
    return [
        CompileCase(
            name=f"moments C={c} {side * side} pixels {TRITON_NAME[dtype]}",
            function=moments_kernel,
            signature={"x_ptr": f"*{TRITON_NAME[dtype]}", "partials_ptr": "*fp32", "HW": "i32", "S": "i32"},
            constants={
                "C": c,
                "P": slice_pixels(side * side),
                "BLOCK_P": pixel_tile(side * side, channel_tile(c), dtype.itemsize),
                "BLOCK_C": channel_tile(c),
            },
            divisible_by_16=("x_ptr", "partials_ptr", "HW"),
        )
        for c, side, dtype in ((128, 256, torch.bfloat16), (128, 256, torch.float32), (512, 8, torch.bfloat16))
    ]
