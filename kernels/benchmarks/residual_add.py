"""residual_add beside torch's two additions, with and without partial statistics, over the UNet's shapes in bfloat16.

Bytes are counted by passes: branch and shortcut read, the sum written. Dimensions: N batch, C channels, H, W.
"""

from __future__ import annotations

import _bench
import torch
from _bench import DEVICE, Case
from torch import Tensor

from segdiff_kernels.residual_add import bias_gradient_op, residual_add, residual_add_reference

BATCH = 32
# Channels and sides at which the paper's UNet ends a residual block.
SHAPES = ((128, 256), (128, 128), (256, 128), (256, 64), (256, 32), (512, 32), (512, 16), (512, 8))


def cases(
    shapes: tuple[tuple[int, int], ...] = SHAPES, batch: int = BATCH, dtype: torch.dtype = torch.bfloat16
) -> list[Case]:
    """The sum, the sum with partials, and the bias's gradient, for each (channels, side)."""
    found = []
    for channels, side in shapes:
        size = (batch, channels, side, side)
        tensor_bytes, name = batch * channels * side * side * dtype.itemsize, f"{batch}x{channels}x{side}x{side}"

        def inputs(size: tuple[int, ...] = size) -> tuple[Tensor, Tensor, Tensor]:
            branch_NCHW, shortcut_NCHW = (
                torch.randn(size, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
                for _ in range(2)
            )
            return branch_NCHW, shortcut_NCHW, torch.randn(size[1], device=DEVICE, dtype=dtype)

        found += [
            Case(f"sum {name}", 3 * tensor_bytes, inputs, {"segdiff": residual_add, "torch": residual_add_reference}),
            Case(
                f"sum, partials {name}",
                3 * tensor_bytes,
                inputs,
                {"segdiff": _sum_with_partials, "torch": residual_add_reference},
            ),
            Case(f"bias gradient {name}", tensor_bytes, inputs, {"segdiff": _bias_gradient, "torch": _torch_gradient}),
        ]
    return found


def _sum_with_partials(branch_NCHW: Tensor, shortcut_NCHW: Tensor, bias_C: Tensor) -> Tensor:
    sum_NCHW, _ = residual_add(branch_NCHW, shortcut_NCHW, bias_C, with_partials=True)
    return sum_NCHW


def _bias_gradient(gradient_NCHW: Tensor, _: Tensor, bias_C: Tensor) -> Tensor:
    return bias_gradient_op(gradient_NCHW, bias_C.dtype)


def _torch_gradient(gradient_NCHW: Tensor, _: Tensor, bias_C: Tensor) -> Tensor:
    return gradient_NCHW.sum(dim=(0, 2, 3)).to(bias_C.dtype)


BENCHMARK = _bench.Benchmark(__doc__, cases, lambda: cases(((40, 6),), 2, torch.float32))

if __name__ == "__main__":
    BENCHMARK.main()
