"""The cost of a job: images, time and bytes. `segdiff sample --dry-run` prints it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_shards.workers import WorkerPool
from segdiff_dist.sampling.config import LEAST_BATCH, SampleConfig
from segdiff_dist.sampling.job import Job, fewer_masks, prepare_job

if TYPE_CHECKING:
    import torch

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.config import DiffusionConfig
    from segdiff_dist.denoising.denoiser import Denoiser

# A pass that takes longer than this is not worth warming up for.
_LONG_PASS_S = 5.0


@dataclass(frozen=True)
class Plan:
    """Seconds and bytes are those of the missing images; seconds are None if they cannot be estimated here.
    `fewer_masks`: a message if there are fewer masks than asked for."""

    num_images: int
    num_missing: int
    num_masks: int
    fewer_masks: str | None
    passes_per_image: int
    pool: WorkerPool
    seconds: float | None
    seconds_from: str
    num_bytes: int
    bytes_from: str
    num_stages: int = 1
    """Of a cascade."""
    classes: str | None = None
    """For masks of a folder: the classes that occur."""

    def __str__(self) -> str:
        """A few lines for a person."""
        duration = "not known" if self.seconds is None else _duration(self.seconds)
        workers = f"{self.pool.num_workers} worker{'s' if self.pool.num_workers > 1 else ''} on {self.pool.device}"
        net = "the net" if self.num_stages == 1 else f"each of {self.num_stages} nets"
        passes = f"{self.passes_per_image} passes through {net} each"
        masks = f"{self.num_masks:,} masks" if self.fewer_masks is None else self.fewer_masks
        return "\n".join(
            [
                f"images: {self.num_images:,} of {masks}, {passes}; {self.num_missing:,} missing",
                f"time:   {duration} with {workers} ({self.seconds_from})",
                f"bytes:  {_size(self.num_bytes)} ({self.bytes_from})",
                *([] if self.classes is None else [self.classes]),
            ]
        )


def plan(run: Path, shards: ShardSet, rows: np.ndarray, diffusion: DiffusionConfig, config: SampleConfig) -> Plan:
    """The work of `sampling.job.sample` with the same arguments. It makes and writes no image; it joins
    config.ray_address.

    Seconds come from the images made so far, else from a pass through the net on this machine.
    """
    return plan_of(prepare_job(run, shards, rows, diffusion, config), config)


def plan_of(job: Job, config: SampleConfig) -> Plan:
    """The same for a job that was prepared with this config."""
    from segdiff_dist.denoising.config import DiffusionConfig
    from segdiff_dist.denoising.samplers import num_evaluations

    with config.workers.joined():
        pool = config.workers.pool()
    passes = num_evaluations(config.sampler, DiffusionConfig(**job.job_settings["diffusion"]))
    num_missing = len(job.items) if job.store is None else len(job.store.missing())
    made = _made_so_far(job)
    each: float | None
    if made is not None:
        each, seconds_from = made[0], f"as the {len(job.items) - num_missing:,} images made so far"
    else:
        pass_s, seconds_from = _seconds_of_a_pass(job, pool, config)
        each = None if pass_s is None else pass_s * passes
    return Plan(
        num_images=len(job.items),
        num_missing=num_missing,
        num_masks=len(set(job.items["row"].to_pylist())),
        fewer_masks=fewer_masks(job.items, config),
        passes_per_image=passes,
        pool=pool,
        seconds=None if each is None else num_missing * each / min(pool.num_workers, max(1, num_missing)),
        seconds_from=seconds_from,
        num_bytes=num_missing * (2 * job.size**2 if made is None else made[1]),
        bytes_from="at most: before compression" if made is None else "as the images made so far",
        num_stages=_num_stages(job),
        classes=job.classes,
    )


def _num_stages(job: Job) -> int:
    model, num = job.loaded[0] if job.loaded else None, 1
    while model is not None and model.lower_net is not None:
        model, num = model.lower_net, num + 1
    return num


def _made_so_far(job: Job) -> tuple[float, int] | None:
    """Seconds of a worker and bytes of an image and its mask, means over the images made so far."""
    if job.store is None or not (done := job.store.done_regions()):
        return None
    num = sum(len(job.store.region(index)) for index in done)
    seconds = sum(job.store.mark(index).get("seconds", 0.0) for index in done)
    return seconds / num, sum(job.store.num_bytes(index) for index in done) // num


def _seconds_of_a_pass(job: Job, pool: WorkerPool, config: SampleConfig) -> tuple[float | None, str]:
    """Seconds of one image through the net, on one worker's device."""
    import torch

    from segdiff_dist.denoising.denoiser import Denoiser

    if pool.device == "cuda" and not torch.cuda.is_available():
        return None, "no image made yet, and no GPU here to try on"
    device = torch.device(pool.device)
    model = job.loaded[0] if job.loaded else Denoiser.load(Path(job.job_settings["weights"]))
    model = model.prepare_for(device)
    model = model.to(torch.bfloat16) if job.job_settings["sample"]["precision"] == "bf16" else model
    seconds = seconds_of_a_pass(model, device, config.threads_per_worker)
    return seconds, f"estimated from a pass of {LEAST_BATCH} images on this machine"


def seconds_of_a_pass(model: Denoiser, device: torch.device, threads: int | None = None) -> float:
    """Seconds of an image of LEAST_BATCH through a net that is on `device`, and through a cascade's stages below it;
    `threads`: null are this process's own."""
    import torch

    below_s = 0.0 if model.lower_net is None else seconds_of_a_pass(model.lower_net, device, threads)
    low: tuple[torch.Tensor | None, ...] = ()
    if model.lower is not None:
        side = model.lower.side
        low = (None, torch.zeros(LEAST_BATCH, 1, side, side, device=device), torch.zeros(LEAST_BATCH, device=device))
    mask_BHW = torch.zeros(LEAST_BATCH, model.size, model.size, dtype=torch.uint8, device=device)
    zero_B = torch.zeros(LEAST_BATCH, dtype=torch.int64, device=device)
    seconds, before = _LONG_PASS_S, torch.get_num_threads()
    torch.set_num_threads(threads or before)
    with torch.inference_mode():
        for _ in range(2):
            began = time.perf_counter()
            model(torch.zeros(LEAST_BATCH, *model.shape, device=device), zero_B, mask_BHW, zero_B, *low).sum().item()
            seconds = time.perf_counter() - began
            if seconds > _LONG_PASS_S:
                break
    torch.set_num_threads(before)
    return below_s + seconds / LEAST_BATCH


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
