"""Slices as pictures: PNG, TIFF or JPEG images and their masks, paired by their names as in plain folders; also what
`segdiff export --format png` writes, by its items.csv and provenance.json.

images/CASE.png and masks/CASE.png             also the other forms of data_shards.ingest.layouts.folder
items.csv                                      of an export: modality, patient, split, spacing and values of each name
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards.documents import read_json
from data_shards.ingest.cases import Case, Listing
from data_shards.ingest.dataset_json import DATASET_FILE, is_of_layout
from data_shards.ingest.layouts.amos import class_names, content_of
from data_shards.ingest.layouts.base import MANIFESTS, Layout, Request
from data_shards.ingest.layouts.exports import (
    CASE,
    ITEMS_FILE,
    MODALITY,
    PATIENT,
    PROVENANCE_FILE,
    RESTORE,
    is_own_export,
    own_items,
    own_pixel,
)
from data_shards.ingest.layouts.folder import all_pairs, label_of_a_name, listing_of, pairs
from data_shards.ingest.layouts.tables import stated_split
from data_shards.ingest.pictures import Pixel, picture_stem, unstated_spacing
from data_shards.labels import UNUSED
from data_shards.problems import InputProblems, Problem, problem


class Pictures(Layout):
    """Folders of two-dimensional images."""

    name = "pictures"

    def recognise(self, root: Path) -> str | None:
        """It is an export, or a picture has a mask of its name. A folder with the dataset.json of another layout is
        left to that layout."""
        if is_own_export(root) and (root / "images").is_dir() and not (root / DATASET_FILE).exists():
            return f"{ITEMS_FILE} and {PROVENANCE_FILE} are of `segdiff export --format png`"
        content = content_of(root)
        if (root / DATASET_FILE).exists() and (not content or is_of_layout(content)):
            return None
        return label_of_a_name(pairs(root, picture_stem)[0])

    def read(self, root: Path, request: Request) -> Listing:
        """All pairs; of an export, in the classes and with the facts that it states."""
        try:
            items = own_items(root)
            cases, problems, said = all_pairs(root, request, picture_stem)
            if items is None:
                spacing = None if request.pixel_mm is None else (request.pixel_mm, request.pixel_mm)
                pixel = Pixel(spacing, table=MANIFESTS[0])
                cases = [replace(case, pixel=pixel) for case in cases]
            else:
                cases = [_stated(root, case, items, request) for case in cases]
                problems += _missing(root, cases, items)
            names = _names(root)
        except InputProblems as error:
            return Listing((), error.problems)
        if unstated := unstated_spacing(root, [case.pixel for case in cases if case.pixel is not None]):
            problems += unstated
            cases = [_with_any_spacing(case) for case in cases]
        where = root if not (root / DATASET_FILE).is_file() else root / DATASET_FILE
        notes = tuple(_grey_notes(cases)) if items is not None else said
        return listing_of(root, request, (cases, problems), names, str(where), notes)


def _with_any_spacing(case: Case) -> Case:
    """The case, so that everything else about it is checked, too."""
    return case if case.pixel is None else replace(case, pixel=replace(case.pixel, spacing_mm=(1.0, 1.0)))


def _stated(root: Path, case: Case, items: dict[str, dict[str, str]], request: Request) -> Case:
    row = items.get(case.case_id)
    if row is None:
        remedy = f"take it away, or give it a line there; or take {ITEMS_FILE} and {PROVENANCE_FILE} away"
        raise problem(root / ITEMS_FILE, "name", f"{case.image.name} is not there", remedy)
    split = stated_split(root / ITEMS_FILE, row["split"]) if row.get("split") else ""
    return replace(
        case,
        modality=row[MODALITY],
        patient=row.get(PATIENT) or row[CASE],
        split=split,
        pixel=own_pixel(root, row, request.pixel_mm),
    )


def _missing(root: Path, cases: list[Case], items: dict[str, dict[str, str]]) -> Iterable[Problem]:
    """Files that an export wrote and that are not there any more."""
    masked = {case.case_id for case in cases if case.label is not None}
    for what, there in (("images", {case.case_id for case in cases}), ("masks", masked)):
        if gone := sorted(items.keys() - there):
            value = f"{len(gone)} of {ITEMS_FILE} are missing: {', '.join(gone[:3])}"
            yield Problem(str(root / what), what, value, f"restore them, or take their lines out of {ITEMS_FILE}")


def _names(root: Path) -> tuple[dict[int, str], list[Problem]]:
    """The classes by id: of dataset.json, else of an export's provenance.json."""
    content = content_of(root)
    if "labels" in content:
        return class_names(root / DATASET_FILE, content["labels"])
    if not is_own_export(root):
        return {}, []
    table: Any = read_json(root / PROVENANCE_FILE, RESTORE).get("label_table")
    if not isinstance(table, list) or not all(isinstance(name, str) for name in table):
        return {}, [Problem(str(root / PROVENANCE_FILE), "label_table", repr(table)[:60], "give a list of names")]
    return {number: name for number, name in enumerate(table) if name != UNUSED}, []


def _grey_notes(cases: list[Case]) -> Iterable[str]:
    """Images that are not in HU are stretched again by percentiles, if nothing is said."""
    plain = sorted({case.modality for case in cases if case.pixel is not None and not case.pixel.has_values})
    for modality in plain:
        keep = f'--prepare.intensities {modality} "values 0 255"'
        yield f"{modality} of pictures has no unit; {keep} keeps its grey values as they are, if you have not given it"
