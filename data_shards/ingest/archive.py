"""The AMOS 2022 folder: which cases it holds, and everything wrong with it that headers and file names can show."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.ingest.dataset_json import (
    DATASET_FILE,
    Entry,
    file_stem,
    problems_with_organs,
    read_dataset,
    read_entries,
)
from data_shards.ingest.modality import find_modalities
from data_shards.ingest.nifti import read_geometry
from data_shards.problems import InputProblems, Problem, refuse
from data_shards.records import MODALITIES

# Image and label headers agree when no corner of the volume moves by more than this part of a voxel.
AFFINE_TOLERANCE_VOXELS = 0.1


@dataclass(frozen=True)
class Case:
    """One patient: image, and label where there is one. `split` is train, val or test; `modality` CT or MR. `notes`:
    what of the archive's statements on it was set aside, in words."""

    case_id: str
    modality: str
    split: str
    image: Path
    label: Path | None
    notes: tuple[str, ...] = ()


def read_archive(root: Path, modalities: Sequence[str] = MODALITIES, modality: str | None = None) -> list[Case]:
    """Cases of the folder at `root` that are of `modalities`, by case id. `modality`: what all of them are, where the
    user states it. Call `find_problems` first: here a broken folder raises InputProblems for the first thing found. A
    test case is labelled when labelsTs/ holds a file of its name."""
    content = read_dataset(root)
    where = str(root / DATASET_FILE)
    entries, wrong = read_entries(where, content)
    refuse(wrong)
    ids = [entry.case_id for entry in entries]
    modality_of, notes_of, wrong = find_modalities(where, content, ids, modality)
    refuse(wrong)
    cases = [_case(root, entry, modality_of[entry.case_id], notes_of.get(entry.case_id, ())) for entry in entries]
    return sorted((case for case in cases if case.modality in modalities), key=lambda case: case.case_id)


def find_problems(root: Path, modalities: Sequence[str] = MODALITIES, modality: str | None = None) -> list[Problem]:
    """All that can be seen before work starts, reading headers alone; an empty list means go."""
    try:
        content = read_dataset(root)
    except InputProblems as error:
        return list(error.problems)
    dataset_file = str(root / DATASET_FILE)
    problems = list(problems_with_organs(dataset_file, content.get("labels")))
    entries, wrong = read_entries(dataset_file, content)
    problems += wrong
    modality_of, _, wrong = find_modalities(dataset_file, content, [entry.case_id for entry in entries], modality)
    problems += wrong
    files_of: dict[str, list[str]] = {}
    for entry in entries:
        files_of.setdefault(entry.case_id, []).append(f"{entry.split}: {entry.image}")
        # Files of a case that may be of either modality are looked at all the same.
        case = _case(root, entry, modality_of.get(entry.case_id, modalities[0] if modalities else MODALITIES[0]))
        if case.modality in modalities:
            problems += _problems_with_files(case)
    for case_id, files in files_of.items():
        if len(files) > 1:
            remedy = "keep one: a patient is in one split, once"
            problems.append(
                Problem(dataset_file, f"case id {case_id}", f"{len(files)} entries ({', '.join(files)})", remedy)
            )
    if not problems and not read_archive(root, modalities, modality):
        value = f"no case among {', '.join(modalities)}"
        problems.append(Problem(dataset_file, "training, validation, test", value, "list cases or widen `modalities`"))
    return list(dict.fromkeys(problems))


def _case(root: Path, entry: Entry, modality: str, notes: tuple[str, ...] = ()) -> Case:
    image = root / entry.image
    label = None if entry.label is None else root / entry.label
    if entry.split == "test":
        label = next((file for name in _names(entry) for file in nifti_files(root / "labelsTs", name)), None)
    return Case(entry.case_id, modality, entry.split, image, label, notes)


def _names(entry: Entry) -> list[str]:
    """What a file of the case may be called, with the channel's number or without."""
    return list(dict.fromkeys((entry.case_id, file_stem(entry.image))))


def nifti_files(folder: Path, case_id: str) -> list[Path]:
    """The NIfTI files of a case in a folder: at most its .nii.gz and its .nii, in this order."""
    return [file for ending in (".nii.gz", ".nii") if (file := folder / f"{case_id}{ending}").is_file()]


def _problems_with_files(case: Case) -> list[Problem]:
    problems: list[Problem] = []
    files = [file for file in (case.image, case.label) if file is not None]
    for file in files:
        # Compressed or unpacked by hand, perhaps changed since: which of the two is meant cannot be known.
        names = dict.fromkeys((file_stem(file.name), case.case_id) if file == case.label else (file_stem(file.name),))
        if len(both := [one for name in names for one in nifti_files(file.parent, name)]) > 1:
            value = f"both {both[0].name} and {both[1].name}"
            problems.append(Problem(str(file.parent), f"case id {case.case_id}", value, "keep the one that is meant"))
    geometries = []
    for file in files:
        if not file.is_file():
            remedy = "restore it, or take it out of dataset.json"
            problems.append(Problem(str(file), "file", f"missing, but {DATASET_FILE} names it", remedy))
            continue
        try:
            geometries.append(read_geometry(file))
        except InputProblems as error:
            problems += error.problems
    if len(geometries) < 2:
        return problems
    (shape, affine), (label_shape, label_affine) = ((one.shape, one.affine) for one in geometries)
    remedy = "use the label that was drawn on this image, on its grid"
    if shape != label_shape:
        problems.append(Problem(str(case.label), "shape", f"{label_shape}, its image has {shape}", remedy))
    elif (moved := largest_shift_voxels(shape, affine, label_affine)) > AFFINE_TOLERANCE_VOXELS:
        guessed = "; ".join(
            f"{file.name}: {note}" for file, one in zip(files, geometries, strict=True) for note in one.notes
        )
        value = f"off by {moved:.2g} voxels from its image" + (f" ({guessed})" if guessed else "")
        problems.append(Problem(str(case.label), "affine", value, remedy))
    return problems


def read_header(file: Path, problems: list[Problem]) -> tuple[tuple[int, ...], np.ndarray] | None:
    """Shape and affine (voxel index as stored to RAS mm) of a 3-D NIfTI file; None, with the reasons added to `found`,
    where it has none that can be used. What of it is a guess is warned of; `read_geometry` returns it in words."""
    try:
        geometry = read_geometry(file)
    except InputProblems as error:
        problems += error.problems
        return None
    for note in geometry.notes:
        warnings.warn(f"{file}: {note}", stacklevel=2)
    return geometry.shape, geometry.affine


def largest_shift_voxels(shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray) -> float:
    """How far the other affine moves the corners of a volume at most, in its smallest voxel sides."""
    corners = np.array(
        [[i, j, k, 1.0] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)]
    )
    moved = corners @ (affine - other).T
    return float(np.linalg.norm(moved, axis=1).max() / np.linalg.norm(affine[:3, :3], axis=0).min())
