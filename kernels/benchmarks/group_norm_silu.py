"""group_norm_silu beside torch's group_norm and silu, forward and backward, over the UNet's 18 shapes in bfloat16.

Bytes are counted by passes over the activation. Forward: x twice, y once; with partials once each. Backward: x and dy
twice, dx once. The shift is the time embedding. Dimensions: N batch, C channels, H, W.
"""

from __future__ import annotations

from typing import Any

import _bench
import torch
from _bench import DEVICE, NORM_SHAPES, Case
from torch import Tensor

from segdiff_kernels.group_norm_silu import backward_op, forward_op, group_norm_silu, group_norm_silu_reference
from segdiff_kernels.residual_add import residual_add

BATCH = 32


def cases(
    shapes: tuple[tuple[int, int], ...] = NORM_SHAPES,
    batch: int = BATCH,
    num_groups: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Case]:
    """Forward from x alone, forward from partials, and backward, for each (channels, side)."""
    found = []
    for channels, side in shapes:
        tensor_bytes = batch * channels * side * side * dtype.itemsize
        size = (batch, channels, side, side)
        passes = {"forward": (3, _forward), "forward, partials": (2, _with_partials), "backward": (5, _backward)}
        for name, (num_passes, make) in passes.items():
            case = f"{name} {batch}x{channels}x{side}x{side}"
            found.append(make(case, num_passes * tensor_bytes, size, num_groups, dtype))
    return found


def _tensors(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, shift."""
    x_NCHW = torch.randn(size, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight_C, bias_C = torch.randn(2, size[1], device=DEVICE, dtype=dtype)
    return x_NCHW, weight_C, bias_C, torch.randn(size[:2], device=DEVICE, dtype=dtype)


def _forward(name: str, num_bytes: int, size: tuple[int, ...], num_groups: int, dtype: torch.dtype) -> Case:
    def ours(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, num_groups, shift_NC=shift)

    def reference(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return group_norm_silu_reference(x, weight, bias, num_groups, shift_NC=shift)

    return Case(name, num_bytes, lambda: _tensors(size, dtype), {"segdiff": ours, "torch": reference})


def _with_partials(name: str, num_bytes: int, size: tuple[int, ...], num_groups: int, dtype: torch.dtype) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        x_NCHW, weight_C, bias_C, _ = _tensors(size, dtype)
        x_NCHW, partials = residual_add(x_NCHW, torch.zeros_like(x_NCHW), with_partials=True)
        return x_NCHW, weight_C, bias_C, partials

    def ours(x: Tensor, weight: Tensor, bias: Tensor, partials: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, num_groups, partials=partials)

    def reference(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Tensor:
        return group_norm_silu_reference(x, weight, bias, num_groups)

    return Case(name, num_bytes, inputs, {"segdiff": ours, "torch": reference})


def _backward(name: str, num_bytes: int, size: tuple[int, ...], num_groups: int, dtype: torch.dtype) -> Case:
    """The backward pass alone: the inputs hold what either forward pass saved."""

    def inputs() -> tuple[Any, ...]:
        leaves = [t.requires_grad_() for t in _tensors(size, dtype)]
        y_NCHW = group_norm_silu_reference(*leaves[:3], num_groups, shift_NC=leaves[3])
        saved = [t.detach() for t in leaves]
        _, statistics_N4C, _ = forward_op(*saved, None, None, num_groups, 1e-5, True)
        return torch.randn_like(y_NCHW), saved, statistics_N4C, leaves, y_NCHW

    def ours(dy: Tensor, saved: list[Tensor], statistics: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return backward_op(dy, None, None, *saved[:3], statistics, None, dtype, num_groups, True)

    def reference(dy: Tensor, _saved: Any, _statistics: Any, leaves: list[Tensor], y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return Case(name, num_bytes, inputs, {"segdiff": ours, "torch": reference})


BENCHMARK = _bench.Benchmark(__doc__, cases, lambda: cases(((40, 6),), 2, 8, torch.float32))

if __name__ == "__main__":
    BENCHMARK.main()
