"""Say what this machine can run, and how to get what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from segdiff_dist.doctor import diagnose
from segdiff_dist.stages.base import Cost, Plan, Result, Stage

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Doctor(Stage):
    """Say what this machine can run. Exit code 1 when something that the pipeline needs is missing."""

    only_reads: ClassVar = True
    needs_temporary_files: ClassVar = False

    def check(self) -> DoctorPlan:
        """There is nothing to refuse."""
        return DoctorPlan()


class DoctorPlan(Plan):
    """Engines to look at."""

    def cost(self) -> Cost:
        """At most a minute, mostly imports."""
        return Cost(notes=("time: up to a minute", "disk: nothing is written"))

    def run(self, tracker: Tracker) -> Result:
        """Check what is installed, and start the engines that must be tried."""
        text, missing = diagnose()
        after = None if missing else "segdiff demo"
        return Result((text,), exit_code=1 if missing else 0, next_command=after)
