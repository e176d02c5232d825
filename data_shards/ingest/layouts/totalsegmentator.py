"""TotalSegmentator's data sets (Wasserthal et al. 2023; MR: Akinci D'Antonoli et al. 2025): a folder a case.

CASE/ct.nii.gz or CASE/mri.nii.gz    and CASE/segmentations/ORGAN.nii.gz, each of zeros and ones
meta.csv                             optional: columns image_id and split, separated by semicolons
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_shards.ingest.cases import Case, Listing, problems_by_case
from data_shards.ingest.layouts.base import (
    Layout,
    Request,
    case_name_problems,
    no_cases,
    one_file,
    patient_of,
    volumes_in,
    with_wanted_modalities,
)
from data_shards.ingest.layouts.tables import read_table, stated_split
from data_shards.problems import InputProblems, Problem

_MODALITY_OF = {"ct": "CT", "mri": "MR"}
_SEGMENTATIONS = "segmentations"
_META = "meta.csv"


class TotalSegmentator(Layout):
    """The folder above the cases'."""

    name = "totalsegmentator"
    by_file = True

    def recognise(self, root: Path) -> str | None:
        """At least one case has an image and a folder of organs."""
        for folder in _folders(root):
            image = _image(folder)
            if image is not None and (folder / _SEGMENTATIONS).is_dir():
                return f"{folder.name} has {image.name} and {_SEGMENTATIONS}/"
        return None

    def read(self, root: Path, request: Request) -> Listing:
        """Every folder with an image is a case. The classes are the organs of all cases, in the order of their
        names."""
        images = {folder: image for folder in _folders(root) if (image := _image(folder)) is not None}
        organs = {folder: _organs(folder) for folder in images}
        twice = [one for folder in images for one in _problems_with_copies(folder)]
        names = dict(enumerate(["background", *sorted({name for files in organs.values() for name in files})]))
        id_of = {name: number for number, name in names.items()}
        split_of, problems = _stated_splits(root)
        problems += twice
        problems += case_name_problems(root, [folder.name for folder in images])
        cases = [
            Case(
                folder.name,
                request.modality or _modality(image),
                split_of.get(folder.name, ""),
                image,
                None,
                notes=request.notes_against(_modality(image)),
                patient=patient_of(folder.name, request.patient),
                organs=tuple((id_of[name], file) for name, file in organs[folder].items()),
            )
            for folder, image in images.items()
        ]
        chosen = with_wanted_modalities(cases, request)
        problems += [] if problems else no_cases(root, request, chosen)
        notes = (*_lacking_organs(chosen, names), *_without_folder(split_of, {folder.name for folder in images}))
        return Listing(chosen, tuple(problems), problems_by_case(chosen), names, notes=notes, has_ids=False)


def _folders(root: Path) -> list[Path]:
    folders = [one for one in root.iterdir() if one.is_dir()] if root.is_dir() else []
    return sorted(one for one in folders if not one.name.startswith("."))


def _image(folder: Path) -> Path | None:
    found = {name.lower(): files for name, files in volumes_in(folder).items()}
    return next((found[name][0] for name in _MODALITY_OF if name in found), None)


def _modality(image: Path) -> str:
    return _MODALITY_OF[image.name.split(".")[0].lower()]


def _organs(folder: Path) -> dict[str, Path]:
    return {name: files[0] for name, files in volumes_in(folder / _SEGMENTATIONS).items()}


def _problems_with_copies(folder: Path) -> Iterator[Problem]:
    """A case with two images, or an organ with two files."""
    images = [file for name, files in volumes_in(folder).items() if name.lower() in _MODALITY_OF for file in files]
    for files in (images, *volumes_in(folder / _SEGMENTATIONS).values()):
        if files:
            yield from one_file(files)[1]


def _lacking_organs(cases: Sequence[Case], names: dict[int, str]) -> Iterator[str]:
    """Cases without the file of an organ that others of their modality have: the organ would be taught to be none."""
    of_modality: dict[str, set[int]] = {}
    for case in cases:
        of_modality.setdefault(case.modality, set()).update(number for number, _ in case.organs)
    lacking = {case.case_id: of_modality[case.modality] - {number for number, _ in case.organs} for case in cases}
    if found := {case_id: numbers for case_id, numbers in lacking.items() if numbers}:
        case_id, numbers = next(iter(found.items()))
        example = f"{case_id}: {', '.join(names[one] for one in sorted(numbers)[:3])}"
        where = f"{len(found)} of {len(cases)} cases have no file of some organs that others have, as {example}"
        yield f"{where}; there these organs count as not drawn; add the files, empty if the organ is not in the image"


def _without_folder(split_of: dict[str, str], known: set[str]) -> Iterator[str]:
    if gone := sorted(split_of.keys() - known):
        yield f"{_META} names {len(gone)} cases that are not here, as {gone[0]}"


def _stated_splits(root: Path) -> tuple[dict[str, str], list[Problem]]:
    file = root / _META
    if not file.is_file():
        return {}, []
    try:
        rows = read_table(file, ("image_id", "split"))
        return {row["image_id"]: stated_split(file, row["split"]) for row in rows if row["split"]}, []
    except InputProblems as error:
        return {}, list(error.problems)
