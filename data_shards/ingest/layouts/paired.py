"""Images and labels whose paths differ only in words for either, wherever they are below a folder.

case_00000/imaging         case_00000/segmentation
Batch 1/volume-0           Batch 1/segmentation-0
img/img0001                label/label0001
p1/p1_frame01              p1/p1_frame01_gt
p1/p1_t1, p1/p1_flair      p1/p1_seg            the modality is what the image's name has beside the label's
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_shards.ingest.cases import Case
from data_shards.ingest.layouts.base import StemOf, patient_of
from data_shards.ingest.layouts.tables import split_of_word
from data_shards.ingest.modality import parse_modalities
from data_shards.ingest.splits import MOST_SCANS
from data_shards.modalities import in_order
from data_shards.problems import Problem

_OF_IMAGES = {"image", "images", "img", "imgs", "imaging", "volume", "volumes", "vol", "scan", "scans"}
_OF_IMAGES |= {"raw", "rawdata", "data"}
_OF_LABELS = {"label", "labels", "seg", "segs", "segmentation", "segmentations", "mask", "masks", "msk", "gt"}
_OF_LABELS |= {"ground", "truth", "derivatives"}
# What BIDS says of a label beside the name of its image (BIDS 1.10, "Derivatives").
_BIDS_ENTITY = re.compile(r"_(?:seg|label|desc)-[A-Za-z0-9]+")
# Words end at digits too, and before capitals, as in TrainingMask.
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_WORD = re.compile(r"[0-9]+|[^\W\d_]+")
_SEPARATORS = "_. -"
_LAST_PIECE = re.compile(rf"[^{_SEPARATORS}]+$")
_ENDS_AS_IMAGE = re.compile(r"(?:[_-](?:images?|img)|_0000)$", re.I)
_FIRST_CHANNEL = "0000"
_NOT_OF_AN_ID = re.compile(r"[^A-Za-z0-9_-]+")

_LIST_THEM = "list pairs in manifest.csv"
_NAME_ALIKE = (
    f"name image and label of a case alike, or {_LIST_THEM}; merge a second label of an image, or take it away"
)

_Words = tuple[str, ...]


@dataclass(frozen=True)
class Paired:
    """The cases, whose modality is empty if their names do not state it; problems; and what to say."""

    cases: tuple[Case, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def reason(self) -> str | None:
        """Why these are pairs, by an example; None if there are none."""
        if not self.cases:
            return None
        image, label = next(case.files for case in self.cases if case.label is not None)
        return f"{len(self.cases)} images have a label by their names, as {image.name} has {label.name}"


def paired_by_words(root: Path, stem_of: StemOf, *, with_unlabelled: bool = False) -> Paired:
    """Every label below `root` with its image. Images without a label are left out, and notes say so, or are cases too.
    If no paths agree, names of files alone may, as long as each is there once."""
    found_files = [(path.relative_to(root), name) for path, name in _files(root, stem_of)]
    num_common = len(Path(os.path.commonpath([below.parent for below, _ in found_files] or [Path()])).parts)
    files = [_File.of(below, name, num_common) for below, name in found_files]
    images, labels = [one for one in files if not one.is_label], [one for one in files if one.is_label]
    found = _matched(images, labels, _File.path_words) or _alone(_matched(images, labels, _File.name_words))
    if not found:
        return Paired()
    used = {file.below for one in found for file in (*one.images, *one.labels)}
    problems = [problem for one in found for problem in one.problems(root)]
    if without := [str(one.below) for one in labels if one.below not in used]:
        value = f"{len(without)} without an image: {', '.join(without[:3])}"
        problems.append(Problem(str(root), "labels", value, _NAME_ALIKE))
    others = [one for one in images if one.below not in used]
    if with_unlabelled:
        found, others = [*found, *(_Pair([], "", [one]) for one in others)], []
    cases = _cases(root, found)
    notes = (*_unlabelled_notes(others, used), *_name_notes(found, cases), *_patient_notes(found))
    return Paired(tuple(cases), tuple(problems), notes)


def _files(root: Path, stem_of: StemOf) -> Iterator[tuple[Path, str]]:
    """Files of the kind below, and their names without ending; in folders behind links too, each once; without hidden
    ones."""
    seen = set[tuple[int, int]]()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(one for one in folders if not one.startswith((".", "__")))
        yield from ((Path(folder, file), name) for file in sorted(files) if (name := stem_of(file)) is not None)


class _File(NamedTuple):
    """A file below the folder. `name`: without its ending."""

    below: Path
    name: str
    is_label: bool

    @classmethod
    def of(cls, below: Path, name: str, num_common: int) -> _File:
        """A word for labels in its name makes it a label; else the nearest folder with a word for either decides, but
        not those that all files have in common."""
        roles = (_role(one) for one in reversed(below.parts[num_common:-1]))
        is_label = _role(name) == "label" or next((one for one in roles if one), "image") == "label"
        return cls(below, _BIDS_ENTITY.sub("", name) if is_label else name, is_label)

    def path_words(self) -> _Words:
        """What image and label of a case have in common. The folder's name in front of a file's says nothing new."""
        folders = [words for one in self.below.parts[:-1] if (words := _case_words(one))]
        stem = self.name_words()
        if folders and stem[: len(folders[-1])] == folders[-1]:
            stem = stem[len(folders[-1]) :]
        return (*(word for one in folders for word in (*one, "/")), *stem)

    def name_words(self) -> _Words:
        """The same of its name alone."""
        return _case_words(self.name)


@dataclass
class _Pair:
    """Files that are taken for image and label of a case: one of each, or it is unclear which is meant. `modality`: by
    the image's name, else empty."""

    labels: list[_File]
    modality: str
    images: list[_File] = field(default_factory=list)

    @property
    def below(self) -> Path:
        """The image's place below the folder."""
        return self.images[0].below

    @property
    def names(self) -> list[str]:
        """The image's name without what makes it an image, behind those of the folders above it."""
        name = self.images[0].name
        if self.modality:
            name = _LAST_PIECE.sub("", name).rstrip(_SEPARATORS)
        name = _ENDS_AS_IMAGE.sub("", name)
        folders = [one for one in self.below.parts[:-1] if _case_words(one)]
        return [*folders, name] if _case_words(name) or not folders else folders

    @property
    def split(self) -> str:
        """The split that a folder is called after; empty if none is."""
        return next((split for one in self.below.parts[:-1] if (split := split_of_word(one))), "")

    def problems(self, root: Path) -> Iterator[Problem]:
        """Of two images or labels of one case."""
        for files in (self.images, self.labels):
            if len(files) > 1:
                value = f"{' and '.join(str(one.below) for one in files[:2])} are of one case by their names"
                yield Problem(str(root), "files", value, f"keep the one that is meant, or {_LIST_THEM}")


def _role(name: str) -> str:
    """`image`, `label`, or nothing: no word for either, or for both."""
    words = _words(name)
    found = [role for role, known in (("image", _OF_IMAGES), ("label", _OF_LABELS)) if not known.isdisjoint(words)]
    return found[0] if len(found) == 1 else ""


def _words(name: str) -> _Words:
    return tuple(one.lower() for one in _WORD.findall(_CAPITAL.sub(" ", name)))


def _case_words(name: str) -> _Words:
    return tuple(one for one in _words(name) if one not in _OF_IMAGES | _OF_LABELS)


def _matched(images: list[_File], labels: list[_File], words_of: Callable[[_File], _Words]) -> list[_Pair]:
    """Labels with the images of the same words."""
    of_words: dict[_Words, list[_File]] = {}
    for label in labels:
        of_words.setdefault(words_of(label), []).append(label)
    found: dict[tuple[_Words, str], _Pair] = {}
    for image in images:
        meanings = _meanings(image, words_of(image))
        if (key := next((one for one in meanings if one[0] and one[0] in of_words), None)) is not None:
            found.setdefault(key, _Pair(of_words[key[0]], key[1])).images.append(image)
    return list(found.values())


def _meanings(image: _File, words: _Words) -> Iterator[tuple[_Words, str]]:
    """The words that its label may have, and the modality that its name then states."""
    yield words, ""
    if words[-1:] == (_FIRST_CHANNEL,):
        yield words[:-1], ""
    piece = _LAST_PIECE.search(image.name)
    named, last = (parse_modalities(piece[0]), _case_words(piece[0])) if piece else (set(), ())
    if len(named) == 1 and last and words[-len(last) :] == last:
        yield words[: -len(last)], next(iter(named))


def _alone(found: list[_Pair]) -> list[_Pair]:
    """The pairs, if each has one image and one label."""
    return found if all(len(one.images) == len(one.labels) == 1 for one in found) else []


def _cases(root: Path, found: list[_Pair]) -> list[Case]:
    """A case a pair. Splits are stated if folders of two or more of them hold pairs."""
    splits = [one.split for one in found]
    is_stated = len(set(splits)) > 1 and all(splits)
    names = _distinct(found)
    return [
        Case(
            f"{name}-{pair.modality}" if pair.modality else name,
            pair.modality,
            pair.split if is_stated else "",
            root / pair.below,
            root / pair.labels[0].below if pair.labels else None,
            patient=patient,
            is_flat=True,
        )
        for name, patient, pair in zip(names, _patients(found, names), found, strict=True)
    ]


def _distinct(found: list[_Pair]) -> list[str]:
    """Names of the cases, as case ids, behind those of as many folders as it takes to distinguish them."""
    names = [one.names for one in found]
    for depth in range(1, max(map(len, names)) + 1):
        ids = [_NOT_OF_AN_ID.sub("-", "_".join(one[-depth:])).strip("-_") for one in names]
        if len({(one, pair.modality) for one, pair in zip(ids, found, strict=True)}) == len(found):
            break
    return ids


def _patients(found: list[_Pair], names: list[str]) -> list[str | None]:
    """Images of several modalities are of one patient, and so are the few files of a folder that is a patient's."""
    folders = _patient_folders(found)
    is_clear = len({one.name for one in folders}) == len(folders)
    patients: list[str | None] = []
    for pair, name in zip(found, names, strict=True):
        folder = pair.below.parent
        if pair.modality:
            patients.append(patient_of(name, None) or name)
        else:
            patients.append((folder.name if is_clear else folder.as_posix()) if folder in folders else None)
    return patients


def _patient_folders(found: list[_Pair]) -> set[Path]:
    """Folders of several pairs whose names begin with that of the folder, or are those of other folders' files."""
    inside: dict[Path, list[_Words]] = {}
    for one in found:
        if not one.modality:
            inside.setdefault(one.below.parent, []).append(one.images[0].name_words())
    times = Counter(name for names in inside.values() for name in set(names))

    def is_patient(folder: Path, names: list[_Words]) -> bool:
        words = _case_words(folder.name)
        is_number = any(one.isdecimal() for one in words)
        begin = is_number and all(name[: len(words)] == words for name in names)
        return 1 < len(names) <= MOST_SCANS and (begin or all(times[name] > 1 for name in names))

    return {folder for folder, names in inside.items() if is_patient(folder, names)}


def _patient_notes(found: list[_Pair]) -> Iterator[str]:
    if folders := sorted(_patient_folders(found)):
        what = f"the files of each of {len(folders)} folders count as one patient's, as those of {folders[0]}"
        yield f"{what}; --prepare.patient or a manifest.csv says another"


def _unlabelled_notes(images: list[_File], used: set[Path]) -> Iterator[str]:
    """Of images in folders of which others are used; whole folders of which nothing is used are named anyway."""
    folders = {one.parent for one in used}
    if found := [str(one.below) for one in images if one.below.parent in folders]:
        what = f"{len(found)} files are not read, since no label is named like them: {', '.join(found[:3])}"
        yield f"{what}; {_LIST_THEM} if that is wrong"


def _name_notes(found: list[_Pair], cases: list[Case]) -> Iterator[str]:
    if modalities := in_order(one.modality for one in found if one.modality):
        some = "; --prepare.modalities takes some of them" if len(modalities) > 1 else ""
        yield f"modality by the names of the images: {', '.join(modalities)}{some}"
    changed = [(pair.names[-1], case.case_id) for pair, case in zip(found, cases, strict=True)]
    if example := next(((name, new) for name, new in changed if _NOT_OF_AN_ID.search(name)), None):
        yield f"case ids have - for other characters, as {example[1]} for {example[0]!r}"
