"""Training: one loop, read from top to bottom, for the denoiser and for whatever else learns from the shards.

Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.feed.loader import Loader, LoaderConfig
from data_shards.feed.mixing import make_order
from data_shards.feed.order import rank_positions
from data_shards.problems import Problem, problem, refuse
from data_shards.records import Batch
from segdiff_dist import checkpoint
from segdiff_dist.config import write_text_atomically
from segdiff_dist.denoiser import describe
from segdiff_dist.distributed import barrier, is_main, mean_over_ranks, rank, world_size
from segdiff_dist.engine import Engine, TrainConfig, ema_decay, learning_rate

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.tracking import Tracker


class Task(Protocol):
    """What is being learned: a model, its loss, and what becomes of its weights."""

    name: str
    model: nn.Module

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's mean loss, through `forward`, which is the model as the engine runs it; and what else is
        worth logging: name -> float [2], a sum over the micro-batch and how many values went into it."""

    def export(self, weights: dict[str, Tensor], previous_score: float | None) -> tuple[float | None, dict[str, float]]:
        """Called on the main rank at every checkpoint with the gathered EMA weights: write them where they are
        used. Returns the best score so far, where there is a choice to make, and what is worth logging."""


def train(
    task: Task,
    shards: ShardSet,
    rows: np.ndarray,
    loader_config: LoaderConfig,
    config: TrainConfig,
    folder: Path,
    tracker: Tracker,
    device: torch.device,
    resolved_config: str,
) -> None:
    """Train `task` on the given rows of the shard set, from the newest checkpoint in `folder` on.

    Writes folder/checkpoints/, folder/log.jsonl and, through the task, the exported weights. Ctrl-C saves a checkpoint
    and raises KeyboardInterrupt; the same call goes on from there.
    """
    if len(rows) == 0:
        raise problem(shards.root, "split", "no slice to train on", "widen loader.modalities or loader.axes")
    checkpoints, log = folder / "checkpoints", folder / "log.jsonl"
    engine = Engine(task.model.to(device).train(), config, device)
    state: dict[str, Any] = {"images_seen": 0, "loss_sum": 0.0, "loss_count": 0, "best_score": None}
    newest = checkpoint.newest_complete(checkpoints)
    if newest is not None:
        state = checkpoint.read_state(newest)
        _refuse_other_ground(newest, state, shards)
        engine.load(newest)
    if is_main():
        _cut_log(log, state["images_seen"])
        tracker.log_params({task.name: {**describe(task.model), "ranks": world_size(), "device": str(device)}})
    barrier()

    batches = iter(
        Loader(
            shards,
            make_order(shards, rows, loader_config.mix, config.seed),
            rank_positions(
                state["images_seen"],
                micro_batch_size=config.micro_batch_size,
                num_micro_batches=engine.num_micro_batches,
                rank=rank(),
                world_size=world_size(),
            ),
            loader_config,
            batch_size=config.micro_batch_size,
            seed=config.seed,
            device=device,
        )
    )
    loss_sum = torch.tensor(state["loss_sum"], dtype=torch.float64, device=device)
    clock = _Clock(state["images_seen"])
    with _progress(task.name, config.num_images, state["images_seen"]) as bar, _CatchInterrupt(device) as interrupt:
        while state["images_seen"] < config.num_images:
            engine.set_lr(learning_rate(state["images_seen"], config))
            for _ in range(engine.num_micro_batches):
                with clock.waiting():
                    batch = next(batches)
                loss, _ = task.loss(engine, batch)
                engine.backward(loss)
                engine.step()
                loss_sum += loss.detach().double()
                state["loss_count"] += 1
            before, state["images_seen"] = state["images_seen"], state["images_seen"] + config.global_batch_size
            engine.update_ema(ema_decay(state["images_seen"], config.global_batch_size, config))
            bar.update(min(state["images_seen"], config.num_images) - before)

            done = state["images_seen"] >= config.num_images
            if done or _crosses(before, state["images_seen"], config.log_every_images):
                mean_loss = float(mean_over_ranks(loss_sum / state["loss_count"]))
                loss_sum.zero_()
                state["loss_count"] = 0
                row = {"loss": mean_loss, "grad_norm": engine.grad_norm()}
                row |= {"lr": learning_rate(before, config), **clock.rates(state["images_seen"])}
                if is_main():
                    bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
                    _log(log, tracker, task.name, row, state["images_seen"])
                if not np.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"{task.name}: the loss is {mean_loss} at {state['images_seen']} images; "
                        f"the last good checkpoint is {checkpoint.newest_complete(checkpoints) or 'none'}"
                    )
            stop = interrupt.agreed()
            if done or stop or _crosses(before, state["images_seen"], config.checkpoint_every_images):
                with clock.paused():
                    state["loss_sum"] = float(loss_sum)
                    _save(engine, task, shards, state, checkpoints, config, tracker, resolved_config)
            if stop:
                raise KeyboardInterrupt
    engine.close()


def _save(
    engine: Engine,
    task: Task,
    shards: ShardSet,
    state: dict[str, Any],
    checkpoints: Path,
    config: TrainConfig,
    tracker: Tracker,
    resolved_config: str,
) -> None:
    """Write a checkpoint on all ranks, export the EMA, and only then declare the checkpoint complete."""
    folder = checkpoints / checkpoint.checkpoint_name(state["images_seen"])
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    engine.save(folder)
    weights = engine.full_weights()
    if is_main():
        state["best_score"], metrics = task.export(weights, state["best_score"])
        tracker.log_metrics({f"{task.name}/{k}": v for k, v in metrics.items()}, state["images_seen"])
        write_text_atomically(folder / "config.yaml", resolved_config)
        checkpoint.write_state(folder, {**state, "ranks": world_size(), "shards_digest": shards.digest})
        checkpoint.mark_complete(folder)
        checkpoint.prune(checkpoints, config.keep_checkpoints)
    barrier()


def _refuse_other_ground(folder: Path, state: dict[str, Any], shards: ShardSet) -> None:
    """A checkpoint goes on with the data and the number of ranks it was written with."""
    found = []
    if state["shards_digest"] != shards.digest:
        remedy = "restore the shard set the run was started with, or use another run folder"
        found.append(Problem(str(folder), "shards_digest", f"not that of {shards.root}", remedy))
    if state["ranks"] != world_size():
        remedy = f"start it on {state['ranks']} ranks again"
        found.append(Problem(str(folder), "ranks", f"{state['ranks']} there, {world_size()} now", remedy))
    refuse(found)


def _crosses(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def _log(path: Path, tracker: Tracker, name: str, row: dict[str, float], images_seen: int) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"images_seen": images_seen, **row}) + "\n")
    tracker.log_metrics({f"{name}/{key}": value for key, value in row.items()}, images_seen)


def _cut_log(path: Path, images_seen: int) -> None:
    """Forget lines that a killed run wrote after its last checkpoint, or half wrote: they will be written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_text_atomically(path, "".join(line for line in whole if json.loads(line)["images_seen"] <= images_seen))


def _progress(name: str, total: int, initial: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=min(initial, total), desc=name, unit="img", disable=not is_main(), mininterval=1.0)


class _Clock:
    """Images a second and the share of time spent waiting for data, since the last question."""

    def __init__(self, images_seen: int) -> None:
        self._images, self._start, self._waited_s, self._paused_s = images_seen, time.perf_counter(), 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here does not count."""
        start = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start

    def rates(self, images_seen: int) -> dict[str, float]:
        """What to log; begins the next measurement."""
        busy_s = max(time.perf_counter() - self._start - self._paused_s, 1e-9)
        rates = {"images_per_s": (images_seen - self._images) / busy_s, "data_wait_fraction": self._waited_s / busy_s}
        self._images, self._start, self._waited_s, self._paused_s = images_seen, time.perf_counter(), 0.0, 0.0
        return rates


class _CatchInterrupt:
    """Ctrl-C and SIGTERM wait for the end of the step, so that a checkpoint can be written first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> _CatchInterrupt:
        self._asked = False
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_: Any) -> None:
        if self._asked:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks answer alike."""
        if world_size() == 1:
            return self._asked
        return bool(float(mean_over_ranks(torch.tensor(float(self._asked), device=self._device))) > 0)

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
