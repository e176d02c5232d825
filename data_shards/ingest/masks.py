"""The mask of a case in a label set: the experts' organs, a whole-body tool's classes, or the former over the latter.

Whole-body masks of any tool are in one folder, WHOLEBODY/<case id>.nii.gz or .nii, in the ids of labels.WHOLEBODY.
WHOLEBODY/annotations.json, if it exists, names the tool (`segdiff annotate` writes it).

Dimensions: I right, J anterior, K superior (canonical, RAS+).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.documents import read_json
from data_shards.ingest.cases import (
    AFFINE_TOLERANCE_VOXELS,
    Case,
    largest_shift_voxels,
    nifti_files,
    side_problems,
)
from data_shards.ingest.dicom_labels import DicomLabels
from data_shards.ingest.label_tables import Labelling
from data_shards.ingest.volume_files import read_geometry
from data_shards.ingest.volumes import UnreadableVolume, Volume, read_dicom_labels, read_labels
from data_shards.labels import AMOS, AMOS_TO_WHOLEBODY, BODY, FROM_EXPERTS, LABEL_TABLES, UNUSED, WHOLEBODY
from data_shards.problems import InputProblems, Problem, problem
from data_shards.records import MASK_SOURCES

ANNOTATIONS = "annotations.json"
ANNOTATIONS_VERSION = 1
# A whole-body mask on another grid is used when its field holds this share of the image's voxels. Tools crop a slice or
# two at the ends of a stack; a mask of another field of view would call most of the patient unlabelled.
LEAST_COVER = 0.95
# A voxel centre counts as inside the mask's grid up to half a mask voxel beyond its outermost centres, and this much
# for rounding.
_EDGE_VOXELS = 0.5 + 1e-4


@dataclass(frozen=True)
class CaseMask:
    """A case's mask, uint8 ids of the label set's table on the image's canonical grid, and who drew it (MASK_SOURCES).
    `volume` is None if nobody drew one."""

    volume: Volume | None
    source: str

    def __post_init__(self) -> None:
        assert self.source in MASK_SOURCES
        assert (self.volume is None) == (self.source == "none")


def read_case_mask(
    case: Case, image: Volume, label_set: str, wholebody: Path | None, labelling: Labelling | None = None
) -> CaseMask:
    """The mask of `case`, whose image is given, in the ids of LABEL_TABLES[label_set], or of labelling's own table.

    amos, and others of FROM_EXPERTS: the experts' labels. wholebody: the case's file in `wholebody`. merged: that file
    with the experts' organs laid over it; where one of the two is missing, the other alone. In `merged` the experts'
    outline is the organ's outline: if they drew an organ anywhere in the case, it is only there, and other pixels that
    the whole-body mask gives to it become `body`. Organs that they did not draw (MR has no bladder in AMOS) stay as in
    the whole-body mask.

    Raises UnreadableVolume for files that cannot be read, ids outside their table, and a whole-body mask whose field
    holds less than LEAST_COVER of the image's voxels.
    """
    assert label_set in LABEL_TABLES
    assert AMOS.body_id is not None
    shape = image.voxels_IJK.shape
    expert = None
    if case.is_labelled and label_set != "wholebody":
        drawn = _read_experts(case, labelling)
        expert = resampled_to_grid(drawn, shape, image.affine, case.sources[1])
    if labelling is not None and labelling.is_own:
        return CaseMask(expert, "none" if expert is None else "expert")
    if label_set in FROM_EXPERTS:
        if expert is not None and label_set != AMOS.name:
            expert = replace(expert, voxels_IJK=np.array(FROM_EXPERTS[label_set], np.uint8)[expert.voxels_IJK])
        return CaseMask(expert, "none" if expert is None else "expert")
    file = None if wholebody is None else _wholebody_file(wholebody, case.case_id)
    whole = None if file is None else resampled_to_grid(read_wholebody(file), shape, image.affine, file)
    if whole is not None and expert is not None:
        return CaseMask(_laid_over(expert, whole), "merged")
    if expert is not None:
        return CaseMask(_laid_over(expert, None), "expert")
    return CaseMask(whole, "none" if whole is None else "wholebody")


def _read_experts(case: Case, labelling: Labelling | None) -> Volume:
    """The experts' labels, in AMOS' ids, or renumbered. A voxel in the files of several organs belongs to the last of
    them."""
    assert AMOS.body_id is not None
    ids = None if labelling is None else labelling.ids
    if isinstance(case.label, DicomLabels):
        assert ids is not None
        assert labelling is not None
        return read_dicom_labels(case.label, ids, labelling.table.body_id if labelling.is_own else AMOS.body_id)
    if case.label is not None:
        pixel = case.pixel_of(case.label)
        return read_labels(case.label, AMOS.body_id, ids=ids, one_slice=case.is_flat, pixel=pixel)
    assert ids is not None
    drawn: Volume | None = None
    num_twice = 0
    for stored, file in case.organs:
        organ = read_labels(file, 2)
        if drawn is None:
            drawn = replace(organ, voxels_IJK=np.zeros_like(organ.voxels_IJK))
        elif organ.voxels_IJK.shape != drawn.voxels_IJK.shape:
            raise UnreadableVolume(str(file), f"{organ.voxels_IJK.shape} voxels, other organs {drawn.voxels_IJK.shape}")
        inside = organ.voxels_IJK > 0
        num_twice += int(np.count_nonzero(drawn.voxels_IJK[inside] * (drawn.voxels_IJK[inside] != ids[stored])))
        drawn.voxels_IJK[inside] = ids[stored]
    assert drawn is not None
    if not num_twice:
        return drawn
    note = f"{num_twice} voxels are in several organs, and belong to the last of them by name; correct their files"
    return replace(drawn, notes=(*drawn.notes, note))


def read_wholebody(file: Path) -> Volume:
    """A whole-body mask as stored. Raises UnreadableVolume also for ids that are not classes of the whole-body
    table."""
    assert WHOLEBODY.body_id is not None
    volume = read_labels(file, WHOLEBODY.body_id)
    unused = WHOLEBODY.names.index(UNUSED)
    if any((plane == unused).any() for plane in np.moveaxis(volume.voxels_IJK, 2, 0)):
        raise UnreadableVolume(
            str(file),
            f"label id {unused} is not a class of the whole-body table: the mask has the ids of another table",
        )
    return volume


def resampled_to_grid(mask: Volume, shape: Sequence[int], affine: np.ndarray, file: object) -> Volume:
    """The mask on the grid (shape, affine): unchanged if it is already on that grid, else by nearest neighbour.

    Affines must be invertible. Works plane by plane: besides the result it holds six floats a voxel of one plane.
    Raises UnreadableVolume if the mask's field holds less than LEAST_COVER of the grid's voxels; `file` is its name.
    """
    if tuple(shape) == mask.voxels_IJK.shape and (
        largest_shift_voxels(mask.voxels_IJK.shape, affine, mask.affine) <= AFFINE_TOLERANCE_VOXELS
    ):
        return mask
    to_mask = np.linalg.inv(mask.affine) @ affine
    last = np.array(mask.voxels_IJK.shape) - 1
    row, column = (np.arange(n, dtype=np.float64) for n in shape[:2])
    result = np.zeros(tuple(shape), np.uint8, order="F")
    num_inside = 0
    for k in range(shape[2]):
        inside = np.ones(result.shape[:2], dtype=bool)
        nearest = []
        for (by_i, by_j, by_k, start), end in zip(to_mask[:3], last, strict=True):
            position = (by_i * row)[:, None] + (by_j * column + (by_k * k + start))
            inside &= (position >= -_EDGE_VOXELS) & (position <= end + _EDGE_VOXELS)
            nearest.append(np.clip(np.rint(position), 0, end).astype(np.int32))
        result[inside, k] = mask.voxels_IJK[nearest[0][inside], nearest[1][inside], nearest[2][inside]]
        num_inside += int(np.count_nonzero(inside))
    cover = num_inside / result.size
    if cover < LEAST_COVER:
        least = f"at least {100 * LEAST_COVER:.0f} % are needed"
        raise UnreadableVolume(str(file), f"its field holds {100 * cover:.1f} % of the image's voxels; {least}")
    return replace(mask, voxels_IJK=result, affine=affine)


def find_wholebody_problems(cases: Sequence[Case], label_set: str, wholebody: Path | None) -> list[Problem]:
    """All problems of a folder of whole-body masks that headers and names show; an empty list means that work can
    start.

    Cases without a mask are not a problem as long as others have one.
    """
    if label_set in FROM_EXPERTS:
        remedy, value = (
            "leave the folder out, or use label_set wholebody or merged",
            f"not used by label_set {label_set}",
        )
        return [] if wholebody is None else [Problem(str(wholebody), "wholebody", value, remedy)]
    if wholebody is None:
        remedy = "give the folder of whole-body masks (--wholebody DIR); `segdiff annotate` makes one"
        return [Problem("prepare", "wholebody", f"not given, but label_set is {label_set}", remedy)]
    if not wholebody.is_dir():
        remedy = "give the folder of whole-body masks, <case id>.nii.gz; `segdiff annotate` makes one"
        return [Problem(str(wholebody), "wholebody", "not a folder", remedy)]
    problems: list[Problem] = []
    try:
        read_annotations(wholebody)
    except InputProblems as error:
        problems += error.problems
    files_of = {case.case_id: nifti_files(wholebody, case.case_id) for case in cases}
    case_of = {case.case_id: case for case in cases}
    if not any(files_of.values()):
        example = f"{cases[0].case_id}.nii.gz" if cases else "<case id>.nii.gz"
        problems.append(Problem(str(wholebody), "masks", "none for any case", f"name them by case, as {example}"))
    for case_id, files in files_of.items():
        if len(files) > 1:
            value = f"both {files[0].name} and {files[1].name}"
            problems.append(Problem(str(wholebody), f"case id {case_id}", value, "keep the one that is meant"))
        for file in files:
            try:
                problems += _side_problems(case_of[case_id], file)
            except InputProblems as error:
                problems += error.problems
    return problems


def _side_problems(case: Case, mask: Path) -> list[Problem]:
    """Why a whole-body mask may be mirrored. Raises InputProblems for a header that cannot be used."""
    of_mask = read_geometry(mask)
    if not isinstance(case.image, Path):
        return []
    of_image = read_geometry(case.image, one_slice=case.is_flat, channel=case.channel, pixel=case.pixel)
    return list(side_problems(case.image, of_image, mask, of_mask))


def read_annotations(wholebody: Path) -> dict[str, Any] | None:
    """WHOLEBODY/annotations.json, None without the file. Raises InputProblems if it is broken or too new."""
    file = wholebody / ANNOTATIONS
    if not file.is_file():
        return None
    remedy = "restore it, or take it away: the masks are then taken as made by hand"
    content = read_json(file, remedy, "a record of annotations")
    cases = content.get("cases")
    whole = isinstance(cases, dict) and all(isinstance(record, dict) for record in cases.values())
    version = content.get("format_version") if whole else None
    if not isinstance(version, int):
        raise problem(file, "content", "not a record of annotations: no format_version or cases", remedy)
    if version > ANNOTATIONS_VERSION:
        remedy = (
            f"this version reads up to {ANNOTATIONS_VERSION}: install the segdiff-dist that wrote it, or a newer one"
        )
        raise problem(file, "format_version", version, remedy)
    return dict(content)


def annotation_record(wholebody: Path) -> dict[str, Any] | None:
    """The maker of the masks in `wholebody`, for index.json: tool, tool_version, command; None if it is not recorded.
    Raises InputProblems as read_annotations does."""
    content = read_annotations(wholebody)
    return None if content is None else {name: content.get(name) for name in ("tool", "tool_version", "command")}


def _wholebody_file(wholebody: Path, case_id: str) -> Path | None:
    return next(iter(nifti_files(wholebody, case_id)), None)


def _laid_over(expert: Volume, whole: Volume | None) -> Volume:
    """The experts' organs, in the whole-body table's ids, over the whole-body mask (both on one grid), or alone."""
    to_wholebody = np.array(AMOS_TO_WHOLEBODY, dtype=np.uint8)
    drawn = np.zeros(len(to_wholebody), dtype=bool)
    planes = range(expert.voxels_IJK.shape[2])
    for k in planes:
        drawn |= np.bincount(expert.voxels_IJK[:, :, k].ravel(), minlength=len(drawn)) > 0
    drawn[0] = False
    without_drawn = np.arange(256, dtype=np.uint8)
    without_drawn[to_wholebody[drawn]] = WHOLEBODY.names.index(BODY)
    result = np.empty(expert.voxels_IJK.shape, np.uint8, order="F")
    for k in planes:
        organs = expert.voxels_IJK[:, :, k]
        rest = 0 if whole is None else without_drawn[whole.voxels_IJK[:, :, k]]
        result[:, :, k] = np.where(organs > 0, to_wholebody[organs], rest)
    return Volume(result, 1.0, 0.0, expert.affine, expert.sha256)
