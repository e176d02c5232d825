"""A whole volume from a mask volume: cut into slices as `segdiff prepare` does, generated, put back where the mask is.

Dimensions: I, J, K canonical (right, anterior, superior); S slices generated; H rows, W columns.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_shards.ingest.body import BodyField, find_body
from data_shards.ingest.cases import read_header
from data_shards.ingest.counts import dimension_through
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.volumes import UnreadableVolume, Volume, read_labels, read_volume
from data_shards.labels import UNUSED, LabelTable
from data_shards.problems import Problem, explain_full_disk, problem, refuse
from segdiff_dist.export.config import VolumeConfig
from segdiff_dist.export.dicom import Kind, dicom_kind, problems_without_kind
from segdiff_dist.export.samples import HU_BY_MEDIAN, grey_map_of, is_stretched, unknown_hu
from segdiff_dist.export.slicewise import CutMask, Generate, cutting, values_of
from segdiff_dist.export.volume_out import is_dicom, kind_problems, save_dicom, save_file

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.pipeline import SegGuidedPipeline

# Printed before the work: a volume without an outline takes as long as one with it.
_NO_BODY = (
    "no voxel shows the patient's outline (class `body`): the model invents it, slice by slice, or leaves organs in "
    "black air; for an outline give an image of the patient: --volume.body-image IMAGE"
)
# Number of pairs of neighbouring real slices whose difference is measured.
_REAL_PAIRS = 64
# How much smaller or larger than any slice of the set: the body of a child is half as wide as that of a large adult.
_MUCH = 1.5


@dataclass(frozen=True)
class VolumeReport:
    """The result. `outside`: the share of labelled voxels outside of the slices. Differences are mean absolute
    differences between neighbouring slices, in grey values: of some slices with the chosen noise, of the same slices
    with the other noise, and of real slices with about the same distance; None if there are none to measure. `gap_mm`:
    the distance of generated and of real slices."""

    num_slices: int
    outside: float
    has_body: bool
    difference: float | None
    difference_other: float | None
    difference_real: float | None
    gap_mm: tuple[float, float]


def make_volume(
    mask_file: Path, out: Path, generate: Generate, size: int, shards: ShardSet, config: VolumeConfig
) -> VolumeReport:
    """Write the image of a mask volume to `out`: int16, HU or grey values, with the mask's shape, affine and codes; as
    DICOM, if `out` has no ending.

    `shards`: the set that the model was trained on; the model got the central `size` pixels of its slices. Raises
    InputProblems: an unreadable mask, ids that the set's labels do not have, unknown HU, an `out` that exists or has no
    name of a volume.
    """
    return check_volume(mask_file, out, shards, config).make(generate, size)


@dataclass(frozen=True)
class VolumeJob:
    """A checked job, made by `check_volume`: the only thing that can run. `kind`: of
    DICOM images, None if there is none; `num_voxels`, `num_slices`: of the mask."""

    mask_file: Path
    out: Path
    shards: ShardSet
    config: VolumeConfig
    grey: GreyMap
    kind: Kind | None
    num_voxels: int
    num_slices: int

    @property
    def num_bytes(self) -> int:
        """What is written: one int16 a voxel."""
        return 2 * self.num_voxels

    def make(self, generate: Generate, size: int) -> VolumeReport:
        """Generate the slices and write the volume; parameters and errors as of `make_volume`."""
        return _make(self, generate, size)


def check_volume(mask_file: Path, out: Path, shards: ShardSet, config: VolumeConfig) -> VolumeJob:
    """Find the problems that show before a voxel is read; raises InputProblems."""
    grey = grey_map_of(config.modality, shards.index["preprocessing"], shards)
    unknown = [unknown_hu(shards.root, "give a set with CT in it, or --modality MR")] if grey is None else []
    kind = dicom_kind(config.modality, config.modality in shards.in_hu)
    if is_dicom(out) and kind is None:
        unknown += problems_without_kind(out, [config.modality])
    refuse([*volume_problems(mask_file, out, config), *unknown])
    assert grey is not None
    shape, affine = read_header(mask_file, []) or ((0, 0, 0), np.eye(4))
    num_slices = shape[dimension_through(affine, config.axis)]
    return VolumeJob(mask_file, out, shards, config, grey, kind, int(np.prod(shape)), num_slices)


@dataclass(frozen=True)
class MadeVolume:
    """The generated values on the canonical voxels of the mask, int16 and HU for CT, and where slices reach."""

    values_IJK: np.ndarray
    shown_IJK: np.ndarray
    labels: Volume
    report: VolumeReport


def _make(job: VolumeJob, generate: Generate, size: int) -> VolumeReport:
    if job.out.exists():  # written by another command since the check
        refuse(volume_problems(job.mask_file, job.out, job.config))
    made = generate_volume(job, generate, size)
    with explain_full_disk(job.out.parent):
        if is_dicom(job.out):
            table = job.shards.label_table
            in_hu, kind = job.config.modality in job.shards.in_hu, job.kind or "MR"
            save_dicom(job.out, made.values_IJK, made.labels, job.grey, job.config, table, kind, in_hu=in_hu)
        else:
            save_file(job.out, made.values_IJK, job.mask_file)
    return made.report


def generate_volume(job: VolumeJob, generate: Generate, size: int) -> MadeVolume:
    """Everything but the writing."""
    shards, config, grey = job.shards, job.config, job.grey
    if config.modality in shards.in_hu and is_stretched(shards.index["preprocessing"]):
        warnings.warn(HU_BY_MEDIAN, stacklevel=2)
    labels = _read_mask(job.mask_file, shards.label_table)
    cut_mask = _cut(labels, shards, config, size)
    mask_SHW, indices = cut_mask.mask_SHW, cut_mask.indices
    if (note := _field_note(cut_mask, labels, shards, config.axis)) is not None:
        warnings.warn(note, stacklevel=2)
    body_id = shards.label_table.body_id
    has_body = body_id is None or bool((mask_SHW == body_id).any())
    if not has_body:
        warnings.warn(_NO_BODY, stacklevel=2)
    image_SHW = generate(mask_SHW, indices, config.noise == "shared")
    grey_IJK, shown_IJK = cut_mask.back(image_SHW)
    values_IJK = values_of(grey_IJK, grey)
    labelled_IJK = labels.voxels_IJK > 0
    outside = 1.0 - float(shown_IJK[labelled_IJK].mean()) if labelled_IJK.any() else 0.0
    probe = _probe(mask_SHW, config.probe_slices)
    difference: float | None = None
    other: float | None = None
    real: float | None = None
    gap = real_gap = 1
    if probe is not None:
        other_SHW = generate(mask_SHW[probe], indices[probe], config.noise != "shared")
        difference, other = slice_difference(image_SHW[probe]), slice_difference(other_SHW)
        gap = round(float(np.median(np.diff(indices[probe]))))
        real, real_gap = real_difference(shards, config.modality, config.axis, gap, size)
    spacing_mm = shards.index["preprocessing"].get("spacing_mm", PrepareConfig.spacing_mm)
    gap_mm = (gap * spacing_mm, real_gap * spacing_mm)
    report = VolumeReport(len(mask_SHW), outside, has_body, difference, other, real, gap_mm)
    return MadeVolume(values_IJK, shown_IJK, labels, report)


def check_voxels(job: VolumeJob) -> None:
    """Read mask and body image; raises InputProblems for what only their voxels show."""
    _read_body_image(_read_mask(job.mask_file, job.shards.label_table), job.config)


def slice_generator(pipeline: SegGuidedPipeline, config: VolumeConfig, seed: int) -> Generate:
    """Slice k has the noise of (seed, item k), or all slices have that of item 0."""

    def generate(mask_SHW: np.ndarray, indices: list[int], shared: bool) -> np.ndarray:
        item_ids = [0] * len(indices) if shared else indices
        return pipeline.generate(mask_SHW, item_ids, config.modality, config.axis, seed, described="volume")

    return generate


def volume_problems(mask_file: Path, out: Path, config: VolumeConfig) -> list[Problem]:
    """The problems that show before a voxel is read."""
    problems, header = config.problems(), None
    if mask_file.is_dir():
        remedy = "give one volume, or --volume.format nnunet for all of it"
        problems.append(Problem(str(mask_file), "mask", "a folder", remedy))
    elif not mask_file.is_file():
        problems.append(Problem(str(mask_file), "mask", "not found", "give a volume of label ids"))
    else:
        header = read_header(mask_file, problems)
    if config.body_image is not None and not config.body_image.is_file():
        problems.append(
            Problem("config", "volume.body_image", str(config.body_image), "not found: give a NIfTI volume")
        )
    problems += kind_problems(out, None if header is None else header[1])
    if out.exists():
        problems.append(Problem(str(out), "output", "exists already", "remove it, or give another name"))
    if not out.absolute().parent.is_dir():
        problems.append(Problem(str(out), "output", "its folder does not exist", "make it first"))
    return problems


def slice_difference(image_SHW: np.ndarray) -> float:
    """Mean absolute difference between neighbouring slices, in grey values."""
    return float(np.abs(np.diff(image_SHW.astype(np.float32), axis=0)).mean())


def real_difference(shards: ShardSet, modality: str, axis: str, gap: int, size: int) -> tuple[float | None, int]:
    """The same for the set's real slices that are about `gap` slice indices apart, None if it has no such pair; and
    their distance, since a set may hold only every n-th slice."""
    rows = shards.select(modalities=[modality], axes=[axis], labelled_only=False)
    table = shards.samples.select(("case_id", "slice_index")).take(rows).to_pylist()
    row_at = {(one["case_id"], one["slice_index"]): int(row) for one, row in zip(table, rows, strict=True)}
    stride = int(shards.index["preprocessing"].get("slice_stride", PrepareConfig.slice_stride))
    near = max(1, round(gap / stride)) * stride
    pairs = [(row, row_at[case, k + near]) for (case, k), row in row_at.items() if (case, k + near) in row_at]
    chosen = pairs[:: max(1, len(pairs) // _REAL_PAIRS)]
    both = [np.stack([shards.read(row).cropped(size).image_uint8() for row in pair]) for pair in chosen]
    return (float(np.mean([slice_difference(image_2HW) for image_2HW in both])) if both else None), near


def _read_mask(file: Path, table: LabelTable) -> Volume:
    try:
        labels = read_labels(file, 256)
    except UnreadableVolume as error:
        raise problem(file, "voxels", error.reason, f"give a mask with ids of {table.name!r}, the model's") from error
    known = {i for i, name in enumerate(table.names) if name != UNUSED}
    unknown = sorted(set(np.unique(labels.voxels_IJK).tolist()) - known)
    if unknown:
        raise problem(file, "label ids", unknown, f"no class of {table.name!r}, which the model knows: relabel them")
    return labels


def _cut(labels: Volume, shards: ShardSet, config: VolumeConfig, size: int) -> CutMask:
    """Every slice of the mask along the axis, as those of the set were cut."""
    like: Literal["CT", "MR"] = "CT" if config.modality in shards.in_hu else "MR"
    how = cutting(shards.index["preprocessing"], config.axis, shards.label_table)
    return CutMask.of(labels, how, size, _body(labels, config, like))


def _field_note(cut_mask: CutMask, labels: Volume, shards: ShardSet, axis: str) -> str | None:
    """A text if the mask's slices show much less or much more of the patient than those of the set."""
    rows = shards.select(axes=[axis], labelled_only=False)
    if not len(rows):
        return None
    mm_N = np.array(shards.samples["spacing_mm"].take(rows).to_pylist(), np.float64).max(axis=-1)
    place, size = cut_mask.place, cut_mask.mask_SHW.shape[-1]
    own_mm = abs(place.rows[1]) * float(labels.spacing_mm[place.view[1]])
    if mm_N.min() / _MUCH <= own_mm <= mm_N.max() * _MUCH:
        return None
    usual = f"{size * mm_N.min():.0f} to {size * mm_N.max():.0f} mm"
    return (
        f"slices of this mask show {size * own_mm:.0f} mm, those that the model was trained on {usual}: organs are in "
        f"another size than it knows; `segdiff paint --model RUN` puts a small mask into a field of the usual size"
    )


def _body(labels: Volume, config: VolumeConfig, like: Literal["CT", "MR"]) -> BodyField | None:
    """The patient's voxels, from config.body_image, whose values are like those of CT or MR; None without it."""
    image = _read_body_image(labels, config)
    return None if image is None else find_body(image, like)


def _read_body_image(labels: Volume, config: VolumeConfig) -> Volume | None:
    if config.body_image is None:
        return None
    try:
        image = read_volume(config.body_image)
    except UnreadableVolume as error:
        raise problem(config.body_image, "voxels", error.reason, "give the image that the mask was drawn on") from error
    same = image.voxels_IJK.shape == labels.voxels_IJK.shape and np.allclose(image.affine, labels.affine, atol=1e-3)
    if not same:
        remedy = "give the image that the mask was drawn on"
        raise problem(config.body_image, "shape, affine", "not those of the mask", remedy)
    return image


def _probe(mask_SHW: np.ndarray, num: int) -> slice | None:
    """`num` consecutive slices, in the middle of those whose masks are not empty."""
    shown = np.flatnonzero(mask_SHW.any(axis=(1, 2)))
    if num == 0 or len(mask_SHW) < 2:
        return None
    middle = int(shown[len(shown) // 2]) if len(shown) else len(mask_SHW) // 2
    first = max(0, min(middle - num // 2, len(mask_SHW) - num))
    return slice(first, first + num)
