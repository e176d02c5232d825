"""What `run` would do with your volumes in the hours given: settings, time, memory and disk of each stage."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.problems import problem
from segdiff_dist.stages.base import Plan, Result, command, flag
from segdiff_dist.stages.budgeted import PLAN, Budgeted, Planned, locked_folder
from segdiff_dist.stages.cost import Cost

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class PlanRun(Budgeted):
    """Look at the headers of DATA and at this machine, and write a configuration that fits into the hours, for `segdiff
    run`. The plan chooses every setting that you do not give, also where a default is printed here. --out FOLDER is the
    folder of `segdiff run`, --out NAME.yaml the file itself."""

    def check(self) -> PlanRunPlan:
        """Reads headers, and times a few passes of the networks."""
        self.refuse_begun()
        return PlanRunPlan(self, self.file, self.planned())

    def refuse_begun(self) -> None:
        """Refuse to replace a plan whose work has begun."""
        if self.file.exists() and any((self.folder / name).exists() for name in ("shards", "run")):
            go_on = command("run", "--out", self.folder)
            raise problem(
                self.file, "--out", "the work by this plan has begun", f"go on: {go_on}, or give another --out"
            )


@dataclass(frozen=True)
class PlanRunPlan(Plan):
    """A plan, not yet written."""

    stage: PlanRun
    file: Path
    planned: Planned

    def cost(self) -> Cost:
        """The table."""
        return Cost(notes=self.planned.lines)

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the folder, where `run` reads the plan."""
        return locked_folder(self.stage.folder)

    def run(self, tracker: Tracker) -> Result:
        """Write it."""
        stage, planned = self.stage, self.planned
        stage.refuse_begun()  # it may have begun since the check
        replaced = self._put_aside()
        planned.write(self.file, command("plan", stage.amos_root, "--hours", f"{stage.hours:g}"))
        lines = (*planned.lines, f"plan: {self.file.resolve()}", *replaced)
        if self.file.name == PLAN:
            return Result(lines, next_command=command("run", stage.amos_root, *flag("--out", stage.out)), value=planned)
        return Result(lines, next_command=command("run", "--config", self.file), value=planned)

    def _put_aside(self) -> list[str]:
        """Keep the file that is replaced, which may have been edited; returns a line that says where."""
        if not self.file.exists():
            return []
        kept = self.file.with_name(f"{self.file.name}.before")
        self.file.replace(kept)
        return [f"the plan before: {kept.resolve()}"]
