"""One turn of a sampler: diffusers' loop in a process of its own, or our workers, over the same items and weights.

Only the making of images is timed: processes are started, weights loaded and one batch made before the clock starts.
Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.fan_out import TaskFailure, Workers
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.sampling.config import LEAST_BATCH, SampleConfig
from segdiff_dist.sampling.job import prepare_job
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.sampling.worker import WorkerFactory

# Passes through the net before the clock of diffusers' loop runs.
_WARM_UP_PASSES = 2

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Task:
    """The work of every contender: the first items of a job, from RUN/weights and a shard set."""

    run: Path
    data: Path
    diffusion: DiffusionConfig
    config: SampleConfig

    def store(self, path: Path, **changes: Any) -> SampleStore:
        """An empty store of the job in `path`, with some of the settings changed."""
        shards, config = ShardSet.open(self.data), replace(self.config, out=path, **changes)
        shutil.rmtree(path, ignore_errors=True)
        job = prepare_job(self.run, shards, shards.select(split=config.split), self.diffusion, config)
        return SampleStore.create(job.path, job.job_settings | {"device": "cpu"}, job.items, job.size)


def ours(task: Task, path: Path, num_workers: int, **changes: Any) -> tuple[int, float, float]:
    """(images, seconds, share of the workers' time that went into images) of Ray workers with one thread each."""
    store = task.store(path, **changes)
    regions = store.missing_regions()
    make = WorkerFactory(store.path, "cpu", task.config.batch_size, num_workers)
    with Workers(_warm(make, task, path), num_workers=num_workers) as workers:
        _all(workers.run([-1] * num_workers))
        began = time.perf_counter()
        busy_s = sum(_all(workers.run(regions)))
        seconds = time.perf_counter() - began
    return len(store), seconds, busy_s / (seconds * num_workers)


def ours_without_ray(task: Task, path: Path) -> tuple[int, float]:
    """(images, seconds) of what one of the workers does, in a process of its own without Ray."""
    store = task.store(path)
    with _context.Pool(1, initializer=_one_thread) as pool:
        seconds = pool.apply(_regions_here, (task, path, store.missing_regions()))
    return len(store), seconds


def diffusers_loop(task: Task, path: Path) -> tuple[int, float]:
    """(images, seconds) of diffusers' pipeline loop, fp32, in one process with as many threads as cores.

    Its images go to PATH/diffusers.npy. As DDIMPipeline it keeps everything in memory and writes nothing while timed.
    """
    store = task.store(path)
    with _context.Pool(1) as pool:
        seconds = pool.apply(_diffusers_loop, (task, path))
    return len(store), seconds


def _warm(make: WorkerFactory, task: Task, path: Path) -> Any:
    """The factory, whose workers take region -1 for a rehearsal: a batch of few steps that is thrown away."""

    def make_worker() -> Any:
        make_region = make()
        rehearse = _rehearsal(make_region)
        return lambda index: rehearse() if index < 0 else make_region(index)

    return make_worker


def _rehearsal(make_region: Any) -> Any:
    def rehearse() -> float:
        mask_BHW = torch.zeros(make_region.batch_size, make_region.model.size, make_region.model.size)
        zero_B = torch.zeros(make_region.batch_size, dtype=torch.int64)
        with torch.inference_mode():
            for _ in range(_WARM_UP_PASSES):
                make_region.model(mask_BHW[:, None], zero_B, mask_BHW.to(torch.uint8), zero_B)
        return 0.0

    return rehearse


def _all(results: Any) -> list[float]:
    seconds = []
    for done in results:
        assert not isinstance(done.result, TaskFailure), done.result.error
        seconds.append(done.result)
    return seconds


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _regions_here(task: Task, path: Path, regions: list[int]) -> float:
    make_region = WorkerFactory(path, "cpu", task.config.batch_size)()
    _rehearsal(make_region)()
    began = time.perf_counter()
    for index in regions:
        make_region(index)
    return time.perf_counter() - began


@torch.no_grad()
def _diffusers_loop(task: Task, path: Path) -> float:
    from diffusers import DDIMScheduler, UNet2DModel

    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.sampling.worker import item_conditions
    from segdiff_kernels import philox

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    store, shards = SampleStore.open(path), ShardSet.open(task.data)
    folder = Path(store.job["weights"])
    unet = UNet2DModel.from_pretrained(folder).eval()
    description = json.loads((folder / "segdiff.json").read_text())
    model = Denoiser.load(folder)
    process, sampler = task.diffusion, store.job["sample"]["sampler"]
    scheduler = DDIMScheduler(
        num_train_timesteps=process.num_train_timesteps,
        beta_schedule=process.beta_schedule,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[process.prediction_type],
        rescale_betas_zero_snr=process.zero_terminal_snr,
        timestep_spacing=sampler["timestep_spacing"],
        clip_sample=sampler["clip_sample"],
    )
    batches, batch = [], max(LEAST_BATCH, task.config.batch_size or task.config.region_size)
    items = store.items.to_pylist()
    for start in range(0, len(items), batch):
        some = items[start : start + batch]
        conditions = item_conditions(model, shards, some, (), torch.device("cpu"))
        channels_BKHW = model.mask_encoder(conditions.mask_BHW, torch.float32)
        ids_B = torch.tensor([item["item_id"] for item in some])
        x_T = philox.normal(
            sampler_seed(store), philox.STREAM_SAMPLE, ids_B, (1, description["size"], description["size"])
        )
        batches.append((x_T, channels_BKHW, conditions.class_B))
    for _ in range(_WARM_UP_PASSES):
        unet(torch.cat(batches[0][:2], 1), 0, class_labels=batches[0][2])
    made = []
    began = time.perf_counter()
    for x_BCHW, channels_BKHW, class_B in batches:
        scheduler.set_timesteps(sampler["num_steps"])
        for t in scheduler.timesteps:
            prediction = unet(torch.cat((x_BCHW, channels_BKHW), 1), t, class_labels=class_B).sample
            x_BCHW = scheduler.step(prediction, t, x_BCHW, eta=0.0).prev_sample
        made.append(((x_BCHW / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)[:, 0].numpy())
    seconds = time.perf_counter() - began
    np.save(path / "diffusers.npy", np.concatenate(made))
    return seconds


def sampler_seed(store: SampleStore) -> int:
    """The seed of a job's noise."""
    return int(store.job["sample"]["seed"])
