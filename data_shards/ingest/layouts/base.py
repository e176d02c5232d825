"""The interface of a layout: a way to arrange images, labels and their metadata in a folder."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_shards.ingest.cases import Case, Listing
from data_shards.ingest.volume_files import stem
from data_shards.problems import Problem
from data_shards.records import MODALITIES, is_case_id

# A shard's member is named CASE-sagittal-0000.image.npy.zst, and a plain tar holds names of up to 100 characters.
_LONGEST_CASE_ID = 64
# Wrong names that are listed one by one.
_MOST_NAMES = 3
# Tables of cases, which the layout `folder` reads.
MANIFESTS = ("manifest.csv", "manifest.tsv")
# The name of a file of one kind without its ending; None for others.
StemOf = Callable[[str], str | None]
# BIDS (1.10, "Entities"): the subject is the first part of every name.
_BIDS_SUBJECT = r"(sub-[A-Za-z0-9]+)_"
_OWN_VOLUME = re.compile(r"(.+)_[a-z0-9-]+_[0-9]+-volume")


@dataclass(frozen=True)
class Request:
    """The settings for a layout. `modality`: of every case, if the user states it; `modalities`: those that are used,
    None for all; `channel`, `channels` and `fold`: for nnU-Net and MSD; `patient`: a pattern whose first group, in a
    case id, is the patient; `draws_splits`: the user wants other splits than the stated ones; `keep_ids`:
    DICOM's own ids and file names are shown; `pixel_mm`: the side of a picture's pixel; `unlabelled`: images without a
    label are wanted, also where only labels show which files are images."""

    modalities: Sequence[str] | None = None
    modality: str | None = None
    channel: int | None = None
    channels: tuple[int, ...] | None = None
    fold: int = 0
    patient: str | None = None
    draws_splits: bool = False
    keep_ids: bool = False
    pixel_mm: float | None = None
    unlabelled: bool = False

    def takes(self, modality: str) -> bool:
        """Whether cases of this modality are used."""
        return self.modalities is None or modality in self.modalities

    def notes_against(self, said: str) -> tuple[str, ...]:
        """What to say if the setting is another modality than a case's table or name says; `said` may be empty."""
        if self.modality is None or said in ("", self.modality):
            return ()
        what = f"taken as {self.modality} as stated, against {said} by its table or name"
        return (f"{what}; else leave --prepare.modality out",)

    @property
    def any_modality(self) -> str:
        """The modality of a case whose own is a problem, so that its files are checked too."""
        return (self.modalities or MODALITIES)[0]


class Layout(ABC):
    """One way to arrange a data set."""

    name: ClassVar[str]
    by_file: ClassVar[bool] = False  # it is recognised by a file that describes it, or by names of its own

    @abstractmethod
    def recognise(self, root: Path) -> str | None:
        """Why the folder has this layout, as text; None if it does not. Reads only names and small files."""

    def not_read(self, root: Path) -> str | None:
        """What is there that only another layout reads, and the setting for it."""
        found = next((name for name in MANIFESTS if (root / name).is_file()), None)
        return found and f"{found} is not read; --prepare.layout folder reads it instead"

    @abstractmethod
    def read(self, root: Path, request: Request) -> Listing:
        """The cases of the folder, by case id, and all problems that names and headers show."""


def volumes_in(folder: Path, stem_of: StemOf = stem) -> dict[str, list[Path]]:
    """The volume files in a folder by their name without ending, in order of names, without hidden files. A link to a
    file that is not there is one, so that its case is reported. `stem_of`: another kind of files, by their names."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = stem_of(file.name)
        if name is not None and (file.is_file() or file.is_symlink()):
            found.setdefault(name, []).append(file)
    return found


def one_file(files: Sequence[Path]) -> tuple[Path, list[Problem]]:
    """The first of the files of one name, and a problem if there are more, since it cannot be known which is meant."""
    if len(files) == 1:
        return files[0], []
    value = f"both {files[0].name} and {files[1].name}"
    return files[0], [Problem(str(files[0].parent), "files", value, "keep the one that is meant")]


def case_name_problems(where: Path, names: Sequence[str], otherwise: str = "") -> Iterator[Problem]:
    """Problems of names that cannot be case ids. `otherwise`: another remedy than to rename the files."""
    remedy = f"name cases with letters, digits, _ and -, at most {_LONGEST_CASE_ID} characters{otherwise}"
    wrong = [name for name in names if not is_case_id(name) or "." in name or len(name) > _LONGEST_CASE_ID]
    for name in wrong[:_MOST_NAMES]:
        yield Problem(str(where), "case id", repr(name[:100]), remedy)
    if len(wrong) > _MOST_NAMES:
        yield Problem(str(where), "case id", f"{len(wrong) - _MOST_NAMES:,} more such names", remedy)


def patient_of(case_id: str, pattern: str | None, *usual: str) -> str | None:
    """The patient of a case by the user's pattern; without one by the `usual` ones, or as BIDS names its subjects. None
    if none matches. Volumes of `segdiff volume --format nnunet` are of the patient of their mask."""
    if own := _OWN_VOLUME.fullmatch(case_id):
        return patient_of(own[1], pattern, *usual) or own[1]
    patterns = (*usual, _BIDS_SUBJECT) if pattern is None else (pattern,)
    return next((matched[1] for one in patterns if (matched := re.match(one, case_id))), None)


def with_wanted_modalities(cases: Sequence[Case], request: Request) -> tuple[Case, ...]:
    """Those of the modalities asked for, by case id."""
    return tuple(sorted((one for one in cases if request.takes(one.modality)), key=lambda one: one.case_id))


def no_cases(root: Path, request: Request, found: Sequence[Case]) -> list[Problem]:
    """A problem if no case is left."""
    if found:
        return []
    value = "none" if request.modalities is None else f"none of {' or '.join(request.modalities)}"
    return [Problem(str(root), "cases", value, "check the folder, --prepare.layout and --prepare.modalities")]
