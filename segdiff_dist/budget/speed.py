"""How long a network takes for an image on this machine, measured in a few passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from segdiff_dist.planning.network import Network

if TYPE_CHECKING:
    from segdiff_dist.ranks.precision import Settled

# One pass to warm up, then passes for this long; a first pass that takes longer than that counts itself.
_MEASURED_S = 1.5


def training_s(network: Network, images: int, device: torch.device, precision: Settled) -> float:
    """Seconds for an image of a forward and a backward pass on `images` images, without the optimiser."""
    model, inputs = _on(network, images, device, precision)

    def work() -> None:
        made = model(*inputs)
        parts = made if isinstance(made, tuple) else (made,)
        sum((part.float().mean() for part in parts), torch.zeros((), device=device)).backward()
        model.zero_grad(set_to_none=True)

    return _median_s(work, device) / images


def pass_s(network: Network, images: int, device: torch.device, precision: Settled) -> float:
    """Seconds for an image of a forward pass on `images` images."""
    model, inputs = _on(network, images, device, precision)
    model.eval()
    with torch.inference_mode():
        return _median_s(lambda: model(*inputs), device) / images


def _on(network: Network, images: int, device: torch.device, precision: Settled) -> tuple[nn.Module, tuple[Any, ...]]:
    with torch.device(device):
        model = network.make().train()
    model = model.to(torch.bfloat16) if precision == "bf16" else model
    inputs = (
        torch.zeros_like(one, device=device) if isinstance(one, Tensor) else one for one in network.inputs(images)
    )
    return model, tuple(inputs)


def _median_s(work: Callable[[], Any], device: torch.device) -> float:
    times: list[float] = []
    while not times or (len(times) < 2 and times[0] < _MEASURED_S) or 0 < sum(times[1:]) < _MEASURED_S:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    counted = sorted(times[1:] or times)
    return counted[len(counted) // 2]
