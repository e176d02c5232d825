"""The parts of the norms' backward pass that its kernels share, in the notation of _norm_backward_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from segdiff_kernels._norm_forward_tiles import group_tile, load_affine, sigmoid


@triton.jit
def _before_silu(dy, z):  # type: ignore[no-untyped-def]
    """dz: dy * SiLU'(z), with SiLU'(z) = sigmoid(z) * (1 + z * (1 - sigmoid(z)))."""
    sigmoid_z = sigmoid(z)
    return dy * sigmoid_z * (1.0 + z * (1.0 - sigmoid_z))


@triton.jit
def sum_tile(  # type: ignore[no-untyped-def]
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
def coefficients(  # type: ignore[no-untyped-def]
    program,
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
    n, c_GK, exists_GK = group_tile(program, C, K, BLOCK_G, BLOCK_K)
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
def dx_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    dy_ptr,
    residual_ptr,
    more_ptr,
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
    """dx of a tile, plus residual and more; x, these and dx have rows of CX channels, all other pointers are at x's
    first channel."""
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
    if more_ptr is not None:
        dx_PC += tl.load(more_ptr + row * CX + where_PC, mask=keep_PC, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * CX + where_PC, dx_PC.to(dx_ptr.dtype.element_ty), mask=keep_PC)


@triton.jit
def parameter_gradients(  # type: ignore[no-untyped-def]
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
