"""SiLU(GroupNorm(x + shift)) of one tensor, or of two side by side (Wu and He 2018).

With xhat = (x - centre) * rstd + correction and z = weight * xhat + bias, the norm is z and the output SiLU(z) = z *
sigmoid(z). `centre` is the group's mean minus the channel's shift, so the shifted tensor is never made. `correction` is
the rounding error of `centre` in float32, so that large means lose no digits. Launches: moments of slices
(_moments_triton.py) for a tensor without partial statistics, merge_kernel, normalise_kernel; or all of them in one
(_norm_forward_one_pass_triton.py).

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
from segdiff_kernels._norm_forward_one_pass_triton import launch_forward_one_pass
from segdiff_kernels._norm_forward_tiles import merge_groups, normalise_tile
from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.partials import new_partials, num_slices, slice_pixels
from segdiff_kernels.tiles import channel_tile, merge_tiles, one_pass_channels, pixel_tile


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
    """Statistics of the groups; a program for each sample and BLOCK_G groups."""
    merge_groups(
        tl.program_id(0), partials_ptr, skip_partials_ptr, shift_ptr, skip_shift_ptr, statistics_ptr, HW, S,
        shift_stride, skip_shift_stride, eps, C1, C2, K, P, BLOCK_S, BLOCK_G, BLOCK_K,
    )  # fmt: skip


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
        normalise_tile(
            x_ptr, y_ptr, statistics_ptr, weight_ptr, bias_ptr,
            n, block * BLOCK_P, tile * BLOCK_C + c_C, HW, C1, C, SILU, PER_SAMPLE, BLOCK_P,
        )  # fmt: skip
    elif C2 > 0:
        normalise_tile(
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
    zeros: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, C, H, W] channels-last, statistics [N, 4, C], partials of x); zeros: counters (_turns.py).

    One launch where a part fits in the L2 cache, or if all partials are given; one more if those of one tensor of two
    are. Else two launches, and one a tensor without partials.
    """
    n, c1, h, w = x_NCHW.shape
    c2 = 0 if skip_NCHW is None else skip_NCHW.shape[1]
    c, slices = c1 + c2, num_slices(h * w)
    y_NCHW = torch.empty((n, c, h, w), dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=torch.channels_last)
    statistics_N4C = x_NCHW.new_empty((n, 4, c), dtype=torch.float32)
    shape = (h * w, c1, c2, num_groups, x_NCHW.element_size())
    has_none = partials_NS2C is None and (skip_NCHW is None or skip_partials_NS2C is None)
    part = one_pass_channels(*shape) if has_none else 0
    if part:
        partials_NS2C = new_partials(x_NCHW)
        skip_partials_NS2C = None if skip_NCHW is None else new_partials(skip_NCHW)
    else:
        has_none = False
        if partials_NS2C is None:
            partials_NS2C = launch_moments(x_NCHW)
        if skip_partials_NS2C is None and skip_NCHW is not None:
            skip_partials_NS2C = launch_moments(skip_NCHW)
        part = one_pass_channels(*shape, reads_twice=False)
    strides = [0 if shift is None else shift.stride(0) for shift in (shift_NC, skip_shift_NC)]
    if part:
        tensors = (x_NCHW, skip_NCHW, y_NCHW, partials_NS2C, skip_partials_NS2C, shift_NC, skip_shift_NC)
        numbers = (strides[0], strides[1], eps)
        launch_forward_one_pass(
            *(tensors, (statistics_N4C, weight_C, bias_C), numbers, (n, c1, c2, h * w), num_groups),
            *(silu, part, has_none, zeros),
        )
        return y_NCHW, statistics_N4C, partials_NS2C
    merge = merge_tiles(c, num_groups, slices)
    merge_kernel[(n * triton.cdiv(num_groups, merge["BLOCK_G"]),)](
        partials_NS2C,
        skip_partials_NS2C,
        shift_NC,
        skip_shift_NC,
        statistics_N4C,
        h * w,
        slices,
        *strides,
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
    return y_NCHW, statistics_N4C, partials_NS2C


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
