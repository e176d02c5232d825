"""The norms' forward pass in one launch: without partial statistics it reads x from memory once, the second time from
the L2 cache; with them it merges them itself.

As in _norm_triton.py slices become groups, and y is written. A part is a few channels of one sample
(tiles.one_pass_channels). Programs take turns as in _turns.py, and slices are merged in their order, whichever program
does it, so a repeat is bit-identical.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels._moments_triton import TRITON_NAME, moments_tile
from segdiff_kernels._norm_forward_tiles import merge_groups, normalise_tile
from segdiff_kernels._turns import counters_for, declare_ready, draw, is_last, wait_until_ready
from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.partials import num_slices, slice_pixels
from segdiff_kernels.tiles import merge_tiles, one_pass_channels, parts_in_flight, pixel_tile


@triton.jit
def forward_one_pass_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    y_ptr,
    partials_ptr,
    skip_partials_ptr,
    shift_ptr,
    skip_shift_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    counters_ptr,
    shift_stride,
    skip_shift_stride,
    eps,
    HW,
    N,
    S,
    A,
    lag,
    C1: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    MOMENTS: tl.constexpr,
    SILU: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All of the forward pass. MOMENTS: A = S programs sum up a part, and write the partials; else A = 1 reads them."""
    C: tl.constexpr = C1 + C2
    TILES: tl.constexpr = C // BLOCK_C
    X_TILES: tl.constexpr = C1 // BLOCK_C
    MERGES: tl.constexpr = BLOCK_C // (K * BLOCK_G)
    summed_ptr = counters_ptr + 1
    ready_ptr = summed_ptr + N * TILES
    part, s, is_sum = draw(counters_ptr, N * TILES, A, S, lag)
    n, tile = (part // TILES).to(tl.int64), part % TILES
    c_C = tl.arange(0, BLOCK_C)
    if is_sum:
        is_complete = part >= 0
        if MOMENTS:
            if tile < X_TILES:
                moments_tile(x_ptr, partials_ptr, n, s, tile * BLOCK_C + c_C, HW, S, C1, P, BLOCK_P, BLOCK_C)
            elif C2 > 0:
                moments_tile(
                    skip_ptr, skip_partials_ptr, n, s, (tile - X_TILES) * BLOCK_C + c_C, HW, S, C2, P, BLOCK_P, BLOCK_C
                )
            is_complete = is_last(summed_ptr + part, S)
        if is_complete:
            for merge in range(MERGES):
                merge_groups(
                    part * MERGES + merge, partials_ptr, skip_partials_ptr, shift_ptr, skip_shift_ptr, statistics_ptr,
                    HW, S, shift_stride, skip_shift_stride, eps, C1, C2, K, P, BLOCK_S, BLOCK_G, BLOCK_K,
                )  # fmt: skip
            declare_ready(ready_ptr + part, S)
    else:
        wait_until_ready(ready_ptr + part)
        for start in range(0, P, BLOCK_P):
            if tile < X_TILES:
                normalise_tile(
                    x_ptr, y_ptr, statistics_ptr, weight_ptr, bias_ptr,
                    n, s * P + start, tile * BLOCK_C + c_C, HW, C1, C, SILU, PER_SAMPLE, BLOCK_P,
                )  # fmt: skip
            elif C2 > 0:
                normalise_tile(
                    skip_ptr, y_ptr + C1, statistics_ptr + C1, weight_ptr + C1, bias_ptr + C1,
                    n, s * P + start, (tile - X_TILES) * BLOCK_C + c_C, HW, C2, C, SILU, PER_SAMPLE, BLOCK_P,
                )  # fmt: skip


def launch_forward_one_pass(
    tensors: tuple[Tensor | None, ...],
    parameters: tuple[Tensor, Tensor, Tensor],
    numbers: tuple[int, int, float],
    shape: tuple[int, int, int, int],
    num_groups: int,
    silu: bool,
    part: int,
    moments: bool,
    zeros: Tensor | None,
) -> None:
    """Fill y and statistics, and with `moments` the partials. tensors: the kernel's arguments from x to the skip's
    shift; parameters: statistics, weight and bias; numbers: strides of the shifts, eps; shape: N, C1, C2, H * W; part:
    its channels; zeros: counters (_turns.py)."""
    n, c1, c2, pixels = shape
    c, slices, x_NCHW = c1 + c2, num_slices(pixels), tensors[0]
    assert x_NCHW is not None
    parts, sums = n * (c // part), slices if moments else 1
    forward_one_pass_kernel[(parts * (sums + slices),)](
        *(*tensors, *parameters, counters_for(n, c, zeros, x_NCHW.device), *numbers),
        *(pixels, n, slices, sums, parts_in_flight(parts, sums + slices)),
        C1=c1,
        C2=c2,
        K=c // num_groups,
        P=slice_pixels(pixels),
        MOMENTS=moments,
        SILU=silu,
        PER_SAMPLE=parameters[1].dim() == 2,
        **forward_tiles(pixels, part, c, num_groups, x_NCHW.element_size()),
    )


def forward_tiles(num_pixels: int, part: int, num_channels: int, num_groups: int, element_size: int) -> dict[str, int]:
    """Blocks: half of those of the kernels that do only one thing, so that no register spills."""
    merge = merge_tiles(num_channels, num_groups, num_slices(num_pixels))
    merge["BLOCK_S"] = max(1, merge["BLOCK_S"] // 2)
    return {"BLOCK_P": max(1, pixel_tile(num_pixels, part, element_size) // 2), "BLOCK_C": part, **merge}


def compile_cases() -> list[CompileCase]:
    """The real UNet's norms, with 32 groups: the largest image, without and with partials, the smallest, and a pair.
    Parameters and shift float32."""
    shapes = ((128, 0, 256, True), (128, 0, 256, False), (512, 0, 8, True), (256, 256, 64, False))
    return [_compile_case(c1, c2, side * side, moments) for c1, c2, side, moments in shapes]


def _compile_case(c1: int, c2: int, pixels: int, moments: bool) -> CompileCase:
    bf16 = torch.bfloat16
    part = one_pass_channels(pixels, c1, c2, 32, bf16.itemsize, reads_twice=moments)
    skip = ("skip_ptr", "skip_partials_ptr", "skip_shift_ptr")
    floats = ("partials_ptr", "shift_ptr", "statistics_ptr", "weight_ptr", "bias_ptr", *(skip[1:] if c2 else ()))
    signature = dict.fromkeys(("x_ptr", "y_ptr", *(skip[:1] if c2 else ())), "*bf16") | dict.fromkeys(floats, "*fp32")
    pointers = signature | {"counters_ptr": "*i32"}
    numbers = dict.fromkeys(("shift_stride", "skip_shift_stride", "HW", "N", "S", "A", "lag"), "i32") | {"eps": "fp32"}
    return CompileCase(
        name=f"group_norm_silu/one pass C={c1}+{c2} {pixels} pixels {TRITON_NAME[bf16]}" + " moments" * moments,
        function=forward_one_pass_kernel,
        signature=pointers | numbers,
        constants={
            **({} if c2 else dict.fromkeys(skip)),
            **{"C1": c1, "C2": c2, "K": (c1 + c2) // 32, "P": slice_pixels(pixels), "MOMENTS": moments, "SILU": True},
            "PER_SAMPLE": False,
            **forward_tiles(pixels, part, c1 + c2, 32, bf16.itemsize),
        },
        divisible_by_16=(*pointers, "HW", "N"),
        narrow_loads=200,  # of the merge, which is not what streams
    )
