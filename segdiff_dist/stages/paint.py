"""One CT or MR image from one mask: PNG, NIfTI, MetaImage, NRRD or DICOM SEG, of any size."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from data_shards.choices import Axis, Modality
from data_shards.locks import lock_beside, locked
from data_shards.problems import problem
from segdiff_dist.config.choices import Device
from segdiff_dist.experiment import collect
from segdiff_dist.stages.base import Cost, Plan, Result, Stage, command, flag

if TYPE_CHECKING:
    from segdiff_dist.painting.job import PaintJob
    from segdiff_dist.tracking.tracker import Tracker

_EXAMPLE = "example.png"
# Fewer are made within a minute or two: no pass is made only to say so.
_MANY_SLICES = 16


@dataclass(frozen=True, kw_only=True)
class Paint(Stage):
    """Make the CT or MR image of a mask, in the mask's place and size: `segdiff paint -i mask.png -o ct.png`. No mask
    yet? `segdiff paint --example -i mask.png` writes one. Without --model: by the small model that comes with the
    package, which was trained on drawn patients (the phantom), not on real ones."""

    aliases: ClassVar = {"-i": "--mask", "-o": "--out"}
    essential: ClassVar = (
        *("--mask", "--out", "--example", "--modality", "--seed", "--model", "--labels", "--other-labels"),
        *("--spacing", "--axis", "--steps"),
    )

    mask: Path | None = None
    """The mask: .png, .nii.gz, .nii, .mha, .mhd, .nrrd or DICOM SEG (.dcm), with a label id at each voxel."""
    out: Path | None = None
    """The new image: .png of a 2-D mask (grey values); .nii.gz, .nii, .mha or .nrrd (HU for CT); without an ending: a
    folder with a DICOM series and a SEG."""
    model: str | None = None
    """A run folder, an exported pipeline, a URL (file:, https:, s3:) of one, or a Hugging Face name OWNER/NAME. null:
    the model that comes with the package."""
    model_digest: str | None = None
    """The sha256 that the model's weights must have. The command prints it."""
    modality: Modality | None = None
    """The modality to make, as CT or MR. null: the model's first one (CT for the small model)."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the noise: the same seed makes the same image, another one another patient with these organs."""
    labels: str | None = None
    """What the ids in the mask mean: a JSON or YAML file with `id: name`, nnU-Net's dataset.json, a label table, or
    amos, wholebody or merged. null: as the mask or a file beside it says, else the model's own ids."""
    other_labels: Literal["refuse", "body", "background"] = "refuse"
    """What becomes of classes that the model does not have. refuse: no image is made. body: the rest of the patient."""
    spacing: Annotated[float, Gt(0)] | None = None
    """Side of a pixel of a PNG mask in mm, so that organs get their true size. null: the picture fills the model's
    square."""
    outline: Literal["auto", "none"] = "auto"
    """For masks of organs alone. auto: the patient's outline is an ellipse around the organs. none: they stay alone."""
    axis: Axis = "axial"
    """The axis along which the slices of a volume are made."""
    noise: Literal["shared", "independent"] = "shared"
    """shared: all slices of a volume have one noise, so that neighbours look alike. independent: one for each."""
    steps: Annotated[int, Ge(1)] | None = None
    """Steps from noise to image: fewer are faster and rougher. null: the model's own."""
    guidance: Annotated[float, Ge(0)] | None = None
    """Scale of classifier-free guidance; 1 is none. null: the model's own."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the network. auto: bf16 where the device has arithmetic for it."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    example: bool = False
    """Write a mask to begin with, a slice of the phantom, to --mask, and stop."""

    def check(self) -> PaintPlan | ExamplePlan:
        """Reads the mask's header; opens the model."""
        if self.example:
            return ExamplePlan(self, self._new_mask())
        from segdiff_dist.painting.job import PaintSettings, check_paint
        from segdiff_dist.painting.masks import open_mask
        from segdiff_dist.painting.model import open_model

        mask_file, out, model = collect(
            lambda: _given(self.mask, "--mask"),
            lambda: _given(self.out, "--out"),
            lambda: open_model(self.model, digest=self.model_digest, device=self.device, precision=self.precision),
        )
        model = model.with_sampler(self.steps, self.guidance)
        mask = open_mask(mask_file, grid_mm=model.grid_mm, spacing_mm=self.spacing)
        settings = PaintSettings(**{each.name: getattr(self, each.name) for each in fields(PaintSettings)})
        return PaintPlan(self, check_paint(mask, model, settings, out), out)

    def _new_mask(self) -> Path:
        file = self.mask or Path(_EXAMPLE)
        if file.exists():
            raise problem(file, "--mask", "exists already", "remove it, or give another name")
        if file.suffix.lower() != ".png":
            raise problem(file, "--mask", f"the ending {file.suffix or '(none)'}", "the example is a .png")
        return file


def _given(path: Path | None, name: str) -> Path:
    if path is None:
        remedy = "segdiff paint -i MASK -o IMAGE; a mask to begin with: segdiff paint --example -i example.png"
        raise problem("command line", name, "not given", remedy)
    return path


@dataclass(frozen=True)
class PaintPlan(Plan):
    """A mask, and a model."""

    stage: Paint
    job: PaintJob
    out: Path

    def cost(self) -> Cost:
        """The images to make, at most, their time by a pass of the network, and what is known of mask and model."""
        from segdiff_dist.denoising.samplers import num_evaluations

        pipeline, mask = self.job.model.pipeline, self.job.mask
        passes = num_evaluations(pipeline.sampler, pipeline.diffusion)
        shape = " x ".join(map(str, mask.shape))
        return Cost(
            images=self.job.num_slices,
            seconds=self.job.seconds,
            notes=(
                f"mask: {shape} voxels; model: {self.job.model.name}, {pipeline.size} pixels, {self.job.modality}",
                f"passes through the net: {passes} an image, on {pipeline.device.type}",
                f"model's sha256: {self.job.model.digest}",
            ),
        )

    def announced(self) -> tuple[str, Cost, Path] | None:
        """The cost of a volume."""
        if self.job.num_slices < _MANY_SLICES:
            return None
        return "paint", replace(self.cost(), shorter="fewer steps: --steps N", notes=()), self.out

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the new file."""
        return locked(lock_beside(self.out), self.out, "is making it")

    def run(self, tracker: Tracker) -> Result:
        """Generate, put back, write."""
        made = self.job.make()
        made.save(self.out)
        low, high = (round(self.job.grey.offset + grey * self.job.grey.scale) for grey in (0, 255))
        unit = f"HU from {low} to {high}" if self.job.model.is_in_hu(made.modality) else "grey values"
        if self.out.suffix.lower() == ".png" and self.job.model.is_in_hu(made.modality):
            unit = f"grey values 0 to 255 for HU {low} to {high}"
        num = f"{made.num_slices} slice{'s' if made.num_slices > 1 else ''}"
        return Result(
            (
                f"{self.out}: synthetic {made.modality}, {num}, {unit}",
                *made.notes,
                f"model: {made.model.name} (sha256 {made.model.digest[:16]})",
            ),
            value=made,
        )


@dataclass(frozen=True)
class ExamplePlan(Plan):
    """A place for the example mask."""

    stage: Paint
    file: Path

    def cost(self) -> Cost:
        """A few kilobytes."""
        return Cost(num_bytes=10_000)

    def run(self, tracker: Tracker) -> Result:
        """Copy the mask of the package."""
        import shutil

        from segdiff_dist.painting.model_source import EXAMPLE_MASK

        shutil.copyfile(EXAMPLE_MASK, self.file)
        image = self.file.with_name(f"{self.file.stem}_ct.png")
        after = command("paint", "-i", self.file, "-o", image, *flag("--model", self.stage.model))
        return Result((f"a mask of the phantom, in AMOS' label ids: {self.file}",), next_command=after)
