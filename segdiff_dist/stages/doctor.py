"""Say what this machine can run, and how to get what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from segdiff_dist.doctor import diagnose
from segdiff_dist.stages.base import Plan, Result, Stage
from segdiff_dist.stages.cost import Cost

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Doctor(Stage):
    """Say what this machine can run. Exit code 1 when something that the pipeline needs is missing or does not work."""

    only_reads: ClassVar = True
    needs_temporary_files: ClassVar = False

    tries: Annotated[bool, tyro.conf.arg(name="try")] = True
    """Start Ray, DALI, DeepSpeed, MLflow and, on a GPU, Triton on the smallest work. --no-try: look only at what is
    installed."""

    def check(self) -> DoctorPlan:
        """There is nothing to refuse."""
        return DoctorPlan(self.tries)


@dataclass(frozen=True)
class DoctorPlan(Plan):
    """Engines to look at and, with `tries`, to start."""

    tries: bool

    def cost(self) -> Cost:
        """Imports, and the start of the engines."""
        return Cost(notes=("time: about a minute", "disk: nothing is left"))

    def run(self, tracker: Tracker) -> Result:
        """Check what is installed, and start the engines that must be tried."""
        text, missing = diagnose(self.tries)
        after = None if missing else "segdiff demo"
        return Result((text,), exit_code=1 if missing else 0, next_command=after)
