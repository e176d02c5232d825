"""A batch's noised input and target from pixels: ours, torch as training does it without kernels, and compiled.

256x256, from 8 and 16 bits by a schedule, and with a noise level for each sample.
"""

from __future__ import annotations

from typing import Any

import _bench
import torch
from _bench import DEVICE, Case
from torch import Tensor

from segdiff_kernels.condition_input import condition_input, condition_input_reference


def cases(batch: int, size: int) -> list[Case]:
    """From 8 bits, from 16, and EDM's levels."""
    return [
        _case(batch, size, torch.uint8),
        _case(batch, size, torch.uint16),
        _case(batch, size, torch.uint8, by_levels=True),
    ]


def _case(batch: int, size: int, grey: torch.dtype, by_levels: bool = False) -> Case:
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        image_BHW = torch.randint(0, torch.iinfo(grey).max + 1, (batch, size, size), device=DEVICE).to(grey)
        position_B = torch.randint(0, 2**40, (batch,), device=DEVICE)
        noise = _edm_levels(batch) if by_levels else torch.linspace(0.999, 0.001, 1000, device=DEVICE)
        return image_BHW, position_B, noise

    def call(function: Any, image_BHW: Tensor, position_B: Tensor, noise: Tensor) -> Any:
        alphas_cumprod_T, levels_B4 = (None, noise) if by_levels else (noise, None)
        return function(image_BHW, position_B, alphas_cumprod_T, seed=0, prediction_type="v", levels_B4=levels_B4)

    def ours(*tensors: Tensor) -> Any:
        return call(condition_input, *tensors)

    def reference(*tensors: Tensor) -> Any:
        return call(condition_input_reference, *tensors)

    contenders = {"ours": ours}
    if DEVICE.type == "cuda" and grey == torch.uint8:  # inductor knows little of uint16; a toy is not worth it
        contenders["torch.compile"] = torch.compile(reference)
    contenders["torch"] = reference
    name = f"B={batch} {size}x{size} from {8 * grey.itemsize} bits{' by levels' if by_levels else ''}"
    return Case(name, batch * size**2 * (grey.itemsize + 8), inputs, contenders)


def _edm_levels(batch: int) -> Tensor:
    """Sigma from 0.002 to 80, sigma_data 0.5. Karras et al. 2022, table 1."""
    sigma_B = torch.logspace(-2.7, 1.9, batch, device=DEVICE)
    total_B = torch.sqrt(sigma_B**2 + 0.25)
    return torch.stack((1 / total_B, sigma_B / total_B, sigma_B / (0.5 * total_B), -0.5 / total_B), dim=1)


BENCHMARK = _bench.Benchmark(__doc__, real=lambda: cases(32, 256), toy=lambda: cases(2, 12))

if __name__ == "__main__":
    BENCHMARK.main()
