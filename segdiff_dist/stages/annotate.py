"""Whole-body masks of volumes, by TotalSegmentator or any command; resumes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from data_shards.ingest.annotate_config import AnnotateConfig
from data_shards.locks import FOLDER_LOCK, locked
from data_shards.wording import in_words
from segdiff_dist.experiment import collect
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import ConfiguredStage, open_tracker, plain
from segdiff_dist.stages.cost import Cost, duration
from segdiff_dist.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from data_shards.ingest.annotate import Annotation
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Annotate(ConfiguredStage):
    """Make the missing whole-body masks. Exit code 1 when some volumes got none."""

    less_memory: ClassVar = "--annotate.num-workers"
    essential: ClassVar = ("--annotate.tool", "--annotate.command", "--annotate.num-workers", "--run")

    amos_root: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """The volumes: a folder as AMOS 2022 is, with dataset.json, imagesTr, labelsTr."""
    wholebody: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="WHOLEBODY")] = None
    """Folder of whole-body masks, <case id>.nii.gz."""
    run: Path | None = None
    """A run folder in whose MLflow run this is recorded."""
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> AnnotatePlan:
        """Asks the tool for its version; reads the archive's headers."""
        from data_shards.ingest.annotate import check

        root, wholebody = collect(lambda: self.path("amos_root"), lambda: self.path("wholebody"))
        return AnnotatePlan(self, check(root, wholebody, self.annotate))


@dataclass(frozen=True)
class AnnotatePlan(Plan):
    """An archive and a tool that runs."""

    stage: Annotate
    annotation: Annotation

    def cost(self) -> Cost:
        """The number of volumes. The time is that of the masks made so far; before the first one it is not known."""
        found, workers = self.annotation, self.stage.annotate.num_workers
        notes = [f"volumes: {found.num_cases:,}, {found.num_missing:,} of them without a mask"]
        if found.seconds is not None:
            notes.append(f"time: by the masks made so far, {workers} volumes at a time")
        elif found.most_seconds is not None:
            notes.append(f"time: not known before the tool has made a mask; at most {duration(found.most_seconds)}")
        else:
            notes.append("time: not known before the tool has made a mask; --annotate.timeout-s N limits it")
        return Cost(
            seconds=found.seconds, notes=tuple(notes), what=in_words(found.num_missing, "volume"),
            shorter=f"more volumes at a time: --annotate.num-workers N (now {workers})",
        )  # fmt: skip

    def announced(self) -> tuple[str, Cost, Path] | None:
        """The cost, where it is known."""
        return None if self.annotation.seconds is None else ("annotate", self.cost(), self.annotation.wholebody)

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the folder of masks."""
        wholebody = self.annotation.wholebody
        return locked(wholebody / FOLDER_LOCK, wholebody, "is annotating it", lends=True)

    def tracker(self) -> Tracker:
        """The tracker of the run folder, or of the folder of masks."""
        return open_tracker(self.stage.experiment, "annotate", self.stage.run or self.annotation.wholebody)

    def run(self, tracker: Tracker) -> Result:
        """Make the missing masks."""
        from data_shards.ingest.masks import ANNOTATIONS

        stage, report = self.stage, self.annotation.run()
        version = report.tool_version or "unknown"
        tracker.log_params({"annotate": plain(stage.experiment)["annotate"], "annotate_tool_version": version})
        tracker.log_metrics({"annotate/num_masks": report.num_masks, "annotate/num_failed": len(report.failed)})
        tracker.log_artifact(self.annotation.wholebody / ANNOTATIONS, "annotate")
        before = f", {report.num_kept} of them there already" if report.num_kept else ""
        message = [f"{report.num_masks} whole-body masks in {stage.wholebody}{before}"]
        if report.tool_version is None:
            message.append("the tool's version is not recorded; --annotate.version-command says how to ask for it")
        message += [f"failed: {case_id}: {reason}" for case_id, reason in report.failed]
        if report.failed:
            message.append("put these right and start the same command again; it tries only them")
            return Result(tuple(message), exit_code=1, value=report)
        assert stage.amos_root is not None
        shards = stage.amos_root.with_name(f"{stage.amos_root.name}-shards")
        after = command("prepare", stage.amos_root, shards, "--wholebody", stage.wholebody, *stage.config_flag)
        return Result(tuple(message), next_command=after, value=report)
