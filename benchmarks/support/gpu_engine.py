"""benchmarks/gpu.py: steps of the training engine, replayed and launched one by one, by images at once.

A step of `segdiff train` without loader, log and checkpoints: micro-batches, guard, update, averages. Host time is the
duration of a step's calls, and GPU time is the sum of its kernels: if the host time is longer, the GPU waits.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from data_shards.records import Batch
from segdiff_dist.training.captured import MicroStep, UpdateStep, recorded_updates
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.engine import Engine
from segdiff_dist.training.step_log import LogWindow, StepCheck, UpdateGuard
from support.gpu_session import Session, describe
from support.gpu_training import denoiser_task, random_batch

# Steps that two runs are compared over.
_COMPARED_STEPS = 3


@dataclass
class Steps:
    """Training steps as the loop makes them, on one batch."""

    engine: Engine
    check: StepCheck
    micro_step: MicroStep
    update_step: UpdateStep
    batch: Batch
    images_seen: int = 0

    def step(self) -> None:
        """One update of the weights."""
        for number in range(1, self.engine.num_micro_batches + 1):
            self.micro_step(self.batch)
            if number < self.engine.num_micro_batches:
                self.engine.step(is_last=False)
        if not self.update_step.replay():
            self.engine.step(self.check)
        self.images_seen += self.engine.config.global_batch_size
        self.engine.update_averages(self.images_seen, self.engine.config.global_batch_size)

    @property
    def images(self) -> int:
        return self.engine.config.global_batch_size


def make_steps(session: Session, folder: Path, images: int, micro_batch: int, graph: Literal["auto", "off"]) -> Steps:
    """Ready to step: recorded where that is wanted and possible."""
    # A dry run's interpreter takes a second for each kernel; the other parts run them.
    task = denoiser_task(session, folder, "torch" if session.args.dry_run else "triton")
    config = TrainConfig(global_batch_size=images, micro_batch_size=micro_batch, cuda_graph=graph)
    engine = Engine(task.model, config, micro_batch, session.device)
    engine.module.train()
    window = LogWindow(session.device)
    check = StepCheck(window, UpdateGuard(config.spike_factor, session.device))

    def forward_and_backward(batch: Batch) -> None:
        loss, metrics = task.loss(engine, batch)
        engine.backward(loss)
        window.add(loss, metrics)

    def sums() -> list[Tensor]:
        return [*engine.gradients, window.step_sums]

    micro_step = MicroStep(forward_and_backward, sums, config, session.device)
    batch = random_batch(micro_batch, session.scale.size, session.device)
    micro_step.prepare(iter([batch]), "engine")
    return Steps(engine, check, micro_step, recorded_updates(engine, check, micro_step), batch)


def engine_steps(session: Session) -> list[dict[str, Any]]:
    """For every number of images at once, eager and replayed: images/s, host and GPU time, launches, memory.

    A step has as many images as the largest number; with fewer at once they are accumulated.
    """
    rows: list[dict[str, Any]] = []
    images = max(session.scale.engine_batches)
    for micro_batch in session.scale.engine_batches:
        for graph in ("auto", "off"):
            row: dict[str, Any] = {"images": images, "at_once": micro_batch, "cuda_graph": graph}
            rows.append(row)
            try:
                row |= _measured(session, images, micro_batch, graph)
            except Exception as error:  # the results of the other sizes are still useful
                row["error"] = describe(error)
                if not session.device_works():
                    raise
            session.keep(rows)
            print(f"  {row}", flush=True)
    return rows


def determinism(session: Session) -> dict[str, Any]:
    """Whether two runs give the same bits, and what torch's deterministic algorithms cost."""
    images = session.scale.batches[0]
    found: dict[str, Any] = {"steps": _COMPARED_STEPS}
    for choice in (False, True):
        torch.use_deterministic_algorithms(choice, warn_only=True)
        try:
            found[f"images_per_s, deterministic {choice}"] = _measured(session, images, images, "auto")["images_per_s"]
        finally:
            torch.use_deterministic_algorithms(False)
        session.keep(found)
    weights = []
    for _ in range(2):
        with TemporaryDirectory(prefix="bench-gpu-") as folder:
            steps = make_steps(session, Path(folder), images, images, "auto")
            for _ in range(_COMPARED_STEPS):
                steps.step()
            weights.append([p.detach().clone() for p in steps.engine.module.parameters()])
            steps.engine.close()
    found["parameters_that_differ"] = sum(not torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return found


def _measured(session: Session, images: int, micro_batch: int, graph: Literal["auto", "off"]) -> dict[str, Any]:
    is_cuda = session.device.type == "cuda"
    with TemporaryDirectory(prefix="bench-gpu-") as folder:
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        steps = make_steps(session, Path(folder), images, micro_batch, graph)
        steps.step()
        session.synchronize()
        found: dict[str, Any] = {"ready_s": time.perf_counter() - began, "replays": steps.micro_step.is_recorded}
        seconds = session.seconds(steps.step, session.scale.steps)
        found |= {"step_ms": 1e3 * seconds, "images_per_s": steps.images / seconds, "host_ms": _host_ms(session, steps)}
        if is_cuda:
            found |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, **_gpu_time(session, steps)}
        steps.engine.close()
    del steps
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    return found


def _host_ms(session: Session, steps: Steps) -> float:
    """Duration of a step's calls while the device can follow."""
    session.synchronize()
    began = time.perf_counter()
    steps.step()
    host_s = time.perf_counter() - began
    session.synchronize()
    return 1e3 * host_s


def _gpu_time(session: Session, steps: Steps) -> dict[str, float]:
    """Sum of a step's kernels, and their number."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps.step()
        session.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return {"gpu_busy_ms": sum(event.device_time for event in kernels) / 1e3, "launches": len(kernels)}
