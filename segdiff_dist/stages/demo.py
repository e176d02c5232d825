"""Every stage on the phantom, on two CPU cores, in ten minutes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_shards.locks import locked
from data_shards.problems import WorkFailed
from segdiff_dist.exit_status import ExitStatus
from segdiff_dist.stages.base import Plan, Result
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

# Trained at the same time as the denoiser if there is a core for each.
_SEGMENTER = "train-segmenter"
_SEGMENTER_LOG = "train-segmenter.log"

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
        """As measured on two cores."""
        return Cost(seconds=600.0, notes=(f"stages: {', '.join(_STEPS)}",))

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
        at_once = _can_train_at_once(experiment)
        with ray_session(experiment.prepare.ray_address):
            for number, name in enumerate(_STEPS, 1):
                if at_once and name == _SEGMENTER:
                    continue
                both = at_once and name == "train"
                title = (
                    f"[{number - 1}-{number}/{len(_STEPS)}] {_SEGMENTER}, {name}"
                    if both
                    else f"[{number}/{len(_STEPS)}] {name}"
                )
                print(f"\n{title}", flush=True)
                start = time.perf_counter()
                with _segmenter_beside(self.stage, self.folder / _SEGMENTER_LOG) if both else nullcontext():
                    result = _result_of(name, self.stage)
                times_s[f"{_SEGMENTER}, {name}" if both else name] = time.perf_counter() - start
        summary = result.value
        times = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in times_s.items())
        return Result(
            (
                f"\n{format_table(summary)}",
                *(*sharpness_messages(summary["metrics"]), ""),
                f"{times}  in all {sum(times_s.values()) / 60:.1f} min",
                f"report: {(self.folder / 'evaluation' / 'report.html').resolve()}",
            ),
            next_command=result.next_command,
            value=summary,
        )


def _result_of(name: str, demo: Demo) -> Result:
    return _step(_STEPS[name], demo).check().start_as_step()


def _step(stage: type[ConfiguredStage], demo: Demo) -> ConfiguredStage:
    return replace(stage.of(demo.experiment), config=demo.config).over(demo.experiment)


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
            os.kill(process.pid or 0, signal.SIGINT)
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
    with ExitStatus() as status:
        _step(TrainSegmenter, demo).check().start().say()
    raise SystemExit(status.code)
