"""What the ids in a mask mean, and which ids of the model's table they are: classes are matched by name.

The names come from the user (--labels), from the mask itself (DICOM SEG, .seg.nrrd), from a file beside it (NAME.json,
NAME.yaml, nnU-Net's dataset.json), or else the ids are the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_shards.documents import parse_yaml, read_bytes
from data_shards.ingest.dataset_json import DATASET_FILE, amos_id, words
from data_shards.labels import BACKGROUND, LABEL_TABLES, UNUSED, LabelTable, shown_name
from data_shards.problems import Problem, problem, refuse

OtherLabels = Literal["refuse", "body", "background"]
_REMEDY = "give a JSON or YAML file with `id: name` for each class, nnU-Net's dataset.json, or a table's name"
_MOST_BYTES = 2**20
_LARGEST_ID = 2**16 - 1
# 3D Slicer's header: Segment3_Name:=liver, Segment3_LabelValue:=4
_SEGMENT = re.compile(rb"^Segment(\d+)_(Name|LabelValue):=(.*?)\r?$", re.M)
_MOST_SHOWN = 8


@dataclass(frozen=True)
class LabelNames:
    """Names of the ids in a mask, and who says so. `is_model`: the ids are the model's own."""

    by_id: Mapping[int, str]
    source: str
    is_model: bool = False


def names_of_model(table: LabelTable) -> LabelNames:
    """The model's own ids."""
    named = {i: name for i, name in enumerate(table.names) if name != UNUSED}
    return LabelNames(named, f"the model's table {table.name!r}", is_model=True)


def given_names(given: str | Path | Mapping[int, str] | None, mask: Path | None, table: LabelTable) -> LabelNames:
    """The names for a mask whose format has none: as given, or as a file beside the mask says, or the model's own."""
    if isinstance(given, Mapping):
        return LabelNames(_parsed(given, "labels", table), "the given names")
    if given is not None and not isinstance(given, str | Path):
        raise problem("labels", "labels", repr(given)[:60], _REMEDY)
    if given is not None and str(given) in LABEL_TABLES and not Path(given).is_file():
        return LabelNames(dict(enumerate(LABEL_TABLES[str(given)].names)), f"the table {str(given)!r}")
    if given is not None:
        return LabelNames(_parsed(_read(Path(given)), str(given), table), str(given))
    for file in () if mask is None else _beside(mask):
        content = _read(file)
        if _names_classes(content):
            return LabelNames(_parsed(content, str(file), table), str(file))
    return names_of_model(table)


def slicer_names(file: Path) -> dict[int, str]:
    """The segments that 3D Slicer names in the header of a .seg.nrrd; empty for other files."""
    if not file.name.lower().endswith((".seg.nrrd", ".nrrd")):
        return {}
    with file.open("rb") as stream:
        head = re.split(rb"\r?\n\r?\n", stream.read(_MOST_BYTES), maxsplit=1)[0]
    found: dict[bytes, dict[bytes, str]] = {}
    for number, key, value in _SEGMENT.findall(head):
        found.setdefault(number, {})[key] = value.decode("utf-8", "replace").strip()
    numbered = [one for one in found.values() if one.get(b"LabelValue", "").isdecimal() and b"Name" in one]
    return {int(one[b"LabelValue"]): one[b"Name"] for one in numbered}


def matched(names: LabelNames, table: LabelTable, where: str, others: OtherLabels = "refuse") -> dict[int, int]:
    """The model's id of each id in the mask, background included. Classes that the model does not have become `body`
    or background, or are left out of the result, so that a mask that shows them is refused."""
    if names.is_model:
        return {number: number for number in names.by_id}
    own = {_form(name): i for i, name in enumerate(table.names) if name != UNUSED}
    of_organ = {amos_id(name): i for i, name in enumerate(table.names) if amos_id(name) is not None}
    found = {0: 0}
    for number, name in names.by_id.items():
        new = own.get(_form(name), of_organ.get(amos_id(name)) if amos_id(name) is not None else None)
        if new is None and others != "refuse":
            new = 0 if others == "background" else table.body_id
            if new is None:
                raise problem(where, "--other-labels", "body", f"the model's table {table.name!r} has no body")
        if new is not None:
            found[number] = new
    if found.keys() <= {0} and len(names.by_id) > 1:
        value = f"none of {_listed(names.by_id)} ({names.source}) is a class of the model"
        raise problem(where, "labels", value, f"the model knows {', '.join(table.names[1:])}: name them so")
    return found


def unknown_labels(where: str, unknown: Mapping[int, str | None], table: LabelTable, source: str) -> Problem:
    """The problem with ids that a mask shows and the model does not know."""
    known = ", ".join(f"{i} {name}" for i, name in enumerate(table.names) if i and name != UNUSED)
    remedy = (
        f"the model knows {known}: say what your ids mean with --labels FILE (id: name), or give --other-labels body "
        f"or background"
    )
    return Problem(where, f"labels by {source}", f"the mask has {_listed(unknown)}", remedy)


def _listed(names: Mapping[int, str | None]) -> str:
    shown = [f"{i} {shown_name(name)}" if name else str(i) for i, name in sorted(names.items()) if i != 0]
    return ", ".join(shown[:_MOST_SHOWN]) + (
        f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    )


def _form(name: str) -> str:
    """`Right kidney`, `kidney_right` and `kidney-right` alike: words in alphabetical order."""
    return " ".join(sorted(words(name).split()))


def _beside(mask: Path) -> Iterator[Path]:
    """NAME.json, NAME.yaml or NAME.yml beside a mask; dataset.json in its folder or the one above."""
    stem = mask.name.split(".")[0]
    names = [mask.with_name(f"{stem}{ending}") for ending in (".json", ".yaml", ".yml")]
    folders = [mask.absolute().parent, mask.absolute().parent.parent]
    yield from (file for file in (*names, *(one / DATASET_FILE for one in folders)) if file.is_file())


def _names_classes(content: Any) -> bool:
    """Whether a file beside a mask is about its classes: a scanner's sidecar is not."""
    if not isinstance(content, Mapping):
        return False
    return any(isinstance(content.get(key), Mapping | list) for key in ("labels", "names")) or all(map(_is_id, content))


def _read(file: Path) -> Any:
    content = read_bytes(file, _REMEDY, _MOST_BYTES)
    return parse_yaml(content, file, _REMEDY)  # JSON is YAML


def _parsed(content: Any, where: str, table: LabelTable) -> dict[int, str]:
    """{id: name} of `id: name`, `name: id`, or of these under `labels` (nnU-Net) or `names` (a label table)."""
    label_map: Mapping[Any, Any] = {}
    if isinstance(content, Mapping) and isinstance(content.get("labels"), Mapping):
        content = content["labels"]
    elif isinstance(content, Mapping) and isinstance(content.get("names"), list | Mapping):
        label_map = content.get("label_map") or {}
        content = content["names"]
    if isinstance(content, list):
        content = dict(enumerate([BACKGROUND, *(one for one in content if one != BACKGROUND)]))
    if not isinstance(content, Mapping) or not content:
        raise problem(where, "labels", type(content).__name__, _REMEDY)
    if regions := [str(key) for key, value in content.items() if isinstance(value, list)]:
        value = f"regions ({', '.join(regions)[:60]})"
        raise problem(where, "labels", value, "a pixel has one class here: name the ids in a file, --labels FILE")
    pairs = [_pair(key, value, where, table) for key, value in content.items()]
    numbers = [number for number, _ in pairs]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise problem(where, "labels", f"id {twice[0]} twice", "give each id one name")
    renamed = {words(str(key)): str(value) for key, value in label_map.items()}
    return {number: renamed.get(str(number), renamed.get(words(name), name)) for number, name in pairs}


def _pair(key: Any, value: Any, where: str, table: LabelTable) -> tuple[int, str]:
    if _is_id(value) and not _is_id(key):
        key, value = value, key
    problems = []
    if not _is_id(key):
        problems.append(Problem(where, "labels", repr(key)[:60], f"ids are whole numbers from 0 to {_LARGEST_ID}"))
    if _is_id(value):  # an id of the model's table
        value = table.names[int(value)] if int(value) < table.num_classes else None
    if not isinstance(value, str) or not value.strip():
        problems.append(Problem(where, f"labels.{str(key)[:40]}", repr(value)[:60], "give the name of one class"))
    refuse(problems)
    return int(key), str(value)


def _is_id(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return 0 <= value <= _LARGEST_ID
    return isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 5
