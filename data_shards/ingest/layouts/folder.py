"""Plain folders: images and labels paired by their names, or by a table, manifest.csv or manifest.tsv.

images/CASE, and labels/CASE or masks/CASE     below train/, val/ and test/ where there are splits
imagesTr/, labelsTr/, imagesVa/, ...           the same, splits in the folders' names
CASE and CASE_label in one folder              also _seg and _mask
CASE/imaging and CASE/segmentation, ...        other words and folders: see `paired`
manifest.csv                                   columns image and, if they are known, label, modality, ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from data_shards.ingest.cases import Case, Listing, problems_by_case
from data_shards.ingest.dataset_json import DATASET_FILE, is_below, is_of_layout, words
from data_shards.ingest.itk_files import segment_names
from data_shards.ingest.layouts.amos import class_names, content_of
from data_shards.ingest.layouts.base import (
    MANIFESTS,
    Layout,
    Request,
    StemOf,
    case_name_problems,
    no_cases,
    one_file,
    patient_of,
    volumes_in,
    with_wanted_modalities,
)
from data_shards.ingest.layouts.exports import own_modality
from data_shards.ingest.layouts.paired import paired_by_words
from data_shards.ingest.layouts.tables import PIXEL_COLUMNS, read_columns, read_table, stated_pixel, stated_split
from data_shards.ingest.modality import find_modalities, parse_modality
from data_shards.ingest.pictures import Pixel, is_picture, picture_stem
from data_shards.ingest.volume_files import stem
from data_shards.problems import InputProblems, Problem, problem, refuse

_COLUMNS = ("image", "label", "modality", "patient", "split", "case", *PIXEL_COLUMNS)
_IMAGES, _LABELS = ("images", "image", "imgs"), ("labels", "label", "masks", "mask", "segmentations")
_SPLIT_FOLDERS = {
    "": "",
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPLIT_ENDS = {"tr": "train", "va": "val", "val": "val", "ts": "test"}
# Suffixes of a case's name in its files.
_IS_LABEL = re.compile(r"(.+?)[._-](?:labels?|seg|segmentation|masks?)", re.I)
_IS_IMAGE = re.compile(r"(.+?)(?:[_-](?:images?|img)|_0000)", re.I)


class Folder(Layout):
    """Files of images and labels, whatever their format."""

    name = "folder"

    def recognise(self, root: Path) -> str | None:
        """There is a manifest, or an image with a label of its name. A folder with the faulty dataset.json of another
        layout is left to that layout."""
        if (manifest := _manifest(root)) is not None:
            return f"there is {manifest.name}"
        content = content_of(root)
        if (root / DATASET_FILE).exists() and (not content or is_of_layout(content)):
            return None
        return label_of_a_name(pairs(root)[0])

    def not_read(self, root: Path) -> str | None:
        """Files with the usual ending of DICOM; pictures with masks, if the folder's own table does not name files."""
        found = sum(file.suffix.lower() == ".dcm" for file in root.rglob("*"))
        if found:
            return f"{found} files of DICOM (.dcm) beside the volumes; --prepare.layout dicom reads these instead"
        cases = [] if _manifest(root) is not None else pairs(root, picture_stem)[0]
        num = sum(case.label is not None for case in cases)
        return f"{num} pictures with masks beside the volumes; --prepare.layout pictures reads these" if num else None

    def read(self, root: Path, request: Request) -> Listing:
        """Cases of the manifest if there is one, else the pairs. dataset.json's `labels` or a table (prepare.labels)
        name the classes."""
        manifest, content = _manifest(root), content_of(root)
        if all((root / name).is_file() for name in MANIFESTS):
            return Listing((), (Problem(str(root), "files", f"both {' and '.join(MANIFESTS)}", "keep one"),))
        try:
            found = all_pairs(root, request) if manifest is None else _listed(manifest, request.pixel_mm)
        except InputProblems as error:
            return Listing((), error.problems)
        cases, problems, notes = found
        names = class_names(root / DATASET_FILE, content["labels"]) if "labels" in content else ({}, [])
        classes, wrong = _with_segments(names[0], cases)
        names, problems = (classes, names[1]), [*problems, *wrong]
        where = str(manifest or (root / DATASET_FILE if (root / DATASET_FILE).is_file() else root))
        return listing_of(root, request, (cases, problems), names, where, notes)


def label_of_a_name(cases: list[Case]) -> str | None:
    """That an image has a label of its name, as text; None if none has."""
    pair = next((case for case in cases if case.label is not None), None)
    return None if pair is None else f"{pair.image.name} has a label of its name"


def listing_of(
    root: Path,
    request: Request,
    found: tuple[list[Case], list[Problem]],
    names: tuple[dict[int, str], list[Problem]],
    where: str,
    notes: tuple[str, ...],
) -> Listing:
    """The cases that were found, with modality and patient. `names`: the classes by id. Either with its problems.
    `where`: the table in which a modality could be stated."""
    cases, problems = found
    problems += case_name_problems(root, [case.case_id for case in cases], f", or name them in {MANIFESTS[0]} (`case`)")
    problems += _twins(root, cases)
    unstated = [case.case_id for case in cases if not case.modality or request.modality]
    modality_of, notes_of, wrong = find_modalities(where, content_of(root), unstated, request.modality)
    problems += wrong if unstated else []
    cases = [
        replace(
            case,
            modality=modality_of.get(case.case_id, case.modality) or request.any_modality,
            patient=case.patient or patient_of(case.case_id, request.patient),
            notes=(*notes_of.get(case.case_id, ()), *request.notes_against(case.modality)),
        )
        for case in cases
    ]
    chosen = with_wanted_modalities(cases, request)
    problems += [] if problems else no_cases(root, request, chosen)
    notes += tuple(_shared_labels(root, chosen))
    return Listing(chosen, tuple(problems), problems_by_case(chosen), names[0], tuple(names[1]), notes)


def _shared_labels(root: Path, cases: Sequence[Case]) -> Iterator[str]:
    """A label that a table gives to two images of one modality. T1 and T2 of a patient may have one label."""
    of_label: dict[tuple[Path, str], list[Case]] = {}
    for case in cases:
        if isinstance(case.label, Path):
            of_label.setdefault((case.label, case.modality), []).append(case)
    for (label, _), same in of_label.items():
        if len(same) > 1:
            ids = ", ".join(case.case_id for case in same[:3])
            yield f"{ids} have one label, {label.relative_to(root)}: look whether it is that of each of them"


def _with_segments(names: dict[int, str], cases: Sequence[Case]) -> tuple[dict[int, str], list[Problem]]:
    """The classes, where nothing else names them by the segments that 3D Slicer names in its labels (.seg.nrrd). Its
    numbers may differ from file to file: labels that contradict one another, or dataset.json, are problems."""
    known, problems = dict(names), list[Problem]()
    stated = {words(name): number for number, name in known.items()}
    for case in cases:
        for number, name in segment_names(case.label).items() if isinstance(case.label, Path) else ():
            other = stated.get(words(name), number) != number
            if other or (not names and words(known.get(number, name)) != words(name)):
                value = f"segment {number} is {name!r}, and not so in the other labels or in {DATASET_FILE}"
                remedy = "export all segmentations to label maps with one colour table, so that a class has one id"
                problems.append(Problem(str(case.label), "segments", value, remedy))
            elif not names:
                known[number], stated[words(name)] = name, number
    return known, problems


def _manifest(root: Path) -> Path | None:
    return next((root / name for name in MANIFESTS if (root / name).is_file()), None)


def all_pairs(
    root: Path, request: Request, stem_of: StemOf = stem
) -> tuple[list[Case], list[Problem], tuple[str, ...]]:
    """The pairs, problems and notes; if no image has a label by `pairs`, those by words of their paths. The user's
    pattern for patients counts more than these."""
    cases, problems = pairs(root, stem_of)
    is_plain = any(case.label is not None for case in cases)
    found = None if is_plain else paired_by_words(root, stem_of, with_unlabelled=request.unlabelled)
    if found is None or not found.cases:
        return cases, problems, ()
    cases = [_of_pattern(case, request.patient) if request.patient else case for case in found.cases]
    return cases, list(found.problems), found.notes


def _of_pattern(case: Case, pattern: str) -> Case:
    """The case, whose patient the pattern finds in its name without the modality; if it finds none, as it was."""
    name = case.case_id.removesuffix(f"-{case.modality}") if case.modality else case.case_id
    return replace(case, patient=patient_of(name, pattern) or case.patient)


def pairs(root: Path, stem_of: StemOf = stem) -> tuple[list[Case], list[Problem]]:
    """Cases without modality, whose files are found by their names. `stem_of`: the kind of files, see volumes_in."""
    cases: list[Case] = []
    problems: list[Problem] = []
    for split, images, labels in _folder_pairs(root, stem_of):
        if images == labels:
            files = volumes_in(images, stem_of)
            are_labels = {name for name in files if _IS_LABEL.fullmatch(name)}
            label_files = _by_case({name: files[name] for name in files if name in are_labels}, _label_name)
            image_files = _by_case({name: files[name] for name in files if name not in are_labels}, _case_name)
        else:
            of_labels, of_images = volumes_in(labels, stem_of), volumes_in(images, stem_of)
            # With one name for both, what it ends with is a part of it: _0000 is the first case, and no channel.
            same = of_labels.keys() & of_images.keys()
            label_files = _by_case(of_labels, _label_name, same)
            image_files = _by_case(of_images, _case_name, same)
        for name, of_image in image_files.items():
            image, found = one_file(of_image)
            problems += found
            label, found = one_file(label_files[name]) if name in label_files else (None, [])
            problems += found
            cases.append(Case(name, "", split, image, label, is_flat=True))
        strange = sorted(label_files.keys() - image_files.keys())
        if strange:
            value = f"{len(strange)} without an image: {', '.join(strange[:3])}"
            remedy = f"name image and label of a case alike, or list both in {MANIFESTS[0]}"
            problems.append(Problem(str(labels), "labels", value, remedy))
    return cases, problems


def _folder_pairs(root: Path, stem_of: StemOf) -> Iterator[tuple[str, Path, Path]]:
    """Split, folder of images and folder of labels, which may be one. Names may be in capitals."""
    below = _folders(root)
    for name, split in _SPLIT_FOLDERS.items():
        folder = below.get(name) if name else root
        inside = _folders(folder)
        images = next((inside[one] for one in _IMAGES if one in inside), None)
        labels = next((inside[one] for one in _LABELS if one in inside), None)
        if folder is not None and images is not None:
            yield split, images, labels or folder / _LABELS[0]
        elif folder is not None and volumes_in(folder, stem_of):
            yield split, folder, folder
    for end, split in _SPLIT_ENDS.items():
        if f"images{end}" in below:
            yield split, below[f"images{end}"], below.get(f"labels{end}", root / f"labels{end}")


def _folders(folder: Path | None) -> dict[str, Path]:
    """The folders in a folder, by their names in lower case."""
    inside = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ()
    return {one.name.lower(): one for one in inside if one.is_dir()}


def _by_case(
    files: dict[str, list[Path]], case_of: Callable[[str], str], case_names: Collection[str] = ()
) -> dict[str, list[Path]]:
    """All files of each case: CASE_seg and CASE_mask are two labels, of which one must be chosen. `case_names`: files
    that are called as their case."""
    found: dict[str, list[Path]] = {}
    for name, some in files.items():
        found.setdefault(name if name in case_names else case_of(name), []).extend(some)
    return found


def _case_name(name: str) -> str:
    matched = _IS_IMAGE.fullmatch(name)
    return matched[1] if matched else name


def _label_name(name: str) -> str:
    matched = _IS_LABEL.fullmatch(name)
    return _case_name(matched[1] if matched else name)


def _twins(root: Path, cases: list[Case]) -> list[Problem]:
    ids = [case.case_id for case in cases]
    twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    remedy = "give each case a name of its own; in a manifest, with a column `case`"
    return [Problem(str(root), f"case id {name}", f"{ids.count(name)} times", remedy) for name in twice]


def _listed(manifest: Path, pixel_mm: float | None) -> tuple[list[Case], list[Problem], tuple[str, ...]]:
    """Cases of a manifest, problems and notes. Raises InputProblems for a table that cannot be read."""
    cases: list[Case] = []
    problems: list[Problem] = []
    for number, row in enumerate(read_table(manifest, ("image",)), start=2):
        try:
            cases.append(_row_case(manifest, row, pixel_mm))
        except InputProblems as error:
            problems += [replace(one, field=f"line {number}: {one.field}") for one in error.problems]
    return cases, problems, tuple(_unused_columns(manifest))


def _unused_columns(manifest: Path) -> Iterator[str]:
    """A column `mask` would leave all cases without labels."""
    unused = [name for name in read_columns(manifest) if name and name not in _COLUMNS]
    if unused:
        yield f"{manifest.name}: columns that are not used: {', '.join(unused)[:200]}; known are {', '.join(_COLUMNS)}"


def _row_case(manifest: Path, row: dict[str, str], pixel_mm: float | None) -> Case:
    image = _path(manifest, "image", row["image"])
    assert image is not None or not row["image"]
    if image is None:
        raise problem(manifest, "image", "empty", "name the image's file")
    modality = row.get("modality", "")
    if modality:
        modality = own_modality(manifest.parent, modality) or parse_modality(manifest, modality)
    split = stated_split(manifest, row["split"]) if row.get("split") else ""
    name = row.get("case") or _case_name(_any_stem(image.name) or image.name)
    label = _path(manifest, "label", row.get("label", ""))
    pixel: Pixel | None = stated_pixel(manifest, row, pixel_mm)
    if not is_picture(image):
        refuse(
            Problem(str(manifest), column, row[column][:40], f"{image.name} states it itself: leave it empty")
            for column in PIXEL_COLUMNS
            if row.get(column)
        )
        pixel = None
    return Case(name, modality, split, image, label, patient=row.get("patient") or None, is_flat=True, pixel=pixel)


def _any_stem(name: str) -> str | None:
    """Of a volume or a picture."""
    return stem(name) or picture_stem(name)


def _path(manifest: Path, field: str, text: str) -> Path | None:
    """A file below the manifest's folder; None if nothing is named. Backslashes are read as slashes (Windows)."""
    path = text.replace("\\", "/")
    if not path:
        return None
    if not is_below(path) or _any_stem(PurePosixPath(path).name) is None:
        raise problem(manifest, field, repr(text[:80]), "name a file below this table's folder, as ct/0001.nii.gz")
    return manifest.parent / path
