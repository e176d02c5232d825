"""Small training runs as the stages make them, for tests; and the referee, which has no DeepSpeed."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_support import Recording

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Shuffled, rank_positions
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.sigma_data import with_sigma_data
from segdiff_dist.denoising.task import DenoiserTask
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.tracker import Tracker
from segdiff_dist.training import captured, checkpoint, checkpoint_writer, sharded_state
from segdiff_dist.training.config import TrainConfig, learning_rate
from segdiff_dist.training.loop import TrainingJob, train

CPU = torch.device("cpu")
NET = DenoiserConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=(16,))
# Also reads what the loader did to each slice.
LABELLED = replace(NET, augmentation_labels=True)
DIFFUSION = DiffusionConfig(prediction_type="v", zero_terminal_snr=True)
LOADER = LoaderConfig(flip=True, rotate_degrees=10)
QUICK: dict[str, Any] = {
    "num_images": 96,
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "lr": 2e-3,
    "warmup_images": 16,
    "checkpoint_every_images": 32,
    "log_every_images": 16,
}


def run_training(
    shapes: Path, run: Path, net: DenoiserConfig = NET, diffusion: DiffusionConfig = DIFFUSION, **changes: Any
) -> list[float]:
    """Train as the stage does; returns the logged losses."""
    shards = ShardSet.open(shapes)
    config = TrainConfig(**{**QUICK, **changes})
    rows = shards.select(split="train")
    process = with_sigma_data(diffusion, shards, rows)
    task = DenoiserTask(shards, shards.size, net, process, config.seed, run / "weights", CPU)
    with Tracker(run, TrackingConfig(enabled=False), "train") as tracker:
        train(TrainingJob(task, shards, rows, LOADER, config, run, tracker, CPU, {"config": "here"}))
    return losses(run)


def losses(run: Path) -> list[float]:
    """What a run has logged."""
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def logged(run: Path) -> list[list[float | None]]:
    """What a run has logged, without its speed."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [[line[name] for name in ("loss", "grad_norm", "lr", "skipped_steps")] for line in lines]


def plain_losses(shapes: Path, steps: int, num_images: int) -> list[float]:
    """The same run in plain PyTorch, fp32: gradients of two micro-batches of 4 averaged, AdamW, the same schedule."""
    shards, config = ShardSet.open(shapes), TrainConfig(**{**QUICK, "num_images": num_images})
    task = DenoiserTask(shards, shards.size, LABELLED, DIFFUSION, 0, Path("unused"), CPU)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    positions = rank_positions(0, micro_batch_size=4, num_micro_batches=2, rank=0, world_size=1)
    order = Shuffled(shards.select(split="train"), 0)
    batches = iter(Loader(shards, order, positions, LOADER, batch_size=4, seed=0))
    found = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(8 * step, config)
        micro = []
        for _ in range(2):
            loss, _ = task.loss(task.model, next(batches))
            (loss / 2).backward()
            micro.append(loss.item())
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(sum(micro) / 2)
    return found


def train_under(
    rank: int,
    out: Path,
    shapes: Path,
    settings: list[tuple[str, int, int]],
    num_images: int,
    name: str | None = None,
    until: int | None = None,
    optimizer: str = "adamw",
) -> None:
    """What each rank of a test does: the same run under each (precision, zero_stage, micro_batch_size), one after the
    other, in OUT/<setting> or OUT/`name`; with `until` it is asked to stop there, as by Ctrl-C."""
    for precision, zero_stage, micro_batch_size in settings:
        folder = out / (name or f"{precision}-{zero_stage}-{micro_batch_size}")
        changes: dict[str, Any] = {
            "precision": precision,
            "zero_stage": zero_stage,
            "micro_batch_size": micro_batch_size,
            "num_images": num_images,
            "log_every_images": 8,
            "checkpoint_every_images": num_images,
            "optimizer": optimizer,
        }
        with _stopped_at(until if until and until < num_images else None):
            run_training(shapes, folder, LABELLED, **changes)
    assert "torch._inductor.compile_fx" not in sys.modules, "a compiler that nobody asked for takes seconds to load"


def train_with_scores(rank: int, out: Path, shapes: Path, scores: dict[int, float], lost: int, until: int) -> None:
    """What each rank of a test does: a run whose weights have these scores, stopped at `until` and gone on with. For
    the state of checkpoint `lost` the main rank then finds no room, which the others cannot see."""
    DenoiserTask.score = "overlap"  # type: ignore[assignment]
    DenoiserTask.validate = lambda _, __, images_seen: {"overlap": scores[images_seen]}  # type: ignore[method-assign]
    write = checkpoint_writer.write_atomic

    def full(path: Path, text: str, **options: Any) -> None:
        if path.name == checkpoint.STATE and int(path.parent.name) == lost:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text, **options)

    with _stopped_at(until):
        run_training(shapes, out, micro_batch_size=2)
    checkpoint_writer.write_atomic = full
    run_training(shapes, out, micro_batch_size=2)


def exported(run: Path) -> bytes:
    return (run / "weights" / "ema_0.05" / "diffusion_pytorch_model.safetensors").read_bytes()


def interrupt_at(images: int, monkeypatch: pytest.MonkeyPatch, shapes: Path, run: Path, **changes: Any) -> None:
    """Train until a Ctrl-C has saved a checkpoint there."""
    loss = DenoiserTask.loss

    def interrupted(self: DenoiserTask, forward: Any, batch: Batch) -> Any:
        if int(batch.position_B[0]) == images - 16:  # all ranks stop at the step after
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, forward, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserTask, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_training(shapes, run, **changes)
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())[-1] == f"{images:012d}"


def disk_is_full_for(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = sharded_state.write

    def full(folder: Path, rank: int, state: Any) -> None:
        if int(folder.name) == images:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, rank, state)

    monkeypatch.setattr(sharded_state, "write", full)


@contextmanager
def _stopped_at(images: int | None) -> Iterator[None]:
    """Training in this context gets a SIGTERM in time to stop after so many images, and is expected to."""
    if images is None:
        yield
        return
    loss = DenoiserTask.loss

    def stopping(self: DenoiserTask, forward: Any, batch: Any) -> Any:
        if images - 16 <= int(batch.position_B[0]) < images - 8:  # the ranks learn of it one step later
            stopping.asked = stopping.asked or signal.raise_signal(signal.SIGTERM) is None  # type: ignore[attr-defined]
        return loss(self, forward, batch)

    stopping.asked = False  # type: ignore[attr-defined]
    DenoiserTask.loss = stopping  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        DenoiserTask.loss = loss  # type: ignore[method-assign]


def train_recorded(rank: int, out: Path, shapes: Path, settings: dict[str, Any]) -> None:
    """What each rank of a test does: the same run eagerly and from a recording, in OUT/off and OUT/on."""
    captured.recorder_for = lambda _: Recording()
    for choice in ("off", "on"):
        run_training(shapes, out / choice, cuda_graph=choice, **settings)
