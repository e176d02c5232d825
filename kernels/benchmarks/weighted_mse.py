"""weighted_mse beside the loss as torch writes it: the value alone, and the value with its gradient.

Least bytes: prediction and target read; with the gradient w (p - t) written, read, and the gradient written. One
channel is the image's. Dimensions: B batch, C channels, H, W.
"""

from __future__ import annotations

from collections.abc import Callable

import _bench
import torch
from _bench import DEVICE, Case
from torch import Tensor

from segdiff_kernels.weighted_mse import weighted_mse, weighted_mse_reference

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cases(batches: tuple[int, ...] = (32, 64), sides: tuple[int, ...] = (256, 512)) -> list[Case]:
    """Predictions in bfloat16 against targets in float32."""
    found = []
    for batch in batches:
        for side in sides:
            numel = batch * side * side

            def inputs(batch: int = batch, side: int = side) -> tuple[Tensor, Tensor, Tensor]:
                prediction_BCHW = torch.randn(batch, 1, side, side, device=DEVICE, dtype=torch.bfloat16)
                target_BCHW = torch.randn(batch, 1, side, side, device=DEVICE)
                return prediction_BCHW.requires_grad_(), target_BCHW, torch.rand(batch, device=DEVICE)

            name, contenders = f"{batch}x1x{side}x{side}", {"segdiff": weighted_mse, "torch": weighted_mse_reference}
            value = {who: _value(loss) for who, loss in contenders.items()}
            gradient = {who: _gradient(loss) for who, loss in contenders.items()}
            found.append(Case(f"value {name}", numel * (2 + 4), inputs, value))
            found.append(Case(f"value and gradient {name}", numel * (2 + 4 + 3 * 2), inputs, gradient))
    return found


def _value(loss: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.no_grad()(loss)


def _gradient(loss: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
    def both(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
        value, _ = loss(prediction_BCHW, target_BCHW, weight_B)
        return value.detach(), torch.autograd.grad(value, prediction_BCHW)[0]

    return both


BENCHMARK = _bench.Benchmark(__doc__, cases, lambda: cases((2,), (24,)))

if __name__ == "__main__":
    BENCHMARK.main()
