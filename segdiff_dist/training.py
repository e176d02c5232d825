"""Training: one loop, read from top to bottom, for the denoiser and for whatever else learns from the shards."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.feed.loader import Loader, LoaderConfig
from data_shards.feed.mixing import make_order
from data_shards.feed.order import rank_positions
from data_shards.problems import problem
from data_shards.records import Batch
from segdiff_dist import checkpoint
from segdiff_dist.checkpoint import CheckpointWriter
from segdiff_dist.config import write_text_atomically
from segdiff_dist.denoiser import describe
from segdiff_dist.distributed import Agreement, agree, code_versions, gather_objects, is_main, rank, world_size
from segdiff_dist.engine import Engine, start_distributed
from segdiff_dist.export import Exporter
from segdiff_dist.heartbeat import Heartbeat
from segdiff_dist.micro_batch import find_micro_batch
from segdiff_dist.step_log import Guard, Window
from segdiff_dist.throughput import FlopCounter, StepClock, peak_flops, progress_line
from segdiff_dist.train_config import TrainConfig, learning_rate

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.tracking import Tracker


# Validation and the end of a run may take this long before a rank counts as hanging.
_PATIENCE_S = 3600.0


class Task(Protocol):
    """What is being learned: a model, its loss, how it is judged on the way, and what becomes of its weights."""

    name: str
    model: nn.Module
    score: str | None
    """The number of `validate` that says which weights are best, and only those are exported; None: the newest are."""

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's mean loss, through `forward`, which is the model as the engine runs it; and what else is
        worth logging: name -> float [2], a sum over the micro-batch and how many values went into it. The same names in
        every call."""

    def validate(self, forward: Callable[..., Any], images_seen: int) -> dict[str, float]:
        """Judge the averaged weights, which `forward` runs without gradients. Called on all ranks, which must call
        `forward` equally often; the same numbers on all of them."""

    def export(self, average: str, weights: dict[str, Tensor]) -> None:
        """Write weights, keys as in the model's state_dict, where they are used. Main rank, beside the training."""


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and where its last good checkpoint is."""


@dataclass
class RunState:
    """Where a run stands, beside what the engine holds."""

    images_seen: int = 0
    best_score: float | None = None
    is_best: bool = True
    """Whether the weights of this moment are the ones to export."""


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

    Writes folder/checkpoints/, folder/log.jsonl, folder/snapshots/ and, through the task, the exported weights. Ctrl-C,
    SIGTERM and SIGUSR1 save a checkpoint and raise KeyboardInterrupt; the same call goes on from there, on any number
    of ranks and with any zero_stage.

    Raises TrainingStopped after too many skipped steps in a row, and OSError where the last checkpoint cannot be
    written.
    """
    if len(rows) == 0:
        raise problem(shards.root, "split", "no slice to train on", "widen loader.modalities or loader.axes")
    start_distributed(device)
    agree({"shards digest": shards.digest, "config": resolved_config, **code_versions()})
    order = make_order(shards, rows, loader_config.mix, config.seed)

    def load(positions: Iterator[np.ndarray], batch_size: int) -> Iterator[Batch]:
        loader = Loader(shards, order, positions, loader_config, batch_size=batch_size, seed=config.seed, device=device)
        return iter(loader)

    model = task.model.to(device).train()
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    first = rank_positions(0, micro_batch_size=1, num_micro_batches=1, rank=0, world_size=1)
    counter, peak = FlopCounter(model), peak_flops(device, config.precision)
    micro_batch_size = find_micro_batch(task, lambda: next(load(first, 1)), config, folder)
    engine = Engine(model, config, micro_batch_size, device)
    exporter = Exporter(task, config, folder)
    state, window, guard = _resume(engine, exporter, shards, config, folder)
    if is_main():
        _cut_log(folder / "log.jsonl", state.images_seen)
        about = {"ranks": world_size(), "device": str(device), "peak_tflops": peak.flops / 1e12, "peak": peak.source}
        tracker.log_params({task.name: {**describe(task.model), **about}})
    batches = load(
        rank_positions(
            state.images_seen,
            micro_batch_size=micro_batch_size,
            num_micro_batches=engine.num_micro_batches,
            rank=rank(),
            world_size=world_size(),
        ),
        micro_batch_size,
    )
    clock = StepClock(state.images_seen, device, counter, peak)
    agreement = Agreement(("stop", *CheckpointWriter.FLAGS))
    writer = CheckpointWriter(
        folder / "checkpoints",
        keep=config.keep_checkpoints,
        keep_every_images=config.keep_every_images,
        on_complete=exporter.export,
    )
    done = stop = state.images_seen >= config.num_images
    with (
        Heartbeat(config.hang_timeout_s) as heartbeat,
        _progress(task.name, config.num_images, state.images_seen) as bar,
        _CatchInterrupt() as interrupt,
        writer,
    ):
        while not (done or stop):
            engine.set_lr(learning_rate(state.images_seen, config))
            for micro_batch in range(1, engine.num_micro_batches + 1):
                with clock.waiting():
                    batch = next(batches)
                loss, told = task.loss(engine, batch)
                engine.backward(loss)
                window.add(loss, told)
                last = micro_batch == engine.num_micro_batches
                skipped = engine.step(guard.veto(window.step_loss()) if last else None)
            window.close_step(skipped)
            guard.count(skipped)
            before, state.images_seen = state.images_seen, state.images_seen + config.global_batch_size
            engine.update_averages(state.images_seen, config.global_batch_size)
            bar.update(min(state.images_seen, config.num_images) - before)
            heartbeat.beat(state.images_seen)
            clock.step()

            done = state.images_seen >= config.num_images
            if done or _crosses(before, state.images_seen, config.log_every_images):
                row = {**window.means(), "grad_norm": engine.grad_norm(), "lr": learning_rate(before, config)}
                row |= {"skipped_steps": guard.num_skipped, **clock.rates(state.images_seen)}
                if is_main():
                    bar.set_postfix_str(progress_line(row), refresh=False)
                    _log(folder / "log.jsonl", tracker, task.name, row, state.images_seen)
                if guard.num_in_a_row >= config.max_skipped_steps:
                    raise TrainingStopped(_why_hopeless(task, guard, state, folder))

            agreed = agreement.exchange({"stop": float(interrupt.asked), **writer.flags()})
            writer.poll(agreed)
            stop = agreed["stop"] > 0
            save = done or stop or _crosses(before, state.images_seen, config.checkpoint_every_images)
            with clock.paused():
                validate_every = config.validate_every_images or config.checkpoint_every_images
                if done or (not stop and _crosses(before, state.images_seen, validate_every)):
                    with heartbeat.patience(_PATIENCE_S), engine.using_average(config.averages[0]):
                        _judge(task, engine, state, tracker)
                if save:
                    writer.drain(agreement)
                    values = {**vars(state), "window": window.values(), "guard": guard.values()}
                    writer.start(engine.state(), {**values, "shards_digest": shards.digest}, resolved_config)
        with heartbeat.patience(_PATIENCE_S):
            writer.drain(agreement, must_succeed=True)
    engine.close()
    if not done:
        raise KeyboardInterrupt


def _resume(
    engine: Engine, exporter: Exporter, shards: ShardSet, config: TrainConfig, folder: Path
) -> tuple[RunState, Window, Guard]:
    """Where the newest usable checkpoint left off, or the beginning. The main rank chooses it for all."""
    found = checkpoint.newest_usable(folder / "checkpoints") if is_main() else None
    newest: Path | None = gather_objects(found)[0]
    if newest is None:
        return RunState(), Window(engine.device), Guard(config.spike_factor, engine.device)
    saved = checkpoint.read_state(newest)
    if saved["shards_digest"] != shards.digest:
        remedy = "restore the shard set the run was started with, or use another run folder"
        raise problem(newest, "shards_digest", f"not that of {shards.root}", remedy)
    engine.load(newest, saved["ranks"])
    if is_main():
        exporter.catch_up(newest)
    state = RunState(saved["images_seen"], saved["best_score"], saved["is_best"])
    guard = Guard(config.spike_factor, engine.device, saved["guard"])
    return state, Window(engine.device, saved["window"]), guard


def _judge(task: Task, engine: Engine, state: RunState, tracker: Tracker) -> None:
    """Validate the average in place, and see whether it is the best so far."""
    metrics = task.validate(engine, state.images_seen)
    if task.score is not None:
        score = metrics[task.score]
        state.is_best = state.best_score is None or score > state.best_score
        state.best_score = score if state.is_best else state.best_score
        metrics = {**metrics, f"best_{task.score}": float(state.best_score or 0.0)}
    tracker.log_metrics({f"{task.name}/{name}": value for name, value in metrics.items()}, state.images_seen)


def _why_hopeless(task: Task, guard: Guard, state: RunState, folder: Path) -> str:
    newest = next(iter(checkpoint.complete_ones(folder / "checkpoints")), None)
    return (
        f"{task.name}: {guard.num_in_a_row} steps in a row up to {state.images_seen} images were skipped: their loss "
        f"or gradient was no number, or far above the mean; the last good checkpoint is {newest or 'none'}"
    )


def _checkpoint_activations(model: nn.Module) -> None:
    """Turn on what diffusers' networks have for it."""
    networks: list[Any] = [m for m in model.children() if hasattr(m, "enable_gradient_checkpointing")]
    if not networks:
        raise problem("config", "activation_checkpointing", "true", "this network cannot; leave it off")
    for network in networks:
        network.enable_gradient_checkpointing()


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


class _CatchInterrupt:
    """Ctrl-C, SIGTERM and SIGUSR1 (what Slurm sends before it takes a job's machines) wait for the end of the step, so
    that a checkpoint can be written first. A second one does not wait."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> _CatchInterrupt:
        self.asked = False
        self._old = {s: signal.signal(s, self._ask) for s in self._SIGNALS}
        return self

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
