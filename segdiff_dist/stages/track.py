"""Send MLflow the records that wait in a run folder, after its server was away."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from segdiff_dist.stages.base import Plan, Result
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.stages.cost import Cost
from segdiff_dist.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Track(ConfiguredStage):
    """Send MLflow the records of a run folder that wait."""

    only_reads: ClassVar = True
    needs_temporary_files: ClassVar = False

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """The run folder."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> TrackPlan:
        """The folder must be on this machine. Whether the server answers is known only when records are sent."""
        return TrackPlan(self, self.path("run"))


@dataclass(frozen=True)
class TrackPlan(Plan):
    """A folder with records."""

    stage: Track
    folder: Path

    def cost(self) -> Cost:
        """How many records wait."""
        from segdiff_dist.tracking.link import SPOOL
        from segdiff_dist.tracking.spool import num_waiting

        return Cost(notes=(f"records: {num_waiting(self.folder / SPOOL):,}",))

    def run(self, tracker: Tracker) -> Result:
        """Send them."""
        from segdiff_dist.tracking.tracker import send_spool

        sent = send_spool(self.folder, self.stage.tracking.adopt)
        return Result((f"{sent:,} records of {self.folder} sent to MLflow",), value=sent)
