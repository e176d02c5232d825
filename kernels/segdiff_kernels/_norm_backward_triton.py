"""The backward pass of _norm_triton.py, in the same notation: three launches, x and dy are read twice.

With dz the gradient for z, m the mean over a group: dx = rstd * (weight * dz - m(weight * dz) - xhat * m(weight * dz *
xhat)), dbias = sum dz, dweight = sum dz * xhat. sums_kernel adds up slices, coefficients_kernel merges them, dx_kernel
writes. Between them, in float32: `sums` [N, S, 2, C] of dz and dz * (x - centre), `totals` [N, 2, C] of dz and dz *
xhat, `coefficients` [N, 2, C] of dx. Every sum has a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels._moments_triton import TRITON_NAME, where_in_grid
from segdiff_kernels._norm_backward_tiles import coefficients, dx_tile, parameter_gradients, sum_tile
from segdiff_kernels._norm_one_pass_triton import launch_one_pass
from segdiff_kernels._norm_triton import UNET_NORMS, norm_tiles
from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.partials import num_slices, slice_pixels
from segdiff_kernels.tiles import merge_tiles, one_pass_channels


@triton.jit
def sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    dy_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    HW,
    S,
    C1: tl.constexpr,
    C2: tl.constexpr,
    P: tl.constexpr,
    SILU: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dz and dz * (x - centre) over each slice; a program for each sample, slice and tile of channels."""
    C: tl.constexpr = C1 + C2
    tiles: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    skip_tiles: tl.constexpr = (C2 + BLOCK_C - 1) // BLOCK_C
    n, s, tile = where_in_grid(tl.program_id(0), S, tiles + skip_tiles)
    c_C = tl.arange(0, BLOCK_C)
    if tile < tiles:
        sum_tile(
            x_ptr, dy_ptr, statistics_ptr, weight_ptr, bias_ptr, sums_ptr,
            n, s, tile * BLOCK_C + c_C, HW, S, C1, C, P, SILU, PER_SAMPLE, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    elif C2 > 0:
        sum_tile(
            skip_ptr, dy_ptr + C1, statistics_ptr + C1, weight_ptr + C1, bias_ptr + C1, sums_ptr + C1,
            n, s, (tile - tiles) * BLOCK_C + c_C, HW, S, C2, C, P, SILU, PER_SAMPLE, BLOCK_P, BLOCK_C,
        )  # fmt: skip


@triton.jit
def coefficients_kernel(  # type: ignore[no-untyped-def]
    sums_ptr,
    statistics_ptr,
    weight_ptr,
    totals_ptr,
    coefficients_ptr,
    dshift_ptr,
    HW,
    S,
    C: tl.constexpr,
    K: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Totals over the pixels, coefficients of dx, and dshift; a program for each sample and BLOCK_G groups."""
    coefficients(
        tl.program_id(0), sums_ptr, statistics_ptr, weight_ptr, totals_ptr, coefficients_ptr, dshift_ptr, HW, S, C, K,
        PER_SAMPLE, BLOCK_S, BLOCK_G, BLOCK_K,
    )  # fmt: skip


@triton.jit
def dx_kernel(  # type: ignore[no-untyped-def]
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
    coefficients_ptr,
    totals_ptr,
    dweight_ptr,
    dbias_ptr,
    HW,
    N,
    num_blocks,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SILU: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx and dskip, plus the gradients that go round the norm; the first programs also add up dweight and dbias."""
    C: tl.constexpr = C1 + C2
    tiles: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    skip_tiles: tl.constexpr = (C2 + BLOCK_C - 1) // BLOCK_C
    # With a weight and bias for each sample, their gradients are the totals.
    parameter_tiles: tl.constexpr = 0 if PER_SAMPLE else (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c_C = tl.arange(0, BLOCK_C)
    if program < parameter_tiles:
        if not PER_SAMPLE:
            parameter_gradients(totals_ptr, dweight_ptr, dbias_ptr, program * BLOCK_C + c_C, N, C, BLOCK_P, BLOCK_C)
    else:
        n, block, tile = where_in_grid(program - parameter_tiles, num_blocks, tiles + skip_tiles)
        if tile < tiles:
            dx_tile(
                x_ptr, dy_ptr, residual_ptr, more_ptr, dx_ptr, statistics_ptr, weight_ptr, bias_ptr, coefficients_ptr,
                n, block * BLOCK_P, tile * BLOCK_C + c_C, HW, C1, C, SILU, PER_SAMPLE, BLOCK_P,
            )  # fmt: skip
        elif C2 > 0:
            dx_tile(
                skip_ptr, dy_ptr + C1, skip_residual_ptr, None, dskip_ptr, statistics_ptr + C1, weight_ptr + C1,
                bias_ptr + C1, coefficients_ptr + C1,
                n, block * BLOCK_P, (tile - tiles) * BLOCK_C + c_C, HW, C2, C, SILU, PER_SAMPLE, BLOCK_P,
            )  # fmt: skip


def launch_backward(
    dy_NCHW: Tensor,
    x_NCHW: Tensor,
    skip_NCHW: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_N4C: Tensor,
    num_groups: int,
    shift_dtype: torch.dtype | None,
    silu: bool,
    residual_NCHW: Tensor | None,
    more_NCHW: Tensor | None,
    skip_residual_NCHW: Tensor | None,
    zeros: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """(dx, dskip, dweight, dbias, dshift [N, C]); `residual` and `more` are added to dx, `skip_residual` to dskip.

    weight and bias are [C], or [N, C] for each sample; so are their gradients. zeros: counters (_turns.py).
    """
    n, c1, h, w = x_NCHW.shape
    c2 = 0 if skip_NCHW is None else skip_NCHW.shape[1]
    c, slices, per_sample = c1 + c2, num_slices(h * w), weight_C.dim() == 2
    dx_NCHW = torch.empty_like(x_NCHW, memory_format=torch.channels_last)
    dskip_NCHW = None if skip_NCHW is None else torch.empty_like(skip_NCHW, memory_format=torch.channels_last)
    dweight_C, dbias_C = torch.empty_like(weight_C), torch.empty_like(bias_C)
    dshift_NC = None if shift_dtype is None else statistics_N4C.new_empty((n, c), dtype=shift_dtype)
    activations = (x_NCHW, skip_NCHW, dy_NCHW, residual_NCHW, more_NCHW, skip_residual_NCHW, dx_NCHW, dskip_NCHW)
    parameters, found = (statistics_N4C, weight_C, bias_C), (dx_NCHW, dskip_NCHW, dweight_C, dbias_C, dshift_NC)
    part = one_pass_channels(h * w, c1, c2, num_groups, x_NCHW.element_size())
    if part:
        of_parameters = (dshift_NC, dweight_C, dbias_C)
        launch_one_pass(activations, parameters, of_parameters, (n, c1, c2, h * w), num_groups, silu, part, zeros)
        return found
    norm = norm_tiles(h * w, c1, c2, x_NCHW.dtype)
    channel_tiles = triton.cdiv(c1, norm["BLOCK_C"]) + triton.cdiv(c2, norm["BLOCK_C"])

    sums_NS2C = statistics_N4C.new_empty((n, slices, 2, c))
    sums_kernel[(n * slices * channel_tiles,)](
        x_NCHW,
        skip_NCHW,
        dy_NCHW,
        statistics_N4C,
        weight_C,
        bias_C,
        sums_NS2C,
        h * w,
        slices,
        C1=c1,
        C2=c2,
        P=slice_pixels(h * w),
        SILU=silu,
        PER_SAMPLE=per_sample,
        **norm,
    )
    totals_N2C = statistics_N4C.new_empty((n, 2, c))
    coefficients_N2C = torch.empty_like(totals_N2C)
    merge = merge_tiles(c, num_groups, slices)
    coefficients_kernel[(n * triton.cdiv(num_groups, merge["BLOCK_G"]),)](
        sums_NS2C,
        statistics_N4C,
        weight_C,
        totals_N2C,
        coefficients_N2C,
        dshift_NC,
        h * w,
        slices,
        C=c,
        K=c // num_groups,
        PER_SAMPLE=per_sample,
        **merge,
    )
    if per_sample:
        dweight_C.copy_(totals_N2C[:, 1])
        dbias_C.copy_(totals_N2C[:, 0])
    blocks = triton.cdiv(h * w, norm["BLOCK_P"])
    parameter_tiles = 0 if per_sample else triton.cdiv(c, norm["BLOCK_C"])
    dx_kernel[(parameter_tiles + n * blocks * channel_tiles,)](
        *activations,
        *(statistics_N4C, weight_C, bias_C, coefficients_N2C, totals_N2C),
        *((None, None) if per_sample else (dweight_C, dbias_C)),
        *(h * w, n, blocks),
        C1=c1,
        C2=c2,
        SILU=silu,
        PER_SAMPLE=per_sample,
        **norm,
    )
    return found


def compile_cases() -> list[CompileCase]:
    """The real UNet's norms, with 32 groups; parameters and shift float32; x and skip also go round the norm."""
    shapes = [(c1, c2, side * side, dtype) for c1, c2, side, dtype in UNET_NORMS]
    per_sample = _compile_cases(*shapes[0], per_sample=True)
    return [case for shape in shapes for case in _compile_cases(*shape)] + per_sample


def _compile_cases(c1: int, c2: int, pixels: int, dtype: torch.dtype, *, per_sample: bool = False) -> list[CompileCase]:
    x, name = f"*{TRITON_NAME[dtype]}", f"C={c1}+{c2} {pixels} pixels {TRITON_NAME[dtype]}"
    name += " per sample" * per_sample
    skip = ("skip_ptr", "skip_residual_ptr", "dskip_ptr")
    shapes = {"C1": c1, "C2": c2, "SILU": True, "PER_SAMPLE": per_sample, **norm_tiles(pixels, c1, c2, dtype)}
    affine = dict.fromkeys(("statistics_ptr", "weight_ptr", "bias_ptr"), "*fp32")
    read = {**dict.fromkeys(("x_ptr", "dy_ptr", *(skip[:1] if c2 else ())), x), **affine}
    sums = CompileCase(
        name=f"group_norm_silu_backward/sums {name}",
        function=sums_kernel,
        signature={**read, "sums_ptr": "*fp32", "HW": "i32", "S": "i32"},
        constants={**({} if c2 else {"skip_ptr": None}), **shapes, "P": slice_pixels(pixels)},
        divisible_by_16=(*read, "sums_ptr", "HW"),
        narrow_loads=10 if c2 else 5,
    )
    merged = ("sums_ptr", "statistics_ptr", "weight_ptr", "totals_ptr", "coefficients_ptr", "dshift_ptr")
    coefficients = CompileCase(
        name=f"group_norm_silu_backward/coefficients {name}",
        function=coefficients_kernel,
        signature={**dict.fromkeys(merged, "*fp32"), "HW": "i32", "S": "i32"},
        constants={
            **{"C": c1 + c2, "K": (c1 + c2) // 32, "PER_SAMPLE": per_sample},
            **merge_tiles(c1 + c2, 32, num_slices(pixels)),
        },
        divisible_by_16=(*merged, "HW"),
        streams=False,
    )
    used = {
        **read,
        **dict.fromkeys(("residual_ptr", *(() if c2 else ("more_ptr",)), "dx_ptr", *(skip[1:] if c2 else ())), x),
    }
    parameters = ("dweight_ptr", "dbias_ptr")
    used |= dict.fromkeys(("coefficients_ptr", "totals_ptr", *(() if per_sample else parameters)), "*fp32")
    dx = CompileCase(
        name=f"group_norm_silu_backward/dx {name}",
        function=dx_kernel,
        signature={**used, "HW": "i32", "N": "i32", "num_blocks": "i32"},
        constants={
            **dict.fromkeys(("more_ptr",) if c2 else skip),
            **dict.fromkeys(parameters if per_sample else ()),
            **shapes,
        },
        divisible_by_16=(*used, "HW", "N"),
        narrow_loads=14 if c2 else 7,
    )
    # Merging does not depend on x's dtype.
    return [sums, dx] if dtype == torch.float32 else [sums, coefficients, dx]
