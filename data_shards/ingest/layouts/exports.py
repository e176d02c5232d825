"""What `segdiff export` writes beside its files: the facts of each image, and where all of them come from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from data_shards.documents import read_json
from data_shards.ingest.layouts.tables import read_table, stated_pixel
from data_shards.ingest.pictures import Pixel
from data_shards.labels import is_colour
from data_shards.modalities import MODALITY_RULE, is_modality
from data_shards.problems import InputProblems, Problem, refuse

ITEMS_FILE, PROVENANCE_FILE = "items.csv", "provenance.json"
_MADE_BY = "segdiff sample"
_MERGED = "merged_with"
RESTORE = f"restore {ITEMS_FILE} and {PROVENANCE_FILE} of the export, or take both away"
NAME, MODALITY, CASE, PATIENT = "name", "target_modality", "case_id", "patient"


def is_own_export(root: Path) -> bool:
    """Whether the folder has the record of an export of `segdiff sample`'s images."""
    if not ((root / ITEMS_FILE).is_file() and (root / PROVENANCE_FILE).is_file()):
        return False
    try:
        return read_json(root / PROVENANCE_FILE, RESTORE).get("made_by") == _MADE_BY
    except InputProblems:
        return True  # reported when it is read


def own_items(root: Path) -> dict[str, dict[str, str]] | None:
    """The rows of an export's items.csv by name; None if the folder is no export. Raises InputProblems."""
    if not is_own_export(root):
        return None
    read_json(root / PROVENANCE_FILE, RESTORE)
    rows = read_table(root / ITEMS_FILE, (NAME, MODALITY, CASE))
    names = Counter(row[NAME] for row in rows)
    refuse(
        Problem(str(root / ITEMS_FILE), "name", f"{name} comes {num} times", "keep the line that is meant")
        for name, num in names.items()
        if num > 1
    )
    refuse(
        Problem(str(root / ITEMS_FILE), MODALITY, repr(name[:40]), f"a modality is {MODALITY_RULE}")
        for name in dict.fromkeys(row[MODALITY] for row in rows)
        if not is_modality(name)
    )
    return {row[NAME]: row for row in rows}


def own_patients(root: Path) -> dict[str, str]:
    """The patient of each image of an export. None of one that has real cases too (`--merge-with`): these are their own
    patients, and so their names are those of the masks' patients. Raises InputProblems."""
    items = own_items(root)
    if items is None or _MERGED in read_json(root / PROVENANCE_FILE, RESTORE):
        return {}
    return {name: row[PATIENT] for name, row in items.items() if row.get(PATIENT)}


def own_colours(root: Path) -> dict[str, str]:
    """Colours of classes by name, as an export of any layout states them; none in other folders."""
    try:
        record = read_json(root / PROVENANCE_FILE, RESTORE) if (root / PROVENANCE_FILE).is_file() else {}
    except InputProblems:
        return {}  # another program's file; that of an export is reported where its items are read
    names, colours = record.get("label_table"), record.get("label_colours")
    if not (isinstance(names, list) and isinstance(colours, list) and len(names) == len(colours)):
        return {}
    return {str(name): colour for name, colour in zip(names, colours, strict=True) if is_colour(colour)}


def own_pixel(root: Path, row: dict[str, str], pixel_mm: float | None) -> Pixel:
    """What an export's row says of the picture's pixels. Those of earlier versions say nothing."""
    pixel = stated_pixel(root / ITEMS_FILE, row, pixel_mm)
    return pixel if row else replace(pixel, table=None)


def own_modality(root: Path, name: object) -> str | None:
    """A modality that an export states, which may be any name; None for what other people write."""
    return name if isinstance(name, str) and is_modality(name) and is_own_export(root) else None
