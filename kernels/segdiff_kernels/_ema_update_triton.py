"""The Triton side of segdiff_kernels.ema_update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.ema_update import BLOCK, MAX_AVERAGES, chunks

_NUM_WARPS = 8


@triton.jit
def _lerp(average, weight, share):  # type: ignore[no-untyped-def]
    """aten/src/ATen/native/Lerp.h, in the form it has for vectors."""
    near = share < 0.5
    return tl.fma(weight - average, tl.where(near, share, share - 1.0), tl.where(near, average, weight))


@triton.jit
def ema_update_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    chunks_ptr,
    num_tensors,
    share_0,
    share_1,
    share_2,
    share_3,
    NUM_AVERAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one weight, and of each of its averages.

    Whole groups of four are masked together, so that they are read 16 bytes at a time for any size. Up to three
    elements are left at a tensor's end; its last program computes them one by one.
    """
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    size = tl.load(table_ptr + (1 + NUM_AVERAGES) * num_tensors + tensor)
    whole = size // 4 * 4
    index = start + tl.arange(0, BLOCK)
    rest = whole + tl.arange(0, 4)
    rest_inside = (rest < size) & (size <= start + BLOCK)
    # The hint must be on the cast itself: on the result of a helper it would be lost when the helper is inlined.
    weight_ptr = tl.load(table_ptr + tensor).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
    weight = tl.load(weight_ptr + index, mask=index < whole)
    rest_weight = tl.load(weight_ptr + rest, mask=rest_inside)
    for i in tl.static_range(NUM_AVERAGES):
        share = share_0 if i == 0 else share_1 if i == 1 else share_2 if i == 2 else share_3
        average_ptr = tl.load(table_ptr + (1 + i) * num_tensors + tensor).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            average_ptr = tl.multiple_of(average_ptr, 16)
        average = tl.load(average_ptr + index, mask=index < whole)
        tl.store(average_ptr + index, _lerp(average, weight, share), mask=index < whole)
        rest_average = tl.load(average_ptr + rest, mask=rest_inside)
        tl.store(average_ptr + rest, _lerp(rest_average, rest_weight, share), mask=rest_inside)


def launch(averages: Sequence[Tensor], weights: Sequence[Tensor], shares: Sequence[float]) -> None:
    """See segdiff_kernels.ema_update."""
    addresses = tuple(tensor.data_ptr() for tensor in (*weights, *averages))
    table, chunks_N2 = _tables(addresses, tuple(weight.numel() for weight in weights), weights[0].device)
    if chunks_N2.shape[0] == 0:
        return
    ema_update_kernel[(chunks_N2.shape[0],)](
        table,
        chunks_N2,
        len(weights),
        *shares,
        *[0.0] * (MAX_AVERAGES - len(shares)),
        NUM_AVERAGES=len(shares),
        ALIGNED=all(address % 16 == 0 for address in addresses),
        BLOCK=BLOCK,
        num_warps=_NUM_WARPS,
    )


@lru_cache(maxsize=8)  # looked up by their contents: a changed address gives another table
def _tables(addresses: tuple[int, ...], sizes_T: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [1 + A + 1, T]: addresses of the weights and of the averages, then sizes; int32 [N, 2], as of `chunks`."""
    table = torch.tensor([*addresses, *sizes_T], dtype=torch.int64).unflatten(0, (-1, len(sizes_T)))
    return table.to(device), torch.tensor(chunks(sizes_T), dtype=torch.int32).reshape(-1, 2).to(device)


def compile_cases() -> list[CompileCase]:
    """One to three averages."""
    shares = {f"share_{i}": "fp32" for i in range(MAX_AVERAGES)}
    return [
        CompileCase(
            f"ema_update/{num_averages} averages",
            ema_update_kernel,
            {"table_ptr": "*i64", "chunks_ptr": "*i32", "num_tensors": "i32", **shares},
            {"NUM_AVERAGES": num_averages, "ALIGNED": True, "BLOCK": BLOCK},
            num_warps=_NUM_WARPS,
            divisible_by_16=("table_ptr", "chunks_ptr"),
            # Narrow loads: tensor, chunk and size; for each tensor its address and the elements left at its end.
            narrow_loads=3 + 2 * (1 + num_averages),
        )
        for num_averages in (1, 2, 3)
    ]
