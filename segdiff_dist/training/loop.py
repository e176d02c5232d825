"""Training: one loop for every network that learns from shards. `train` reads from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.mixing import make_order
from data_shards.feed.order import rank_positions
from data_shards.problems import WorkFailed, problem
from data_shards.records import Batch
from segdiff_dist.config import flatten, to_yaml
from segdiff_dist.ranks.distributed import check_agreement, code_versions, gather_objects, is_main, rank, world_size
from segdiff_dist.ranks.heartbeat import Heartbeat
from segdiff_dist.ranks.precision import fast_precision
from segdiff_dist.training import checkpoint
from segdiff_dist.training.best_weights import BestWeights, RunState, crosses
from segdiff_dist.training.captured import MicroStep, recorded_updates
from segdiff_dist.training.checkpoint_writer import CheckpointWriter
from segdiff_dist.training.compiled import compile_checked
from segdiff_dist.training.config import TrainConfig, learning_rate
from segdiff_dist.training.engine import Engine, start_distributed
from segdiff_dist.training.export import Exporter, refuse_to_replace
from segdiff_dist.training.micro_batch import find_micro_batch
from segdiff_dist.training.step_log import LogWindow, RunLog, StepCheck, UpdateGuard
from segdiff_dist.training.stop_signals import StopSignals
from segdiff_dist.training.task import Task
from segdiff_dist.training.throughput import FlopCounter, Peak, StepClock, peak_flops, progress_line

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.tracking.tracker import Tracker


# Validation and the end of a run may take this long before a rank counts as hanging.
_PATIENCE_S = 3600.0


class TrainingStopped(WorkFailed):
    """The run cannot go on. The message says why, and which checkpoint is the last good one."""

    # Not 1, Python's code of any error: another start may succeed after such an error, but not after this one.
    exit_code = 3


@dataclass(frozen=True)
class TrainingJob:
    """The task, its data and settings, and the folder of the results."""

    task: Task
    shards: ShardSet
    rows: np.ndarray
    """The rows of the shard set to train on."""
    loader: LoaderConfig
    config: TrainConfig
    folder: Path
    """The folder of checkpoints/, log.jsonl and snapshots/. The task decides where weights are exported."""
    tracker: Tracker
    device: torch.device
    settings: Mapping[str, Any]
    """The whole resolved configuration, by section. Ranks must agree on it, and each checkpoint keeps a copy."""
    compile_kernels: Callable[[int], None] | None = None
    """Compiles the network's kernels for micro-batches of a given number of images, before they are launched."""
    extra_NX: np.ndarray | None = None
    """A further array with an entry for each row of the set, for Batch.extra_BX."""

    def load(self, images_seen: int, batch_size: int, num_batches: int, of_rank: int, ranks: int) -> Iterator[Batch]:
        """The micro-batches of one rank from `images_seen` on, `num_batches` of them a step."""
        order = make_order(self.shards, self.rows, self.loader.mix, self.config.seed)
        positions = rank_positions(
            images_seen, micro_batch_size=batch_size, num_micro_batches=num_batches, rank=of_rank, world_size=ranks
        )
        seed, device = self.config.seed, self.device
        return iter(
            Loader(
                self.shards,
                order,
                positions,
                self.loader,
                batch_size=batch_size,
                seed=seed,
                device=device,
                extra_NX=self.extra_NX,
            )
        )


def train(job: TrainingJob) -> None:
    """Train from the newest checkpoint in the job's folder on, to config.num_images. Call it on every rank.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP save a checkpoint and raise KeyboardInterrupt. The same call resumes from there,
    on any number of ranks and with any zero_stage.

    Raises TrainingStopped after config.max_skipped_steps skipped steps in a row, and OSError if the last checkpoint
    cannot be written.
    """
    if job.config.precision == "auto":
        job = replace(job, config=replace(job.config, precision=fast_precision(job.device)))
    task, config, folder = job.task, job.config, job.folder
    if len(job.rows) == 0:
        raise problem(job.shards.root, "split", "no slice to train on", "widen loader.modalities or loader.axes")
    start_distributed(job.device)
    check_agreement(_shared_by_ranks(job))

    with Heartbeat(config.hang_timeout_s) as heartbeat:
        # Set up, on every rank alike.
        with heartbeat.patience(_PATIENCE_S):
            model = task.model.to(job.device).train()
            if config.activation_checkpointing:
                _checkpoint_activations(model)
            counter, peak = FlopCounter(model, task.passes), peak_flops(job.device, config.precision)
            if job.compile_kernels is not None:
                size = config.micro_batch_size
                job.compile_kernels(config.global_batch_size // world_size() if size == "auto" else size)
                gather_objects(None)  # one process of each machine compiles for all
            micro_batch_size = find_micro_batch(task, lambda: next(job.load(0, 1, 1, 0, 1)), config, folder)
            if config.compile:
                compile_checked(task, next(job.load(0, micro_batch_size, 1, 0, 1)), config.precision)
            engine = Engine(model, config, micro_batch_size, job.device)
            num_micro_batches = engine.num_micro_batches
            resumed_from, state, window, guard = _resume(engine, job)
            log = RunLog(folder / "log.jsonl", job.tracker, task.name, state.images_seen)
            if is_main():
                num_parameters = sum(p.numel() for p in model.parameters())
                job.tracker.log_params({task.name: _found_at_start(job.device, micro_batch_size, peak, num_parameters)})

            def forward_and_backward(batch: Batch) -> None:
                loss, metrics = task.loss(engine, batch)
                engine.backward(loss)
                window.add(loss, metrics)

            def sums() -> list[torch.Tensor]:
                return [*engine.gradients, window.step_sums]

            micro_step = MicroStep(forward_and_backward, sums, config, job.device)
            check = StepCheck(window, guard)
            batches = job.load(state.images_seen, micro_batch_size, num_micro_batches, rank(), world_size())
            clock = StepClock(state.images_seen, job.device, counter, peak)
            best = BestWeights(task, engine, config, state, log)
            writer = CheckpointWriter(
                folder / "checkpoints",
                config=to_yaml(job.settings),
                keep=config.keep_checkpoints,
                keep_every_images=config.keep_every_images,
                on_complete=Exporter(task, config, folder).export,
            )
            writer.reserve(engine.state().shards)

        is_done, stop = state.images_seen >= config.num_images, False
        progress = _progress_bar(task.name, config.num_images, state.images_seen)
        with _naming_the_last_good_checkpoint(job), StopSignals() as signals, writer, progress as bar:
            with heartbeat.patience(_PATIENCE_S), clock.paused():
                best.resume_pending(writer, resumed_from)
                if not is_done:
                    batches = micro_step.prepare(batches, task.name)
                update_step = recorded_updates(engine, check, micro_step)

            while not (is_done or stop):
                # Step: this rank's share of a global batch, one micro-batch at a time, and the update.
                before = state.images_seen
                engine.set_lr(learning_rate(before, config))
                for number in range(1, num_micro_batches + 1):
                    with clock.waiting():
                        batch = next(batches)
                    heartbeat.beat(before)  # a rank that waits for data is behind the others, so the heartbeat names it
                    micro_step(batch)
                    if number < num_micro_batches:
                        engine.step(is_last=False)
                writer.wait_until_copied()
                if not update_step.replay():
                    engine.step(check)
                state.images_seen += config.global_batch_size
                engine.update_averages(state.images_seen, config.global_batch_size)
                heartbeat.beat(state.images_seen)
                clock.step()
                bar.update(min(state.images_seen, config.num_images) - before)
                is_done = state.images_seen >= config.num_images

                # Log the means since the last line.
                logs = is_done or crosses(before, state.images_seen, config.log_every_images)
                if logs:
                    row = {**window.means(), "grad_norm": engine.grad_norm(), "lr": learning_rate(before, config)}
                    row |= {"skipped_steps": guard.num_skipped, **clock.rates(state.images_seen)}
                    log.write(state.images_seen, row)
                    bar.set_postfix_str(progress_line(row), refresh=False)

                # Exchange with the other ranks. Stop if too many steps in a row were skipped.
                stop = writer.after_step(signals.asked)
                if logs and guard.longest_in_a_row >= config.max_skipped_steps:
                    with heartbeat.patience(_PATIENCE_S):
                        writer.drain()
                    raise TrainingStopped(_skipped_too_many(task.name, guard, state.images_seen))

                # Validate and save.
                validates = best.is_due() and (is_done or not stop)
                saves = is_done or stop or crosses(before, state.images_seen, config.checkpoint_every_images)
                if validates or saves:
                    with heartbeat.patience(_PATIENCE_S), clock.paused():
                        writer.drain()
                        best.discard_unsaved_best(writer.lost)
                        is_best = validates and best.validate()
                        if saves or is_best:
                            is_sound = guard.is_sound(config.max_skipped_steps)
                            if is_sound or is_done:  # the run ended during a short streak
                                best.choose_newest()
                            values = {**vars(state), "window": window.values(), "guard": guard.values()}
                            values |= {"sound": is_sound, "shards_digest": job.shards.digest}
                            writer.start(engine.state(), values)

            with heartbeat.patience(_PATIENCE_S):
                writer.drain(must_succeed=True)
            engine.close()
    if not is_done:
        raise KeyboardInterrupt


def _found_at_start(device: torch.device, micro_batch_size: int, peak: Peak, num_parameters: int) -> dict[str, Any]:
    """Facts about a run besides its settings, for the tracker."""
    return {
        "ranks": world_size(),
        "device": str(device),
        "micro_batch_size_used": micro_batch_size,
        "peak_tflops": peak.flops / 1e12,
        "peak_source": peak.source,
        "parameters": num_parameters,
    }


def _shared_by_ranks(job: TrainingJob) -> dict[str, str]:
    """The values that must be the same on every rank. Only settings in sections count: folders may have other names on
    other machines."""
    settings = {key: str(value) for key, value in flatten(job.settings).items() if "." in key}
    return {"shards digest": job.shards.digest, **settings, **code_versions()}


def _resume(engine: Engine, job: TrainingJob) -> tuple[Path | None, RunState, LogWindow, UpdateGuard]:
    """Load the newest usable checkpoint, which rank 0 chooses; returns its folder and the progress of the run. Without
    a checkpoint: None, and the beginning."""
    config = job.config
    chosen = checkpoint.newest_usable(job.folder / "checkpoints") if is_main() else None
    newest: Path | None = gather_objects(chosen)[0]
    if newest is None:
        refuse_to_replace(job.folder)  # those that there were are damaged
        return None, RunState(), LogWindow(engine.device), UpdateGuard(config.spike_factor, engine.device)
    saved = checkpoint.read_state(newest)
    checkpoint.refuse_other_set(newest, saved, job.shards)
    engine.load(newest, saved["ranks"])
    # Checkpoints of earlier versions lack the last two.
    best, validated = saved.get("best_images_seen"), saved.get("validated_images_seen")
    state = RunState(saved["images_seen"], saved["best_score"], best, validated)
    guard = UpdateGuard(config.spike_factor, engine.device, saved["guard"])
    return newest, state, LogWindow(engine.device, saved["window"]), guard


def _checkpoint_activations(model: nn.Module) -> None:
    """Turn on activation checkpointing in diffusers' networks."""
    networks: list[Any] = [m for m in model.children() if hasattr(m, "enable_gradient_checkpointing")]
    if not networks:
        raise problem("config", "activation_checkpointing", "true", "this network cannot; leave it off")
    for network in networks:
        network.enable_gradient_checkpointing()


def _progress_bar(name: str, total: int, initial: int) -> Any:
    from data_shards.progress import progress_bar

    start = min(initial, total)
    return progress_bar(total=total, initial=start, desc=name, unit="img", disable=not is_main(), mininterval=1.0)


def _skipped_too_many(name: str, guard: UpdateGuard, images_seen: int) -> str:
    skipped = f"{guard.longest_in_a_row} steps in a row up to {images_seen} images were skipped"
    return f"{name}: {skipped}: their loss or gradient was not a number, or far above the mean"


@contextmanager
def _naming_the_last_good_checkpoint(job: TrainingJob) -> Iterator[None]:
    """Complete the message of a TrainingStopped: the checkpoint that the same command resumes from, and what to try."""
    try:
        yield
    except TrainingStopped as stopped:
        sound = checkpoint.discard_unsound(job.folder / "checkpoints") if is_main() else None
        checkpoints = "The newest checkpoint from before the first of them is"
        where = f"{checkpoints} {sound}, and the same command continues from it"
        if sound is None:
            where = "No checkpoint is from before the first of them"
        lr = job.config.lr
        remedy = f"if it ends so again: a new --run folder and a lower lr ({lr / 10:g} instead of {lr:g})"
        raise TrainingStopped(f"{stopped}. {where}; {remedy}") from None
