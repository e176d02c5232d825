"""skip_group_norm_silu beside torch's cat, group_norm and silu, forward and backward, over the UNet's pairs, bfloat16.

Bytes are counted by passes over both activations, as in group_norm_silu.py. Dimensions: N batch, C channels, H, W.
"""

from __future__ import annotations

from typing import Any

import _bench
import torch
from _bench import DEVICE, Case
from torch import Tensor

from segdiff_kernels.skip_group_norm_silu import (
    backward_op,
    forward_op,
    skip_group_norm_silu,
    skip_group_norm_silu_reference,
)

BATCH = 32
# Channels of x, of the skip tensor, and the side, of the up blocks of the paper's UNet.
PAIRS = (
    *((512, 512, 8), (512, 512, 16), (512, 256, 16), (512, 256, 32), (256, 256, 32), (256, 256, 64), (256, 128, 64)),
    *((256, 128, 128), (128, 128, 128), (128, 128, 256)),
)


def cases(
    pairs: tuple[tuple[int, int, int], ...] = PAIRS,
    batch: int = BATCH,
    num_groups: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Case]:
    """Forward and backward of each pair."""
    found = []
    for c1, c2, side in pairs:
        tensor_bytes = batch * (c1 + c2) * side * side * dtype.itemsize
        for name, num_passes, make in (("forward", 3, _forward), ("backward", 5, _backward)):
            case = f"{name} {batch}x({c1}+{c2})x{side}x{side}"
            found.append(make(case, num_passes * tensor_bytes, (batch, c1, c2, side), num_groups, dtype))
    return found


def _tensors(size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, skip, weight, bias."""
    batch, c1, c2, side = size
    x_NCHW, skip_NCHW = (
        torch.randn(batch, c, side, side, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for c in (c1, c2)
    )
    weight_C, bias_C = torch.randn(2, c1 + c2, device=DEVICE, dtype=dtype)
    return x_NCHW, skip_NCHW, weight_C, bias_C


def _forward(name: str, num_bytes: int, size: tuple[int, int, int, int], num_groups: int, dtype: torch.dtype) -> Case:
    def ours(*tensors: Tensor) -> Tensor:
        return skip_group_norm_silu(*tensors, num_groups)

    def reference(*tensors: Tensor) -> Tensor:
        return skip_group_norm_silu_reference(*tensors, num_groups)

    return Case(name, num_bytes, lambda: _tensors(size, dtype), {"segdiff": ours, "torch": reference})


def _backward(name: str, num_bytes: int, size: tuple[int, int, int, int], num_groups: int, dtype: torch.dtype) -> Case:
    """The backward pass alone: the inputs hold what either forward pass saved."""

    def inputs() -> tuple[Any, ...]:
        leaves = [t.requires_grad_() for t in _tensors(size, dtype)]
        y_NCHW = skip_group_norm_silu_reference(*leaves, num_groups)
        saved = [t.detach() for t in leaves]
        _, statistics_N4C = forward_op(*saved, None, None, None, None, None, num_groups, 1e-5, True)
        return torch.randn_like(y_NCHW), saved, statistics_N4C, leaves, y_NCHW

    def ours(dy: Tensor, saved: list[Tensor], statistics: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return backward_op(dy, None, None, *saved, statistics, None, None, num_groups, True)[:4]

    def reference(dy: Tensor, _saved: Any, _statistics: Any, leaves: list[Tensor], y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return Case(name, num_bytes, inputs, {"segdiff": ours, "torch": reference})


BENCHMARK = _bench.Benchmark(__doc__, cases, lambda: cases(((24, 40, 6),), 2, 8, torch.float32))

if __name__ == "__main__":
    BENCHMARK.main()
