"""The Triton side of segdiff_kernels.label_conv_in.

Dimensions: P pixels of one sample, O output channels, C = 1 + K input channels, R rows of sums: C and one of ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels.backend import is_interpreted
from segdiff_kernels.compile_cases import CompileCase

# Channels of a row of one_hot_table: 255 classes, the image and a channel of ones, rounded up to a power of two.
ONE_HOT_WIDTH = tl.constexpr(512)


class Config(NamedTuple):
    """Pixels and output channels of a tile, rows of sums, warps, stages of its pipeline, and parts that the pixels are
    summed in."""

    block_p: int
    block_o: int
    block_r: int = 1
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1


def forward_config(out_channels: int) -> Config:
    """A warp writes whole rows of output channels, 16 bytes a thread."""
    return Config(block_p=32, block_o=min(128, max(16, triton.next_power_of_2(out_channels))))


def weight_gradient_config(batch: int, num_pixels: int, channels: int, out_channels: int, dtype: torch.dtype) -> Config:
    """Tiles whose three sums fit the registers, and up to 88 parts: with the 3 rows of taps 264 programs.

    Those fill an H100's 132 multiprocessors twice. A tile waits for labels, then for their rows: so tiles are as large
    as two programs a multiprocessor allow, with two stages, whose shared memory then suffices. The numbers do not
    depend on the GPU, so all GPUs give the same bits.
    """
    in_full = dtype == torch.float32
    block_p = 32 if in_full else 128
    block_o = min(64 if in_full else 128, max(16, triton.next_power_of_2(out_channels)))
    block_r = min(32, max(16, triton.next_power_of_2(channels + 1)))
    num_tiles = batch * triton.cdiv(num_pixels, block_p)
    splits = min(triton.cdiv(num_tiles, 4), 88)
    return Config(block_p, block_o, block_r, num_warps=8, num_stages=3 if in_full else 2, splits=splits)


@triton.jit
def _neighbour(row, column, height, width, tap):  # type: ignore[no-untyped-def]
    """Offset of a tap's pixel from the pixel itself, and whether it is in the image."""
    y, x = row + (tap // 3 - 1), column + (tap % 3 - 1)
    return (tap // 3 - 1) * width + (tap % 3 - 1), (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _shares(edge_ptr, num_pixels, pixel, inside, dtype):  # type: ignore[no-untyped-def]
    """Second class, and the shares of first and second, rounded to `dtype` as one-hot channels would be."""
    second = tl.load(edge_ptr + pixel, inside, 255).to(tl.int32)
    share = tl.div_rn(tl.load(edge_ptr + num_pixels + pixel, inside, 255).to(tl.float32), 255.0)
    return second, share.to(dtype).to(tl.float32), (1.0 - share).to(dtype).to(tl.float32)


@triton.jit
def label_conv_in_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    mask_ptr,
    edge_ptr,
    table_ptr,
    bias_ptr,
    height,
    width,
    channels,
    out_channels,
    HAS_EDGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out [B, HW, O]; a program for BLOCK_P pixels of a sample and BLOCK_O output channels."""
    sample = tl.program_id(1).to(tl.int64)
    num_pixels = height * width
    first = tl.program_id(0) * BLOCK_P
    pixel = first + tl.arange(0, BLOCK_P)
    row, column = pixel // width, pixel % width
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_channel = (o < out_channels)[None, :]
    x_ptr += sample * num_pixels
    mask_ptr += sample * num_pixels
    sums = tl.load(bias_ptr + o, o < out_channels, 0.0).to(tl.float32)[None, :] + tl.zeros((BLOCK_P, 1), tl.float32)
    for tap in range(9):  # not unrolled: the table's rows of all taps would not fit the registers
        offset, inside = _neighbour(row, column, height, width, tap)
        inside &= pixel < num_pixels
        x = tl.load(x_ptr + pixel + offset, inside, 0.0).to(tl.float32)
        label = tl.load(mask_ptr + pixel + offset, inside, 255).to(tl.int32)
        tap_ptr = table_ptr + tap * channels * out_channels
        sums += x[:, None] * tl.load(tap_ptr + o, o < out_channels, 0.0).to(tl.float32)[None, :]
        rows_ptr = tap_ptr + o[None, :]
        is_class = inside & (label + 1 < channels)
        looked_up = tl.load(rows_ptr + (1 + label)[:, None] * out_channels, is_class[:, None] & is_channel, 0.0)
        if HAS_EDGE:
            here_ptr = edge_ptr + 2 * sample * num_pixels
            second, share, rest = _shares(here_ptr, num_pixels, pixel + offset, inside, x_ptr.dtype.element_ty)
            sums += share[:, None] * looked_up.to(tl.float32)
            is_class = inside & (second + 1 < channels) & (rest > 0.0)
            looked_up = tl.load(rows_ptr + (1 + second)[:, None] * out_channels, is_class[:, None] & is_channel, 0.0)
            sums += rest[:, None] * looked_up.to(tl.float32)
        else:
            sums += looked_up.to(tl.float32)
    out_ptr += (sample * num_pixels + first) * out_channels
    offsets = tl.arange(0, BLOCK_P)[:, None] * out_channels + o[None, :]
    tl.store(out_ptr + offsets, sums.to(out_ptr.dtype.element_ty), (pixel < num_pixels)[:, None] & is_channel)


@triton.jit
def _add_tap(  # type: ignore[no-untyped-def]
    sums_OR,
    dout_PO,
    x_ptr,
    mask_ptr,
    edge_ptr,
    one_hot_ptr,
    pixel,
    row,
    column,
    r,
    height,
    width,
    channels,
    tap,
    HAS_EDGE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """sums += dout^T [x ; one_hot ; 1], of the pixels' neighbours at this tap."""
    num_pixels = height * width
    offset, inside = _neighbour(row, column, height, width, tap)
    inside &= pixel < num_pixels
    x = tl.load(x_ptr + pixel + offset, inside, 0.0)
    label = tl.load(mask_ptr + pixel + offset, inside, 255).to(tl.int32)
    value_PR = tl.load(one_hot_ptr + label[:, None] * ONE_HOT_WIDTH + r[None, :])
    if HAS_EDGE:
        second, share, rest = _shares(edge_ptr, num_pixels, pixel + offset, inside, dout_PO.dtype)
        other_PR = tl.load(one_hot_ptr + second[:, None] * ONE_HOT_WIDTH + r[None, :]).to(tl.float32)
        mixed_PR = share[:, None] * value_PR.to(tl.float32) + rest[:, None] * other_PR
        value_PR = tl.where((r == channels)[None, :], 1.0, mixed_PR).to(dout_PO.dtype)
    value_PR = tl.where((r == 0)[None, :], x[:, None], value_PR)
    if WIDEN:
        dout_PO, value_PR = dout_PO.to(tl.float32), value_PR.to(tl.float32)
    return tl.dot(tl.trans(dout_PO), value_PR, sums_OR, input_precision="ieee")


@triton.jit
def label_conv_in_weight_gradient_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    dout_ptr,
    x_ptr,
    mask_ptr,
    edge_ptr,
    one_hot_ptr,
    num_tiles,
    tiles_per_sample,
    tiles_per_split,
    height,
    width,
    channels,
    num_rows,
    out_channels,
    HAS_EDGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Partial sums [splits, 9, rows, O] of dout times [x ; one-hot ; 1]."""
    # A program has one row of taps. The programs of the other two rows run at the same time and find the gradients in
    # the L2 cache.
    tap = 3 * tl.program_id(0)
    split = tl.program_id(1)
    num_o_blocks = tl.cdiv(out_channels, BLOCK_O)
    o = (tl.program_id(2) % num_o_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = (tl.program_id(2) // num_o_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    num_pixels = height * width
    s0 = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    s1, s2 = s0, s0
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, num_tiles)):
        start = (tile // tiles_per_sample).to(tl.int64) * num_pixels
        first = (tile % tiles_per_sample) * BLOCK_P
        pixel = first + tl.arange(0, BLOCK_P)
        row, column = pixel // width, pixel % width
        offsets = tl.arange(0, BLOCK_P)[:, None] * out_channels + o[None, :]
        wanted = (pixel < num_pixels)[:, None] & (o < out_channels)[None, :]
        d = tl.load(dout_ptr + (start + first) * out_channels + offsets, wanted, 0.0)
        x, m, e = x_ptr + start, mask_ptr + start, edge_ptr
        if HAS_EDGE:
            e += 2 * start
        s0 = _add_tap(s0, d, x, m, e, one_hot_ptr, pixel, row, column, r, height, width, channels, tap, HAS_EDGE, WIDEN)
        s1 = _add_tap(
            s1, d, x, m, e, one_hot_ptr, pixel, row, column, r, height, width, channels, tap + 1, HAS_EDGE, WIDEN
        )
        s2 = _add_tap(
            s2, d, x, m, e, one_hot_ptr, pixel, row, column, r, height, width, channels, tap + 2, HAS_EDGE, WIDEN
        )
    plane = num_rows * out_channels
    to_ptr = partial_ptr + (split * 9 + tap).to(tl.int64) * plane + r[None, :] * out_channels + o[:, None]
    wanted = (r < num_rows)[None, :] & (o < out_channels)[:, None]
    tl.store(to_ptr, s0, wanted)
    tl.store(to_ptr + plane, s1, wanted)
    tl.store(to_ptr + 2 * plane, s2, wanted)


@triton.jit
def label_conv_in_input_gradient_kernel(  # type: ignore[no-untyped-def]
    dx_ptr, dout_ptr, table_ptr, height, width, out_channels, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr
):
    """dx [B, HW], the sum over taps and output channels; a program for BLOCK_P pixels of a sample."""
    sample = tl.program_id(1).to(tl.int64)
    num_pixels = height * width
    first = tl.program_id(0) * BLOCK_P
    pixel = first + tl.arange(0, BLOCK_P)
    row, column = pixel // width, pixel % width
    sums = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    dout_ptr += (sample * num_pixels + first) * out_channels
    for start in range(0, out_channels, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        is_channel = (o < out_channels)[None, :]
        for tap in range(9):
            # The outputs that read x[p] through this tap are on the opposite side.
            offset, inside = _neighbour(row, column, height, width, 8 - tap)
            inside &= pixel < num_pixels
            offsets = (tl.arange(0, BLOCK_P) + offset)[:, None] * out_channels + o[None, :]
            dout = tl.load(dout_ptr + offsets, inside[:, None] & is_channel, 0.0).to(tl.float32)
            weight = tl.load(table_ptr + tap * out_channels + o, o < out_channels, 0.0).to(tl.float32)
            sums += dout * weight[None, :]
    tl.store(dx_ptr + sample * num_pixels + pixel, tl.sum(sums, 1).to(dx_ptr.dtype.element_ty), pixel < num_pixels)


def launch_forward(
    out_BOHW: Tensor, x_B1HW: Tensor, mask_BHW: Tensor, edge_B2HW: Tensor | None, table_9CO: Tensor, bias_O: Tensor
) -> None:
    """Fill out_BOHW."""
    batch, out_channels, height, width = out_BOHW.shape
    config = forward_config(out_channels)
    grid = (triton.cdiv(height * width, config.block_p), batch, triton.cdiv(out_channels, config.block_o))
    label_conv_in_kernel[grid](
        *(out_BOHW, x_B1HW, mask_BHW, edge_B2HW, table_9CO, bias_O.contiguous()),
        *(height, width, table_9CO.shape[1], out_channels),
        HAS_EDGE=edge_B2HW is not None,
        BLOCK_P=config.block_p,
        BLOCK_O=config.block_o,
        num_warps=config.num_warps,
    )


def launch_weight_gradient(
    dout_BOHW: Tensor, x_B1HW: Tensor, mask_BHW: Tensor, edge_B2HW: Tensor | None, channels: int
) -> Tensor:
    """float32 [splits, 9, C + 1, O]: sums over parts of the pixels; row C is of ones."""
    batch, out_channels, height, width = dout_BOHW.shape
    config = weight_gradient_config(batch, height * width, channels, out_channels, dout_BOHW.dtype)
    tiles_per_sample = triton.cdiv(height * width, config.block_p)
    num_tiles = batch * tiles_per_sample
    num_rows = channels + 1
    partial_S9RO = dout_BOHW.new_empty((config.splits, 9, num_rows, out_channels), dtype=torch.float32)
    grid = (3, config.splits, triton.cdiv(out_channels, config.block_o) * triton.cdiv(num_rows, config.block_r))
    label_conv_in_weight_gradient_kernel[grid](
        *(partial_S9RO, dout_BOHW, x_B1HW, mask_BHW, edge_B2HW, one_hot_table(channels, dout_BOHW)),
        *(num_tiles, tiles_per_sample, triton.cdiv(num_tiles, config.splits)),
        *(height, width, channels, num_rows, out_channels),
        HAS_EDGE=edge_B2HW is not None,
        BLOCK_P=config.block_p,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        WIDEN=is_interpreted(),  # whose dot multiplies the bits of bfloat16 as if they were integers
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial_S9RO


def one_hot_table(channels: int, like: Tensor) -> Tensor:
    """[256, 512]: for each id the channels [0 ; one_hot ; 1], of which a tile reads its own.

    Rows are looked up rather than computed, since a thread then has 16 bytes of one pixel instead of one number of each
    of eight pixels.
    """
    table = torch.eye(257, ONE_HOT_WIDTH.value, dtype=like.dtype, device=like.device)[1:]
    table[channels - 1 :] = 0.0
    table[:, channels] = 1.0
    return table


def launch_input_gradient(dx_B1HW: Tensor, dout_BOHW: Tensor, table_91O: Tensor) -> None:
    """Fill dx_B1HW."""
    batch, out_channels, height, width = dout_BOHW.shape
    config = forward_config(out_channels)
    label_conv_in_input_gradient_kernel[triton.cdiv(height * width, config.block_p), batch](
        *(dx_B1HW, dout_BOHW, table_91O, height, width, out_channels),
        BLOCK_P=config.block_p,
        BLOCK_O=config.block_o,
        num_warps=config.num_warps,
    )


def compile_cases() -> list[CompileCase]:
    """17 classes to 128 channels at 256x256, 32 samples: hard masks in bf16 and fp32, soft ones in bf16."""
    cases = []
    sides = ("height", "width", "out_channels")
    forward = forward_config(128)
    tile = {"BLOCK_P": forward.block_p, "BLOCK_O": forward.block_o}
    for dtype, torch_dtype, soft in (
        ("bf16", torch.bfloat16, False),
        ("fp32", torch.float32, False),
        ("bf16", torch.bfloat16, True),
    ):
        labels = {"mask_ptr": "*u8"} | ({"edge_ptr": "*u8"} if soft else {})
        edge_constants = {"HAS_EDGE": soft} | ({} if soft else {"edge_ptr": None})
        name = f"{dtype} {'soft' if soft else 'hard'}"
        pointers = {"out_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "table_ptr": f"*{dtype}", "bias_ptr": "*fp32"}
        pointers |= labels
        output = CompileCase(
            name=f"label_conv_in/output {name}",
            function=label_conv_in_kernel,
            signature=pointers | dict.fromkeys((*sides, "channels"), "i32"),
            constants=edge_constants | tile,
            num_warps=forward.num_warps,
            divisible_by_16=(*pointers, *sides),
            streams=False,  # it reads the table, from the L1 cache, and three bytes a pixel
        )
        backward = weight_gradient_config(32, 256 * 256, 18, 128, torch_dtype)
        pointers = {"partial_ptr": "*fp32", "dout_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
        pointers |= {"one_hot_ptr": f"*{dtype}"} | labels
        counts = ("num_tiles", "tiles_per_sample")
        weight_gradient = CompileCase(
            name=f"label_conv_in/weight gradient {name}",
            function=label_conv_in_weight_gradient_kernel,
            signature=pointers | dict.fromkeys((*sides, *counts, "channels", "num_rows", "tiles_per_split"), "i32"),
            constants=edge_constants
            | {"BLOCK_P": backward.block_p, "BLOCK_O": backward.block_o, "BLOCK_R": backward.block_r, "WIDEN": False},
            num_warps=backward.num_warps,
            num_stages=backward.num_stages,
            divisible_by_16=(*pointers, *sides, *counts),
            # Of x and the labels: three to five bytes a pixel, compared with 256 of gradients.
            narrow_loads=36 if soft else 24,
        )
        cases += [output, weight_gradient]
    pointers = {"dx_ptr": "*bf16", "dout_ptr": "*bf16", "table_ptr": "*bf16"}
    input_gradient = CompileCase(
        name="label_conv_in/input gradient bf16",
        function=label_conv_in_input_gradient_kernel,
        signature=pointers | dict.fromkeys(sides, "i32"),
        constants=tile,
        num_warps=forward.num_warps,
        divisible_by_16=(*pointers, *sides),
        narrow_loads=1,  # of a row of weights
    )
    return [*cases, input_gradient]
