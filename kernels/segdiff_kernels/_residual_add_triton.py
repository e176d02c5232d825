"""The Triton side of segdiff_kernels.residual_add: one pass over both tensors, with the sum's partial statistics.

Dimensions: N samples, S slices of P pixels, C channels; for the bias's gradient rows are pixels of all samples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels._moments_triton import (
    TRITON_NAME,
    merge_rows,
    welford,
    where_in_grid,
)
from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.partials import new_partials, num_slices, slice_pixels
from segdiff_kernels.tiles import MOST_CHUNKS, channel_tile, chunk_rows, pixel_tile


@triton.jit
def residual_add_kernel(  # type: ignore[no-untyped-def]
    branch_ptr,
    shortcut_ptr,
    bias_ptr,
    sum_ptr,
    partials_ptr,
    HW,
    S,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """branch + shortcut + bias [N, HW, C], and its partials [N, S, 2, C], of the values as rounded and written."""
    n, s, tile = where_in_grid(tl.program_id(0), S, (C + BLOCK_C - 1) // BLOCK_C)
    c_C = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    exists_1C = (c_C < C)[None, :]
    num_pixels = tl.minimum(HW - s * P, P)
    first = (n * HW + s * P) * C
    bias_1C = tl.full((1, BLOCK_C), 0.0, tl.float32)
    if bias_ptr is not None:
        bias_1C = tl.load(bias_ptr + c_C, mask=c_C < C, other=0.0).to(tl.float32)[None, :]
    mean_PC = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    m2_PC = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for start in range(0, P, BLOCK_P):
        p_P1 = (start + tl.arange(0, BLOCK_P))[:, None]
        keep_PC = (p_P1 < num_pixels) & exists_1C
        offset_PC = p_P1 * C + c_C[None, :]
        branch_PC = tl.load(branch_ptr + first + offset_PC, mask=keep_PC, other=0.0).to(tl.float32)
        shortcut_PC = tl.load(shortcut_ptr + first + offset_PC, mask=keep_PC, other=0.0).to(tl.float32)
        sum_PC = (branch_PC + bias_1C + shortcut_PC).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + first + offset_PC, sum_PC, mask=keep_PC)
        if partials_ptr is not None:
            mean_PC, m2_PC = welford(sum_PC.to(tl.float32), keep_PC, mean_PC, m2_PC, start // BLOCK_P + 1)
    if partials_ptr is not None:
        mean_C, m2_C = merge_rows(mean_PC, m2_PC, num_pixels, BLOCK_P)
        partials_ptr += (n * S + s) * 2 * C
        tl.store(partials_ptr + c_C, mean_C, mask=c_C < C)
        tl.store(partials_ptr + C + c_C, m2_C, mask=c_C < C)


@triton.jit
def channel_sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr, sums_ptr, num_rows, chunk, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """sums [chunks, C]: of each `chunk` of the rows of x [num_rows, C]."""
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c_C = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (tl.program_id(0) // tiles).to(tl.int64) * chunk
    sum_PC = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for start in range(0, chunk, BLOCK_P):
        p_P1 = (start + tl.arange(0, BLOCK_P))[:, None]
        keep_PC = (p_P1 < num_rows - first) & (c_C < C)[None, :]
        sum_PC += tl.load(x_ptr + first * C + (p_P1 * C + c_C[None, :]), mask=keep_PC, other=0.0).to(tl.float32)
    sums_ptr += (tl.program_id(0) // tiles) * C
    tl.store(sums_ptr + c_C, tl.sum(sum_PC, axis=0).to(sums_ptr.dtype.element_ty), mask=c_C < C)


def launch_residual_add(
    branch_NCHW: Tensor, shortcut_NCHW: Tensor, bias_C: Tensor | None, with_partials: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum, partials or None), in one launch."""
    n, c, h, w = branch_NCHW.shape
    sum_NCHW = torch.empty_like(branch_NCHW, memory_format=torch.channels_last)
    partials_NS2C = new_partials(branch_NCHW) if with_partials else None
    slices, block_c = num_slices(h * w), channel_tile(c)
    residual_add_kernel[(n * slices * triton.cdiv(c, block_c),)](
        branch_NCHW,
        shortcut_NCHW,
        bias_C,
        sum_NCHW,
        partials_NS2C,
        h * w,
        slices,
        C=c,
        P=slice_pixels(h * w),
        BLOCK_P=pixel_tile(h * w, block_c, branch_NCHW.element_size()),
        BLOCK_C=block_c,
    )
    return sum_NCHW, partials_NS2C


def launch_channel_sums(x_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over N, H, W [C], in a fixed order, x read once: two launches, one if there are no more than 512 rows."""
    n, c, h, w = x_NCHW.shape
    rows_MC, num_rows = x_NCHW, n * h * w
    if num_rows > MOST_CHUNKS:
        block_c = channel_tile(c)
        block_p = pixel_tile(h * w, block_c, x_NCHW.element_size())
        chunk = chunk_rows(num_rows, block_p)
        chunks = triton.cdiv(num_rows, chunk)
        rows_MC = torch.empty((chunks, c), dtype=torch.float32, device=x_NCHW.device)
        channel_sums_kernel[(chunks * triton.cdiv(c, block_c),)](
            x_NCHW, rows_MC, num_rows, chunk, C=c, BLOCK_P=block_p, BLOCK_C=block_c
        )
        num_rows = chunks
    total_C = torch.empty(c, dtype=dtype, device=x_NCHW.device)
    narrow_c = min(32, channel_tile(c))
    channel_sums_kernel[(triton.cdiv(c, narrow_c),)](
        rows_MC, total_C, num_rows, num_rows, C=c, BLOCK_P=64, BLOCK_C=narrow_c
    )
    return total_C


def compile_cases() -> list[CompileCase]:
    """The real UNet's residual blocks at the widest image and the smallest, with a bias and partials, float32 bias."""
    cases = []
    for c, side, dtype in ((128, 256, torch.bfloat16), (128, 256, torch.float32), (512, 8, torch.bfloat16)):
        x, pixels, block_c = f"*{TRITON_NAME[dtype]}", side * side, channel_tile(c)
        tiles = {"C": c, "BLOCK_P": pixel_tile(pixels, block_c, dtype.itemsize), "BLOCK_C": block_c}
        cases.append(
            CompileCase(
                name=f"residual_add C={c} {pixels} pixels {x[1:]}",
                function=residual_add_kernel,
                signature={
                    **{"branch_ptr": x, "shortcut_ptr": x, "bias_ptr": "*fp32", "sum_ptr": x, "partials_ptr": "*fp32"},
                    **{"HW": "i32", "S": "i32"},
                },
                constants={**tiles, "P": slice_pixels(pixels)},
                divisible_by_16=("branch_ptr", "shortcut_ptr", "bias_ptr", "sum_ptr", "partials_ptr", "HW"),
                narrow_loads=1,
            )
        )
        cases.append(
            CompileCase(
                name=f"residual_add_backward C={c} {pixels} pixels {x[1:]}",
                function=channel_sums_kernel,
                signature={"x_ptr": x, "sums_ptr": "*fp32", "num_rows": "i32", "chunk": "i32"},
                constants=tiles,
                divisible_by_16=("x_ptr", "sums_ptr", "num_rows", "chunk"),
            )
        )
    return cases
