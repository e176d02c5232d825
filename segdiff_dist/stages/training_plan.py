"""The plan of a training, which `train`, `distil`, `train-segmenter` and `train-autoencoder` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data_shards.feed.config import LoaderConfig
from data_shards.locks import locked, refuse_where_locked
from data_shards.problems import Attempts, Problem, refuse
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.network_shapes import denoiser_network
from segdiff_dist.experiment import load_experiment, save_experiment
from segdiff_dist.planning.duration import duration_s, is_short, warn_of_length
from segdiff_dist.planning.memory import (
    SmallConfig,
    capacity_of,
    disk_bytes,
    memory_problems,
    plan_memory,
    refuse_together,
)
from segdiff_dist.planning.network import Network
from segdiff_dist.ranks.distributed import is_main, world_size
from segdiff_dist.ranks.precision import settled
from segdiff_dist.shipped import shipped_config
from segdiff_dist.stages.base import Done, Plan, Result
from segdiff_dist.stages.configured import open_tracker, plain
from segdiff_dist.stages.cost import Cost
from segdiff_dist.stages.resources import bytes_in, disk_problems, unless_forced
from segdiff_dist.stages.training_setup import TrainingSetup
from segdiff_dist.tracking.data_sets import describe_shards, log_shards
from segdiff_dist.tracking.store import bytes_of_record
from segdiff_dist.tracking.tracker import Tracker
from segdiff_dist.training.checkpoint import complete_checkpoints, read_state, refuse_other_set
from segdiff_dist.training.export import is_exported, refuse_to_replace
from segdiff_dist.training.loop import TrainingJob, train
from segdiff_dist.training.throughput import peak_flops


class FinalMeasurement(Protocol):
    """Measures what a training has made, on rank 0, when it is over."""

    @property
    def is_done(self) -> bool:
        """Whether that was measured."""

    def __call__(self) -> tuple[tuple[str, ...], dict[str, float], Path | None]:
        """Lines for the user; metrics and a picture for the tracker."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Plan):
    """A checked training of any of the networks. Its rows, device and settings are those of every rank."""

    setup: TrainingSetup
    stage: str
    """`train`, `distil`, `segmenter` or `autoencoder`: the name in the log and in MLflow."""
    loader: LoaderConfig
    network: Network
    make_task: Callable[[Tracker], Any]
    """Makes the training task."""
    refuse_others: Callable[[], object]
    """Raises InputProblems if the folder has work of another training."""
    saved_sections: tuple[str, ...]
    """The sections of RUN/config.yaml that this stage fixes."""
    logged_sections: tuple[str, ...]
    message: str
    """The line that rank 0 prints first."""
    next_command: str
    limits: dict[str, Any] = field(default_factory=dict)
    """Further arguments of memory_problems."""
    compile_kernels: Callable[[int], None] | None = None
    """As TrainingJob has it."""
    make_extra: Callable[[], np.ndarray | None] | None = None
    """Makes what the task needs before the training: an array for Batch.extra_BX, or None."""
    extra_bytes: int = 0
    """Its bytes on the disk."""
    final_measurement: FinalMeasurement | None = None
    """Measures the result of the training."""

    def checked(self) -> Plan:
        """This plan, if the training is not finished and the memory is sufficient."""
        self._refuse_other_work()
        newest, num_images, folder = self.newest_checkpoint, self.setup.config.num_images, self.setup.folder
        is_trained = newest is not None and self.images_seen >= num_images
        is_measured = self.final_measurement is None or self.final_measurement.is_done
        if newest is not None and is_trained and is_measured and is_exported(newest, folder):
            seen = f"already trained on {num_images:,} images in {folder}"
            return Done(Result((f"{self.stage}: {seen}; nothing to do",), next_command=self.next_command))
        if world_size() == 1:
            refuse(self.memory_problems())
        return self

    def _refuse_other_work(self) -> None:
        """Refuse to continue a training of other settings or of another set, and to replace weights."""
        self.refuse_others()
        folder = self.setup.folder
        newest = next(iter(complete_checkpoints(folder / "checkpoints")), None)
        if newest is not None:
            refuse_other_set(newest, read_state(newest), self.setup.shards)
        else:
            refuse_to_replace(folder)

    @cached_property
    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint when the stage was checked."""
        return next(iter(complete_checkpoints(self.setup.folder / "checkpoints")), None)

    @cached_property
    def images_seen(self) -> int:
        """Images seen at the newest checkpoint."""
        return 0 if self.newest_checkpoint is None else read_state(self.newest_checkpoint)["images_seen"]

    def memory_problems(self) -> list[Problem]:
        """Problems if this rank has too little memory; none with --force."""
        setup, capacity = self.setup, capacity_of(self.setup.device)
        found = memory_problems(setup.section, self.network, setup.config, capacity, ranks=world_size(), **self.limits)
        return unless_forced(found)

    def cost(self) -> Cost:
        """Time from the FLOPs of the net and the peak of the device; memory of a rank; disk of the checkpoints."""
        config, device = self.setup.config, self.setup.device
        number, frozen = self.network.num_parameters, self.network.num_frozen
        images = max(0, config.num_images - self.images_seen)
        peak = peak_flops(device, config.precision)
        on_gpu = device.type == "cuda"
        memory = plan_memory(self.network, config, world_size(), on_gpu)
        where = f"{world_size()} x {device.type}"
        parameters = f"parameters: {number:,}" + (f", and {frozen:,} that are frozen" if frozen else "")
        return Cost(
            images=images,
            seconds=duration_s(self.network, images, peak.flops * world_size()),
            num_bytes=self._bytes_to_come(disk_bytes(self.network, config) + self.extra_bytes),
            memory_bytes=memory.needed("GPU" if on_gpu else "lone host"),
            what=f"{number / 1e6:.1f} M parameters, {config.micro_batch_size} images at once",
            smaller=self._smaller,
            notes=(parameters, f"time: estimated for {where}, {peak.flops / 1e12:.3g} TFLOP/s each"),
        )

    def announced(self) -> tuple[str, Cost, Path] | None:
        """The cost. One of several ranks does not refuse alone: a full disk is an error of its own."""
        if world_size() > 1 or is_short(self.network, self.setup.config.num_images - self.images_seen):
            return None
        return self.stage, self.cost(), self.setup.folder

    def disk_problems(self) -> list[Problem]:
        """Problems of the disk. A short training writes its checkpoints too."""
        if world_size() > 1:
            return []
        config, latents = self.setup.config, 0 if self.newest_checkpoint else self.extra_bytes
        num_checkpoints = min(config.keep_checkpoints + 1, -(-config.num_images // config.checkpoint_every_images))
        least = self._bytes_to_come(disk_bytes(self.network, config, num_checkpoints) + latents)
        cost = Cost(num_bytes=least, smaller=self._smaller if num_checkpoints > 2 else "")
        return disk_problems(cost, self.setup.folder)

    def _bytes_to_come(self, of_training: int) -> int:
        """Bytes on the disk besides those of the files that will be replaced; with MLflow's database."""
        of_record = bytes_of_record(self.setup.run, self.setup.experiment.tracking)
        return max(0, of_training - _bytes_in(self.setup.folder)) + of_record

    @property
    def _smaller(self) -> str:
        setup = self.setup
        return f"--{setup.section}.keep-checkpoints 1" if setup.config.keep_checkpoints > 1 else ""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by rank 0. If rank 0 refuses, the other ranks refuse too, so that none waits for it in vain. Another
        command may have trained here since the check, so rank 0 checks again whether this training goes with it."""
        setup = self.setup
        file, doing = setup.folder / ".train.lock", "is training there"
        images = setup.config.num_images - self.images_seen
        too_little = self.memory_problems() if world_size() > 1 else []
        warn_of_length(setup.section, self.network, images, setup.config, setup.device)
        if not is_main():
            refuse_where_locked(file, setup.folder, doing)
            refuse_together(too_little, setup.device)
            yield
            return
        with locked(file, setup.folder, doing):
            found = Attempts(too_little)
            found.make("training", self._refuse_other_work)
            refuse_together(found.problems, setup.device)
            yield

    def tracker(self) -> Tracker:
        """The tracker of the run folder."""
        return open_tracker(self.setup.experiment, self.stage, self.setup.run)

    def run(self, tracker: Tracker) -> Result:
        """Train, and export the weights."""
        setup, config, settings = self.setup, self.setup.config, plain(self.setup.experiment)
        if is_main():
            save_experiment(setup.experiment, self.saved_sections)
        logged = {name: settings[name] for name in self.logged_sections}
        tracker.log_params(logged | {"shards_digest": setup.shards.digest})
        log_shards(tracker, setup.shards, "training")
        tracker.log_about(self._about(), setup.recipe)
        if is_main():
            tracker.log_artifact(setup.run / "config.yaml")
            print(self.message, flush=True)
        extra_NX = None if self.make_extra is None else self.make_extra()
        task = self.make_task(tracker)
        job = TrainingJob(
            task, setup.shards, setup.rows, self.loader, config, setup.folder, tracker, setup.device, settings,
            self.compile_kernels, extra_NX,
        )  # fmt: skip
        train(job)
        lines: tuple[str, ...] = (f"weights in {setup.folder / 'weights'}",)
        if self.final_measurement is not None and is_main():
            measured, metrics, picture = self.final_measurement()
            lines += measured
            tracker.log_metrics(metrics, config.num_images)
            if picture is not None:
                tracker.log_artifact(picture)
        return Result(lines, next_command=self.next_command)

    def _about(self) -> str:
        """What is trained on what, for the run's description."""
        setup = self.setup
        recipe = "" if setup.recipe is None else f"recipe `{setup.recipe}`, "
        net = f"{self.network.num_parameters / 1e6:.1f} million parameters"
        return f"{recipe}{net}, {setup.config.num_images:,} images of {describe_shards(setup.shards)}."


def _bytes_in(folder: Path) -> int:
    """Bytes of the checkpoints and weights there are, which new ones replace."""
    return sum(bytes_in(folder / name, "*.safetensors") for name in ("checkpoints", "weights"))


def small_config(shards: ShardSet, side: int, device: torch.device) -> SmallConfig:
    """The shipped configuration for small machines, on slices of `side` pixels."""
    experiment = load_experiment(shipped_config("amos_small"), None)
    network = denoiser_network(experiment.denoiser, shards, side, device)
    train = replace(experiment.train, precision=settled(experiment.train.precision, device))
    return SmallConfig("amos_small", network, train)
