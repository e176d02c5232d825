"""Training: one loop, read from top to bottom, for the denoiser and for whatever else learns from the shards."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.mixing import make_order
from data_shards.feed.order import rank_positions
from data_shards.files import write_atomic
from data_shards.problems import WorkFailed, problem
from data_shards.records import Batch
from segdiff_dist.config import flatten, to_yaml
from segdiff_dist.ranks.distributed import Agreement, agree, code_versions, gather_objects, is_main, rank, world_size
from segdiff_dist.ranks.heartbeat import Heartbeat
from segdiff_dist.training import checkpoint
from segdiff_dist.training.checkpoint import CheckpointWriter
from segdiff_dist.training.compiled import compile_checked
from segdiff_dist.training.config import TrainConfig, learning_rate
from segdiff_dist.training.engine import Engine, start_distributed
from segdiff_dist.training.export import Exporter
from segdiff_dist.training.micro_batch import find_micro_batch
from segdiff_dist.training.step_log import Guard, Window
from segdiff_dist.training.throughput import FlopCounter, StepClock, peak_flops, progress_line

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.tracking.tracker import Tracker


# Validation and the end of a run may take this long before a rank counts as hanging.
_PATIENCE_S = 3600.0


class Task(Protocol):
    """What is being learned: a model, its loss, how it is judged on the way, and what becomes of its weights."""

    name: str
    model: nn.Module
    score: str | None
    """The number of `validate` that says which weights are best, and only those are exported; None: the newest are. A
    new best is always saved, so that those are weights that were judged, not others from around then."""

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's mean loss, through `forward`, which is the model as the engine runs it; and what else is
        worth logging: name -> float [2], a sum over the micro-batch and how many values went into it. The same names in
        every call."""

    def validate(self, forward: Callable[..., Any], images_seen: int) -> dict[str, float]:
        """Judge the averaged weights, which `forward` runs without gradients. Called on all ranks, which must call
        `forward` equally often; the same numbers on all of them."""

    def export(self, average: str, weights: dict[str, Tensor]) -> None:
        """Write weights, keys as in the model's state_dict, where they are used. Main rank, beside the training."""


class TrainingStopped(WorkFailed):
    """The run cannot go on; the message says why and where its last good checkpoint is."""

    # Not 1, which Python gives any error: another start may cure that.
    exit_code = 3


@dataclass
class RunState:
    """Where a run stands, beside what the engine holds."""

    images_seen: int = 0
    best_score: float | None = None
    best_images_seen: int | None = None
    """Whose weights are to be exported: those that had the best score, or without a score the newest."""
    validated_images_seen: int | None = None
    """The last that were judged."""


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, on what, how and where to."""

    task: Task
    shards: ShardSet
    rows: np.ndarray
    """Of the shard set: those to train on."""
    loader: LoaderConfig
    config: TrainConfig
    folder: Path
    """Takes checkpoints/, log.jsonl and snapshots/; the weights are exported by the task."""
    tracker: Tracker
    device: torch.device
    settings: Mapping[str, Any]
    """The whole resolved configuration, by section. Ranks must agree on it, and checkpoints keep a copy."""

    def load(self, images_seen: int, batch_size: int, num_batches: int, of_rank: int, ranks: int) -> Iterator[Batch]:
        """A rank's micro-batches from `images_seen` on, where a step has `num_batches` of them."""
        order = make_order(self.shards, self.rows, self.loader.mix, self.config.seed)
        positions = rank_positions(
            images_seen, micro_batch_size=batch_size, num_micro_batches=num_batches, rank=of_rank, world_size=ranks
        )
        seed, device = self.config.seed, self.device
        return iter(Loader(self.shards, order, positions, self.loader, batch_size=batch_size, seed=seed, device=device))


def train(job: TrainingJob) -> None:
    """Train from the newest checkpoint in the job's folder on.

    Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and raise KeyboardInterrupt; the same call goes on from there, on any
    number of ranks and with any zero_stage.

    Raises TrainingStopped after too many skipped steps in a row, and OSError where the last checkpoint cannot be
    written.
    """
    if len(job.rows) == 0:
        raise problem(job.shards.root, "split", "no slice to train on", "widen loader.modalities or loader.axes")
    start_distributed(job.device)
    # Settings are what sections hold; folders may have other names on other machines.
    sections = {key: str(value) for key, value in flatten(job.settings).items() if "." in key}
    agree({"shards digest": job.shards.digest, **sections, **code_versions()})
    with Heartbeat(job.config.hang_timeout_s) as heartbeat:
        with heartbeat.patience(_PATIENCE_S):
            training = _Training(job)
        try:
            with _CatchInterrupt() as interrupt, training.writer:
                training.run(heartbeat, interrupt)
        except TrainingStopped as stopped:
            sound = checkpoint.discard_unsound(training.checkpoints) if is_main() else None
            raise TrainingStopped(f"{stopped}. {_what_now(sound, job.config)}") from None
    if not training.done:
        raise KeyboardInterrupt


class _Training:
    """One run: what it needs, set up on every rank alike, and the loop."""

    def __init__(self, job: TrainingJob) -> None:
        self.task, self.config, self.tracker = job.task, job.config, job.tracker
        self.shards_digest = job.shards.digest
        self.log_file, self.checkpoints = job.folder / "log.jsonl", job.folder / "checkpoints"
        task, config = job.task, job.config
        model = task.model.to(job.device).train()
        if config.activation_checkpointing:
            _checkpoint_activations(model)
        counter, peak = FlopCounter(model), peak_flops(job.device, config.precision)
        size = find_micro_batch(task, lambda: next(job.load(0, 1, 1, 0, 1)), config, job.folder)
        if config.compile:
            compile_checked(task, next(job.load(0, size, 1, 0, 1)), config.precision)
        self.engine = Engine(model, config, size, job.device)
        exporter = Exporter(task, config, job.folder)
        self.resumed_from, self.state, self.window, self.guard = _resume(self.engine, job)
        self.best_before = self.state.best_score, self.state.best_images_seen
        start = self.state.images_seen
        if is_main():
            _cut_log(self.log_file, start)
            about = {"ranks": world_size(), "device": str(job.device), "micro_batch_size_used": size}
            about |= {"peak_tflops": peak.flops / 1e12, "peak_source": peak.source}
            about["parameters"] = sum(p.numel() for p in model.parameters())
            job.tracker.log_params({task.name: about})
        self.batches = job.load(start, size, self.engine.num_micro_batches, rank(), world_size())
        self.clock = StepClock(start, job.device, counter, peak)
        self.writer = CheckpointWriter(
            self.checkpoints,
            config=to_yaml(job.settings),
            keep=config.keep_checkpoints,
            keep_every_images=config.keep_every_images,
            on_complete=exporter.export,
        )
        self.writer.reserve(self.engine.state().shards)

    @property
    def done(self) -> bool:
        """Whether all images were seen."""
        return self.state.images_seen >= self.config.num_images

    def run(self, heartbeat: Heartbeat, interrupt: _CatchInterrupt) -> None:
        """Step, log, validate and save until all images were seen or a rank was asked to stop."""
        config, state = self.config, self.state
        agreement = Agreement(("stop", *CheckpointWriter.FLAGS))
        stop = False
        with heartbeat.patience(_PATIENCE_S), self.clock.paused():
            self._take_up()
        with _progress(self.task.name, config.num_images, state.images_seen) as bar:
            while not (self.done or stop):
                before = state.images_seen
                self._step(heartbeat)
                bar.update(min(state.images_seen, config.num_images) - before)
                logs = self.done or _crosses(before, state.images_seen, config.log_every_images)
                if logs:
                    bar.set_postfix_str(progress_line(self._log(before)), refresh=False)

                agreed = agreement.exchange({"stop": float(interrupt.asked), **self.writer.flags()})
                self.writer.poll(agreed)
                if logs and self.guard.longest_in_a_row >= config.max_skipped_steps:
                    with heartbeat.patience(_PATIENCE_S):
                        self.writer.drain(agreement)
                    raise TrainingStopped(self._why_stopped())
                stop = agreed["stop"] > 0
                validates = self._is_validation_due and (self.done or not stop)
                saves = self.done or stop or _crosses(before, state.images_seen, config.checkpoint_every_images)
                if validates or saves:
                    with heartbeat.patience(_PATIENCE_S), self.clock.paused():
                        self.writer.drain(agreement)
                        self._forget_lost_best()
                        is_best = validates and self._validate()
                        if saves or is_best:
                            self._save()
            with heartbeat.patience(_PATIENCE_S):
                self.writer.drain(agreement, must_succeed=True)
        self.engine.close()

    def _step(self, heartbeat: Heartbeat) -> None:
        """One global batch: this rank's share of it, a micro-batch at a time, and the update."""
        engine, state = self.engine, self.state
        engine.set_lr(learning_rate(state.images_seen, self.config))
        for micro_batch in range(1, engine.num_micro_batches + 1):
            with self.clock.waiting():
                batch = next(self.batches)
            heartbeat.beat(state.images_seen)  # who waits for data is behind the others, and is named
            loss, told = self.task.loss(engine, batch)
            engine.backward(loss)
            self.window.add(loss, told)
            last = micro_batch == engine.num_micro_batches
            if last:
                self.writer.wait_until_copied()
            skipped = engine.step(self.guard.veto(self.window.step_loss()) if last else None)
        self.window.close_step(skipped)
        self.guard.count(skipped)
        state.images_seen += self.config.global_batch_size
        engine.update_averages(state.images_seen, self.config.global_batch_size)
        heartbeat.beat(state.images_seen)
        self.clock.step()

    def _log(self, before: int) -> dict[str, float]:
        """Means since the last line, to the log and the tracker."""
        images_seen, guard = self.state.images_seen, self.guard
        row = {**self.window.means(), "grad_norm": self.engine.grad_norm(), "lr": learning_rate(before, self.config)}
        row |= {"skipped_steps": guard.num_skipped, **self.clock.rates(images_seen)}
        if is_main():
            told = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN
            with self.log_file.open("a") as file:
                file.write(json.dumps({"images_seen": images_seen, **told}) + "\n")
            self._track(row)
        return row

    def _why_stopped(self) -> str:
        """In words, without what to do about it."""
        skipped = f"{self.guard.longest_in_a_row} steps in a row up to {self.state.images_seen} images were skipped"
        return f"{self.task.name}: {skipped}: their loss or gradient was not a number, or far above the mean"

    @property
    def _is_validation_due(self) -> bool:
        """Whether the averages of this moment are ones to judge."""
        images_seen, every = self.state.images_seen, self.config.validate_every_images
        before = images_seen - self.config.global_batch_size
        return self.done or _crosses(before, images_seen, every or self.config.checkpoint_every_images)

    def _validate(self) -> bool:
        """Judge the first average; returns whether its score is the best so far."""
        state, name = self.state, self.task.score
        with self.engine.using_average(self.config.averages[0]):
            metrics = self.task.validate(self.engine, state.images_seen)
        state.validated_images_seen = state.images_seen
        is_best = False
        if name is not None:
            score, best = metrics[name], state.best_score
            self.best_before = best, state.best_images_seen
            if best is None or math.isnan(best) or score > best:
                is_best, best, state.best_images_seen = True, score, state.images_seen
            state.best_score = best
            metrics = {**metrics, f"best_{name}": best}
        self._track(metrics)
        return is_best

    def _take_up(self) -> None:
        """What a stop or a kill left undone at the checkpoint the run goes on from: the validation that was due there,
        so that a stop does not change which weights are best, and the export."""
        state = self.state
        if self.resumed_from is None:
            return
        is_best = self._is_validation_due and state.validated_images_seen != state.images_seen and self._validate()
        values = {**checkpoint.read_state(self.resumed_from), **vars(state)} if is_best else None
        self.writer.take_up(self.resumed_from, values)

    def _forget_lost_best(self) -> None:
        """The best weights whose checkpoint could not be written are gone: the next must beat those before them."""
        if self.task.score is not None and self.writer.lost == self.state.best_images_seen:
            self.state.best_score, self.state.best_images_seen = self.best_before

    def _track(self, values: Mapping[str, float]) -> None:
        named = {f"{self.task.name}/{name}": value for name, value in values.items()}
        self.tracker.log_metrics(named, self.state.images_seen)

    def _save(self) -> None:
        """Begin a checkpoint of this moment."""
        # Weights from within a streak of skipped steps may be what causes it. At the end of a run it was a short one.
        sound = self.guard.num_in_a_row == 0 and self.guard.longest_in_a_row < self.config.max_skipped_steps
        if self.task.score is None and (sound or self.done):
            self.state.best_images_seen = self.state.images_seen
        values = {**vars(self.state), "window": self.window.values(), "guard": self.guard.values(), "sound": sound}
        self.writer.start(self.engine.state(), {**values, "shards_digest": self.shards_digest})


def _what_now(sound: Path | None, config: TrainConfig) -> str:
    """After a run that learned nothing any more: where it was well, and what to type."""
    where = (
        "No checkpoint is from before the first of them"
        if sound is None
        else f"The newest checkpoint from before the first of them is {sound}, and the same command goes on from it"
    )
    return (
        f"{where}; if it ends so again: a new --run folder and a lower lr ({config.lr / 10:g} instead of {config.lr:g})"
    )


def _resume(engine: Engine, job: TrainingJob) -> tuple[Path | None, RunState, Window, Guard]:
    """Where the newest usable checkpoint left off, and its folder; or the beginning. The main rank chooses it."""
    config = job.config
    found = checkpoint.newest_usable(job.folder / "checkpoints") if is_main() else None
    newest: Path | None = gather_objects(found)[0]
    if newest is None:
        return None, RunState(), Window(engine.device), Guard(config.spike_factor, engine.device)
    saved = checkpoint.read_state(newest)
    if saved["shards_digest"] != job.shards.digest:
        remedy = "restore the shard set the run was started with, or use another run folder"
        raise problem(newest, "shards_digest", f"not that of {job.shards.root}", remedy)
    engine.load(newest, saved["ranks"])
    # Checkpoints of before do not say whose weights were best, nor when they were judged.
    best, validated = saved.get("best_images_seen"), saved.get("validated_images_seen")
    state = RunState(saved["images_seen"], saved["best_score"], best, validated)
    guard = Guard(config.spike_factor, engine.device, saved["guard"])
    return newest, state, Window(engine.device, saved["window"]), guard


def _checkpoint_activations(model: nn.Module) -> None:
    """Turn on what diffusers' networks have for it."""
    networks: list[Any] = [m for m in model.children() if hasattr(m, "enable_gradient_checkpointing")]
    if not networks:
        raise problem("config", "activation_checkpointing", "true", "this network cannot; leave it off")
    for network in networks:
        network.enable_gradient_checkpointing()


def _crosses(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def _cut_log(path: Path, images_seen: int) -> None:
    """Forget lines that a killed run wrote after its last checkpoint, or half wrote: they will be written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_atomic(path, "".join(line for line in whole if json.loads(line)["images_seen"] <= images_seen))


def _progress(name: str, total: int, initial: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=min(initial, total), desc=name, unit="img", disable=not is_main(), mininterval=1.0)


class _CatchInterrupt:
    """Ctrl-C, SIGTERM and SIGUSR1 (what Slurm sends before it takes a job's machines) wait for the end of the step, so
    that a checkpoint can be written first. Only a second Ctrl-C does not wait."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> _CatchInterrupt:
        self.asked = False
        self._old = {s: signal.signal(s, self._ask) for s in self._SIGNALS}
        return self

    def _ask(self, number: int, _: Any) -> None:
        # DeepSpeed's launcher sends its ranks SIGTERM for a Ctrl-C that the terminal has sent them already.
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
