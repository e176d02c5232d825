"""Write the embedded data: synthetic CT and MR with 15 organs, laid out as AMOS 2022."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from data_shards.locks import FOLDER_LOCK, locked
from data_shards.phantom.config import PhantomConfig, case_keys
from data_shards.problems import refuse
from segdiff_dist.stages.base import Cost, Plan, Result, command
from segdiff_dist.stages.configured import ConfiguredStage, open_tracker, plain

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Phantom(ConfiguredStage):
    """Write a phantom archive."""

    essential: ClassVar = ("--phantom.seed", "--phantom.num-train", "--phantom.num-val", "--phantom.num-test")
    needs_temporary_files: ClassVar = False

    amos_root: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """The new archive: dataset.json, imagesTr, labelsTr, ..."""
    phantom: PhantomConfig = field(default_factory=PhantomConfig)

    def check(self) -> PhantomPlan:
        """Refuses settings out of range and a folder that holds something else."""
        from data_shards.phantom import find_problems

        out = self.path("amos_root")
        refuse(find_problems(out, self.phantom))
        return PhantomPlan(self, out)


@dataclass(frozen=True)
class PhantomPlan(Plan):
    """A phantom archive that can be written to `out`."""

    stage: Phantom
    out: Path

    def cost(self) -> Cost:
        """The number of volumes."""
        return Cost(notes=(f"volumes: {len(case_keys(self.stage.phantom)):,}",))

    def lock(self) -> AbstractContextManager[None]:
        """Of the archive."""
        return locked(self.out / FOLDER_LOCK, self.out, "is writing it", lends=True)

    def tracker(self) -> Tracker:
        """Of the run folder, where there is one."""
        run = self.stage.experiment.run
        return super().tracker() if run is None else open_tracker(self.stage.experiment, "phantom", run)

    def run(self, tracker: Tracker) -> Result:
        """Write it; an archive that is there already stays."""
        from data_shards.phantom import write_phantom

        write_phantom(self.out, self.stage.phantom)
        tracker.log_params({"phantom": plain(self.stage.experiment)["phantom"]})
        tracker.log_artifact(self.out / "dataset.json", "phantom")
        shards = self.out.with_name(f"{self.out.name}-shards")
        after = command("prepare", self.out, shards, *self.stage.config_flag)
        return Result((f"phantom archive in {self.out}",), next_command=after)
