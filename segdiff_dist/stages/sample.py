"""Make images from masks; the same command again makes only what is missing."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_shards.feed.config import LoaderConfig
from data_shards.problems import InputProblems, Problem, problem, refuse
from segdiff_dist.experiment import collect, save_experiment
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import (
    ConfiguredStage,
    address_flag,
    open_tracker,
    plain,
    weights_name,
)
from segdiff_dist.stages.cost import Cost
from segdiff_dist.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from segdiff_dist.sampling.job import Job
    from segdiff_dist.tracking.tracker import Tracker

# Generated images keep two thirds of their pixels in zstd, their masks a hundredth.
_LEAST_SHARE = 0.2
_FEW_IMAGES = 200


@dataclass(frozen=True, kw_only=True)
class Sample(ConfiguredStage):
    """Make images from masks. The same command again makes only what is missing."""

    less_memory: ClassVar = "--sample.num-workers or --sample.batch-size"
    essential: ClassVar = (
        *("--run", "--data", "--split", "--num", "--sample.samples-per-mask", "--masks", "--sample.target-modality"),
        *("--sample.seed", "--out", "--sample.weights", "--sample.num-workers", "--ray-address", "--sample.device"),
        *("--sample.sampler.preset", "--sample.sampler.guidance"),
    )
    aliases: ClassVar = {"--modality": "--sample.target-modality"}

    data: str | None = None
    """The shard set whose masks are used: a folder or a URL that fsspec knows."""
    run: Path | None = None
    """The run folder: weights are read from RUN/weights, images are written to RUN/samples."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> SamplePlan:
        """Opens set, weights and store; lists the images."""
        from segdiff_dist.export.model_set import unlike_trained_set, warn_of_unseen_axis
        from segdiff_dist.sampling.job import prepare_job
        from segdiff_dist.sampling.weights import refuse_missing

        experiment = self.experiment
        config = replace(self.sample, weights=weights_name(experiment, self.sample.weights))
        run, shards = self.open_run_and_data()
        for one in unlike_trained_set(run, shards) or ():
            warnings.warn(f"{shards.root}: {one}: images are as in the training, not as this set's", stacklevel=2)
        collect(
            lambda: refuse(config.problems()),
            lambda: _refuse_new_seed(config, config.out or run / "samples"),
            lambda: _refuse_devices(config),
            lambda: refuse_missing(run / "weights" / config.weights),
        )
        if config.masks is not None:
            warn_of_unseen_axis(config.masks_axis, shards, self.loader.axes)
        rows = shards.select(split=config.split, modalities=self.loader.modalities, axes=self.loader.axes)
        return SamplePlan(self, run, config, prepare_job(run, shards, rows, experiment.diffusion, config))


@dataclass(frozen=True)
class SamplePlan(Plan):
    """A checked job: its images are listed, and the store is open if the job has begun."""

    stage: Sample
    run_folder: Path
    config: SampleConfig
    job: Job

    def cost(self) -> Cost:
        """Seconds come from the images made so far, else from a pass through the net on this machine."""
        from segdiff_dist.sampling.plan import plan_of

        return Cost(notes=tuple(str(plan_of(self.job, self.config)).splitlines()))

    def workers_problems(self) -> list[Problem]:
        """Problems of sample.num_workers."""
        return self.config.workers.memory_problems()

    def announced(self) -> tuple[str, Cost, Path] | None:
        """The cost in numbers; of a few images it is small, and a pass through the net is not made for it."""
        from segdiff_dist.sampling.plan import plan_of

        if len(self.job.items) <= _FEW_IMAGES or self.config.ray_address is not None:
            return None
        plan = plan_of(self.job, self.config)
        cost = Cost(
            images=plan.num_missing, seconds=plan.seconds, num_bytes=plan.num_bytes, sure_share=_LEAST_SHARE,
            smaller="fewer masks: --num N", shorter="fewer steps: --sample.sampler.preset fast, fewer masks: --num N",
        )  # fmt: skip
        return "sample", cost, self.job.path

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the images' folder."""
        from segdiff_dist.sampling.store import locked

        return locked(self.job.path, lends=True)

    def tracker(self) -> Tracker:
        """The tracker of the run folder."""
        return open_tracker(self.stage.experiment, "sample", self.run_folder)

    def run(self, tracker: Tracker) -> Result:
        """Make the missing images."""
        from segdiff_dist.sampling.job import make_job
        from segdiff_dist.sampling.store import SampleStore

        SampleStore.reopen(self.job.path, self.job.job_settings)  # refuses what another command began since the check
        experiment, config = self.stage.experiment, self.config
        if self.job.classes is not None:
            print(self.job.classes, flush=True)
        if config.out is None:
            save_experiment(experiment, ("sample",))
        tracker.log_params({"sample": plain(experiment)["sample"]})
        store = make_job(self.job, config)
        tracker.log_metrics({"sample/num_images": len(store)})
        tracker.log_artifact(store.path / "job.json", "samples")
        return Result((f"{len(store):,} images in {store.path}",), next_command=self._next(), value=store)

    def _next(self) -> str:
        """`evaluate` if it can read the images, else `export`."""
        run, config, address = self.run_folder, self.config, address_flag(self.stage.experiment)
        if config.out is not None:
            out = config.out.with_name(f"{config.out.name}-png")
            return command("export", out, "--run", run, "--export.samples", config.out, "--format", "png", *address)
        if self.stage.experiment.evaluate.segmenter is None and not (run / "segmenter" / "weights").is_dir():
            return command("train-segmenter", "--run", run, *address)
        real = () if config.masks is None else ("--real", self.stage.experiment.data)
        return command("evaluate", "--run", run, *real, *address)


def _refuse_new_seed(config: SampleConfig, path: Path) -> None:
    """Raise InputProblems for a seed below 0, unless images were begun with it."""
    from segdiff_dist.sampling.store_files import read_job

    begun: dict[str, Any] = {}
    with suppress(InputProblems):
        begun = read_job(path).get("sample", {})
    if begun.get("seed") != config.seed:
        refuse(config.seed_problems())


def _refuse_devices(config: SampleConfig) -> None:
    """Raise InputProblems for a device that is not on this machine, and for a CUDA graph on a CPU."""
    if config.ray_address is not None:
        return
    device = config.workers.pool().device
    if config.cuda_graph == "on" and device != "cuda":
        remedy = f"a CUDA graph needs a GPU, and this is {device}; give auto or off"
        raise problem("config", "sample.cuda_graph", "on", remedy)
