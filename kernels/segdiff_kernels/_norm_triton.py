"""SiLU(GroupNorm(x + shift)) of one tensor, or of two side by side (Wu and He 2018).

With xhat = (x - centre) * rstd + correction and z = weight * xhat + bias, the norm is z and the output SiLU(z) = z *
sigmoid(z). `centre` is the group's mean minus the channel's shift, so the shifted tensor is never made. `correction` is
the rounding error of `centre` in float32, so that large means lose no digits. Launches: moments of slices
(_moments_triton.py) for a tensor without partial statistics, merge_kernel, normalise_kernel.

Dimensions: N samples, S slices of P pixels, groups G of K channels, C channels in all: C1 of x, then C2 of the skip
tensor (0: there is none). `statistics` [N, 4, C] float32 are centre, rstd, correction and mean of xhat: all that the
backward pass (_norm_backward_triton.py) needs besides x, weight and bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels._moments_triton import TRITON_NAME, launch_moments, where_in_grid
from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.partials import num_slices, slice_pixels
from segdiff_kernels.tiles import channel_tile, merge_tiles, pixel_tile


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
def merge_kernel(  # type: ignore[no-untyped-def]
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
    """Slices into channels, the shift onto their means, channels into groups (Chan et al. 1983, eq. 2.1).

    Means are averaged as differences from the first one, which keeps the digits if they are large.
    """
    C: tl.constexpr = C1 + C2
    n, c_GK, exists_GK = group_tile(tl.program_id(0), C, K, BLOCK_G, BLOCK_K)
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
def _normalise_tile(  # type: ignore[no-untyped-def]
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


@triton.jit
def normalise_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    y_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    HW,
    num_blocks,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SILU: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y [N, HW, C1 + C2]; a program for each sample, BLOCK_P pixels and tile of channels of one of the tensors."""
    C: tl.constexpr = C1 + C2
    tiles: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    skip_tiles: tl.constexpr = (C2 + BLOCK_C - 1) // BLOCK_C
    n, block, tile = where_in_grid(tl.program_id(0), num_blocks, tiles + skip_tiles)
    c_C = tl.arange(0, BLOCK_C)
    if tile < tiles:
        _normalise_tile(
            x_ptr, y_ptr, statistics_ptr, weight_ptr, bias_ptr,
            n, block * BLOCK_P, tile * BLOCK_C + c_C, HW, C1, C, SILU, PER_SAMPLE, BLOCK_P,
        )  # fmt: skip
    elif C2 > 0:
        _normalise_tile(
            skip_ptr, y_ptr + C1, statistics_ptr + C1, weight_ptr + C1, bias_ptr + C1,
            n, block * BLOCK_P, (tile - tiles) * BLOCK_C + c_C, HW, C2, C, SILU, PER_SAMPLE, BLOCK_P,
        )  # fmt: skip


def norm_tiles(num_pixels: int, c1: int, c2: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks of the kernels that stream x and skip: one width for both, so that it suits both."""
    block_c = channel_tile(c1, c2) if c2 else channel_tile(c1)
    return {"BLOCK_P": pixel_tile(num_pixels, block_c, dtype.itemsize), "BLOCK_C": block_c}


def launch_forward(
    x_NCHW: Tensor,
    skip_NCHW: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    shift_NC: Tensor | None,
    skip_shift_NC: Tensor | None,
    silu: bool,
    partials_NS2C: Tensor | None,
    skip_partials_NS2C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [N, C, H, W] channels-last, statistics [N, 4, C]); two launches, and one a tensor without partials."""
    n, c1, h, w = x_NCHW.shape
    c2 = 0 if skip_NCHW is None else skip_NCHW.shape[1]
    c, slices = c1 + c2, num_slices(h * w)
    y_NCHW = torch.empty((n, c, h, w), dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=torch.channels_last)
    statistics_N4C = x_NCHW.new_empty((n, 4, c), dtype=torch.float32)
    if partials_NS2C is None:
        partials_NS2C = launch_moments(x_NCHW)
    if skip_partials_NS2C is None and skip_NCHW is not None:
        skip_partials_NS2C = launch_moments(skip_NCHW)
    merge = merge_tiles(c, num_groups, slices)
    merge_kernel[(n * triton.cdiv(num_groups, merge["BLOCK_G"]),)](
        partials_NS2C,
        skip_partials_NS2C,
        shift_NC,
        skip_shift_NC,
        statistics_N4C,
        h * w,
        slices,
        0 if shift_NC is None else shift_NC.stride(0),
        0 if skip_shift_NC is None else skip_shift_NC.stride(0),
        eps,
        C1=c1,
        C2=c2,
        K=c // num_groups,
        P=slice_pixels(h * w),
        **merge,
    )
    norm = norm_tiles(h * w, c1, c2, x_NCHW.dtype)
    blocks = triton.cdiv(h * w, norm["BLOCK_P"])
    normalise_kernel[(n * blocks * (triton.cdiv(c1, norm["BLOCK_C"]) + triton.cdiv(c2, norm["BLOCK_C"])),)](
        x_NCHW,
        skip_NCHW,
        y_NCHW,
        statistics_N4C,
        weight_C,
        bias_C,
        h * w,
        blocks,
        C1=c1,
        C2=c2,
        SILU=silu,
        PER_SAMPLE=weight_C.dim() == 2,
        **norm,
    )
    return y_NCHW, statistics_N4C


# (C1, C2, side, dtype) of the published UNet's norms that differ in their tiles: the largest image, the smallest, and
# the up blocks' pair whose groups, of 12 channels, straddle the border.
UNET_NORMS = (
    (128, 0, 256, torch.bfloat16),
    (128, 0, 256, torch.float32),
    (512, 0, 8, torch.bfloat16),
    (256, 128, 64, torch.bfloat16),
)


def compile_cases() -> list[CompileCase]:
    """The real UNet's norms, with 32 groups; parameters and shift float32; one with parameters for each sample."""
    shapes = [(c1, c2, side * side, dtype) for c1, c2, side, dtype in UNET_NORMS]
    per_sample = _compile_cases(*shapes[0], per_sample=True)[1:]
    return [case for shape in shapes for case in _compile_cases(*shape)] + per_sample


def _compile_cases(c1: int, c2: int, pixels: int, dtype: torch.dtype, *, per_sample: bool = False) -> list[CompileCase]:
    x, name = f"*{TRITON_NAME[dtype]}", f"C={c1}+{c2} {pixels} pixels {TRITON_NAME[dtype]}"
    name += " per sample" * per_sample
    absent = () if c2 else ("skip_partials_ptr", "skip_shift_ptr")
    merged = ["partials_ptr", "shift_ptr", "statistics_ptr", *(["skip_partials_ptr", "skip_shift_ptr"] if c2 else [])]
    strides = ("shift_stride", "skip_shift_stride")
    merge = CompileCase(
        name=f"group_norm_silu/merge {name}",
        function=merge_kernel,
        signature={**dict.fromkeys(merged, "*fp32"), **dict.fromkeys(("HW", "S", *strides), "i32"), "eps": "fp32"},
        constants={
            **dict.fromkeys(absent),
            **{"C1": c1, "C2": c2, "K": (c1 + c2) // 32, "P": slice_pixels(pixels)},
            **merge_tiles(c1 + c2, 32, num_slices(pixels)),
        },
        divisible_by_16=(*merged, "HW"),
        streams=False,
    )
    tensors = dict.fromkeys(("x_ptr", "y_ptr", *(["skip_ptr"] if c2 else [])), x)
    tensors |= dict.fromkeys(("statistics_ptr", "weight_ptr", "bias_ptr"), "*fp32")
    normalise = CompileCase(
        name=f"group_norm_silu/normalise {name}",
        function=normalise_kernel,
        signature={**tensors, "HW": "i32", "num_blocks": "i32"},
        constants={
            **({} if c2 else {"skip_ptr": None}),
            **{"C1": c1, "C2": c2, "SILU": True, "PER_SAMPLE": per_sample},
            **norm_tiles(pixels, c1, c2, dtype),
        },
        divisible_by_16=(*tensors, "HW"),
        narrow_loads=10 if c2 else 5,
    )
    # Merging does not depend on x's dtype.
    return [normalise] if dtype == torch.float32 else [merge, normalise]
