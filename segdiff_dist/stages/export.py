"""A run's images for nnU-Net, as NIfTI, PNG, DICOM or shards; its model for diffusers or MONAI."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from data_shards.problems import refuse
from segdiff_dist.experiment import collect
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import ConfiguredStage, refuse_addresses, weights_name
from segdiff_dist.stages.cost import Cost

if TYPE_CHECKING:
    from segdiff_dist.export.job import ModelExport, SamplesExport
    from segdiff_dist.tracking.tracker import Tracker


# The time for so few is not measured before they are written.
_FEW_IMAGES = 200


@dataclass(frozen=True, kw_only=True)
class Export(ConfiguredStage):
    """Write samples or model in the form that other programs read."""

    exported: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """The new folder."""
    run: Path | None = None
    """The run folder whose samples or weights are exported."""
    data: str | None = None
    """pipeline, monai: the shard set that the model was trained on, if it is at another place than then. Its
    preprocessing is stored beside the model, so that masks of any size can be used."""
    export: ExportConfig = field(default_factory=ExportConfig)

    def check(self) -> ExportPlan:
        """Opens the samples or the weights."""
        from segdiff_dist.export.job import check_model, check_samples
        from segdiff_dist.stages.model_extras import extras_of

        experiment, config = self.experiment, self.export
        if unused := config.without_effect:
            warnings.warn(f"--format {config.format} does not use {', '.join(unused)}", stacklevel=2)
        run, out, _ = collect(
            lambda: self.existing_run(),
            lambda: self.path("exported"),
            lambda: refuse(config.problems()),
        )
        if not config.is_model:
            refuse_addresses(experiment, (run,))
            return ExportPlan(self, check_samples(run, out, config))
        weights = run / "weights" / weights_name(experiment, config.weights)
        sampler = experiment.sample.sampler
        extras = extras_of(run, weights, config, experiment.data)
        job = check_model(weights, out, experiment.diffusion, sampler, extras)
        return ExportPlan(self, replace(job, is_bundle=config.format == "monai"))


@dataclass(frozen=True)
class ExportPlan(Plan):
    """Samples or a model that can be exported."""

    stage: Export
    job: SamplesExport | ModelExport

    def cost(self) -> Cost:
        """Counted without compression."""
        from segdiff_dist.export.job import SamplesExport

        if not isinstance(self.job, SamplesExport):
            return Cost(num_bytes=self.job.num_bytes)
        seconds = self.job.seconds
        notes = () if seconds is None else ("time: by the images of one case, written to a temporary folder",)
        return Cost(images=len(self.job.samples), seconds=seconds, num_bytes=self.job.num_bytes, notes=notes)

    def announced(self) -> tuple[str, Cost, Path] | None:
        """The cost; compressed images take at least a tenth."""
        from segdiff_dist.export.job import SamplesExport

        job = self.job
        is_short = isinstance(job, SamplesExport) and len(job.samples) <= _FEW_IMAGES
        cost = Cost(num_bytes=job.num_bytes) if is_short else self.cost()
        return "export", replace(cost, sure_share=0.1), job.out

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the new folder."""
        from segdiff_dist.export.job import export_lock

        return export_lock(self.job.out)

    def run(self, tracker: Tracker) -> Result:
        """Write beside the new folder, then rename."""
        num_images, out = self.job.write(), self.stage.exported
        form = self.stage.export.format
        model = "a MONAI bundle" if form == "monai" else "a diffusers pipeline"
        made = model if num_images is None else f"{num_images:,} images"
        after = command("inspect", out) if form == "shards" else None
        return Result((f"{made} in {out}", *self.job.lines), next_command=after)
