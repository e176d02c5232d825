"""The memory traffic of a training step of the paper's UNet at 256x256 on a GPU, counted without a GPU.

    eager, channels-last    diffusers' UNet in bf16 as PyTorch runs it, weights and activations channels-last
    eager, rows             the same, row-major
    fused                   `kernels: triton`
    fused, rows             the same with row-major weights, as DeepSpeed has them

Bytes outside convolutions and matrix products, kernels launched, and activations kept for the backward pass. Counted on
the meta device (support/step_budget.py has the rules), separately for an image and a step: traffic that does not grow
with the batch, mainly of parameters, belongs to the step. Optimiser, averages and the making of the input are left out.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support.harness import headline, stamp, write
from support.step_budget import PRODUCTS, Budget, Tally, count, per_image
from torch import Tensor

from data_shards.labels import AMOS
from segdiff_dist.attention import set_attention
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser

META = torch.device("meta")
# Targets of the fused step, as a share of eager channels-last.
TARGETS = {"bytes": 0.52, "saved_bytes": 0.70, "launches": 0.60}

# Of the fused step, absolute: bytes an image outside products, launches of a step, and those with row-major weights.
MOST_BYTES, MOST_LAUNCHES, MOST_LAUNCHES_OF_ROWS = 2.6e9, 900, 900


def eager_budget(config: DenoiserConfig, size: int, memory_format: torch.memory_format) -> Callable[[int], Budget]:
    """The budget of a step of diffusers' UNet by batch: its input is given, the loss is the mean squared error."""
    unet = _on_meta(config, size).unet.to(memory_format=memory_format)

    def budget_of(num: int) -> Budget:
        x_NCHW = _empty(num, unet.config.in_channels, size, size).contiguous(memory_format=memory_format)
        target_NCHW, index_N = _empty(num, 1, size, size, dtype=torch.float32), _empty(num, dtype=torch.int64)
        labels = index_N if config.class_conditioning else None

        def step() -> Tensor:
            prediction_NCHW = unet(x_NCHW, index_N, class_labels=labels, return_dict=False)[0]
            return F.mse_loss(prediction_NCHW.float(), target_NCHW)

        return count(step, unet)

    return budget_of


def fused_budget(
    config: DenoiserConfig, size: int, memory_format: torch.memory_format = torch.channels_last
) -> Callable[[int], Budget]:
    """The same of our UNet with the fused kernels, from noised image and label map; with the addition of all gradients
    to those of other micro-batches, as in training."""
    from segdiff_dist.denoising.fused_unet import fuse
    from segdiff_dist.training.flat_gradients import FlatGradients
    from segdiff_kernels.weighted_mse import weighted_mse

    unet = _on_meta(config, size).unet
    fuse(unet, reads_labels=True)
    unet.to(memory_format=memory_format)
    ends = [0, *accumulate(parameter.numel() for parameter in unet.parameters())]
    gradients = FlatGradients([list(zip(unet.parameters(), ends, strict=False))], [ends[-1]])

    def budget_of(num: int) -> Budget:
        x_t_N1HW, mask_NHW = _empty(num, 1, size, size), _empty(num, size, size, dtype=torch.uint8)
        target_N1HW, weight_N = _empty(num, 1, size, size, dtype=torch.float32), _empty(num, dtype=torch.float32)
        index_N = _empty(num, dtype=torch.int64)
        labels = index_N if config.class_conditioning else None

        def step() -> Tensor:
            prediction_N1HW = unet(x_t_N1HW, index_N, labels, False, mask_BHW=mask_NHW)[0]
            return weighted_mse(prediction_N1HW.float(), target_N1HW, weight_N)[0]

        return count(step, unet, gradients.add)

    return budget_of


def budgets(config: DenoiserConfig, size: int) -> dict[str, tuple[Budget, Budget]]:
    """By way of computing: the budget of one image, and of what a step costs besides."""
    ways = {
        "eager, channels-last": eager_budget(config, size, torch.channels_last),
        "eager, rows": eager_budget(config, size, torch.contiguous_format),
        "fused": fused_budget(config, size),
        "fused, rows": fused_budget(config, size, torch.contiguous_format),
    }
    return {name: per_image(budget_of) for name, budget_of in ways.items()}


def shares(of_an_image: dict[str, Budget], against: str = "eager, channels-last") -> dict[str, float]:
    """The fused budget as a share of another, for each of TARGETS."""
    return {name: getattr(of_an_image["fused"], name) / getattr(of_an_image[against], name) for name in TARGETS}


def print_table(found: dict[str, tuple[Budget, Budget]]) -> None:
    """Megabytes an image and launches, by kind of work; then the sums and what a step costs besides."""
    print(f"{'':<36}" + "".join(f"{name:>28}" for name in found))
    print(f"{'':<36}" + "".join(f"{'MB an image':>18}{'launches':>10}" for _ in found))
    kinds = {kind for image, _ in found.values() for kind in image.kinds}
    largest = {kind: max(image.kinds.get(kind, Tally()).bytes for image, _ in found.values()) for kind in kinds}
    for kind in sorted(kinds - {PRODUCTS}, key=lambda kind: -largest[kind]) + [PRODUCTS]:
        tallies = [image.kinds.get(kind, Tally()) for image, _ in found.values()]
        print(f"{kind:<36}" + "".join(f"{tally.bytes / 1e6:>18,.1f}{tally.launches:>10,}" for tally in tallies))
    print(f"{'outside products':<36}" + "".join(f"{i.bytes / 1e6:>18,.1f}{i.launches:>10,}" for i, _ in found.values()))
    print(
        f"{'kept for the backward pass':<36}"
        + "".join(f"{i.saved_bytes / 1e6:>18,.1f}{'':>10}" for i, _ in found.values())
    )
    print(f"{'MB a step besides':<36}" + "".join(f"{step.bytes / 1e6:>18,.1f}{'':>10}" for _, step in found.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was counted to FILE")
    parser.add_argument("--quick", action="store_true", help="at 64x64")
    args = parser.parse_args()
    record: dict[str, Any] = stamp(args)
    print(headline(record) + "\n")
    found = budgets(DenoiserConfig(), 64 if args.quick else 256)
    print_table(found)
    of_an_image = {name: image for name, (image, _) in found.items()}
    record["rows"] = {name: {"image": asdict(image), "step": asdict(step)} for name, (image, step) in found.items()}
    record["shares"] = {against: shares(of_an_image, against) for against in of_an_image if "fused" not in against}
    for name, share in record["shares"]["eager, channels-last"].items():
        reached = "reached" if share <= TARGETS[name] else "NOT reached"
        rows = record["shares"]["eager, rows"][name]
        print(f"{name}: {share:.2f} of eager channels-last, target {TARGETS[name]:.2f}: {reached}; {rows:.2f} of rows")
    write(args.json, record)


def _on_meta(config: DenoiserConfig, size: int) -> Denoiser:
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # which warns of every cast
    with META:
        denoiser = Denoiser(config, AMOS, size).to(torch.bfloat16).train()
    set_attention(denoiser.unet, "sdpa")
    return denoiser


_empty = partial(torch.empty, dtype=torch.bfloat16, device=META)

if __name__ == "__main__":
    main()
