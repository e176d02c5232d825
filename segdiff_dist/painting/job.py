"""An image of a mask: `segdiff_dist.paint` and `segdiff paint`.

The rule of sizes: a plane of the mask is put into the middle of a square, of its long side or of the field that the
model's images show, whichever is longer; the square becomes the model's pixels; the image goes back the same way, by
linear interpolation, and by area where pixels shrink. Pictures without a spacing fill the square.

Dimensions: I, J, K canonical (right, anterior, superior); H rows, W columns.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.slices import VIEWS, Cutting
from data_shards.ingest.volumes import Volume
from data_shards.problems import Problem, explain_full_disk, problem, refuse
from data_shards.records import AXES
from segdiff_dist.export.config import VolumeConfig
from segdiff_dist.export.dicom import dicom_kind, problems_without_kind
from segdiff_dist.export.model_set import unseen_axis
from segdiff_dist.export.slicewise import CutMask, cutting, values_of
from segdiff_dist.export.volume_out import is_dicom, kind_problems, save_dicom, save_values
from segdiff_dist.painting.masks import LabelMask, MaskFile, picture_of_IJK
from segdiff_dist.painting.model import Model
from segdiff_dist.painting.outline import with_outline
from segdiff_dist.painting.tables import OtherLabels
from segdiff_dist.sampling.config import LEAST_BATCH
from segdiff_dist.sampling.mask_folder import axis_of

if TYPE_CHECKING:
    from PIL.Image import Image

Outline = Literal["auto", "none"]
Noise = Literal["shared", "independent"]
DREW_OUTLINE = "the mask has no outline of the patient (class `body`): an ellipse around the organs is used"
PNG = ".png"
# What these settings may be: also from Python, where no parser has checked them.
_CHOICES = {
    "axis": tuple(AXES),
    "other_labels": get_args(OtherLabels),
    "outline": get_args(Outline),
    "noise": get_args(Noise),
}


@dataclass(frozen=True)
class Painting:
    """A finished image. `grey_IJK`: 0 to 255; `values_IJK`: int16, HU for CT. `labels`: the mask in the model's ids.
    `num_slices`: slices that were generated."""

    grey_IJK: np.ndarray
    values_IJK: np.ndarray
    labels: Volume
    mask: MaskFile
    grey: GreyMap
    modality: str
    axis: str
    model: Model
    num_slices: int
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> np.ndarray:
        """int16 in the layout of the mask that was given: [H, W], or [I, J, K] as stored."""
        return self._as_given(self.values_IJK)

    @property
    def pixels(self) -> np.ndarray:
        """uint8 in the same layout: grey values."""
        return self._as_given(np.rint(self.grey_IJK).astype(np.uint8))

    @property
    def image(self) -> Image:
        """The picture of a two-dimensional mask."""
        from PIL import Image

        if not self.mask.is_flat:
            raise problem(self.mask.where, "image", f"{len(self.mask.shape)}-D", "a volume has no one picture: .values")
        return Image.fromarray(np.ascontiguousarray(picture_of_IJK(np.rint(self.grey_IJK).astype(np.uint8))))

    def save(self, out: str | Path) -> None:
        """Write it by the ending: .png (grey values), .nii.gz, .nii, .mha, .nrrd (HU for CT), none: a folder with a
        DICOM series and a SEG. Raises InputProblems."""
        out = Path(out)
        refuse(out_problems(out, self.mask, self.model, self.modality))
        with explain_full_disk(out.absolute().parent):
            self._write(out)

    def _write(self, out: Path) -> None:
        if out.suffix.lower() == PNG:
            _save_png(out, self.image)
        elif is_dicom(out):
            in_hu = self.model.is_in_hu(self.modality)
            kind = dicom_kind(self.modality, in_hu) or "MR"
            config = VolumeConfig(modality=self.modality, axis=self.axis)  # type: ignore[arg-type]
            save_dicom(out, self.values_IJK, self.labels, self.grey, config, self.model.table, kind, in_hu=in_hu)
        else:
            affine = self.labels.affine if self.mask.affine is None else self.mask.affine
            is_flat = self.mask.kind == "volume" and self.mask.is_flat
            save_values(out, self.values_IJK, affine, self.mask.header, is_flat=is_flat)

    def _as_given(self, values_IJK: np.ndarray) -> np.ndarray:
        if self.mask.kind in ("picture", "array") and self.mask.is_flat:
            return np.ascontiguousarray(picture_of_IJK(values_IJK))
        if self.mask.affine is None:
            return values_IJK
        import nibabel as nib

        canonical = np.stack((np.arange(3), np.ones(3)), axis=1)
        own = nib.orientations.ornt_transform(canonical, nib.io_orientation(self.mask.affine))
        values = nib.apply_orientation(values_IJK, own)
        return values[..., 0] if self.mask.is_flat else values


@dataclass(frozen=True, kw_only=True)
class PaintOptions:
    """How a mask is read and its volume made, as `segdiff paint --help-all` says. They are seldom needed."""

    axis: str = "axial"
    other_labels: OtherLabels = "refuse"
    outline: Outline = "auto"
    noise: Noise = "shared"


@dataclass(frozen=True, kw_only=True)
class PaintSettings(PaintOptions):
    """All that a user chooses. `modality` None: the model's first."""

    modality: str | None = None
    seed: int = 0
    labels: Any = None


@dataclass(frozen=True)
class PaintSlices:
    """The slices of a mask, as the model takes them. `labels`: the mask in the model's ids."""

    cut_mask: CutMask
    item_ids: list[int]
    axis: str
    labels: Volume
    notes: tuple[str, ...]

    @property
    def mask_SHW(self) -> np.ndarray:
        """uint8 [S, H, W]."""
        return self.cut_mask.mask_SHW


@dataclass(frozen=True)
class PaintJob:
    """A checked job, made by `check_paint`: the only thing that can run."""

    mask: MaskFile
    model: Model
    settings: PaintSettings
    modality: str
    grey: GreyMap

    def make(self, *, shows_progress: bool = True) -> Painting:
        """Read the mask, generate its slices, put them back. Raises InputProblems for what only the voxels show."""
        cut_mask = self.cut()
        described = "paint" if shows_progress else None
        keys = cut_mask.item_ids, self.modality, cut_mask.axis, self.settings.seed
        return self.finished(cut_mask, self.model.pipeline.generate(cut_mask.mask_SHW, *keys, described))

    def cut(self) -> PaintSlices:
        """Read the mask: the slices to generate. Raises InputProblems for what only the voxels show."""
        read = self.mask.read(self.model.table, self.settings.labels, self.settings.other_labels)
        labels, notes = self._outlined(read)
        axis = axis_of(labels.voxels_IJK.shape, self.settings.axis)
        cut_mask = CutMask.of(labels, self._how(axis, labels), self.model.pipeline.size)
        unseen = unseen_axis(axis, self.model.preprocessing.get("axes", ()))
        notes += () if unseen is None else (unseen,)
        item_ids = [0] * len(cut_mask.indices) if self.settings.noise == "shared" else cut_mask.indices
        return PaintSlices(cut_mask, item_ids, axis, labels, notes)

    def finished(self, slices: PaintSlices, image_SHW: np.ndarray) -> Painting:
        """The generated images, uint8 [S, H, W], on the mask's voxels."""
        grey_IJK, shown_IJK = slices.cut_mask.back(image_SHW)
        grey_IJK = np.where(shown_IJK, grey_IJK, np.float32(0))
        return Painting(
            grey_IJK=grey_IJK,
            values_IJK=values_of(grey_IJK, self.grey),
            labels=slices.labels,
            mask=self.mask,
            grey=self.grey,
            modality=self.modality,
            axis=slices.axis,
            model=self.model,
            num_slices=len(image_SHW),
            notes=slices.notes,
        )

    def _outlined(self, read: LabelMask) -> tuple[Volume, tuple[str, ...]]:
        labels, table = read.labels, self.model.table
        notes: tuple[str, ...] = (f"labels: by {read.names.source}", *read.notes)
        if not labels.voxels_IJK.any():
            value = f"all background, by {read.names.source}"
            raise problem(self.mask.where, "mask", value, "draw at least one organ, or the patient's outline")
        if self.settings.outline == "none" or table.body_id is None or (labels.voxels_IJK == table.body_id).any():
            return labels, notes
        axis = axis_of(labels.voxels_IJK.shape, self.settings.axis)
        return with_outline(labels, table.body_id, axis), (*notes, DREW_OUTLINE)

    def _how(self, axis: str, labels: Volume) -> Cutting:
        how = cutting(self.model.preprocessing, axis, self.model.table)
        knows_mm = (
            self.mask.affine is not None or self.mask.knows_mm or not np.allclose(labels.spacing_mm, how.spacing_mm)
        )
        return replace(how, fit="pad", least_mm=self.model.field_mm if knows_mm else 0.0)

    @property
    def seconds(self) -> float:
        """The time for all slices, from a pass of the network on its device."""
        from segdiff_dist.denoising.samplers import num_evaluations
        from segdiff_dist.sampling.plan import seconds_of_a_pass

        pipeline = self.model.pipeline
        passes = num_evaluations(pipeline.sampler, pipeline.diffusion)
        return max(self.num_slices, LEAST_BATCH) * passes * seconds_of_a_pass(pipeline.model, pipeline.device)

    @property
    def num_slices(self) -> int:
        """At most as many as are generated."""
        if self.mask.is_flat or self.mask.affine is None:
            return 1 if self.mask.is_flat else self.mask.shape[VIEWS[self.settings.axis][0]]
        import nibabel as nib

        along = int(np.argsort(nib.io_orientation(self.mask.affine)[:, 0])[VIEWS[self.settings.axis][0]])
        return self.mask.shape[along]


def check_paint(mask: MaskFile, model: Model, settings: PaintSettings, out: Path | None = None) -> PaintJob:
    """Find the problems that show before a voxel is read; raises InputProblems."""
    known = model.modalities
    chosen = known[0] if settings.modality is None else settings.modality
    problems = [] if out is None else out_problems(out, mask, model, chosen)
    if chosen not in known:
        problems.append(Problem(model.name, "--modality", chosen, f"the model knows {', '.join(known)}"))
    for name, allowed in _CHOICES.items():
        if (given := getattr(settings, name)) not in allowed:
            flag = f"--{name.replace('_', '-')}"
            problems.append(Problem("command line", flag, str(given), f"give one of {', '.join(allowed)}"))
    seed: Any = settings.seed
    if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        problems.append(Problem("command line", "--seed", str(seed), f"give a whole number from 0 to {2**63 - 1}"))
    refuse(problems)
    if not model.pipeline.model.config.class_conditioning and len(known) > 1:
        warnings.warn(f"{model.name}: the model ignores the modality", stacklevel=2)
    return PaintJob(mask, model, settings, chosen, model.grey(chosen))


def out_problems(out: Path, mask: MaskFile, model: Model, modality: str) -> list[Problem]:
    """Why the image cannot be written to `out`."""
    problems = []
    if out.exists():
        problems.append(Problem(str(out), "output", "exists already", "remove it, or give another name"))
    if not out.absolute().parent.is_dir():
        problems.append(Problem(str(out), "output", "its folder does not exist", "make it first"))
    if out.suffix.lower() == PNG:
        if not mask.is_flat:
            remedy = "a PNG holds one slice: let the name end in .nii.gz, .mha or .nrrd, or give a folder for DICOM"
            problems.append(Problem(str(out), "output", f"a PNG for a mask of {len(mask.shape)} dimensions", remedy))
        return problems
    problems += kind_problems(out, mask.affine, (PNG,) if mask.is_flat else ())
    if is_dicom(out) and dicom_kind(modality, model.is_in_hu(modality)) is None:
        problems += problems_without_kind(out, [modality])
    return problems


def _save_png(out: Path, image: Image) -> None:
    from data_shards.files import new_file

    with new_file(out) as unfinished:
        image.save(unfinished, format="PNG")
