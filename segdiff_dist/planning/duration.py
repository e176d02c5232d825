"""How long a training will take, estimated before it starts."""

from __future__ import annotations

import sys

import torch

from segdiff_dist.planning.network import Network
from segdiff_dist.ranks.distributed import is_main, world_size
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.throughput import peak_flops

_DAY_S, _SHORT_S = 86_400.0, 120.0
# The share of a device's peak that a training step reaches; typical of networks of this kind (docs/scale.md).
_USUAL_MFU = 0.4
# Every machine is faster. A run that takes less than a day at this rate is not timed.
_SLOWEST_FLOPS = 5e9


def duration_s(network: Network, images: int, flops: float) -> float:
    """Approximate seconds for `images` images on devices of `flops` FLOP/s together."""
    return images * network.flops_per_image / (flops * _USUAL_MFU)


def is_short(network: Network, images: int) -> bool:
    """Whether any machine needs less than two minutes, as far as an upper bound of the FLOPs shows it."""
    return images * network.most_flops_per_image < _SHORT_S * _SLOWEST_FLOPS


def warn_of_length(section: str, network: Network, images: int, config: TrainConfig, device: torch.device) -> None:
    """Print one line, on rank 0, where `images` images will take longer than a day."""
    if not is_main() or images * network.most_flops_per_image < _DAY_S * _SLOWEST_FLOPS:
        return
    seconds = duration_s(network, images, peak_flops(device, config.precision).flops * world_size())
    if seconds > _DAY_S:
        sys.stderr.write(length_warning(section, images, seconds) + "\n")


def length_warning(section: str, images: int, seconds: float) -> str:
    """The line about a long run."""
    return (
        f"warning: {section}: {images:,} images take about {seconds / _DAY_S:,.0f} days on this machine "
        f"({images / seconds:.3g} images/s); fewer: --{section}.num-images N, smaller nets: --config amos_small"
    )
