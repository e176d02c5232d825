"""The paper's net and `denoiser.net: efficient`, both of 114 M parameters at 256x256, on a CPU in turns.

    train     images a second of prediction, loss and gradients, without the update
    sample    images a second of one pass of a sampler

Beside them, counted: FLOPs of training on an image, and bytes that are kept for its backward pass. The target is 0.4 of
the paper net's time an image. What the images of the two are like is measured elsewhere (docs/models.md).
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as every command does

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from support.harness import Contender, arguments, compare, measure, report

from data_shards.labels import AMOS, LabelTable
from data_shards.ray_session import num_cores
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.network_shapes import denoiser_network

# The sides and widths of best_ct_mr, and of the paper.
_NETS = {"paper": DenoiserConfig(), "efficient": DenoiserConfig(net="efficient", attention_head_dim=64)}
# Rates are the reciprocal of times.
_TARGET = 1 / 0.4


@dataclass(frozen=True)
class _Classes:
    """Of a set of CT and MR."""

    label_table: LabelTable = AMOS
    modalities: tuple[str, ...] = ("CT", "MR")


def counts(config: DenoiserConfig, side: int, precision: str) -> dict[str, Any]:
    """Parameters, TFLOPs of training on an image, and MiB kept for its backward pass."""
    network = denoiser_network(config, _Classes(), side, torch.device("cpu"))
    return {
        "parameters": network.num_parameters,
        "TFLOPs": round(network.flops_per_image / 1e12, 3),
        "kept MiB": round(network.activations(1, precision, False) / 2**20),
    }


def batch_of(num: int, side: int) -> dict[str, torch.Tensor]:
    """Inputs of a denoiser: noise, and a mask of two organs."""
    mask_BHW = torch.zeros((num, side, side), dtype=torch.uint8)
    mask_BHW[:, side // 4 : side // 2, side // 4 : side // 2] = 6
    mask_BHW[:, side // 2 :, side // 3 :] = 2
    noise_B1HW = torch.randn((num, 1, side, side), generator=torch.Generator().manual_seed(0))
    classes_B = torch.zeros(num, dtype=torch.int64)
    return {"x_t_BCHW": noise_B1HW, "timestep_B": classes_B + 500, "mask_BHW": mask_BHW, "class_B": classes_B}


def train(denoiser: Denoiser, batch: dict[str, torch.Tensor], num: int) -> tuple[float, float]:
    """Images and seconds."""
    began = time.perf_counter()
    for _ in range(num):
        F.mse_loss(denoiser(**batch), batch["x_t_BCHW"]).backward()
        denoiser.zero_grad(set_to_none=True)
    return num * len(batch["x_t_BCHW"]), time.perf_counter() - began


@torch.inference_mode()
def sample(denoiser: Denoiser, batch: dict[str, torch.Tensor], num: int) -> tuple[float, float]:
    """Images and seconds."""
    began = time.perf_counter()
    for _ in range(num):
        denoiser(**batch)
    return num * len(batch["x_t_BCHW"]), time.perf_counter() - began


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--batch", type=int, default=2, help="images at once")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    side = 64 if args.quick else 256
    args.rounds = 1 if args.quick else args.rounds
    torch.set_num_threads(num_cores())
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
    batch, contenders, counted = batch_of(args.batch, side), dict[str, Contender](), dict[str, Any]()
    for name, config in _NETS.items():
        denoiser = Denoiser(config, AMOS, side).to(dtype, memory_format=torch.channels_last)
        denoiser.choose_operators(torch.device("cpu"))
        train(denoiser, batch, 1)  # oneDNN compiles its kernels
        contenders[f"train, {name}"] = partial(train, denoiser, batch, 1)
        contenders[f"sample, {name}"] = partial(sample, denoiser, batch, 3)
        counted[name] = counts(config, side, args.precision)
    rates = measure(contenders, args.rounds)
    ratios = [compare(rates, f"{work}, efficient", f"{work}, paper", _TARGET) for work in ("train", "sample")]
    report(args, rates, ratios, unit="images a second", notes=counted)


if __name__ == "__main__":
    main()
