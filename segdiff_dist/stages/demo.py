"""All of it on the phantom, on two CPU cores, in ten minutes."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_shards.locks import locked
from segdiff_dist.stages.base import Cost, Plan, Result
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.stages.evaluate import Evaluate
from segdiff_dist.stages.phantom import Phantom
from segdiff_dist.stages.prepare import Prepare
from segdiff_dist.stages.sample import Sample
from segdiff_dist.stages.train import Train
from segdiff_dist.stages.train_segmenter import TrainSegmenter

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker

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
    """Run every stage on the phantom. Stages that are done already are passed over."""

    writes: ClassVar = ("amos_root", "data")
    default_config: ClassVar = "demo"

    run: Path | None = None
    """The run folder."""

    def check(self) -> DemoPlan:
        """Each stage is checked when the one before it is done."""
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
        """Of the demo; each stage takes its own besides."""
        return locked(self.folder / ".demo.lock", self.folder, "is running the demo")

    def run(self, tracker: Tracker) -> Result:
        """Run every stage; the result is the headline table, the time of each stage, and where the report is."""
        from data_shards.fan_out import ray_session
        from segdiff_dist.evaluation.measure.summary import format_table
        from segdiff_dist.evaluation.metrics.sharpness import sharpness_messages

        experiment = self.stage.experiment
        times_s: dict[str, float] = {}
        with ray_session(experiment.prepare.ray_address):
            for number, (name, stage) in enumerate(_STEPS.items(), 1):
                print(f"\n[{number}/{len(_STEPS)}] {name}", flush=True)
                start = time.perf_counter()
                result = stage.of(experiment).over(experiment).check().start()
                times_s[name] = time.perf_counter() - start
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
