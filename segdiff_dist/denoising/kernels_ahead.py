"""The denoiser's kernels compiled before the training needs them, on all cores, in a process of its own.

    python -m segdiff_dist.denoising.kernels_ahead JSON

Triton compiles a kernel when it is first launched, one after another: more than a minute for the paper's net. Which
kernels a net launches follows from its shapes, so they are compiled at once (segdiff_kernels/ahead.py), into Triton's
cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import segdiff_kernels
from data_shards.files import write_atomic
from data_shards.labels import LabelTable
from segdiff_dist.attention import set_attention
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.ranks.distributed import local_rank
from segdiff_kernels.weighted_mse import weighted_mse


@dataclass(frozen=True)
class KernelPlan:
    """Everything that the kernels of a net depend on."""

    denoiser: dict[str, Any]
    """The section of the configuration."""
    table: tuple[str, tuple[str, ...]]
    """Name of the label table, and its class names."""
    side: int
    images: int
    """Images of a micro-batch."""
    precision: str
    arch: int
    """The GPU's architecture: 90 for sm_90."""

    def work(self) -> None:
        """A forward and a backward pass, on the meta device."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.denoiser.items()}
        config = DenoiserConfig(**{**given, "kernels": "triton", "attention": "sdpa"})
        meta, side = torch.device("meta"), self.side
        with meta:
            model = Denoiser(config, LabelTable(self.table[0], tuple(self.table[1])), side)
            model.choose_operators(meta)
            set_attention(model.unet, "sdpa")
            model.to(torch.bfloat16 if self.precision == "bf16" else torch.float32)
            number_B = torch.empty(self.images, dtype=torch.int64)
            mask_BHW = torch.empty(self.images, side, side, dtype=torch.uint8)
            x_t_BCHW = torch.empty(self.images, 1, side, side)
            edge = (torch.empty(self.images, 2, side, side, dtype=torch.uint8),) if config.soft_masks else ()
            prediction_BCHW = model(x_t_BCHW, number_B, mask_BHW, number_B, *edge)
            loss, _ = weighted_mse(prediction_BCHW, torch.empty_like(x_t_BCHW), torch.empty(self.images))
            loss.backward()

    def marker(self) -> Path:
        """A file in Triton's cache, which exists if these versions have compiled these kernels."""
        import triton

        sources = b"".join(file.read_bytes() for file in sorted(Path(segdiff_kernels.__path__[0]).glob("*.py")))
        facts = json.dumps([asdict(self), torch.__version__, triton.__version__]).encode()
        return Path(triton.knobs.cache.dir) / f"segdiff-{hashlib.sha256(facts + sources).hexdigest()[:32]}"


def plan_of(
    config: DenoiserConfig, table: LabelTable, side: int, images: int, precision: str, device: torch.device
) -> KernelPlan:
    """For this GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    names = (table.name, tuple(table.names))
    return KernelPlan(asdict(config), names, side, images, precision, 10 * major + minor)


def compile_kernels(plan: KernelPlan) -> None:
    """Compile the kernels that are not yet in the cache, on one rank of each machine, and print a line on stderr. A
    failure is reported and costs only time: Triton then compiles at the first launch."""
    if local_rank() != 0 or plan.marker().is_file():
        return
    start = time.perf_counter()
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "segdiff_dist.denoising.kernels_ahead", json.dumps(asdict(plan))]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.stderr.write(f"kernels: not compiled ahead, but when they are first launched: {reason}\n")
        return
    seconds = time.perf_counter() - start
    sys.stderr.write(f"kernels: {done.stdout.strip()} compiled for sm_{plan.arch} in {seconds:.0f} s\n")


def main(given: str) -> None:
    """The command: compiles, writes the marker, prints how many there are."""
    from segdiff_kernels.ahead import compile_ahead

    plan = KernelPlan(**json.loads(given))
    num_workers = len(os.sched_getaffinity(0))
    number = compile_ahead(plan.work, plan.arch, num_workers)
    plan.marker().parent.mkdir(parents=True, exist_ok=True)
    write_atomic(plan.marker(), "")
    sys.stdout.write(f"{number} on {num_workers} cores\n")


if __name__ == "__main__":
    main(sys.argv[1])
