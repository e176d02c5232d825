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
from segdiff_kernels._norm_triton import UNET_NORMS, group_tile, load_affine, norm_tiles, sigmoid
from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.partials import num_slices, slice_pixels
from segdiff_kernels.tiles import merge_tiles


@triton.jit
def _before_silu(dy, z):  # type: ignore[no-untyped-def]
    """dz: dy * SiLU'(z), with SiLU'(z) = sigmoid(z) * (1 + z * (1 - sigmoid(z)))."""
    sigmoid_z = sigmoid(z)
    return dy * sigmoid_z * (1.0 + z * (1.0 - sigmoid_z))


@triton.jit
def _sum_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    dy_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    n,
    s,
    c_C,
    HW,
    S,
    CX: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    SILU: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over a slice of x; all pointers but x_ptr are at x's first channel."""
    exists_C = c_C < CX
    row = n * HW + s * P
    centre_1C, scale_1C, offset_1C = load_affine(statistics_ptr, weight_ptr, bias_ptr, n, c_C, exists_C, C, PER_SAMPLE)
    dz_sum_PC = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    product_sum_PC = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for start in range(0, P, BLOCK_P):
        p_P1 = (start + tl.arange(0, BLOCK_P))[:, None]
        keep_PC = (s * P + p_P1 < HW) & exists_C[None, :]
        x_PC = tl.load(x_ptr + row * CX + (p_P1 * CX + c_C[None, :]), mask=keep_PC, other=0.0).to(tl.float32)
        dy_PC = tl.load(dy_ptr + row * C + (p_P1 * C + c_C[None, :]), mask=keep_PC, other=0.0).to(tl.float32)
        x_PC -= centre_1C
        dz_PC = _before_silu(dy_PC, x_PC * scale_1C + offset_1C) if SILU else dy_PC
        dz_sum_PC += dz_PC
        product_sum_PC += dz_PC * x_PC
    sums_ptr += (n * S + s) * 2 * C
    tl.store(sums_ptr + c_C, tl.sum(dz_sum_PC, axis=0), mask=exists_C)
    tl.store(sums_ptr + C + c_C, tl.sum(product_sum_PC, axis=0), mask=exists_C)


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
        _sum_tile(
            x_ptr, dy_ptr, statistics_ptr, weight_ptr, bias_ptr, sums_ptr,
            n, s, tile * BLOCK_C + c_C, HW, S, C1, C, P, SILU, PER_SAMPLE, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    elif C2 > 0:
        _sum_tile(
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
    """Totals over the pixels; (constant, slope) of dx = scale * dz - constant - slope * (x - centre); dshift.

    The shift's gradient, the sum of dx over the pixels, follows from the totals and the mean of xhat, without dx.
    """
    n, c_GK, exists_GK = group_tile(tl.program_id(0), C, K, BLOCK_G, BLOCK_K)
    s_S11 = tl.arange(0, BLOCK_S)[:, None, None]
    sums_ptr += n * S * 2 * C
    dz_SGK = tl.full((BLOCK_S, BLOCK_G, BLOCK_K), 0.0, tl.float32)
    product_SGK = tl.full((BLOCK_S, BLOCK_G, BLOCK_K), 0.0, tl.float32)
    for first in range(0, S, BLOCK_S):
        keep_SGK = (first + s_S11 < S) & exists_GK[None, :, :]
        sums_SGK = sums_ptr + ((first + s_S11) * 2 * C + c_GK[None, :, :])
        dz_SGK += tl.load(sums_SGK, mask=keep_SGK, other=0.0)
        product_SGK += tl.load(sums_SGK + C, mask=keep_SGK, other=0.0)

    statistics_ptr += n * 4 * C + c_GK
    rstd_GK = tl.load(statistics_ptr + C, mask=exists_GK, other=0.0)
    correction_GK = tl.load(statistics_ptr + 2 * C, mask=exists_GK, other=0.0)
    dz_GK = tl.sum(dz_SGK, axis=0)
    product_GK = tl.sum(product_SGK, axis=0) * rstd_GK + dz_GK * correction_GK
    totals_ptr += n * 2 * C + c_GK
    tl.store(totals_ptr, dz_GK, mask=exists_GK)
    tl.store(totals_ptr + C, product_GK, mask=exists_GK)

    if PER_SAMPLE:
        weight_ptr += n * C
    # rstd times the group's means of weight * dz and of weight * dz * xhat.
    scale_GK = rstd_GK * tl.load(weight_ptr + c_GK, mask=exists_GK, other=0.0).to(tl.float32)
    dz_mean_G1 = (tl.sum(scale_GK * dz_GK, axis=1) / (K * HW))[:, None]
    product_mean_G1 = (tl.sum(scale_GK * product_GK, axis=1) / (K * HW))[:, None]
    coefficients_ptr += n * 2 * C + c_GK
    tl.store(coefficients_ptr, dz_mean_G1 + product_mean_G1 * correction_GK, mask=exists_GK)
    tl.store(coefficients_ptr + C, product_mean_G1 * rstd_GK, mask=exists_GK)
    if dshift_ptr is not None:
        xhat_mean_GK = tl.load(statistics_ptr + 3 * C, mask=exists_GK, other=0.0)
        dshift_GK = scale_GK * dz_GK - HW * (dz_mean_G1 + product_mean_G1 * xhat_mean_GK)
        tl.store(dshift_ptr + n * C + c_GK, dshift_GK.to(dshift_ptr.dtype.element_ty), mask=exists_GK)


@triton.jit
def _dx_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    dy_ptr,
    residual_ptr,
    dx_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    coefficients_ptr,
    n,
    first_pixel,
    c_C,
    HW,
    CX: tl.constexpr,
    C: tl.constexpr,
    SILU: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx of a tile; x, residual and dx have rows of CX channels, all other pointers are at x's first channel."""
    exists_C = c_C < CX
    p_P1 = tl.arange(0, BLOCK_P)[:, None]
    keep_PC = (first_pixel + p_P1 < HW) & exists_C[None, :]
    row = n * HW + first_pixel
    where_PC = p_P1 * CX + c_C[None, :]
    x_PC = tl.load(x_ptr + row * CX + where_PC, mask=keep_PC, other=0.0).to(tl.float32)
    dy_PC = tl.load(dy_ptr + row * C + (p_P1 * C + c_C[None, :]), mask=keep_PC, other=0.0).to(tl.float32)
    centre_1C, scale_1C, offset_1C = load_affine(statistics_ptr, weight_ptr, bias_ptr, n, c_C, exists_C, C, PER_SAMPLE)
    coefficients_ptr += n * 2 * C
    constant_1C = tl.load(coefficients_ptr + c_C, mask=exists_C, other=0.0)[None, :]
    slope_1C = tl.load(coefficients_ptr + C + c_C, mask=exists_C, other=0.0)[None, :]
    x_PC -= centre_1C
    dz_PC = _before_silu(dy_PC, x_PC * scale_1C + offset_1C) if SILU else dy_PC
    dx_PC = scale_1C * dz_PC - constant_1C - slope_1C * x_PC
    if residual_ptr is not None:
        dx_PC += tl.load(residual_ptr + row * CX + where_PC, mask=keep_PC, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * CX + where_PC, dx_PC.to(dx_ptr.dtype.element_ty), mask=keep_PC)


@triton.jit
def _parameter_gradients(  # type: ignore[no-untyped-def]
    totals_ptr, dweight_ptr, dbias_ptr, c_C, N, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dbias and dweight, the totals of dz and dz * xhat over the batch, for a tile of channels."""
    dbias_NC = tl.full((BLOCK_N, BLOCK_C), 0.0, tl.float32)
    dweight_NC = tl.full((BLOCK_N, BLOCK_C), 0.0, tl.float32)
    for first in range(0, N, BLOCK_N):
        n_N1 = (first + tl.arange(0, BLOCK_N))[:, None]
        keep_NC = (n_N1 < N) & (c_C < C)[None, :]
        totals_NC = totals_ptr + n_N1 * 2 * C + c_C[None, :]
        dbias_NC += tl.load(totals_NC, mask=keep_NC, other=0.0)
        dweight_NC += tl.load(totals_NC + C, mask=keep_NC, other=0.0)
    tl.store(dweight_ptr + c_C, tl.sum(dweight_NC, axis=0).to(dweight_ptr.dtype.element_ty), mask=c_C < C)
    tl.store(dbias_ptr + c_C, tl.sum(dbias_NC, axis=0).to(dbias_ptr.dtype.element_ty), mask=c_C < C)


@triton.jit
def dx_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    dy_ptr,
    residual_ptr,
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
            _parameter_gradients(totals_ptr, dweight_ptr, dbias_ptr, program * BLOCK_C + c_C, N, C, BLOCK_P, BLOCK_C)
    else:
        n, block, tile = where_in_grid(program - parameter_tiles, num_blocks, tiles + skip_tiles)
        if tile < tiles:
            _dx_tile(
                x_ptr, dy_ptr, residual_ptr, dx_ptr, statistics_ptr, weight_ptr, bias_ptr, coefficients_ptr,
                n, block * BLOCK_P, tile * BLOCK_C + c_C, HW, C1, C, SILU, PER_SAMPLE, BLOCK_P,
            )  # fmt: skip
        elif C2 > 0:
            _dx_tile(
                skip_ptr, dy_ptr + C1, skip_residual_ptr, dskip_ptr, statistics_ptr + C1, weight_ptr + C1,
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
    skip_residual_NCHW: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """(dx, dskip, dweight, dbias, dshift [N, C]); `residual` and `skip_residual` are added to dx and dskip.

    weight and bias are [C], or [N, C] for each sample; so are their gradients.
    """
    n, c1, h, w = x_NCHW.shape
    c2 = 0 if skip_NCHW is None else skip_NCHW.shape[1]
    c, slices, per_sample = c1 + c2, num_slices(h * w), weight_C.dim() == 2
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
    dshift_NC = None if shift_dtype is None else statistics_N4C.new_empty((n, c), dtype=shift_dtype)
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
    dx_NCHW = torch.empty_like(x_NCHW, memory_format=torch.channels_last)
    dskip_NCHW = None if skip_NCHW is None else torch.empty_like(skip_NCHW, memory_format=torch.channels_last)
    dweight_C, dbias_C = torch.empty_like(weight_C), torch.empty_like(bias_C)
    if per_sample:
        dweight_C.copy_(totals_N2C[:, 1])
        dbias_C.copy_(totals_N2C[:, 0])
    blocks = triton.cdiv(h * w, norm["BLOCK_P"])
    parameter_tiles = 0 if per_sample else triton.cdiv(c, norm["BLOCK_C"])
    dx_kernel[(parameter_tiles + n * blocks * channel_tiles,)](
        *(x_NCHW, skip_NCHW, dy_NCHW, residual_NCHW, skip_residual_NCHW, dx_NCHW, dskip_NCHW),
        *(statistics_N4C, weight_C, bias_C, coefficients_N2C, totals_N2C),
        *((None, None) if per_sample else (dweight_C, dbias_C)),
        *(h * w, n, blocks),
        C1=c1,
        C2=c2,
        SILU=silu,
        PER_SAMPLE=per_sample,
        **norm,
    )
    return dx_NCHW, dskip_NCHW, dweight_C, dbias_C, dshift_NC


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
    used = {**read, **dict.fromkeys(("residual_ptr", "dx_ptr", *(skip[1:] if c2 else ())), x)}
    parameters = ("dweight_ptr", "dbias_ptr")
    used |= dict.fromkeys(("coefficients_ptr", "totals_ptr", *(() if per_sample else parameters)), "*fp32")
    dx = CompileCase(
        name=f"group_norm_silu_backward/dx {name}",
        function=dx_kernel,
        signature={**used, "HW": "i32", "N": "i32", "num_blocks": "i32"},
        constants={**({} if c2 else dict.fromkeys(skip)), **dict.fromkeys(parameters if per_sample else ()), **shapes},
        divisible_by_16=(*used, "HW", "N"),
        narrow_loads=14 if c2 else 7,
    )
    # Merging does not depend on x's dtype.
    return [sums, dx] if dtype == torch.float32 else [sums, coefficients, dx]
