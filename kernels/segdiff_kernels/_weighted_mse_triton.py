"""The Triton side of segdiff_kernels.weighted_mse."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.weighted_mse import BLOCK, num_slices

# The last sum is one program over [B, S], in tiles of this many samples and slices.
_TILE_B, _TILE_S = 16, 64


@triton.jit
def weighted_mse_kernel(  # type: ignore[no-untyped-def]
    prediction_ptr,
    target_ptr,
    weight_ptr,
    difference_ptr,
    partial_ptr,
    numel,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of squares of one slice of one sample, and its w (p - t)."""
    sample, part = tl.program_id(0), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    base = sample.to(tl.int64) * numel
    p = tl.load(prediction_ptr + base + index, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + base + index, mask=inside, other=0.0).to(tl.float32)
    difference = p - t
    tl.store(partial_ptr + sample * tl.num_programs(1) + part, tl.sum(difference * difference))
    if NEEDS_GRADIENT:
        weighted = tl.load(weight_ptr + sample) * difference
        tl.store(difference_ptr + base + index, weighted.to(difference_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weighted_mse_sum_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, weight_ptr, error_ptr, loss_ptr, batch, num_parts, numel, TILE_B: tl.constexpr, TILE_S: tl.constexpr
):
    """Errors [B] and the loss from the sums of the slices [B, S]: one program, so always in the same order."""
    weighted = tl.zeros((TILE_B,), tl.float32)
    for first in range(0, batch, TILE_B):
        sample = first + tl.arange(0, TILE_B)
        squares = tl.zeros((TILE_B, TILE_S), tl.float32)
        for start in range(0, num_parts, TILE_S):
            part = start + tl.arange(0, TILE_S)
            inside = (sample < batch)[:, None] & (part < num_parts)[None, :]
            squares += tl.load(partial_ptr + sample[:, None] * num_parts + part[None, :], mask=inside, other=0.0)
        error = tl.sum(squares, axis=1) / numel
        tl.store(error_ptr + sample, error, mask=sample < batch)
        weighted += error * tl.load(weight_ptr + sample, mask=sample < batch, other=0.0)
    tl.store(loss_ptr, tl.sum(weighted) / batch)


@triton.jit
def weighted_mse_backward_kernel(difference_ptr, grad_loss_ptr, grad_ptr, total, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """grad = difference * 2 grad_loss / total, in float32."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    factor = 2.0 * tl.load(grad_loss_ptr).to(tl.float32) / total
    difference = tl.load(difference_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_ptr + index, (difference * factor).to(grad_ptr.dtype.element_ty), mask=inside)


def launch(
    prediction_BCHW: Tensor,
    target_BCHW: Tensor,
    weight_B: Tensor,
    loss: Tensor,
    error_B: Tensor,
    difference_BCHW: Tensor,
) -> None:
    """Fills loss, error and, if it has elements, difference; see segdiff_kernels.weighted_mse."""
    batch = prediction_BCHW.shape[0]
    numel = prediction_BCHW.numel() // batch
    parts = num_slices(numel)
    partial_BS = error_B.new_empty((batch, parts))
    weighted_mse_kernel[(batch, parts)](
        prediction_BCHW,
        target_BCHW,
        weight_B,
        difference_BCHW,
        partial_BS,
        numel,
        NEEDS_GRADIENT=difference_BCHW.numel() > 0,
        BLOCK=BLOCK,
    )
    weighted_mse_sum_kernel[(1,)](
        partial_BS, weight_B, error_B, loss, batch, parts, numel, TILE_B=_TILE_B, TILE_S=_TILE_S
    )


def launch_backward(difference_BCHW: Tensor, grad_loss: Tensor, grad_BCHW: Tensor) -> None:
    """Fills grad."""
    total = difference_BCHW.numel()
    weighted_mse_backward_kernel[(triton.cdiv(total, BLOCK),)](
        difference_BCHW, grad_loss, grad_BCHW, total, BLOCK=BLOCK
    )


def compile_cases() -> list[CompileCase]:
    """Batches of 32 grey 256x256 images."""
    cases = []
    for dtype in ("bf16", "fp32"):
        pointers = {"prediction_ptr": f"*{dtype}", "target_ptr": "*fp32", "weight_ptr": "*fp32"}
        cases.append(
            CompileCase(
                f"weighted_mse/forward {dtype}",
                weighted_mse_kernel,
                pointers | {"difference_ptr": f"*{dtype}", "partial_ptr": "*fp32", "numel": "i32"},
                {"NEEDS_GRADIENT": True, "BLOCK": BLOCK},
                divisible_by_16=("prediction_ptr", "target_ptr", "difference_ptr", "numel"),
                narrow_loads=1,  # the weight
            )
        )
        cases.append(
            CompileCase(
                f"weighted_mse/backward {dtype}",
                weighted_mse_backward_kernel,
                {"difference_ptr": f"*{dtype}", "grad_loss_ptr": "*fp32", "grad_ptr": f"*{dtype}", "total": "i32"},
                {"BLOCK": BLOCK},
                divisible_by_16=("difference_ptr", "grad_ptr", "total"),
                narrow_loads=1,  # the incoming gradient
            )
        )
    sums = {"partial_ptr": "*fp32", "weight_ptr": "*fp32", "error_ptr": "*fp32", "loss_ptr": "*fp32"}
    cases.append(
        CompileCase(
            "weighted_mse/sum",
            weighted_mse_sum_kernel,
            sums | {"batch": "i32", "num_parts": "i32", "numel": "i32"},
            {"TILE_B": _TILE_B, "TILE_S": _TILE_S},
            divisible_by_16=(*sums, "batch", "num_parts", "numel"),
            streams=False,
        )
    )
    return cases
