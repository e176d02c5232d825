"""Count the slices and classes of a shard set, verify its checksums, look for leakage, draw two pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.stages.cost import Cost

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Inspect(ConfiguredStage):
    """Print a shard set's tables. Exit code 1 when something is wrong with it."""

    only_reads: ClassVar = True
    needs_temporary_files: ClassVar = False

    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")] = None
    """The shard set: a folder or a URL that fsspec knows."""

    def check(self) -> InspectPlan:
        """The work itself opens the set, since problems of the set are the result."""
        return InspectPlan(self, self.given("data"))


@dataclass(frozen=True)
class InspectPlan(Plan):
    """A set to look at."""

    stage: Inspect
    data: str

    def cost(self) -> Cost:
        """Every byte is read."""
        from data_shards.store.shards import ShardSet

        index = ShardSet.open(self.data, check_files=False).index
        read = sum(shard.get("bytes", 0) for shard in index["shards"])
        return Cost(images=index["num_samples"], notes=(f"read: {read / 1e6:,.0f} MB", "disk: two pictures"))

    def run(self, tracker: Tracker) -> Result:
        """Count, verify, draw."""
        from data_shards.store.inspect import format_report, inspect_shards

        report = inspect_shards(self.data)
        run = self.stage.experiment.run or Path("runs") / Path(self.data).name
        after = command("train-segmenter", "--data", self.data, "--run", run, *self.stage.config_flag)
        return Result((format_report(report),), (), 0 if report.ok else 1, after if report.ok else None, report)
