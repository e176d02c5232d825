"""The parts of the norms' forward pass that its kernels share, in the notation of _norm_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_pair(ptr, skip_ptr, row, c, keep, C1: tl.constexpr, C2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Channels `c` of C1 + C2 in row `row`, from rows of C1 and rows of C2 numbers; 0 where not `keep`."""
    value = tl.load(ptr + (row * C1 + c), mask=keep & (c < C1), other=0.0)
    if C2 > 0:
        value += tl.load(skip_ptr + (row * C2 + c - C1), mask=keep & (c >= C1), other=0.0)
    return value


@triton.jit
def group_tile(program, C: tl.constexpr, K: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """(sample as int64, channels, whether they exist) of a program that holds BLOCK_G groups; [BLOCK_G, BLOCK_K]."""
    blocks: tl.constexpr = (C // K + BLOCK_G - 1) // BLOCK_G
    g_G1 = ((program % blocks) * BLOCK_G + tl.arange(0, BLOCK_G))[:, None]
    k_1K = tl.arange(0, BLOCK_K)[None, :]
    return (program // blocks).to(tl.int64), g_G1 * K + k_1K, (g_G1 < C // K) & (k_1K < K)


@triton.jit
def merge_groups(  # type: ignore[no-untyped-def]
    program,
    partials_ptr,
    skip_partials_ptr,
    shift_ptr,
    skip_shift_ptr,
    statistics_ptr,
    HW,
    S,
    shift_stride,
    skip_shift_stride,
    eps,
    C1: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Slices into channels, the shift onto their means, channels into groups (Chan et al. 1983, eq. 2.1), of BLOCK_G
    groups.

    Means are averaged as differences from the first one, which keeps the digits if they are large.
    """
    C: tl.constexpr = C1 + C2
    n, c_GK, exists_GK = group_tile(program, C, K, BLOCK_G, BLOCK_K)
    c_1GK, exists_1GK = c_GK[None, :, :], exists_GK[None, :, :]
    s_S11 = tl.arange(0, BLOCK_S)[:, None, None]
    partials_ptr += n * S * 2 * C1
    if C2 > 0:
        skip_partials_ptr += n * S * 2 * C2

    pivot_GK = _load_pair(partials_ptr, skip_partials_ptr, 0, c_GK, exists_GK, C1, C2)
    from_pivot_SGK = tl.full((BLOCK_S, BLOCK_G, BLOCK_K), 0.0, tl.float32)
    for first in range(0, S, BLOCK_S):
        count_S11 = tl.maximum(tl.minimum(HW - (first + s_S11) * P, P), 0)
        row_S11 = (first + s_S11) * 2
        keep_SGK = (count_S11 > 0) & exists_1GK
        mean_SGK = _load_pair(partials_ptr, skip_partials_ptr, row_S11, c_1GK, keep_SGK, C1, C2)
        from_pivot_SGK += count_S11.to(tl.float32) * (mean_SGK - pivot_GK[None, :, :])
    from_pivot_GK = tl.sum(from_pivot_SGK, axis=0) / HW

    m2_SGK = tl.full((BLOCK_S, BLOCK_G, BLOCK_K), 0.0, tl.float32)
    for first in range(0, S, BLOCK_S):
        count_S11 = tl.maximum(tl.minimum(HW - (first + s_S11) * P, P), 0)
        row_S11 = (first + s_S11) * 2
        keep_SGK = (count_S11 > 0) & exists_1GK
        mean_SGK = _load_pair(partials_ptr, skip_partials_ptr, row_S11, c_1GK, keep_SGK, C1, C2)
        spread_SGK = mean_SGK - pivot_GK[None, :, :] - from_pivot_GK[None, :, :]
        m2_SGK += _load_pair(partials_ptr, skip_partials_ptr, row_S11 + 1, c_1GK, keep_SGK, C1, C2)
        m2_SGK += count_S11.to(tl.float32) * spread_SGK * spread_SGK
    variance_GK = tl.where(exists_GK, tl.sum(m2_SGK, axis=0), 0.0) / HW

    shift_GK = tl.zeros_like(pivot_GK)
    if shift_ptr is not None:
        keep_GK = exists_GK & (c_GK < C1)
        shift_GK += tl.load(shift_ptr + n * shift_stride + c_GK, mask=keep_GK, other=0.0).to(tl.float32)
    if skip_shift_ptr is not None:
        keep_GK = exists_GK & (c_GK >= C1)
        c_GK_of_skip = n * skip_shift_stride + c_GK - C1
        shift_GK += tl.load(skip_shift_ptr + c_GK_of_skip, mask=keep_GK, other=0.0).to(tl.float32)
    # From here on means are counted from the group's first pivot.
    is_first_1K = tl.arange(0, BLOCK_K)[None, :] == 0
    pivot_G1 = tl.sum(tl.where(is_first_1K, pivot_GK, 0.0), axis=1)[:, None]
    mean_GK = tl.where(exists_GK, pivot_GK - pivot_G1 + from_pivot_GK + shift_GK, 0.0)
    mean_G1 = tl.sum(mean_GK, axis=1)[:, None] / K
    spread_GK = tl.where(exists_GK, mean_GK - mean_G1, 0.0)
    variance_G1 = tl.sum(variance_GK + spread_GK * spread_GK, axis=1)[:, None] / K
    rstd_GK = tl.zeros_like(mean_GK) + 1.0 / tl.sqrt_rn(variance_G1 + eps)

    # The rounding error of pivot + difference in float32 goes into the correction (Dekker 1971).
    difference_GK = mean_G1 - shift_GK
    centre_GK = pivot_G1 + difference_GK
    correction_GK = (centre_GK - pivot_G1 - difference_GK) * rstd_GK
    statistics_ptr += n * 4 * C + c_GK
    tl.store(statistics_ptr, centre_GK, mask=exists_GK)
    tl.store(statistics_ptr + C, rstd_GK, mask=exists_GK)
    tl.store(statistics_ptr + 2 * C, correction_GK, mask=exists_GK)
    tl.store(statistics_ptr + 3 * C, spread_GK * rstd_GK, mask=exists_GK)


@triton.jit
def sigmoid(z):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-z)), to 4e-7 of itself. By exp2 and rsqrt, which are one instruction each, unlike exp and a
    division.

    Memory is only a little slower than the arithmetic here, and with exp and a division sums_kernel takes a quarter
    more instructions.
    """
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def load_affine(  # type: ignore[no-untyped-def]
    statistics_ptr, weight_ptr, bias_ptr, n, c_C, exists_C, C: tl.constexpr, PER_SAMPLE: tl.constexpr
):
    """(centre, scale, offset) of a tile's channels, float32 [1, BLOCK_C]: z = (x - centre) * scale + offset.

    PER_SAMPLE: weight and bias have a row of C for each sample.
    """
    statistics_ptr += n * 4 * C + c_C
    if PER_SAMPLE:
        weight_ptr += n * C
        bias_ptr += n * C
    centre_C = tl.load(statistics_ptr, mask=exists_C, other=0.0)
    rstd_C = tl.load(statistics_ptr + C, mask=exists_C, other=0.0)
    correction_C = tl.load(statistics_ptr + 2 * C, mask=exists_C, other=0.0)
    weight_C = tl.load(weight_ptr + c_C, mask=exists_C, other=0.0).to(tl.float32)
    bias_C = tl.load(bias_ptr + c_C, mask=exists_C, other=0.0).to(tl.float32)
    return centre_C[None, :], (rstd_C * weight_C)[None, :], (correction_C * weight_C + bias_C)[None, :]


@triton.jit
def normalise_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
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
    """A tile of x, whose rows hold CX channels, into rows of C; all pointers but x_ptr are at x's first channel."""
    exists_C = c_C < CX
    p_P1 = tl.arange(0, BLOCK_P)[:, None]
    keep_PC = (first_pixel + p_P1 < HW) & exists_C[None, :]
    row = n * HW + first_pixel
    x_PC = tl.load(x_ptr + row * CX + (p_P1 * CX + c_C[None, :]), mask=keep_PC, other=0.0).to(tl.float32)
    centre_1C, scale_1C, offset_1C = load_affine(statistics_ptr, weight_ptr, bias_ptr, n, c_C, exists_C, C, PER_SAMPLE)
    z_PC = (x_PC - centre_1C) * scale_1C + offset_1C
    if SILU:
        z_PC *= sigmoid(z_PC)
    tl.store(y_ptr + row * C + (p_P1 * C + c_C[None, :]), z_PC.to(y_ptr.dtype.element_ty), mask=keep_PC)
