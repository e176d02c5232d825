"""A raw data set of nnU-Net v2 with real cases, which synthetic ones are put beside: what it holds, and whether both
fit together (its documentation/dataset_format.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.documents import checked, parse_json_value, read_bytes, read_json
from data_shards.ingest.dataset_json import DATASET_FILE, amos_id, words
from data_shards.ingest.itk_files import is_itk, simpleitk
from data_shards.ingest.layouts.nnunet import SPLITS_FILE
from data_shards.ingest.modality import parse_modalities
from data_shards.labels import BACKGROUND, BODY, UNUSED, LabelTable
from data_shards.problems import Problem, refuse

FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
PROVENANCE = "provenance.json"
_FIRST = "_0000"
_IGNORE = "ignore"
_LARGEST_ID = 255  # masks are uint8
_MOST_BYTES = 64 * 2**20
_GIVE = "give the folder of a raw data set of nnU-Net v2: dataset.json beside imagesTr and labelsTr"


@dataclass(frozen=True)
class RealSet:
    """The data set in `root`. cases, tests: names of its training and test cases. folds: those of its own
    splits_final.json, none without the file."""

    root: Path
    content: dict[str, Any]
    cases: tuple[str, ...]
    tests: tuple[str, ...]
    folds: tuple[dict[str, list[str]], ...]

    @classmethod
    def read(cls, root: Path) -> RealSet:
        """Refused: what is no such data set, or a synthetic one."""
        content = read_json(root / DATASET_FILE, _GIVE, "the description of a data set")
        ending = str(content.get("file_ending"))
        cases = _names(root / "labelsTr", ending, "")
        refuse(list(_problems(root, content, cases)))
        return cls(root, content, cases, _names(root / "imagesTs", ending, _FIRST), _folds(root, cases))

    @property
    def ending(self) -> str:
        """The ending of its files."""
        return str(self.content["file_ending"])

    def image(self, case: str) -> Path:
        """The image of a case."""
        folder = "imagesTs" if case in self.tests else "imagesTr"
        return self.root / folder / f"{case}{_FIRST}{self.ending}"

    def names_in(self, folder: str) -> set[str]:
        """The names of cases that files in imagesTr or labelsTr have."""
        return set(_names(self.root / folder, self.ending, _FIRST if folder.startswith("images") else ""))

    def num_dimensions(self) -> int:
        """The dimensions of its first image: two for slices, three for volumes."""
        return 2 if self.ending == ".png" else len(self.spacing_mm)

    @cached_property
    def spacing_mm(self) -> tuple[float, ...]:
        """The spacing of its first image, along each dimension; none for PNG."""
        file = self.image(self.cases[0])
        if self.ending == ".png":
            return ()
        if is_itk(file):
            reader = simpleitk(file).ImageFileReader()
            reader.SetFileName(str(file))
            reader.ReadImageInformation()
            return tuple(reader.GetSpacing())
        import nibabel as nib

        return tuple(map(float, nib.load(file).header.get_zooms()))

    def unlike(self, modality: str, ending: str, num_dimensions: int, *, is_cut: bool) -> Iterator[Problem]:
        """The reasons why synthetic images of this kind cannot be cases of the same data set. `is_cut`: its volumes
        become slices like these."""
        where = str(self.root / DATASET_FILE)
        names = list(self.content["channel_names"].values())
        if len(names) > 1:
            yield Problem(where, "channel_names", f"{len(names)} channels", "a synthetic image has one channel")
        elif str(names[0]).lower() != modality.lower() and modality not in parse_modalities(names[0]):
            yield Problem(where, "channel_names", str(names[0]), f"the synthetic images are {modality}")
        if is_cut:
            return
        if self.ending != ending:
            remedy = f"a data set has one kind of files: write {self.ending} (--export.file-ending, OUT's ending), or "
            yield Problem(where, "file_ending", self.ending, f"{remedy}convert its files to {ending}")
            return
        if (theirs := self.num_dimensions()) != num_dimensions:
            remedies = {
                2: "for volumes of masks use `segdiff volume MASKS OUT --volume.format nnunet --merge-with DATASET`",
                3: "for slices use `segdiff export --format nnunet --merge-with DATASET`",
            }
            value = f"has {theirs} dimensions, the synthetic ones {num_dimensions}"
            yield Problem(str(self.image(self.cases[0])), "image", value, remedies[num_dimensions])

    def unlike_spacing(self) -> Iterator[Problem]:
        """The reason why images of unknown spacing, which are written with 1 mm, cannot be beside its slices."""
        spacing_mm = self.spacing_mm
        if len(spacing_mm) == 2 and not np.allclose(spacing_mm, 1.0, rtol=0.01):
            value = f"{' x '.join(f'{one:.4g}' for one in spacing_mm)} mm, and not kept of masks of a folder"
            remedy = (
                "nnU-Net would resample synthetic images as if their pixels were 1 mm: sample from a shard set, or "
                "give PNG beside PNG (--export.file-ending .png), which has no spacing"
            )
            yield Problem(str(self.image(self.cases[0])), "spacing", value, remedy)

    def ids_of(self, table: LabelTable, *, keep_body: bool) -> tuple[np.ndarray, list[Problem]]:
        """uint8 [256] from the table's ids to those of the data set, by name; and the classes that only one of both
        has. `body` is background where the data set does not have it."""
        labels: dict[str, int] = self.content["labels"]
        by_name = {name: _matching(name, labels) for name in table.names if name not in (BACKGROUND, UNUSED)}
        if not keep_body and by_name.get(BODY) is None:
            by_name.pop(BODY, None)
        new_id_K = np.zeros(256, np.uint8)
        for name, theirs in by_name.items():
            new_id_K[table.names.index(name)] = 0 if theirs is None else labels[theirs]
        missing = [name for name, theirs in by_name.items() if theirs is None]
        unknown = [name for name, number in labels.items() if number and name not in (_IGNORE, *by_name.values())]
        remedy = (
            "the same pixels would have other labels in real and in synthetic cases: prepare the set with a table of "
            "the data set's classes (--prepare.labels TABLE.yaml), or change the data set's labels"
        )
        where = str(self.root / DATASET_FILE)
        problems = []
        if missing:
            value = f"not there: {', '.join(missing[:8])} of label table {table.name!r}"
            problems.append(Problem(where, "labels", value, remedy))
        if unknown:
            value = f"{', '.join(unknown[:8])}: not in label table {table.name!r}"
            problems.append(Problem(where, "labels", value, remedy))
        return new_id_K, problems


def _matching(name: str, labels: dict[str, int]) -> str | None:
    """The data set's name of a class: the same words, or the same organ of AMOS."""
    organ = amos_id(name)
    for theirs in labels:
        if words(theirs) == words(name) or (organ is not None and amos_id(theirs) == organ):
            return theirs
    return None


def _names(folder: Path, ending: str, channel: str) -> tuple[str, ...]:
    end = channel + ending
    files = sorted(folder.iterdir()) if folder.is_dir() else ()
    return tuple(file.name[: -len(end)] for file in files if file.name.endswith(end) and not file.name.startswith("."))


def _problems(root: Path, content: dict[str, Any], cases: tuple[str, ...]) -> Iterator[Problem]:
    where = str(root / DATASET_FILE)
    if (root / PROVENANCE).is_file() and read_json(root / PROVENANCE, _GIVE).get("synthetic"):
        remedy = "give real cases alone: synthetic ones would be validated on"
        yield Problem(str(root / PROVENANCE), "synthetic", "true", remedy)
    for key in ("channel_names", "labels"):
        if not isinstance(content.get(key), dict) or not content[key]:
            yield Problem(where, key, "missing", _GIVE)
    labels = content.get("labels")
    if isinstance(labels, dict) and not all(isinstance(value, int) for value in labels.values()):
        yield Problem(where, "labels", "regions", "a synthetic mask has one class a pixel: merge a set without regions")
    elif isinstance(labels, dict):
        wrong = [f"{name}: {value}" for name, value in labels.items() if not 0 <= value <= _LARGEST_ID]
        if wrong:
            yield Problem(where, "labels", wrong[0], f"give whole numbers from 0 to {_LARGEST_ID}")
    if "dataset" in content:
        yield Problem(where, "dataset", "files elsewhere", "put the files into imagesTr and labelsTr")
    elif not cases:
        yield Problem(str(root / "labelsTr"), "cases", f"none that end in {content.get('file_ending')}", _GIVE)
    for case in cases:
        file = root / "imagesTr" / f"{case}{_FIRST}{content.get('file_ending')}"
        if not file.is_file():
            yield Problem(str(file), "image", "not found, but its label is", "restore it, or take the label away")


def _folds(root: Path, cases: tuple[str, ...]) -> tuple[dict[str, list[str]], ...]:
    file = root / SPLITS_FILE
    if not file.is_file():
        return ()
    remedy = "restore the file, or take it away: folds are then made by patient"
    folds = parse_json_value(read_bytes(file, remedy, _MOST_BYTES), file, remedy, "nnU-Net's folds")
    checked(folds, list[dict[str, list[str]]], file, "nnU-Net's folds", remedy)
    named = {case for fold in folds for split in ("train", "val") for case in fold.get(split, ())}
    if strange := sorted(named - set(cases)):
        refuse([Problem(str(file), "cases", f"{strange[0]} has no label in labelsTr", remedy)])
    return tuple({split: list(fold.get(split, ())) for split in ("train", "val")} for fold in folds)
