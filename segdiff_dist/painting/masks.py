"""Masks of any kind as label volumes in the model's ids: PNG, NIfTI, MetaImage, NRRD, DICOM SEG, arrays.

Dimensions: H rows, W columns of a picture; I, J, K canonical (right, anterior, superior).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_shards.ingest.dicom_files import library, quiet
from data_shards.ingest.dicom_labels import undeclared
from data_shards.ingest.dicom_series import to_ras
from data_shards.ingest.itk_files import is_itk
from data_shards.ingest.nifti import problems_in_space
from data_shards.ingest.png_files import read_png_header, read_png_ids
from data_shards.ingest.volume_files import ENDINGS, read_geometry
from data_shards.ingest.volumes import UnreadableVolume, Volume, read_labels
from data_shards.labels import LabelTable
from data_shards.problems import InputProblems, problem, refuse
from segdiff_dist.painting.tables import (
    LabelNames,
    OtherLabels,
    given_names,
    matched,
    slicer_names,
    unknown_labels,
)

Kind = Literal["picture", "volume", "dicom", "array"]
_NUM_IDS = 256
_MOST_IDS = 2**16
# A volume of 1024 x 1024 x 512: more takes days to make, and more memory than a machine has.
_MOST_VOXELS = 2**29
# The side of a pixel: from that of a micrograph to the width of a patient.
_LEAST_MM, _MOST_MM = 0.01, 100.0
_MM_OF_UNIT = {"meter": 1e3, "micron": 1e-3}
_WHOLE_IDS = "give whole numbers, one a voxel"
_KINDS = f".png, {', '.join(ENDINGS)}, or DICOM SEG (.dcm)"


@dataclass(frozen=True)
class MaskFile:
    """A mask whose header was read. `shape`: as stored. `is_flat`: two-dimensional. `affine`: None if the format
    does not hold it. `knows_mm`: of a picture whose pixels' size was given."""

    where: str
    kind: Kind
    shape: tuple[int, ...]
    is_flat: bool
    affine: np.ndarray | None
    read: Callable[[LabelTable, Any, OtherLabels], LabelMask]
    file: Path | None = None
    header: Any = None
    knows_mm: bool = False


@dataclass(frozen=True)
class LabelMask:
    """A mask in the ids of the model's table. `names`: who said what the ids mean. `notes`: guesses about its place."""

    labels: Volume
    names: LabelNames
    notes: tuple[str, ...] = ()


def open_mask(
    mask: Any, *, affine: np.ndarray | None = None, grid_mm: float = 1.0, spacing_mm: float | None = None
) -> MaskFile:
    """The mask's shape, from its header alone. `mask`: a file, an array [H, W] or [I, J, K], or a PIL image. `affine`:
    of an array [I, J, K], its voxels to RAS mm. `spacing_mm`: the side of a picture's pixels (PNG, PIL, [H, W]), which
    has none of its own; null: it is taken as `grid_mm`. Raises InputProblems."""
    if spacing_mm is None:
        return _opened(mask, affine, grid_mm)
    given: Any = spacing_mm
    if not isinstance(given, Real) or not _LEAST_MM <= spacing_mm <= _MOST_MM:
        raise problem("mask", "--spacing", spacing_mm, f"give mm, from {_LEAST_MM} to {_MOST_MM}")
    opened = _opened(mask, affine, spacing_mm)
    if opened.affine is not None or not opened.is_flat:
        remedy = "a spacing is for pictures (PNG, or [H, W]): leave it out"
        raise problem(opened.where, "--spacing", "given for a mask with places of its own", remedy)
    return replace(opened, knows_mm=True)


def _opened(mask: Any, affine: np.ndarray | None, grid_mm: float) -> MaskFile:
    if not isinstance(mask, str | Path):
        if (mode := getattr(mask, "mode", None)) is not None and len(mask.getbands()) > 1:  # a PIL image
            remedy = "a mask has one channel: save it as grey, each pixel a label id (0 is background)"
            raise problem("mask", "image", f"{mode} pixels", remedy)
        return _of_array(np.asarray(mask), affine, grid_mm)
    file = Path(mask)
    name = file.name.lower()
    if not file.is_file():
        value = "a folder" if file.is_dir() else "not found"
        raise problem(file, "mask", value, f"give one file: {_KINDS}; `segdiff sample --masks` takes a folder")
    if name.endswith(".png"):
        return _of_png(file, grid_mm)
    if name.endswith(ENDINGS):
        return _of_volume(file)
    if name.endswith(".dcm") or _is_dicom(file):
        return _of_seg(file)
    raise problem(file, "mask", f"the ending {file.suffix or '(none)'}", f"give {_KINDS}")


def picture_to_IJK(mask_HW: np.ndarray) -> np.ndarray:
    """[W, H, 1] of a picture shown the radiological way: the patient's right on its left, the front up."""
    return mask_HW[::-1, ::-1].T[..., None]


def picture_of_IJK(voxels_IJK: np.ndarray) -> np.ndarray:
    """The picture [H, W] of a volume of one plane."""
    return voxels_IJK[..., 0].T[::-1, ::-1]


def _of_png(file: Path, grid_mm: float) -> MaskFile:
    header = read_png_header(file, None)

    def read(table: LabelTable, labels: Any, others: OtherLabels) -> LabelMask:
        ids_HW = read_png_ids(file, None, _NUM_IDS, any_palette=labels is not None, flag="--labels")
        names = given_names(labels, file, table)
        new_HW = _renumbered(ids_HW, names, table, str(file), others)
        return LabelMask(_volume(picture_to_IJK(new_HW), np.diag([grid_mm] * 3 + [1.0])), names)

    return MaskFile(str(file), "picture", (header.height, header.width), True, None, read, file)


def _of_volume(file: Path) -> MaskFile:
    geometry = read_geometry(file, one_slice=True)
    _refuse_large(str(file), geometry.shape)
    header = None if is_itk(file) else geometry.header

    def read(table: LabelTable, labels: Any, others: OtherLabels) -> LabelMask:
        segments = slicer_names(file) if labels is None else {}
        names = LabelNames({0: "background"} | segments, str(file)) if segments else given_names(labels, file, table)
        ids = _complete(matched(names, table, str(file), others), names, others, table)
        try:
            volume = read_labels(file, _NUM_IDS, ids=ids, one_slice=True)
        except UnreadableVolume as error:
            _explain(file, names, table, ids)
            raise problem(file, "voxels", error.reason, _WHOLE_IDS) from error
        return LabelMask(volume, names, geometry.notes)

    affine = geometry.affine if is_itk(file) else _as_thick_as_stored(file, geometry.affine)
    return MaskFile(str(file), "volume", geometry.shape, geometry.is_flat, affine, read, file, header)


def _as_thick_as_stored(file: Path, affine: np.ndarray) -> np.ndarray:
    """Of one plane, in two or three dimensions, which is read as thick as its pixels are wide. Widths that stand for
    none stay so."""
    import nibabel as nib

    stored = nib.load(file)
    own, read = (np.linalg.norm(one[:3, :3], axis=0) for one in (stored.affine, affine))
    factor = _MM_OF_UNIT.get(stored.header.get_xyzt_units()[0], 1.0)
    thick = affine.copy()
    for d in np.flatnonzero(np.array((*stored.shape, 1)[:3]) == 1).tolist():
        length = own[d] * factor
        if 0 < length <= _MOST_MM:
            thick[:3, d] *= length / read[d]
    return thick


def _complete(ids: dict[int, int], names: LabelNames, others: OtherLabels, table: LabelTable) -> dict[int, int]:
    """With ids that nothing names, if all others are to become body or background."""
    if others == "refuse":
        return ids
    new = 0 if others == "background" or table.body_id is None else table.body_id
    return dict.fromkeys(range(_MOST_IDS), new) | ids


def _explain(file: Path, names: LabelNames, table: LabelTable, ids: Mapping[int, int]) -> None:
    """Refuse a volume for all its unknown ids at once, by their names; nothing if another fault is the reason."""
    try:
        # Every id is known here, and those above the table's become 255.
        volume = read_labels(file, _NUM_IDS, one_slice=True)
    except UnreadableVolume:
        return
    present = np.flatnonzero(np.bincount(volume.voxels_IJK.ravel(order="K"), minlength=_NUM_IDS)).tolist()
    unknown = {number: names.by_id.get(number) for number in present if number not in ids}
    refuse([unknown_labels(str(file), unknown, table, names.source)] if unknown else [])


def _of_seg(file: Path) -> MaskFile:
    highdicom = library("highdicom", file)
    try:
        with quiet():
            segments = highdicom.seg.segread(file)
            geometry = segments.get_volume_geometry()
            names = {int(one.SegmentNumber): str(one.SegmentLabel).strip() for one in segments.SegmentSequence}
    except Exception as error:  # pydicom raises whatever the bytes lead it to
        value = f"no SEG that can be read ({type(error).__name__})"
        raise problem(file, "DICOM", value, "give a DICOM Segmentation object") from error
    if geometry is None:
        raise problem(file, "DICOM SEG", "its frames are not on one even grid", "resample it to a volume")
    if str(segments.get("SegmentationType")) == "FRACTIONAL":
        raise problem(file, "DICOM SEG", "FRACTIONAL", "save it as BINARY")
    shape, affine = tuple(map(int, geometry.spatial_shape[::-1])), to_ras(geometry)
    _refuse_large(str(file), shape)

    def read(table: LabelTable, labels: Any, others: OtherLabels) -> LabelMask:
        known = LabelNames({0: "background"} | {n: name for n, name in names.items() if n}, "its segments")
        if labels is not None:
            known = given_names(labels, None, table)
        ids = matched(known, table, str(file), others)
        if unknown := {number: name for number, name in names.items() if number not in ids}:
            refuse([unknown_labels(str(file), unknown, table, known.source)])
        return LabelMask(_canonical(_drawn(file, segments, ids, table), affine, file.read_bytes()), known)

    return MaskFile(str(file), "dicom", shape, False, affine, read, file)


def _drawn(file: Path, segments: Any, ids: Mapping[int, int], table: LabelTable) -> np.ndarray:
    """uint8 [I, J, K] as stored; other segments are painted over `body`."""
    drawn: np.ndarray | None = None
    try:
        with quiet():
            unknown = undeclared(segments)
    except Exception as error:  # pydicom raises whatever the bytes lead it to
        raise _unreadable_frames(file, error) from error
    if unknown:
        value = f"values of no segment: {unknown[:4]}"
        raise problem(file, "DICOM SEG", value, "write it again with all its segments")
    for number, new in sorted(ids.items(), key=lambda one: one[1] != table.body_id):
        if number == 0 or new == 0:
            continue
        try:
            with quiet():
                volume = segments.get_volume(segment_numbers=[number], combine_segments=True)
        except Exception as error:  # pydicom raises whatever the bytes lead it to
            raise _unreadable_frames(file, error) from error
        inside = np.equal(volume.array, number).T
        drawn = np.zeros(inside.shape, np.uint8) if drawn is None else drawn
        before = drawn[inside]
        if ((before != 0) & (before != new) & (before != (table.body_id or 0))).any():
            remedy = "give one of them to background or both to one class, with --labels"
            raise problem(file, "DICOM SEG", f"{table.names[new]} overlaps another segment", remedy)
        drawn[inside] = new
    if drawn is None:
        raise problem(file, "DICOM SEG", "no segment of the model's classes", "name the segments as the model does")
    return drawn


def _unreadable_frames(file: Path, error: Exception) -> InputProblems:
    value = f"its frames cannot be read ({type(error).__name__})"
    return problem(file, "DICOM", value, "copy it again from where it was made")


def _of_array(mask: np.ndarray, affine: np.ndarray | None, grid_mm: float) -> MaskFile:
    if mask.ndim not in (2, 3) or mask.size == 0 or mask.dtype.kind not in "bui":
        value = f"{mask.dtype} of shape {mask.shape}"
        raise problem("mask", "array", value, "give whole numbers, the label ids, [H, W] or [I, J, K]")
    _refuse_large("mask", mask.shape)
    if affine is not None:
        affine = np.asarray(affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise problem("mask", "affine", str(affine.tolist())[:120], "give 4 x 4 finite numbers: voxels to RAS mm")
        refuse(problems_in_space(Path("mask"), affine))

    def read(table: LabelTable, labels: Any, others: OtherLabels) -> LabelMask:
        names = given_names(labels, None, table)
        new = _renumbered(mask, names, table, "mask", others)
        if mask.ndim == 2:
            own = affine if affine is not None else np.diag([grid_mm] * 3 + [1.0])
            return LabelMask(_volume(picture_to_IJK(new), own), names)
        return LabelMask(_canonical(new, np.eye(4) if affine is None else affine, new.tobytes()), names)

    return MaskFile("mask", "array", mask.shape, mask.ndim == 2, affine, read)


def _renumbered(ids: np.ndarray, names: LabelNames, table: LabelTable, where: str, others: OtherLabels) -> np.ndarray:
    """uint8: the model's ids of a mask's."""
    new_of = _complete(matched(names, table, where, others), names, others, table)
    present = np.unique(ids).tolist()
    if unknown := {int(one): names.by_id.get(int(one)) for one in present if int(one) not in new_of}:
        refuse([unknown_labels(where, unknown, table, names.source)])
    look_up = np.zeros(int(max(present)) + 1, np.uint8)
    look_up[[int(one) for one in present]] = [new_of[int(one)] for one in present]
    return look_up[ids.astype(np.int64)]


def _canonical(voxels: np.ndarray, affine: np.ndarray, content: bytes) -> Volume:
    import nibabel as nib

    orientation = nib.io_orientation(affine)
    turned = affine @ nib.orientations.inv_ornt_aff(orientation, voxels.shape)
    return Volume(nib.apply_orientation(voxels, orientation), 1.0, 0.0, turned, hashlib.sha256(content).hexdigest())


def _volume(voxels_IJK: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(voxels_IJK, 1.0, 0.0, affine, hashlib.sha256(voxels_IJK.tobytes()).hexdigest())


def _refuse_large(where: str, shape: tuple[int, ...]) -> None:
    if (num := int(np.prod(shape, dtype=object))) > _MOST_VOXELS:
        raise problem(where, "shape", f"{shape} is {num:,} voxels", f"at most {_MOST_VOXELS:,} are read: resample it")


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
