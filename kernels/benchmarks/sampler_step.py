"""sampler_step beside diffusers' DDIMScheduler.step and the same combinations in torch.

Least bytes: inputs are read once, results are written once. Dimensions: B batch, C channels, H, W.
"""

from __future__ import annotations

from typing import Any

import _bench
import torch
from _bench import DEVICE, Case
from torch import Tensor

from segdiff_kernels.sampler_step import (
    ddim_coefficients,
    ddim_step,
    multistep_coefficients,
    multistep_step,
    sampler_step_reference,
)

_TIMESTEP, _STRIDE = 500, 20


def cases(batches: tuple[int, ...] = (1, 16, 256), side: int = 256) -> list[Case]:
    """DDIM as the paper samples, and a step of the second order; x_t and predictions float32."""
    scheduler = _scheduler()
    a_t, a_prev, a_before = (
        float(scheduler.alphas_cumprod[t]) for t in (_TIMESTEP, _TIMESTEP - _STRIDE, _TIMESTEP + _STRIDE)
    )
    ddim, second = ddim_coefficients(a_t, a_prev, "epsilon"), multistep_coefficients(a_t, a_prev, a_before, "epsilon")

    def fused(x: Tensor, prediction: Tensor, _: Tensor, limit_B: Tensor) -> Tensor:
        return ddim_step(x, prediction, ddim, limit_B=limit_B)

    def diffusers(x: Tensor, prediction: Tensor, *_: Tensor) -> Tensor:
        return scheduler.step(prediction, _TIMESTEP, x).prev_sample

    def fused_second(x: Tensor, prediction: Tensor, previous: Tensor, limit_B: Tensor) -> Any:
        return multistep_step(x, prediction, previous, second, limit_B)

    def torch_second(x: Tensor, prediction: Tensor, previous: Tensor, limit_B: Tensor) -> Any:
        return sampler_step_reference(x, prediction, second, previous, limit_B=limit_B)

    found = []
    for batch in batches:

        def inputs(batch: int = batch) -> tuple[Tensor, ...]:
            x, prediction, previous = torch.randn(3, batch, 1, side, side, device=DEVICE).unbind()
            return x, prediction, previous, torch.ones(batch, device=DEVICE)

        num_bytes, name = 4 * batch * side * side, f"{batch}x1x{side}x{side}"
        by_second = {"segdiff": fused_second, "torch": torch_second}
        found.append(Case(f"ddim {name}", 3 * num_bytes, inputs, {"segdiff": fused, "diffusers": diffusers}))
        found.append(Case(f"second order {name}", 5 * num_bytes, inputs, by_second))
    return found


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(1000 // _STRIDE)
    return scheduler


BENCHMARK = _bench.Benchmark(__doc__, cases, lambda: cases((2,), 12))

if __name__ == "__main__":
    BENCHMARK.main()
