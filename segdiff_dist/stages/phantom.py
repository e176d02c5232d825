"""Write synthetic CT and MR volumes with 15 organs (the phantom), laid out as AMOS 2022 is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from data_shards.locks import FOLDER_LOCK, locked
from data_shards.phantom.config import PhantomConfig, case_keys
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import ConfiguredStage, open_tracker, plain
from segdiff_dist.stages.cost import Cost

if TYPE_CHECKING:
    from data_shards.phantom import PhantomArchive
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Phantom(ConfiguredStage):
    """Write a phantom archive."""

    less_memory: ClassVar = "--phantom.matrix"
    essential: ClassVar = ("--phantom.num-train", "--phantom.num-val", "--phantom.num-test", "--phantom.seed")
    needs_temporary_files: ClassVar = False

    amos_root: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """The new archive: dataset.json, imagesTr, labelsTr, ..."""
    phantom: PhantomConfig = field(default_factory=PhantomConfig)

    def check(self) -> PhantomPlan:
        """Refuses settings out of range and a folder with other contents."""
        from data_shards.phantom import check

        out = self.path("amos_root")
        return PhantomPlan(self, check(out, self.phantom))


@dataclass(frozen=True)
class PhantomPlan(Plan):
    """A phantom archive that can be written."""

    stage: Phantom
    archive: PhantomArchive

    def cost(self) -> Cost:
        """The number of volumes."""
        return Cost(notes=(f"volumes: {len(case_keys(self.stage.phantom)):,}",))

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the archive."""
        out = self.archive.out
        return locked(out / FOLDER_LOCK, out, "is writing it", lends=True)

    def tracker(self) -> Tracker:
        """The tracker of the run folder, if there is one."""
        run = self.stage.experiment.run
        return super().tracker() if run is None else open_tracker(self.stage.experiment, "phantom", run)

    def run(self, tracker: Tracker) -> Result:
        """Write the archive; an existing one stays."""
        out = self.archive.out
        self.archive.write()
        tracker.log_params({"phantom": plain(self.stage.experiment)["phantom"]})
        tracker.log_artifact(out / "dataset.json", "phantom")
        shards = out.with_name(f"{out.name}-shards")
        after = command("prepare", out, shards, *self.stage.config_flag)
        return Result((f"phantom archive in {out}",), next_command=after)
