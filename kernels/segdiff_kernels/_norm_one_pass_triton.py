"""The norms' backward pass in one launch, which reads x and dy from memory once: the second time from the L2 cache.

As in _norm_backward_triton.py a part of a sample is summed up, its sums are merged, and dx is written. A part is a few
channels of one sample (tiles.one_pass_channels). Programs take turns as in _turns.py. Slices are merged in their order,
whichever program does it, so a repeat is bit-identical. Counters are integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels._moments_triton import TRITON_NAME
from segdiff_kernels._norm_backward_tiles import coefficients, dx_tile, parameter_gradients, sum_tile
from segdiff_kernels._turns import counters_for, declare_ready, draw, is_last, wait_until_ready
from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.partials import num_slices, slice_pixels
from segdiff_kernels.tiles import merge_tiles, one_pass_channels, parts_in_flight, pixel_tile


@triton.jit
def _job(number, num_parts, S, lag):  # type: ignore[no-untyped-def]
    """(part, slice, whether it is summed up) of a program: see above, with L = lag."""
    later = number - lag * S
    steady = (num_parts - lag) * 2 * S
    step, rest = later // (2 * S), later % (2 * S)
    is_head, is_tail = later < 0, later >= steady
    is_sum = is_head | ((later < steady) & (rest < S))
    part = tl.where(rest < S, lag + step, step)
    part = tl.where(is_tail, num_parts - lag + (later - steady) // S, part)
    part = tl.where(is_head, number // S, part)
    s = tl.where(is_tail, (later - steady) % S, rest % S)
    return part, tl.where(is_head, number % S, s), is_sum


@triton.jit
def one_pass_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    dy_ptr,
    residual_ptr,
    more_ptr,
    skip_residual_ptr,
    dx_ptr,
    dskip_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    totals_ptr,
    coefficients_ptr,
    dshift_ptr,
    dweight_ptr,
    dbias_ptr,
    counters_ptr,
    HW,
    N,
    S,
    lag,
    C1: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    SILU: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All of the backward pass; counters as in _turns.py."""
    C: tl.constexpr = C1 + C2
    TILES: tl.constexpr = C // BLOCK_C
    X_TILES: tl.constexpr = C1 // BLOCK_C
    MERGES: tl.constexpr = BLOCK_C // (K * BLOCK_G)
    merged_ptr = counters_ptr + 1
    summed_ptr = merged_ptr + TILES
    ready_ptr = summed_ptr + N * TILES
    part, s, is_sum = draw(counters_ptr, N * TILES, S, S, lag)
    n, tile = (part // TILES).to(tl.int64), part % TILES
    c_C = tl.arange(0, BLOCK_C)
    if is_sum:
        if tile < X_TILES:
            sum_tile(
                x_ptr, dy_ptr, statistics_ptr, weight_ptr, bias_ptr, sums_ptr,
                n, s, tile * BLOCK_C + c_C, HW, S, C1, C, P, SILU, PER_SAMPLE, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        elif C2 > 0:
            sum_tile(
                skip_ptr, dy_ptr + C1, statistics_ptr + C1, weight_ptr + C1, bias_ptr + C1, sums_ptr + C1,
                n, s, (tile - X_TILES) * BLOCK_C + c_C, HW, S, C2, C, P, SILU, PER_SAMPLE, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        if is_last(summed_ptr + part, S):
            for merge in range(MERGES):
                coefficients(
                    part * MERGES + merge, sums_ptr, statistics_ptr, weight_ptr, totals_ptr, coefficients_ptr,
                    dshift_ptr, HW, S, C, K, PER_SAMPLE, BLOCK_S, BLOCK_G, BLOCK_K,
                )  # fmt: skip
            declare_ready(ready_ptr + part, S)
            if not PER_SAMPLE:  # noqa: SIM102  (decided when compiled)
                if is_last(merged_ptr + tile, N):
                    parameter_gradients(
                        totals_ptr, dweight_ptr, dbias_ptr, tile * BLOCK_C + c_C, N, C, BLOCK_P, BLOCK_C
                    )
    else:
        wait_until_ready(ready_ptr + part)
        for start in range(0, P, BLOCK_P):
            if tile < X_TILES:
                dx_tile(
                    x_ptr, dy_ptr, residual_ptr, more_ptr, dx_ptr, statistics_ptr, weight_ptr, bias_ptr,
                    coefficients_ptr,
                    n, s * P + start, tile * BLOCK_C + c_C, HW, C1, C, SILU, PER_SAMPLE, BLOCK_P,
                )  # fmt: skip
            elif C2 > 0:
                dx_tile(
                    skip_ptr, dy_ptr + C1, skip_residual_ptr, None, dskip_ptr, statistics_ptr + C1, weight_ptr + C1,
                    bias_ptr + C1, coefficients_ptr + C1,
                    n, s * P + start, (tile - X_TILES) * BLOCK_C + c_C, HW, C2, C, SILU, PER_SAMPLE, BLOCK_P,
                )  # fmt: skip


def launch_one_pass(
    tensors: tuple[Tensor | None, ...],
    parameters: tuple[Tensor, ...],
    found: tuple[Tensor | None, Tensor, Tensor],
    shape: tuple[int, int, int, int],
    num_groups: int,
    silu: bool,
    part: int,
    zeros: Tensor | None,
) -> None:
    """Fill dx, dskip, dshift, dweight and dbias. tensors: the kernel's arguments from x to dskip; parameters:
    statistics, weight and bias; found: dshift, dweight and dbias; shape: N, C1, C2, H * W; part: its channels; zeros:
    counters (_turns.py)."""
    (n, c1, c2, pixels), (dshift_NC, dweight_C, dbias_C) = shape, found
    statistics_N4C, weight_C, _ = parameters
    c, slices, per_sample = c1 + c2, num_slices(pixels), weight_C.dim() == 2
    tiles, element_size = c // part, next(t for t in tensors if t is not None).element_size()
    sums_NS2C = statistics_N4C.new_empty((n, slices, 2, c))
    totals_N2C, coefficients_N2C = statistics_N4C.new_empty((2, n, 2, c))
    counters = counters_for(n, c, zeros, statistics_N4C.device)
    one_pass_kernel[(2 * n * tiles * slices,)](
        *(*tensors, *parameters, sums_NS2C, totals_N2C, coefficients_N2C, dshift_NC),
        *((None, None) if per_sample else (dweight_C, dbias_C)),
        *(counters, pixels, n, slices, parts_in_flight(n * tiles, 2 * slices)),
        C1=c1,
        C2=c2,
        K=c // num_groups,
        P=slice_pixels(pixels),
        SILU=silu,
        PER_SAMPLE=per_sample,
        **one_pass_tiles(pixels, part, c, num_groups, element_size),
    )
    if per_sample:  # the gradients of each sample's parameters are the totals
        dweight_C.copy_(totals_N2C[:, 1])
        dbias_C.copy_(totals_N2C[:, 0])


def one_pass_tiles(num_pixels: int, part: int, num_channels: int, num_groups: int, element_size: int) -> dict[str, int]:
    """Blocks: a quarter of those of the kernels that only sum up or only write, so that no register spills."""
    merge = merge_tiles(num_channels, num_groups, num_slices(num_pixels))
    merge["BLOCK_S"] = max(1, merge["BLOCK_S"] // 2)
    return {"BLOCK_P": max(1, pixel_tile(num_pixels, part, element_size) // 4), "BLOCK_C": part, **merge}


def compile_cases() -> list[CompileCase]:
    """The real UNet's norms that are read once, with 32 groups: the largest image, the smallest, and a pair; one with
    parameters for each sample. Parameters and shift float32; x and skip also go round the norm."""
    shapes = ((128, 0, 256, False), (512, 0, 8, False), (256, 256, 64, False), (128, 0, 256, True))
    return [_compile_case(c1, c2, side * side, per_sample) for c1, c2, side, per_sample in shapes]


def _compile_case(c1: int, c2: int, pixels: int, per_sample: bool) -> CompileCase:
    bf16 = torch.bfloat16
    part = one_pass_channels(pixels, c1, c2, 32, bf16.itemsize)
    name = f"C={c1}+{c2} {pixels} pixels {TRITON_NAME[bf16]}" + " per sample" * per_sample
    skip, parameters = ("skip_ptr", "skip_residual_ptr", "dskip_ptr"), ("dweight_ptr", "dbias_ptr")
    activations = ("x_ptr", "dy_ptr", "residual_ptr", "dx_ptr", *(skip if c2 else ("more_ptr",)))
    floats = ("statistics_ptr", "weight_ptr", "bias_ptr", "sums_ptr", "totals_ptr", "coefficients_ptr", "dshift_ptr")
    signature = dict.fromkeys(activations, "*bf16") | dict.fromkeys(floats, "*fp32") | {"counters_ptr": "*i32"}
    signature |= dict.fromkeys(() if per_sample else parameters, "*fp32")
    absent = (*(("more_ptr",) if c2 else skip), *(parameters if per_sample else ()))
    return CompileCase(
        name=f"group_norm_silu_backward/one pass {name}",
        function=one_pass_kernel,
        signature=signature | dict.fromkeys(("HW", "N", "S", "lag"), "i32"),
        constants={
            **dict.fromkeys(absent),
            **{"C1": c1, "C2": c2, "K": (c1 + c2) // 32, "P": slice_pixels(pixels), "SILU": True},
            "PER_SAMPLE": per_sample,
            **one_pass_tiles(pixels, part, c1 + c2, 32, bf16.itemsize),
        },
        divisible_by_16=(*signature, "HW", "N"),
        narrow_loads=200,  # of the merge, which is not what streams
    )
