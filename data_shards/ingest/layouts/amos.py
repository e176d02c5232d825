"""AMOS 2022 and the Medical Segmentation Decathlon: dataset.json lists the cases, and names classes by their ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards.documents import read_json
from data_shards.ingest.archive import list_archive
from data_shards.ingest.cases import Listing
from data_shards.ingest.dataset_json import DATASET_FILE, amos_id, file_stem
from data_shards.ingest.layouts.base import Layout, Request, patient_of
from data_shards.ingest.layouts.channels import chosen_channels, joined, numbered
from data_shards.ingest.modality import AMOS_NAME
from data_shards.labels import AMOS
from data_shards.problems import InputProblems, Problem

_RESTORE = "restore the file"
_NUM_ORGANS = len(AMOS.organ_ids)


class Amos(Layout):
    """dataset.json's `training`, `validation` and `test`; ids are AMOS' organs."""

    name = "amos"
    by_file = True

    def recognise(self, root: Path) -> str | None:
        """dataset.json lists cases, and names no other classes than AMOS'."""
        content = content_of(root)
        if not lists_cases(content) or _has_other_classes(content):
            return None
        return f"{DATASET_FILE} lists cases, and names no other classes than AMOS'"

    def read(self, root: Path, request: Request) -> Listing:
        """As of list_archive."""
        listing = list_archive(root, request.modalities, request.modality)
        if request.patient is not None:
            listing = _with_patients(listing, request.patient)
        labels = content_of(root).get("labels")
        num = sum(amos_id(str(name)) not in (None, 0) for name in _names_of(labels).values())
        if not 0 < num < _NUM_ORGANS:
            return listing
        note = f"{DATASET_FILE} names {num} of AMOS' {_NUM_ORGANS} organs, and the set has all of them as classes"
        return replace(listing, notes=(f"{note}; for its own classes alone give --prepare.layout msd",))


class Decathlon(Layout):
    """The same lists; `labels` are id: name. It states no validation cases."""

    name = "msd"
    by_file = True

    def recognise(self, root: Path) -> str | None:
        """dataset.json lists cases, and none of its classes is AMOS'."""
        content = content_of(root)
        if not lists_cases(content) or not _has_other_classes(content):
            return None
        return f"{DATASET_FILE} lists cases, and names classes that are not AMOS'"

    def read(self, root: Path, request: Request) -> Listing:
        """As of list_archive, in the classes of `labels`. Training cases have no split if no cases are for
        validation."""
        content = content_of(root)
        where = root / DATASET_FILE
        names, problems = class_names(where, content.get("labels"))
        named = numbered(content.get("modality"))
        channels, wrong = chosen_channels(where, "modality", named, request)
        if wrong:
            return Listing((), tuple(wrong), names=names, problems_with_names=tuple(problems))
        several = len(named) > 1
        listings = [
            list_archive(root, request.modalities, request.modality, names, channel)
            for channel in ((one, named[one], len(named)) if several else None for one in channels)
        ]
        listings = [_with_patients(one, request.patient) for one in listings]
        found = joined(where, listings) if len(listings) > 1 else listings[0]
        cases = found.cases
        if not content.get("validation"):
            cases = tuple(case.without_split() if case.split == "train" else case for case in cases)
        return replace(found, cases=cases, problems_with_names=tuple(problems))


def _with_patients(listing: Listing, pattern: str | None) -> Listing:
    cases = (replace(case, patient=patient_of(case.case_id, pattern)) for case in listing.cases)
    return replace(listing, cases=tuple(cases))


def content_of(root: Path) -> dict[str, Any]:
    """dataset.json's content; empty if there is no readable one."""
    try:
        return read_json(root / DATASET_FILE, _RESTORE) if (root / DATASET_FILE).is_file() else {}
    except InputProblems:
        return {}


def lists_cases(content: dict[str, Any]) -> bool:
    """Whether it has AMOS' lists."""
    return any(isinstance(content.get(name), list) for name in ("training", "validation", "test"))


def class_names(where: Path, labels: Any) -> tuple[dict[int, str], list[Problem]]:
    """The classes by id, from `labels` as id: name (MSD) or name: id (nnU-Net 2)."""
    remedy = 'give `labels`, {"0": "background", "1": "liver"} or {"background": 0, "liver": 1}'
    if not isinstance(labels, dict) or not labels:
        return {}, [Problem(str(where), "labels", repr(labels)[:80], remedy)]
    names: dict[int, str] = {}
    problems = []
    for key, value in labels.items():
        number, name = (key, value) if isinstance(value, str) else (value, key)
        if isinstance(number, bool) or not str(number).isdecimal() or int(number) > 2**31 or int(number) in names:
            problems.append(Problem(str(where), f"labels.{str(key)[:40]}", repr(value)[:80], remedy))
        else:
            names[int(number)] = str(name)
    return names, problems


def _has_other_classes(content: dict[str, Any]) -> bool:
    """Whether `labels` names a class that AMOS does not have, or none with AMOS' id, and the cases do not have AMOS'
    names."""
    organs = [(key, name) for key, name in _names_of(content.get("labels")).items() if key != "0"]
    entries = content.get("training")
    images = [entry.get("image") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    is_amos = any(isinstance(image, str) and AMOS_NAME.match(file_stem(image)) for image in images)
    has_others = any(amos_id(name) is None for _, name in organs)
    return bool(organs) and not is_amos and (has_others or not any(str(amos_id(name)) == key for key, name in organs))


def _names_of(labels: Any) -> dict[str, str]:
    """Class names by id, of MSD's form."""
    pairs = labels.items() if isinstance(labels, dict) else ()
    return {str(key): name for key, name in pairs if isinstance(name, str)}
