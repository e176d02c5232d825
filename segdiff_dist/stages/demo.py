"""Every stage on the phantom, sized for two CPU cores: about ten minutes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_shards.end_signals import ended_by_signals
from data_shards.locks import locked
from data_shards.problems import WorkFailed
from segdiff_dist.exit_status import ExitStatus
from segdiff_dist.stages.base import Plan, Result
from segdiff_dist.stages.chain import Step, in_a_row, run_stage, stage_of, times_line
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.stages.cost import Cost
from segdiff_dist.stages.evaluate import Evaluate
from segdiff_dist.stages.phantom import Phantom
from segdiff_dist.stages.prepare import Prepare
from segdiff_dist.stages.sample import Sample
from segdiff_dist.stages.train import Train
from segdiff_dist.stages.train_segmenter import TrainSegmenter

if TYPE_CHECKING:
    from segdiff_dist.experiment import Experiment
    from segdiff_dist.tracking.tracker import Tracker

# Trained at the same time as the denoiser, which is next, if there is a core for each.
_SEGMENTER = "train-segmenter"
_SEGMENTER_LOG = "train-segmenter.log"
# Of the shipped configurations.
_SECONDS = {"demo": 600.0, "starter": 3600.0}

_STEPS: dict[str, type[ConfiguredStage]] = {
    "phantom": Phantom,
    "prepare": Prepare,
    "train-segmenter": TrainSegmenter,
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
}


@dataclass(frozen=True, kw_only=True)
class Demo(ConfiguredStage):
    """Run every stage on the phantom. Stages that are already done are skipped."""

    writes: ClassVar = ("amos_root", "data")
    default_config: ClassVar = "demo"

    run: Path | None = None
    """The run folder."""

    def check(self) -> DemoPlan:
        """Each stage is checked when the stage before it is done."""
        return DemoPlan(self, self.path("run"))


@dataclass(frozen=True)
class DemoPlan(Plan):
    """The stages in a row."""

    stage: Demo
    folder: Path

    def cost(self) -> Cost:
        """As measured on two cores. Of a configuration of the user's own only the stages are known."""
        seconds = _SECONDS.get(self.stage.config or self.stage.default_config)
        return Cost(seconds=seconds, notes=(f"stages: {', '.join(_STEPS)}",))

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the demo; each stage also takes its own."""
        return locked(self.folder / ".demo.lock", self.folder, "is running the demo")

    def run(self, tracker: Tracker) -> Result:
        """Run every stage; the result is the headline table, the time of each stage, and the path of the report."""
        from data_shards.fan_out import ray_session
        from segdiff_dist.evaluation.measure.summary_text import format_table
        from segdiff_dist.evaluation.metrics.sharpness import sharpness_messages

        experiment = self.stage.experiment
        times_s: dict[str, float] = {}
        with ray_session(experiment.prepare.ray_address):
            for title, result, seconds in in_a_row(self._steps()):
                times_s[title], last = seconds, result
        summary = last.value
        return Result(
            (
                f"\n{format_table(summary)}",
                *(*sharpness_messages(summary["metrics"]), ""),
                times_line(times_s),
                f"report: {(self.folder / 'evaluation' / 'report.html').resolve()}",
            ),
            next_command=last.next_command,
            value=summary,
        )

    def _steps(self) -> list[Step]:
        stage = self.stage
        steps: list[Step] = [
            (name, partial(run_stage, kind, stage.experiment, stage.config)) for name, kind in _STEPS.items()
        ]
        if not _can_train_at_once(stage.experiment):
            return steps
        first = list(_STEPS).index(_SEGMENTER)
        both = (f"{_SEGMENTER}, train", partial(_with_segmenter, stage, self.folder / _SEGMENTER_LOG))
        return [*steps[:first], both, *steps[first + 2 :]]


def _with_segmenter(stage: Demo, log: Path) -> Result:
    with _segmenter_beside(stage, log):
        return run_stage(Train, stage.experiment, stage.config)


def _can_train_at_once(experiment: Experiment) -> bool:
    """Whether both networks are trained at the same time: on CPUs with a core for each, if the denoiser's loss needs no
    segmenter. Two trainings of one thread then take less time than one after the other with two threads.

    Not so on a CPU without bf16 arithmetic. In fp32 the denoiser takes four times as long as the segmenter, and half of
    the cores would wait for it."""
    from data_shards.ray_session import num_cores
    from segdiff_dist.ranks.distributed import pick_device
    from segdiff_dist.ranks.precision import cpu_has_bf16

    devices = {pick_device(config.device).type for config in (experiment.train, experiment.segmenter.train)}
    return devices == {"cpu"} and num_cores() > 1 and experiment.diffusion.dice_weight == 0 and cpu_has_bf16()


@contextmanager
def _segmenter_beside(demo: Demo, log: Path) -> Iterator[None]:
    """In this context a separate process trains the segmenter; the context ends when it is trained. Each of the two
    trainings has half of the cores. The process prints to `log`."""
    import torch

    from data_shards.ray_session import num_cores

    print(f"the segmenter is trained at the same time: see {log}", flush=True)
    threads, before = max(1, num_cores() // 2), torch.get_num_threads()
    process = multiprocessing.get_context("spawn").Process(
        target=_train_segmenter, args=(demo, log, threads), daemon=True
    )
    process.start()
    torch.set_num_threads(threads)
    try:
        yield
        if process.is_alive():
            print("the denoiser is trained; the segmenter is not yet", flush=True)
        process.join()
    except BaseException:
        if process.is_alive():  # it saves a checkpoint, as this one did
            os.kill(process.pid or 0, signal.SIGTERM)  # a second SIGINT would end it before that
            process.join(60.0)
        raise
    finally:
        torch.set_num_threads(before)
    if process.exitcode != 0:
        raise WorkFailed(f"train-segmenter ended with {process.exitcode}: see {log}")


def _train_segmenter(demo: Demo, log: Path, threads: int) -> None:
    """The work of the other process; its exit code is that of the command."""
    import torch

    with log.open("a") as stream:
        for output in (sys.stdout, sys.stderr):
            os.dup2(stream.fileno(), output.fileno())
    torch.set_num_threads(threads)
    with ended_by_signals(), ExitStatus() as status:
        stage_of(TrainSegmenter, demo.experiment, demo.config).check().start().say()
    raise SystemExit(status.code)
