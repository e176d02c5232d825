"""Weights averaged over another length after training (post-hoc EMA), from the snapshots that it kept."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_shards.documents import read_json
from data_shards.locks import lock_beside, locked
from data_shards.problems import explain_full_disk, problem, refuse
from segdiff_dist.experiment import collect
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import ConfiguredStage, address_flag
from segdiff_dist.stages.cost import Cost
from segdiff_dist.training.config import AverageConfig
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.tracking.tracker import Tracker

# Between 0 (exact) and 1 (unrelated), see ema.misfit: from 0.05 and 0.1 those between them come out at 0.05.
_FAR = 0.25


@dataclass(frozen=True, kw_only=True)
class Average(ConfiguredStage):
    """Write weights averaged over another length to RUN/weights."""

    aliases: ClassVar = {"--length": "--average.length"}

    run: Path | None = None
    """The run folder."""
    average: AverageConfig = field(default_factory=AverageConfig)

    def check(self) -> AveragePlan:
        """Loads the net of the run's first average, whose shape the new weights have."""
        from segdiff_dist.denoising.denoiser import Denoiser
        from segdiff_dist.training.export import exported_averages, snapshot_end

        run, _ = collect(lambda: self.path("run"), lambda: refuse(self.average.problems()))
        if self.average.name in exported_averages(run):
            remedy = "the training wrote it: use it as it is, or give another length"
            raise problem(run / "weights" / self.average.name, "average.length", self.average.length, remedy)
        like = run / "weights" / self.experiment.train.averages[0]
        description = read_json(like / DESCRIPTION, "copy the weights again") if like.is_dir() else {}
        model = Denoiser.load(like)
        return AveragePlan(
            self, run, model, description, snapshot_end(run, self.experiment.train, self.average.images_seen)
        )


@dataclass(frozen=True)
class AveragePlan(Plan):
    """A net, and the record of the training in its weights."""

    stage: Average
    run_folder: Path
    model: Denoiser
    training: dict[str, Any]
    images_seen: int

    @property
    def folder(self) -> Path:
        """The new weights."""
        return self.run_folder / "weights" / self.stage.average.name

    def cost(self) -> Cost:
        """As large as the other weights."""
        return Cost(num_bytes=4 * sum(parameter.numel() for parameter in self.model.parameters()))

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the new weights."""
        return locked(lock_beside(self.folder), self.folder, "is writing it")

    def run(self, tracker: Tracker) -> Result:
        """Reconstruct the average from the snapshots and save it."""
        from segdiff_dist.training.export import average_snapshots

        wanted, folder = self.stage.average, self.folder
        weights, misfit = average_snapshots(
            self.run_folder, self.stage.experiment.train, wanted.length, self.images_seen
        )
        with explain_full_disk(folder):
            self.model.save(folder, weights, self.training)
        profile = f"its profile differs by {misfit:.1%} from the requested one"
        line = f"{folder}: {profile}, which ends at {self.images_seen:,} images"
        if misfit > _FAR:
            warnings.warn("it is far from that average: give a length nearer to train.ema_lengths", stacklevel=2)
        out, address = self.run_folder / f"samples-{folder.name}", address_flag(self.stage.experiment)
        after = command("sample", "--run", self.run_folder, "--sample.weights", folder.name, "--out", out, *address)
        return Result((line,), next_command=after, value=misfit)
