"""ema_update beside torch._foreach_lerp_, over the parameters of the paper's UNet and over one flat shard of them.

Least bytes: each weight read once, each average read and written. A averages, T tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import _bench
import torch
from _bench import DEVICE, Case
from torch import Tensor

from segdiff_kernels.ema_update import EmaUpdate, ema_update_reference

DECAYS = (0.999, 0.9995, 0.9999)

Lists = tuple[EmaUpdate, list[list[Tensor]], list[Tensor]]


def real() -> list[Case]:
    """One to three averages of 114 M parameters, a tensor each as under ZeRO 0, and flat as above it."""
    shapes = _unet_shapes()
    flat = [(sum(torch.Size(shape).numel() for shape in shapes),)]
    return cases({f"{len(shapes)} tensors": shapes, "1 tensor": flat}, (1, 2, 3))


def cases(lists: dict[str, Sequence[tuple[int, ...]]], nums_averages: Sequence[int]) -> list[Case]:
    """Each list of shapes with each number of averages."""
    found = []
    for name, shapes in lists.items():
        for num_averages in nums_averages:

            def inputs(shapes: Sequence[tuple[int, ...]] = shapes, num_averages: int = num_averages) -> Lists:
                weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
                averages = [[torch.zeros_like(weight) for weight in weights] for _ in range(num_averages)]
                return EmaUpdate(averages, weights), averages, weights

            num_bytes = 4 * (1 + 2 * num_averages) * sum(torch.Size(shape).numel() for shape in shapes)
            contenders: dict[str, Callable[..., Any]] = {"segdiff": _fused, "torch": _foreach}
            found.append(Case(f"{num_averages} averages, {name}", num_bytes, inputs, contenders))
    return found


def _fused(update: EmaUpdate, averages: list[list[Tensor]], weights: list[Tensor]) -> list[list[Tensor]]:
    update(DECAYS[: len(averages)])
    return averages


def _foreach(_: EmaUpdate, averages: list[list[Tensor]], weights: list[Tensor]) -> list[list[Tensor]]:
    ema_update_reference(averages, weights, DECAYS[: len(averages)])
    return averages


def _unet_shapes() -> list[tuple[int, ...]]:
    from data_shards.labels import AMOS
    from segdiff_dist.denoising.config import DenoiserConfig
    from segdiff_dist.denoising.denoiser import Denoiser

    with torch.device("meta"):
        return [tuple(p.shape) for p in Denoiser(DenoiserConfig(kernels="torch"), AMOS, 256).parameters()]


BENCHMARK = _bench.Benchmark(__doc__, real, lambda: cases({"4 tensors": [(7,), (4100,), (1,), (3, 2, 3, 3)]}, (1, 3)))

if __name__ == "__main__":
    BENCHMARK.main()
