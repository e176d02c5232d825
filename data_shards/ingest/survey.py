"""A survey of a folder: its layout, its cases with their splits, and the meaning of its labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.ingest.cases import Case, Listing
from data_shards.ingest.dicom_series import DicomSeries
from data_shards.ingest.label_tables import OWN, Labelling, coloured, find_labelling, has_table
from data_shards.ingest.layouts.base import Request
from data_shards.ingest.layouts.exports import own_colours
from data_shards.ingest.layouts.find import AUTO, LAYOUTS, Recognised, recognise
from data_shards.ingest.masks import find_wholebody_problems
from data_shards.ingest.pictures import VALUES_OF_A_PICTURE, is_picture, is_unsigned, picture_stem
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.splits import (
    capital_notes,
    drawn_notes,
    patient_notes,
    patient_problems,
    pattern_problems,
    untrained_notes,
    with_splits,
)
from data_shards.ingest.volume_files import stem
from data_shards.labels import FROM_EXPERTS, LabelTable, shown_name
from data_shards.modalities import MODALITIES, grey_rule, in_order, modalities_of
from data_shards.problems import Problem
from data_shards.records import SPLITS

_AMOS = "amos"
# Fields of problems that a setting or a table solves.
_UNSTATED = {"modality", "spacing"}
_MOST_NAMES = 5


@dataclass(frozen=True)
class Survey:
    """The cases that can be cut. `problems`: why nothing can be done. `skipped`: by case id, why a case is left out, if
    the settings allow it. `notes`: of the listing."""

    recognised: Recognised
    labelling: Labelling
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]
    skipped: dict[str, tuple[Problem, ...]]
    notes: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """The name of the folder's layout."""
        return self.recognised.layout.name

    @property
    def described(self) -> str:
        """The layout with its reason, the classes, and the cases of each split."""
        splits = Counter(case.split for case in self.cases)
        counted = ", ".join(f"{splits[split]} {split}" for split in SPLITS)
        return f"layout: {self.layout} ({self.recognised.reason}); {_in_words(self.labelling.table)}; cases: {counted}"

    @property
    def recorded(self) -> dict[str, Any]:
        """The entries for `preprocessing` in the set's index; none for an AMOS folder."""
        own: dict[str, Any] = {} if self.layout == _AMOS else {"layout": self.layout}
        modalities = modalities_of(case.modality for case in self.cases)
        if modalities != MODALITIES:
            own["modalities"] = list(modalities)
        return own | self.labelling.recorded


def _in_words(table: LabelTable) -> str:
    """How many classes a table has, and its name, or theirs if it is the data set's own."""
    number = len(table.organ_ids)
    if not table.name.startswith(OWN):
        return f"{number} classes of {table.name}"
    names = [shown_name(table.names[i]) for i in table.organ_ids[:_MOST_NAMES]]
    more = f" and {number - len(names)} more" if number > len(names) else ""
    return f"{number} class{'' if number == 1 else 'es'}: {', '.join(names)}{more}"


def survey(root: Path, config: PrepareConfig, wholebody: Path | None) -> Survey:
    """Read names, small files and headers. The settings may have problems of their own."""
    recognised = recognise(root, config.layout if config.layout in {one.name for one in LAYOUTS} else AUTO)
    listing = recognised.read(root, _request(config))
    labelling, wrong = find_labelling(config.label_set, config.labels, listing.names, has_ids=listing.has_ids)
    labelling = coloured(labelling, own_colours(root))
    bad = _bad_cases(listing, config)
    skips = config.on_bad_case == "skip" and any(case.case_id not in bad for case in listing.cases)
    problems = list(listing.problems)
    if not has_table(config.labels):
        problems += listing.problems_with_names
    # What nothing states is said at once; other problems may be the reason that nothing names the classes.
    problems += wrong if all(one.field in _UNSTATED for one in problems) else []
    problems += [] if problems else _pictures_without_values(root, listing, config)
    problems += _alike_modalities(root, listing)
    problems += [] if skips else [one for found in bad.values() for one in found]
    cases = tuple(case for case in listing.cases if case.case_id not in bad)
    of_cases = _unread_notes(root, listing, config, wholebody) if not problems else []
    if listing.names is not None or config.split is not None or config.patient is not None:
        listed, by_tool = cases, config.label_set not in FROM_EXPERTS
        cases = with_splits(listed, config.split, config.seed, by_tool=by_tool)
        of_cases += drawn_notes(listed, cases) if config.split is None else []
        problems += patient_problems(cases) + pattern_problems(cases, config.patient)
    of_cases += [*capital_notes(cases), *untrained_notes(cases)]
    if not problems:
        problems += find_wholebody_problems(cases, config.label_set, wholebody)
    skipped = {case_id: tuple(found) for case_id, found in bad.items()} if skips else {}
    beside = recognised.beside
    if beside is not None and problems:
        wanted = f"{recognised.layout.name} was recognised ({recognised.reason})"
        problems.append(Problem(str(root), "layout", wanted, beside))
    notes = (*filter(None, [beside]), *listing.notes, *labelling.notes, *of_cases, *patient_notes(cases))
    return Survey(recognised, labelling, cases, tuple(dict.fromkeys(problems)), skipped, notes)


def _unread_notes(root: Path, listing: Listing, config: PrepareConfig, wholebody: Path | None) -> list[str]:
    """Folders with volumes of which none is used: a split under another name, or what is not meant to be read."""
    used = {file.parent for case in listing.cases for file in case.files}
    if not used or config.modalities is not None:
        return []
    is_read = picture_stem if any(is_picture(file) for case in listing.cases for file in case.files) else stem
    beside, unread = (wholebody, root / "__MACOSX"), dict[str, int]()
    for folder, folders, files in os.walk(root):
        folders[:] = [one for one in sorted(folders) if one[0] != "." and Path(folder, one) not in beside]
        if Path(folder) not in used and (found := sum(is_read(file) is not None for file in files)):
            unread[os.path.relpath(folder, root)] = found
    if not unread:
        return []
    names = ", ".join(list(unread)[:3]) + (", ..." if len(unread) > 3 else "")
    what = "volumes" if is_read is stem else "pictures"
    return [f"{sum(unread.values())} {what} are not read, since nothing in their folders is used: {names}"]


def _alike_modalities(root: Path, listing: Listing) -> list[Problem]:
    """Names that differ in capitals alone are one modality, or are taken for one."""
    names = in_order(case.modality for case in listing.cases)
    twins = [one for one in names if [name.lower() for name in names].count(one.lower()) > 1]
    return [Problem(str(root), "modality", " and ".join(twins), "write one of them everywhere")] if twins else []


def _pictures_without_values(root: Path, listing: Listing, config: PrepareConfig) -> Iterator[Problem]:
    """Grey values of pictures are no HU, unless a table says which."""
    found = dict.fromkeys(
        case.modality
        for case in listing.cases
        if case.pixel is not None
        and not case.pixel.has_values
        and isinstance(case.image, Path)
        and is_unsigned(case.image)
        and grey_rule(case.modality, config.intensities).kind == "hu"
    )
    for modality in found:
        remedy = VALUES_OF_A_PICTURE.format(modality=modality)
        yield Problem(str(root), f"grey values of {modality}", "pictures do not say which HU they are", remedy)


def _request(config: PrepareConfig) -> Request:
    is_usable = not config.problems()  # else these are reported, and nothing that follows from them
    return Request(
        config.modalities,
        config.modality,
        channel=config.channel,
        channels=config.channels,
        fold=config.fold,
        patient=config.patient if is_usable else None,
        draws_splits=config.split is not None,
        keep_ids=config.keep_dicom_ids,
        unlabelled=config.label_set not in FROM_EXPERTS or config.unlabelled == "train",
        pixel_mm=config.pixel_mm if is_usable or config.pixel_mm is None else 1.0,
    )


def _bad_cases(listing: Listing, config: PrepareConfig) -> dict[str, list[Problem]]:
    """By case id, the reasons why it cannot be used."""
    bad = {case_id: list(found) for case_id, found in listing.problems_of.items()}
    if config.label_set in FROM_EXPERTS and config.unlabelled == "refuse":
        remedy = (
            "add its label, put it into split test, take masks of a whole-body tool (label_set wholebody), or give "
            "--prepare.unlabelled train for a model without masks"
        )
        for case in listing.cases:
            if isinstance(case.image, DicomSeries) and case.case_id in bad:
                continue  # it is no volume: whether it has labels does not matter
            if not case.is_labelled and case.split != "test":  # for training, or for the draw of a split
                bad.setdefault(case.case_id, []).append(Problem(str(case.image), "label", "there is none", remedy))
    return bad
