"""nnU-Net v2's raw data sets (its documentation/dataset_format.md).

dataset.json                  `channel_names`, `labels` as name: id, `file_ending`
imagesTr/CASE_0000            a file a channel; labelsTr/CASE
imagesTs/CASE_0000            and labelsTs/CASE where somebody has them
splits_final.json             folds, each {"train": [...], "val": [...]}, if it was copied here
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_shards.documents import checked, parse_json_value, read_bytes, read_json
from data_shards.ingest.cases import Case, Listing, problems_by_case
from data_shards.ingest.dataset_json import DATASET_FILE, words
from data_shards.ingest.layouts.amos import class_names, content_of, lists_cases
from data_shards.ingest.layouts.base import (
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
from data_shards.ingest.layouts.channels import chosen_channels, joined, numbered
from data_shards.ingest.layouts.exports import own_items, own_modality, own_patients, own_pixel
from data_shards.ingest.modality import find_modalities
from data_shards.ingest.pictures import is_picture, picture_stem, unstated_spacing
from data_shards.ingest.volume_files import stem
from data_shards.problems import InputProblems, Problem, refuse
from data_shards.wording import in_words

SPLITS_FILE = "splits_final.json"
_CHANNEL = re.compile(r"(.+)_([0-9]{4})")
_IGNORE = "ignore"
# Names of images of `segdiff export`: the mask's patient, modality and number of the image (`real`: a slice of a real
# volume), axis and slice.
_OWN_NAME = r"(.+)_[a-z][a-z0-9-]{0,23}_(?:[0-9]+|real)-(?:axial|coronal|sagittal)-[0-9]{4,}$"
_MOST_BYTES = 64 * 2**20


class NnUNet(Layout):
    """A folder called DatasetNNN_NAME below nnUNet_raw."""

    name = "nnunet"
    by_file = True

    def recognise(self, root: Path) -> str | None:
        """dataset.json is nnU-Net's and lists no cases, and labelsTr shows what in a name of imagesTr is a channel."""
        content = content_of(root)
        if lists_cases(content) or not ({"channel_names", "file_ending"} & content.keys()):
            return None
        labels = volumes_in(root / "labelsTr", _any_stem)
        channels = (_CHANNEL.fullmatch(name) for name in volumes_in(root / "imagesTr", _any_stem))
        if not any(channel and channel[1] in labels for channel in channels):
            return None
        return f"{DATASET_FILE} has channel_names or file_ending, and imagesTr has CASE_0000"

    def read(self, root: Path, request: Request) -> Listing:
        """One channel of each case, or several as cases of their own."""
        where, content = root / DATASET_FILE, content_of(root)
        names, of_names = _class_names(where, content)
        named = numbered(content.get("channel_names") or content.get("modality"))
        channels, found = chosen_channels(where, "channel_names", named, request)
        if found := [*found, *_ending_problems(root, content)]:
            return Listing((), tuple(found), names=names, problems_with_names=tuple(of_names))
        try:
            listings = [_listing(root, request, names, (one, named.get(one))) for one in channels]
        except InputProblems as error:  # of an export's table, or of pictures without a spacing
            return Listing((), error.problems, names=names)
        listing = joined(where, listings) if len(listings) > 1 else listings[0]
        notes = (*listing.notes, *_unnamed_channels(root, {*named, *channels}), *_ending_notes(root, content))
        return replace(listing, notes=notes, problems_with_names=tuple(of_names))


def _listing(root: Path, request: Request, names: dict[int, str], channel: tuple[int, Any]) -> Listing:
    """The cases in one channel, of which its number and what is said of it are given."""
    where, (number, name) = root / DATASET_FILE, channel
    cases, problems = _cases(root, number)
    cases = _with_pixels(root, cases, request.pixel_mm)
    cases, notes, found = _listed(root, cases, number)
    notes += tuple(_count_notes(root, cases))
    problems += found
    stated = {} if name is None else {"channel_names": {"0": name}}
    ids = [case.case_id for case in cases]
    modality_of, notes_of, found = find_modalities(str(where), stated, ids, request.modality)
    if request.modality is None and (own := own_modality(root, name)) is not None:
        modality_of, found = dict.fromkeys(ids, own), []
    problems += found
    fold, found = _stated_fold(root, request, [one.case_id for one in cases if one.split != "test"])
    problems += found
    cases = [one for one in cases if one.case_id not in fold.left_out]
    patients = own_patients(root)
    cases = [
        replace(
            one,
            modality=modality_of.get(one.case_id, request.any_modality),
            split=fold.split_of.get(one.case_id, one.split),
            notes=notes_of.get(one.case_id, ()),
            patient=(patient_of(one.case_id, request.patient) if request.patient else None)
            or patients.get(one.case_id)
            or patient_of(one.case_id, request.patient, _OWN_NAME),
        )
        for one in cases
    ]
    chosen = with_wanted_modalities(cases, request)
    problems += [] if problems else no_cases(root, request, chosen)
    return Listing(chosen, tuple(problems), problems_by_case(chosen), names, notes=(*notes, *fold.notes))


def _unnamed_channels(root: Path, known: set[int]) -> Iterator[str]:
    """Files of channels that dataset.json does not name: it, or their number, may be wrong."""
    files = (_CHANNEL.fullmatch(name) for name in volumes_in(root / "imagesTr", _stem_of(content_of(root))))
    if unknown := sorted({int(one[2]) for one in files if one} - known):
        numbers = ", ".join(map(str, unknown[:4]))
        yield f"imagesTr has files of channel {numbers}, which channel_names does not name: they are not read"


def _class_names(where: Path, content: dict[str, Any]) -> tuple[dict[int, str], list[Problem]]:
    """The classes by id. Regions, which overlap, have no ids; `ignore` means that the class is unknown."""
    labels = content.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        value = f"regions ({', '.join(map(str, regions[:4]))})"
        remedy = (
            "a pixel has one class here: name the ids in the label files, as names: {1: edema, 2: core}, in a table "
            "(--prepare.labels TABLE.yaml)"
        )
        return {}, [Problem(str(where), "labels", value, remedy)]
    names, problems = class_names(where, labels)
    for ignored in (name for name in names.values() if words(name) == _IGNORE):
        mapped = f"label_map: {{{ignored}: background}}"
        remedy = f"say what becomes of it in a table (--prepare.labels TABLE.yaml): {mapped}"
        problems.append(Problem(str(where), "labels", f"a class `{ignored}`, whose real class is unknown", remedy))
    return names, problems


def _cases(root: Path, channel: int) -> tuple[list[Case], list[Problem]]:
    """Cases of imagesTr, without a split, and of imagesTs, which are for testing; without modality."""
    cases: list[Case] = []
    problems: list[Problem] = []
    content = content_of(root)
    stem_of, stated = _stem_of(content), isinstance(content.get("file_ending"), str)
    for end, split in (("Tr", ""), ("Ts", "test")):
        labels = volumes_in(root / f"labels{end}", stem_of)
        images = _of_channel(volumes_in(root / f"images{end}", stem_of), channel)
        if alone := sorted(labels.keys() - images.keys()):
            value = f"{len(alone)} without an image of channel {channel}: {', '.join(alone[:3])}"
            remedy = f"restore images{end}/CASE_{channel:04d}, or take the label away"
            problems.append(Problem(str(root / f"labels{end}"), "labels", value, remedy))
        for name, files in images.items():
            image, found = one_file(files)
            problems += found
            label, found = one_file(labels[name]) if name in labels else (None, [])
            problems += found
            cases.append(Case(name, "", split, image, label, is_flat=True, has_stated_ending=stated))
    ids = [case.case_id for case in cases]
    problems += case_name_problems(root, ids)
    twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    problems += [
        Problem(str(root), f"case id {name}", "in imagesTr and imagesTs", "keep one: a patient is in one split, once")
        for name in twice
    ]
    return cases, problems


def _any_stem(name: str) -> str | None:
    return stem(name) or picture_stem(name)


def _stem_of(content: dict[str, Any]) -> StemOf:
    """The data set's files: those that end in its `file_ending`, also in capitals. Without one, all volumes."""
    ending = content.get("file_ending")
    if not isinstance(ending, str):
        return stem
    wanted = ending.lstrip(".").lower()

    def stem_of(name: str) -> str | None:
        found = _any_stem(name)
        return found if found is not None and name[len(found) + 1 :].lower() == wanted else None

    return stem_of


def _ending_problems(root: Path, content: dict[str, Any]) -> Iterator[Problem]:
    """A problem for images, and for labels, if there are some and none has the data set's ending."""
    ending = str(content.get("file_ending"))[:20]
    for folder in (root / "imagesTr", root / "labelsTr"):
        if (files := _of_other_endings(folder, content)) and not volumes_in(folder, _stem_of(content)):
            value = f"{ending}, and no file in {folder.name} ends so: {_some(files)}"
            remedy = "name the ending that the files have, in imagesTr and labelsTr, or convert the files"
            yield Problem(str(root / DATASET_FILE), "file_ending", value, remedy)


def _ending_notes(root: Path, content: dict[str, Any]) -> Iterator[str]:
    """What to say of a folder's images and labels that do not have the data set's ending."""
    ending = content.get("file_ending")
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        if files := _of_other_endings(root / name, content):
            found = f"{in_words(len(files), 'file')} in {name} of another ending than {ending}: {_some(files)}"
            yield f"{found}; not read, since nnU-Net would ignore them"


def _of_other_endings(folder: Path, content: dict[str, Any]) -> list[str]:
    """Names of the volumes and pictures in a folder that do not have the data set's ending."""
    if not isinstance(content.get("file_ending"), str):
        return []
    stem_of, files = _stem_of(content), volumes_in(folder, _any_stem)
    return [file.name for named in files.values() for file in named if stem_of(file.name) is None]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _with_pixels(root: Path, cases: list[Case], pixel_mm: float | None) -> list[Case]:
    """Of pictures, what an export's items.csv says of their pixels, or the setting. Raises InputProblems."""
    if not any(isinstance(case.image, Path) and is_picture(case.image) for case in cases):
        return cases
    items = own_items(root) or {}
    pixels = [own_pixel(root, items.get(case.case_id, {}), pixel_mm) for case in cases]
    refuse(unstated_spacing(root, pixels))
    return [replace(case, pixel=pixel) for case, pixel in zip(cases, pixels, strict=True)]


def _listed(root: Path, cases: list[Case], channel: int) -> tuple[list[Case], tuple[str, ...], list[Problem]]:
    """The cases that nnU-Net itself would use: if dataset.json lists them in `dataset`, these alone for training. Files
    that it names at other places are a problem, since imagesTr and labelsTr may have others of the same names."""
    listed = content_of(root).get("dataset")
    if not isinstance(listed, dict):
        return cases, (), []
    files_of = {one.case_id: [one.image, one.label] for one in cases if one.split != "test"}
    elsewhere = [name for name, entry in listed.items() if _named_files(root, entry, channel) != files_of.get(name)]
    used = [one for one in cases if one.split == "test" or one.case_id in listed]
    num = len(cases) - len(used)
    notes = (f"{num} cases of imagesTr are left out: `dataset` in {DATASET_FILE} does not list them",) if num else ()
    if not elsewhere:
        return used, notes, []
    value = f"{len(elsewhere)} with files that are not in imagesTr and labelsTr: {', '.join(map(str, elsewhere[:3]))}"
    remedy = "put these files, or links, there, and take `dataset` away"
    return used, notes, [Problem(str(root / DATASET_FILE), "dataset", value, remedy)]


def _count_notes(root: Path, cases: list[Case]) -> Iterator[str]:
    """What to say if there are fewer or more training cases than dataset.json says: nnU-Net would refuse them."""
    said, found = content_of(root).get("numTraining"), sum(one.split != "test" for one in cases)
    if isinstance(said, int) and said != found:
        where = f"{DATASET_FILE} says numTraining {said}, and there are {found} training cases"
        yield f"{where}: look whether files are missing"


def _named_files(root: Path, entry: Any, channel: int) -> list[Path] | None:
    """Image and label of an entry of `dataset`; None if it has none."""
    try:
        names = (entry["images"][channel], entry["label"])
    except (TypeError, KeyError, IndexError):
        return None
    return [Path(os.path.normpath(root / str(name).replace("\\", "/"))) for name in names]


def _of_channel(volumes: dict[str, list[Path]], channel: int) -> dict[str, list[Path]]:
    found = {}
    for name, files in volumes.items():
        matched = _CHANNEL.fullmatch(name)
        if matched and int(matched[2]) == channel:
            found[matched[1]] = files
    return found


@dataclass(frozen=True)
class _Fold:
    """The split of each training case, the synthetic cases that the fold does not use, and what to say of both."""

    split_of: dict[str, str]
    left_out: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def _stated_fold(root: Path, request: Request, case_ids: list[str]) -> tuple[_Fold, list[Problem]]:
    """A fold of splits_final.json; no split without the file. In a data set of `segdiff export --merge-with`, a fold
    does not use the synthetic cases whose patients it validates."""
    file = root / SPLITS_FILE
    if not file.is_file():
        return _Fold({}), []
    if request.draws_splits:
        return _Fold({}, notes=(f"{SPLITS_FILE} is not used: --prepare.split draws the splits",)), []
    remedy = "restore the file, or take it away: cases are then put into splits by --prepare.split"
    try:
        folds = parse_json_value(read_bytes(file, remedy, _MOST_BYTES), file, remedy, "nnU-Net's folds")
        checked(folds, list[dict[str, list[str]]], file, "nnU-Net's folds", remedy)
        synthetic = _synthetic_cases(root)
    except InputProblems as error:
        return _Fold({}), list(error.problems)
    number = request.fold
    if number >= len(folds):
        return _Fold({}), [Problem("prepare", "fold", str(number), f"{SPLITS_FILE} has folds 0 to {len(folds) - 1}")]
    of_split = {case_id: split for split in ("train", "val") for case_id in folds[number].get(split, ())}
    left_out = frozenset(synthetic & set(case_ids) - of_split.keys())
    used = [case_id for case_id in case_ids if case_id not in left_out]
    problems = list(_fold_problems(file, number, folds[number], used))
    split_of = {case_id: of_split[case_id] for case_id in used if case_id in of_split}
    counted = ", ".join(f"{list(split_of.values()).count(split)} {split}" for split in ("train", "val"))
    notes = [f"fold {number} of {len(folds)} in {SPLITS_FILE}: {counted}; --prepare.fold takes another"]
    if left_out:
        notes.append(f"{len(left_out)} synthetic cases are left out: fold {number} validates their masks' patients")
    return _Fold(split_of, left_out, tuple(notes)), problems


def _synthetic_cases(root: Path) -> frozenset[str]:
    """The cases that `segdiff export` put beside real ones, by its record."""
    file = root / "provenance.json"
    if not file.is_file():
        return frozenset()
    names = read_json(file, "restore the file, or take it away").get("synthetic_cases")
    return frozenset(map(str, names)) if isinstance(names, list) else frozenset()


def _fold_problems(file: Path, fold: int, lists: dict[str, list[str]], case_ids: list[str]) -> Iterator[Problem]:
    train, val = set(lists.get("train", ())), set(lists.get("val", ()))
    for what, wrong in (
        ("in both train and val", train & val),
        ("without an image in imagesTr", (train | val) - set(case_ids)),
        ("of imagesTr that it does not name", set(case_ids) - train - val),
    ):
        if wrong:
            value = f"{len(wrong)} {what}: {', '.join(sorted(wrong)[:3])}"
            yield Problem(str(file), f"fold {fold}", value, "each training case is in one of the two lists, once")
