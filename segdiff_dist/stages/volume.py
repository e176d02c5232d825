"""A whole CT or MR volume from a mask volume, with its affine and shape."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from data_shards.locks import lock_beside, locked
from data_shards.problems import refuse
from data_shards.ranges import range_problems
from data_shards.wording import in_words
from segdiff_dist.experiment import collect
from segdiff_dist.export.config import VolumeConfig
from segdiff_dist.ranks.distributed import pick_device
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.stages.base import Plan, Result
from segdiff_dist.stages.configured import ConfiguredStage, weights_name
from segdiff_dist.stages.cost import Cost

if TYPE_CHECKING:
    from segdiff_dist.export.volume import VolumeJob, VolumeReport
    from segdiff_dist.export.volume_set import VolumeSetJob
    from segdiff_dist.pipeline import SegGuidedPipeline
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Volume(ConfiguredStage):
    """Generate a volume slice by slice, and print how much neighbouring slices differ."""

    essential: ClassVar = (
        *("--run", "--data", "--modality", "--axis", "--volume.noise", "--volume.body-image"),
        *("--volume.format", "--volume.merge-with"),
        *("--sample.weights", "--sample.seed", "--sample.sampler.preset", "--sample.device"),
    )

    mask_volume: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="MASK")] = None
    """A volume (NIfTI, .mha or .nrrd) of label ids of the model's table."""
    exported: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """The new file: .nii.gz, .nii, .mha or .nrrd. Without an ending: a new folder with a DICOM series and a SEG of the
    mask (extra `dicom`), or, with `--format nnunet`, a raw data set of nnU-Net."""
    run: Path | None = None
    """The run folder whose weights are used."""
    data: str | None = None
    """The shard set that the model was trained on: a folder or a URL that fsspec knows."""
    volume: VolumeConfig = field(default_factory=VolumeConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def check(self) -> VolumePlan:
        """Opens set and weights; reads the header of the mask."""
        from segdiff_dist.export.model_set import refuse_other_set, warn_of_unseen_axis
        from segdiff_dist.export.volume import check_volume
        from segdiff_dist.export.volume_set import check_volume_set
        from segdiff_dist.pipeline import SegGuidedPipeline
        from segdiff_dist.ranks.precision import settled

        experiment, config = self.experiment, self.volume
        mask, out, _ = collect(
            lambda: self.path("mask_volume"),
            lambda: self.path("exported"),
            lambda: refuse(range_problems(self.sample, "config", "sample.") + self.sample.seed_problems()),
        )
        run, shards = self.open_run_and_data()
        refuse_other_set(run, shards, "give --data the set that the model was trained on")
        check = check_volume_set if config.format == "nnunet" else check_volume
        job = check(mask, out, shards, config)
        warn_of_unseen_axis(config.axis, shards, experiment.loader.axes)
        weights = run / "weights" / weights_name(experiment, self.sample.weights)
        device = self.sample.device
        precision = settled(self.sample.precision, pick_device(device, "sample.device"))
        pipeline = SegGuidedPipeline.from_weights(
            weights, experiment.diffusion, self.sample.sampler, device=device, precision=precision
        )
        return VolumePlan(self, job, pipeline, pipeline.size_with(shards, config.modality), weights)


@dataclass(frozen=True)
class VolumePlan(Plan):
    """A mask, and a model that knows its labels."""

    stage: Volume
    job: VolumeJob | VolumeSetJob
    pipeline: SegGuidedPipeline
    size: int
    weights: Path

    def cost(self) -> Cost:
        """Bytes without compression; time from a pass through the net on this machine."""
        from segdiff_dist.denoising.samplers import num_evaluations
        from segdiff_dist.sampling.plan import seconds_of_a_pass

        pipeline, images = self.pipeline, self.job.num_slices
        passes = num_evaluations(pipeline.sampler, pipeline.diffusion)
        seconds = images * passes * seconds_of_a_pass(pipeline.model, pipeline.device)
        notes = ("disk: before compression", f"time: by a pass of a few slices here, {passes} for each")
        shorter = "fewer steps: --sample.sampler.preset fast"
        return Cost(images, seconds, self.job.num_bytes, notes=notes, shorter=shorter)

    def announced(self) -> tuple[str, Cost, Path] | None:
        """The cost; a compressed volume takes at least a tenth."""
        return "volume", replace(self.cost(), sure_share=0.1), self.job.out

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the new file."""
        return locked(lock_beside(self.job.out), self.job.out, "is making it")

    def run(self, tracker: Tracker) -> Result:
        """Generate the slices and put them back onto the mask's voxels."""
        from segdiff_dist.export.volume import VolumeJob, slice_generator

        stage, job = self.stage, self.job
        if not isinstance(job, VolumeJob):
            return self._run_set(job)
        report = job.make(slice_generator(self.pipeline, stage.volume, stage.sample.seed), self.size)
        return Result(tuple(_lines(str(stage.exported), report, stage.volume)), value=report)

    def _run_set(self, job: VolumeSetJob) -> Result:
        from segdiff_dist.export.volume import slice_generator
        from segdiff_dist.sampling.weights import weights_digest

        stage = self.stage
        first = stage.sample.seed
        provenance = {
            "made_by": "segdiff volume",
            "weights_digest": weights_digest(self.weights),
            "seed": first,
            "noise": stage.volume.noise,
        }
        reports = job.make(lambda n: slice_generator(self.pipeline, stage.volume, first + n), self.size, provenance)
        lines = [line for name, report in reports.items() for line in _lines(name, report, stage.volume)]
        return Result((*lines, f"{in_words(len(reports), 'volume')} in {job.out}", *job.lines), value=reports)


def _lines(name: str, report: VolumeReport, config: VolumeConfig) -> list[str]:
    found = [f"{name}: {in_words(report.num_slices, f'{config.axis} slice')} of {config.modality}"]
    if report.outside > 0:
        found.append(
            f"warning: {report.outside:.1%} of the labelled voxels are outside of the model's slices"
            "; `segdiff paint --model RUN` shows all of a plane"
        )
    other = "independent" if config.noise == "shared" else "shared"
    painted_mm, real_mm = report.gap_mm
    for what, value in (
        (f"{config.noise} noise, {painted_mm:g} mm apart", report.difference),
        (f"{other} noise, {painted_mm:g} mm apart", report.difference_other),
        (f"real slices, {real_mm:g} mm apart", report.difference_real),
    ):
        if value is not None:
            found.append(f"mean difference between neighbouring slices, {what}: {value:.2f} grey values")
    return found
