"""Write a shard set in another store or codec; resumes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from data_shards.store.config import ConvertConfig
from segdiff_dist.experiment import collect
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.stages.cost import Cost

if TYPE_CHECKING:
    from data_shards.problems import Problem
    from data_shards.store.convert import Conversion
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Convert(ConfiguredStage):
    """Write the same slices in another form."""

    less_memory: ClassVar = "--convert.num-workers"
    essential: ClassVar = ("--convert.store", "--convert.codec", "--convert.num-workers")

    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")] = None
    """The shard set: a folder or a URL that fsspec knows."""
    converted: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """The new shard set, a folder."""
    convert: ConvertConfig = field(default_factory=ConvertConfig)

    def check(self) -> ConvertPlan:
        """Opens the source."""
        from data_shards.store.convert import check

        source, out = collect(lambda: self.given("data"), lambda: self.path("converted"))
        return ConvertPlan(self, check(source, out, self.convert))


@dataclass(frozen=True)
class ConvertPlan(Plan):
    """A set that can be converted. The conversion itself takes the lock; a finished one needs none."""

    stage: Convert
    conversion: Conversion

    def cost(self) -> Cost:
        """Approximately the source's bytes."""
        shards = self.conversion.shards
        each = (1 + shards.bits // 8) * shards.size**2
        seconds, workers = self.conversion.seconds, self.stage.convert.workers.num_on_cores
        notes = ["disk: before compression"]
        notes += [] if seconds is None else [f"time: by some slices read and encoded here, for {workers} workers"]
        return Cost(
            images=len(shards), seconds=seconds, num_bytes=len(shards) * each, notes=tuple(notes),
            shorter=f"more workers: --convert.num-workers N (now {workers})",
        )  # fmt: skip

    def workers_problems(self) -> list[Problem]:
        """Problems of convert.num_workers."""
        return self.stage.convert.workers.memory_problems()

    def announced(self) -> tuple[str, Cost, Path] | None:
        """The cost; codecs make slices smaller by up to ten times."""
        assert self.stage.converted is not None
        return "convert", replace(self.cost(), sure_share=0.1), self.stage.converted

    def run(self, tracker: Tracker) -> Result:
        """Read, check and write every shard."""
        index, out = self.conversion.run(), self.stage.converted
        line = f"{index['num_samples']:,} slices as {index['store']}, {index['codec']}, in {out}"
        return Result((line,), next_command=command("inspect", out), value=index)
