"""The AMOS 2022 folder: which cases it holds, and everything wrong with it that headers and file names can show."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.nifti import read_geometry
from data_shards.problems import InputProblems, Problem, problem
from data_shards.records import MODALITIES, is_case_id

DATASET_FILE = "dataset.json"
# dataset.json's lists, and the splits they are. AMOS publishes no labels for its test cases.
_SPLIT_OF = {"training": "train", "validation": "val", "test": "test"}
# AMOS' cases up to 500 are CT, those above are MR (its readme's "< 500" is off by one).
_LAST_CT_ID = 500
# Ids as dataset.json names them, its misspellings (`arota`, `postcava`) and their corrections.
_ORGAN_NAMES: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split("|"))
    for names in (
        "background",
        "spleen",
        "right kidney|kidney right",
        "left kidney|kidney left",
        "gall bladder|gallbladder",
        "esophagus|oesophagus",
        "liver",
        "stomach",
        "arota|aorta",
        "postcava|inferior vena cava",
        "pancreas",
        "right adrenal gland|adrenal gland right",
        "left adrenal gland|adrenal gland left",
        "duodenum",
        "bladder|urinary bladder",
        "prostate uterus",
    )
)
# A shard's member is named CASE-sagittal-0000.image.npy.zst, and a plain tar holds names of up to 100 characters.
_LONGEST_CASE_ID = 64
# Image and label headers agree when no corner of the volume moves by more than this part of a voxel.
AFFINE_TOLERANCE_VOXELS = 0.1


@dataclass(frozen=True)
class Case:
    """One patient: image, and label where there is one. `split` is train, val or test; `modality` CT or MR."""

    case_id: str
    modality: str
    split: str
    image: Path
    label: Path | None


def read_archive(root: Path, modalities: Sequence[str] = MODALITIES) -> list[Case]:
    """Cases of the folder at `root`, by case id. Call `find_problems` first: here a broken folder raises InputProblems
    for the first thing found. A test case is labelled when labelsTs/ holds a file of its image's name."""
    content = _read_dataset(root)
    cases = [_case(root, split, entry) for split, entry in _entries(content)]
    return sorted((case for case in cases if case.modality in modalities), key=lambda case: case.case_id)


def find_problems(root: Path, modalities: Sequence[str] = MODALITIES) -> list[Problem]:
    """All that can be seen before work starts, reading headers alone; an empty list means go."""
    try:
        content = _read_dataset(root)
    except InputProblems as error:
        return list(error.problems)
    dataset_file = str(root / DATASET_FILE)
    found = list(_problems_with_organs(dataset_file, content.get("labels")))
    files_of: dict[str, list[str]] = {}
    for split, entry in _entries(content):
        image, wrong = _problems_with_entry(dataset_file, split, entry)
        found += wrong
        if image is None:
            continue
        case = _case(root, split, entry)
        files_of.setdefault(case.case_id, []).append(f"{split}: {image}")
        if case.modality in modalities:
            found += _problems_with_files(case)
    for case_id, files in files_of.items():
        if len(files) > 1:
            remedy = "keep one: a patient is in one split, once"
            found.append(
                Problem(dataset_file, f"case id {case_id}", f"{len(files)} entries ({', '.join(files)})", remedy)
            )
    if not found and not read_archive(root, modalities):
        value = f"no case among {', '.join(modalities)}"
        found.append(Problem(dataset_file, "training, validation, test", value, "list cases or widen `modalities`"))
    return list(dict.fromkeys(found))


def _read_dataset(root: Path) -> dict[str, Any]:
    remedy = "give the folder of an AMOS 2022 archive: dataset.json beside imagesTr, labelsTr, ..."
    if not root.is_dir():
        raise problem(root, "AMOS folder", "not a folder", remedy)
    file = root / DATASET_FILE
    if not file.is_file():
        raise problem(root, DATASET_FILE, "missing", remedy)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise problem(file, "JSON", f"invalid ({error})", "restore the file from the archive") from error
    if not isinstance(content, dict):
        raise problem(file, "JSON", f"a {type(content).__name__}, not an object", "restore the file from the archive")
    for name in _SPLIT_OF:
        if not isinstance(content.get(name, []), list):
            raise problem(file, name, type(content[name]).__name__, "give a list of {image, label} entries")
    return content


def _entries(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, split in _SPLIT_OF.items():
        for entry in content.get(name, []):
            # Test entries are plain file names in some releases of the format.
            yield split, {"image": entry} if isinstance(entry, str) else entry


def _case(root: Path, split: str, entry: dict[str, str]) -> Case:
    image = root / entry["image"]
    label = root / entry["label"] if "label" in entry else None
    if split == "test":
        label = next((file for file in nifti_files(root / "labelsTs", _case_id(image.name))), None)
    case_id = _case_id(entry["image"])
    number = re.search(r"(\d+)$", case_id)
    if number is None:
        raise problem(root / DATASET_FILE, split, entry["image"], "name files by case, as amos_0001.nii.gz")
    return Case(case_id, "CT" if int(number[1]) <= _LAST_CT_ID else "MR", split, image, label)


def nifti_files(folder: Path, case_id: str) -> list[Path]:
    """The NIfTI files of a case in a folder: at most its .nii.gz and its .nii, in this order."""
    return [file for ending in (".nii.gz", ".nii") if (file := folder / f"{case_id}{ending}").is_file()]


def _case_id(file: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", Path(file).name)


def _problems_with_organs(where: str, organs: Any) -> Iterator[Problem]:
    """`labels` may be left out: ids are checked against the table voxel by voxel anyway."""
    if organs is None:
        return
    if not isinstance(organs, dict):
        yield Problem(where, "labels", type(organs).__name__, "give an object of id: name")
        return
    for text, name in organs.items():
        known = _ORGAN_NAMES[int(text)] if text.isdecimal() and int(text) < len(_ORGAN_NAMES) else frozenset()
        if " ".join(re.split(r"[\s_/-]+", str(name).strip().lower())) not in known:
            expected = f"'{sorted(known)[0]}'" if known else f"no id above {len(_ORGAN_NAMES) - 1}"
            remedy = f"AMOS has {expected} there: renumber the labels to AMOS' table"
            yield Problem(where, f"labels.{text}", repr(name), remedy)


def _problems_with_entry(where: str, split: str, entry: Any) -> tuple[str | None, list[Problem]]:
    """The entry's image, None when there is no telling which case it is, and what is wrong with the entry itself."""
    image = entry.get("image") if isinstance(entry, dict) else None
    if not isinstance(image, str):
        return None, [Problem(where, split, repr(entry)[:80], "give an object with `image` and `label`")]
    for file in (image, entry.get("label")):
        if isinstance(file, str) and (".." in Path(file).parts or Path(file).is_absolute() or "\0" in file):
            return None, [Problem(where, split, repr(file)[:100], "give a path inside the archive's folder")]
    if len(_case_id(image)) > _LONGEST_CASE_ID:
        return None, [Problem(where, split, image[:200], f"name cases with at most {_LONGEST_CASE_ID} characters")]
    # A tar's member is named by its case, and WebDataset splits names at the first dot.
    if not (is_case_id(_case_id(image)) and re.fullmatch(r"[^.]*[0-9]", _case_id(image))):
        remedy = "name files by case, as amos_0001.nii.gz: letters, digits, _ and -, ending in the case's number"
        return None, [Problem(where, split, image, remedy)]
    if split == "test":
        return image, []
    if not isinstance(entry.get("label"), str):
        return None, [Problem(where, split, f"{image} has no label", "name its label file, or list it under `test`")]
    if _case_id(entry["label"]) != _case_id(image):
        remedy = "image and label of a case carry the same file name"
        return image, [Problem(where, split, f"{image} is labelled by {entry['label']}", remedy)]
    return image, []


def _problems_with_files(case: Case) -> list[Problem]:
    found: list[Problem] = []
    files = [file for file in (case.image, case.label) if file is not None]
    for file in files:
        # Compressed or unpacked by hand, perhaps changed since: which of the two is meant cannot be told.
        if len(both := nifti_files(file.parent, case.case_id)) > 1:
            value = f"both {both[0].name} and {both[1].name}"
            found.append(Problem(str(file.parent), f"case id {case.case_id}", value, "keep the one that is meant"))
    geometries = []
    for file in files:
        if not file.is_file():
            remedy = "restore it, or take it out of dataset.json"
            found.append(Problem(str(file), "file", f"missing, but {DATASET_FILE} names it", remedy))
            continue
        try:
            geometries.append(read_geometry(file))
        except InputProblems as error:
            found += error.problems
    if len(geometries) < 2:
        return found
    (shape, affine), (label_shape, label_affine) = ((one.shape, one.affine) for one in geometries)
    remedy = "use the label that was drawn on this image, on its grid"
    if shape != label_shape:
        found.append(Problem(str(case.label), "shape", f"{label_shape}, its image has {shape}", remedy))
    elif (moved := largest_shift_voxels(shape, affine, label_affine)) > AFFINE_TOLERANCE_VOXELS:
        found.append(Problem(str(case.label), "affine", f"off by {moved:.2g} voxels from its image", remedy))
    return found


def read_header(file: Path, found: list[Problem]) -> tuple[tuple[int, ...], np.ndarray] | None:
    """Shape and affine (voxel index as stored to RAS mm) of a 3-D NIfTI file; None, with the reasons added to `found`,
    where it has none that can be used. What of it is a guess is warned of; `read_geometry` returns it in words."""
    try:
        geometry = read_geometry(file)
    except InputProblems as error:
        found += error.problems
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
