"""Pairs of image and mask: by the files' names below the two folders, without their endings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.problems import InputProblems, Problem, problem
from data_shards.records import AXES
from segdiff_dist.sampling.mask_files import case_id_of, ending, list_folder

DICOM = ".dcm"
# nnU-Net's name of an image's only channel; its masks do not have it.
_CHANNEL = "_0000"
# A slice's key, as in file names of shard sets and `segdiff export`: it contains the patient.
_KEY = re.compile(rf"(.+)-({'|'.join(AXES)})-(\d{{1,5}})")


@dataclass(frozen=True)
class Pair:
    """An image and its mask. `name`: their path without the ending; `case_id`: of the patient, as far as names contain
    it; `axis` and `slice_index` if the name is a slice's key."""

    name: str
    image: Path
    mask: Path
    case_id: str
    axis: str | None = None
    slice_index: int | None = None


def find_pairs(images: Path, masks: Path) -> list[Pair]:
    """The pairs in the order of their names. Raises InputProblems: no files, files without the other one, two files of
    one name."""
    problems: list[Problem] = []
    image_of = _by_name(images, _image_files(images), problems)
    mask_of = _by_name(masks, list_folder(masks).masks, problems)
    for name in [name for name in image_of if name not in mask_of and name.endswith(_CHANNEL)]:
        if (short := name.removesuffix(_CHANNEL)) in mask_of and short not in image_of:
            image_of[short] = image_of.pop(name)
    problems += _unpaired(images, "image", "mask", [name for name in image_of if name not in mask_of], image_of)
    problems += _unpaired(masks, "mask", "image", [name for name in mask_of if name not in image_of], mask_of)
    if problems:
        raise InputProblems(problems)
    return [_pair(name, image_of[name], mask_of[name]) for name in sorted(image_of)]


def _image_files(folder: Path) -> list[Path]:
    listed = list_folder(folder)
    return [*listed.masks, *(file for file in listed.others if file.suffix.lower() == DICOM)]


def _by_name(folder: Path, files: Iterable[Path], problems: list[Problem]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(folder).as_posix()
        name = name[: -len(ending(file) or DICOM)]
        if name in named:
            value = f"{named[name].name} and {file.name} have one name"
            problems.append(Problem(str(folder), "names", value, "leave one of them out"))
        named[name] = file
    if not named:
        problems += problem(folder, "files", "no PNG, NIfTI or DICOM file", "give the folder that holds them").problems
    return named


def _unpaired(folder: Path, one: str, other: str, names: Sequence[str], there: dict[str, Path]) -> list[Problem]:
    if not names or len(names) == len(there) == 0:
        return []
    shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
    value = f"{len(names)} of {len(there)} have no {other} of the same name: {shown}"
    return [Problem(str(folder), f"{one}s", value, "name both files of a pair alike, or leave them out")]


def _pair(name: str, image: Path, mask: Path) -> Pair:
    """A name that is a slice's key contains patient, axis and index. Otherwise the files of a subfolder belong to one
    patient, and each other file counts as a patient."""
    path = Path(name)
    if (key := _KEY.match(path.name)) is not None:
        return Pair(name, image, mask, _case_id(key[1]), key[2], int(key[3]))
    return Pair(name, image, mask, _case_id(name if path.parent == Path() else str(path.parent)))


def _case_id(name: str) -> str:
    return case_id_of(Path(f"{name}.png"))
