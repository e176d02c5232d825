"""The meaning of the ids in label files: AMOS' organs, the classes that the data name, or the user's own table.

An own table is a YAML file:

    name: abdomen
    names: [liver, tumour]                        # the classes in their order; background and body are added
    label_map: {lesion: tumour, 7: background}    # a class of the data, by its name or its number, to one of the table
    colours: {tumour: '#e5383b'}                  # of classes on pictures; others get colours of ours

`names` may also give the ids in the label files, as {1: liver, 4: tumour}, if the data do not name them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_shards.documents import parse_yaml, read_bytes, reading
from data_shards.ingest.dataset_json import amos_id, words
from data_shards.labels import AMOS, BACKGROUND, BODY, FROM_EXPERTS, LABEL_TABLES, LabelTable
from data_shards.problems import InputProblems, Problem, problem

# The value of prepare.labels that means AMOS' table instead of a file.
AMOS_BY_NAME = AMOS.name
# How the names of data sets' own tables begin.
OWN = "own-"
_REMEDY = "give `name`, `names` and, where needed, `label_map` (docs/data.md 3)"
_MOST_BYTES = 256 * 1024
_LONGEST_NAME = 100
_LARGEST_ID = 2**31
# With more it is a file of another kind.
_MOST_PROBLEMS = 8
# Characters of a digest, enough to distinguish one user's tables.
_DIGITS = 6
_COLOUR = re.compile("#?([0-9a-fA-F]{6})")
# What id 0 is called where it is no class.
_NO_CLASS = {BACKGROUND, "bg", "air", "none", "nothing", "empty", "void", "other", "rest", "outside", "exterior"}
_NO_CLASS |= {"unlabelled", "unlabeled", "no label", "clear label"}


@dataclass(frozen=True)
class Labelling:
    """The table of a set, and the map of the ids in label files.

    ids: stored id to id, background included; None if files have AMOS' own ids. They are ids of `table` if `is_own`,
    else AMOS' ids, from which the label set is made. An id that is not among them fails its volume. notes: on the
    table's file.
    """

    table: LabelTable
    ids: Mapping[int, int] | None = None
    is_own: bool = False
    notes: tuple[str, ...] = ()

    @property
    def recorded(self) -> dict[str, Any]:
        """The entries for `preprocessing` in index.json besides the settings; none for AMOS' own ids."""
        found: dict[str, Any] = {}
        if self.is_own:
            found = {"label_set": self.table.name, "label_names": list(self.table.names)}
            if self.table.colours is not None:
                found["label_colours"] = list(self.table.colours)
        if self.ids is not None:
            found["label_ids"] = [[stored, new] for stored, new in sorted(self.ids.items())]
        return found


@dataclass(frozen=True)
class _Table:
    """A table file. `stored`: the names' ids in label files, if the file gives them."""

    table: LabelTable
    stored: dict[int, str]
    label_map: dict[int | str, str]
    notes: tuple[str, ...] = ()


def find_labelling(
    label_set: str, labels: str | None, names: dict[int, str] | None, *, has_ids: bool = True
) -> tuple[Labelling, list[Problem]]:
    """The labelling for the settings. `names`: the data's classes by stored id, None for AMOS' own ids. `has_ids`: the
    data state the ids; else they name classes alone, as by files or segments, and a table's numbers mean nothing."""
    file = Path(str(labels)) if has_table(labels) else None
    default = Labelling(LABEL_TABLES[label_set])
    try:
        if file is not None:
            if label_set != AMOS.name:
                value = f"{file} with label_set {label_set}"
                raise problem("prepare", "labels", value, "a table of one's own goes with label_set amos")
            table = _read_table(file)
            return _with_table(table if has_ids else _by_names(table, file), names, str(file))
        if names is None or label_set == "wholebody":
            return default, []
        if not names:
            remedy = "name them in a file TABLE.yaml of two lines, `name: mine` and `names: {1: liver, 2: spleen}`"
            remedy += ", and give --prepare.labels TABLE.yaml"
            raise problem("labels", "names", "nothing names the classes of the label files", remedy)
        if label_set == AMOS.name and labels is None:
            return replace(_own(names), notes=_zero_notes(names)), []
        labelling, problems = _into_amos(default.table, names)
        return replace(labelling, notes=_zero_notes(names)), problems
    except InputProblems as error:
        return default, list(error.problems)


def coloured(labelling: Labelling, colours: Mapping[str, str]) -> Labelling:
    """The labelling with these colours by class name, if its table is the data's own and has none."""
    table = labelling.table
    if not labelling.is_own or table.colours is not None or not colours.keys() & set(table.names):
        return labelling
    return replace(labelling, table=replace(table, colours=tuple(map(colours.get, table.names))))


def _zero_notes(names: Mapping[int, str]) -> tuple[str, ...]:
    """What to say if the data name a class with the id of the background."""
    if words(names.get(0, BACKGROUND)) in _NO_CLASS:
        return ()
    return (f"id 0 is called {names[0]!r}, and counts as {BACKGROUND}: number the classes from 1 if that is wrong",)


def has_table(labels: str | None) -> bool:
    """Whether prepare.labels is the file of a table."""
    return labels not in (None, AMOS_BY_NAME)


def _own(names: dict[int, str]) -> Labelling:
    """The data's classes in the order of their ids, and `body`. Its name is made from the classes, so sets of the same
    classes have the same table and can be mixed."""
    kept = [(stored, name) for stored, name in sorted(names.items()) if stored != 0]
    classes = [name for _, name in kept]
    digest = hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:_DIGITS]
    table = _table_of(f"{OWN}{digest}", classes, "labels")
    return Labelling(table, {0: 0} | {stored: table.names.index(name) for stored, name in kept}, is_own=True)


def _into_amos(table: LabelTable, names: dict[int, str]) -> tuple[Labelling, list[Problem]]:
    """AMOS' ids of classes that have one of AMOS' names."""
    ids, unknown = {0: 0}, []
    for stored, name in names.items():
        known = 0 if stored == 0 else AMOS.body_id if words(name) == BODY else amos_id(name)
        if known is None:
            unknown.append(f"{stored} {name!r}")
        else:
            ids[stored] = known
    remedy = "AMOS has 15 organs: say what becomes of others in a table of your own (--prepare.labels TABLE.yaml)"
    problems = [Problem("labels", "names", ", ".join(unknown[:8]), remedy)] if unknown else []
    return Labelling(table, ids), problems


def _with_table(own: _Table, names: dict[int, str] | None, where: str) -> tuple[Labelling, list[Problem]]:
    """Each stored id in the table: by label_map, else by the id that the table gives, else by name."""
    if names is None:
        names = dict(enumerate(AMOS.names[: AMOS.body_id]))
    problems = list(_turned_names(own, names, where))
    named = names | own.stored or dict(enumerate(own.table.names[:-1]))
    ids, unknown = {0: 0}, []
    to_name = {words(name): name for name in own.table.names}
    by_name = {words(key): meant for key, meant in own.label_map.items() if isinstance(key, str)}
    for stored, name in sorted(named.items()):
        meant = own.label_map.get(stored, by_name.get(words(name), to_name.get(words(name))))
        if stored != 0 and meant is None:
            unknown.append(f"{stored} {name!r}")
        elif meant is not None:
            ids[stored] = own.table.names.index(meant)
    ids |= {stored: own.table.names.index(meant) for stored, meant in own.label_map.items() if isinstance(stored, int)}
    remedy = f"name them in `names`, or say what becomes of them: label_map: {{NAME: {BACKGROUND}}}"
    problems += [Problem(where, "label_map", f"nothing for {', '.join(unknown[:8])}", remedy)] if unknown else []
    return Labelling(own.table, ids, is_own=True, notes=own.notes), problems


def _by_names(own: _Table, file: Path) -> _Table:
    """The table for data that number nothing. Raises InputProblems for a number in label_map."""
    if numbers := [key for key in own.label_map if isinstance(key, int)]:
        remedy = "the data have no ids: give the class by its name"
        raise problem(file, f"label_map.{numbers[0]}", own.label_map[numbers[0]], remedy)
    return replace(own, stored={})


def _turned_names(own: _Table, names: Mapping[int, str], where: str) -> Iterator[Problem]:
    """Ids that are one class of the table by the data, and another one by the table."""
    classes = {words(name) for name in own.table.names[1:]}
    for stored, meant in own.stored.items():
        name = names.get(stored, meant)
        if words(name) != words(meant) and words(name) in classes and stored not in own.label_map:
            remedy = f"correct one of them, or say which is meant: label_map: {{{stored}: {meant}}}"
            yield Problem(where, f"names.{stored}", f"{meant!r}, and {name!r} by the data", remedy)


def _read_table(file: Path) -> _Table:
    values = parse_yaml(read_bytes(file, _REMEDY, _MOST_BYTES), file, _REMEDY)
    with reading(file, "a label table", _REMEDY):
        if strange := sorted(map(str, values.keys() - {"name", "names", "label_map", "colours"})):
            raise problem(file, strange[0], "not a key of a label table", _REMEDY)
        names, label_map = values["names"], values.get("label_map") or {}
        stored = {int(key): str(name) for key, name in names.items()} if isinstance(names, dict) else {}
        classes = [name for _, name in sorted(stored.items())] if stored else list(map(str, names))
        table = _table_of(str(values["name"]), [name for name in classes if name != BACKGROUND], str(file))
        meant = {_key(key): str(name) for key, name in label_map.items()}
        colours, wrong, notes = _colours(values.get("colours") or {}, table, file)
    wrong += [
        Problem(str(file), f"label_map.{key}", name, f"give one of {', '.join(table.names)}")
        for key, name in meant.items()
        if name not in table.names
    ]
    if stored.get(0, BACKGROUND) != BACKGROUND:
        wrong.append(Problem(str(file), "names", stored[0], f"number them from 1 on: 0 is {BACKGROUND}"))
    mapped = [key for key in meant if isinstance(key, int)]
    beyond = [number for number in stored if not 0 <= number <= _LARGEST_ID]
    if beyond := [*beyond, *(number for number in mapped if abs(number) > _LARGEST_ID)]:
        remedy = f"ids are 0 to {_LARGEST_ID}; label_map may also say what becomes of -1"
        wrong.append(Problem(str(file), "names", str(beyond[0])[:40], remedy))
    if wrong:
        raise InputProblems(wrong)
    return _Table(replace(table, colours=colours), stored, meant, notes)


def _colours(
    given: Mapping[Any, Any], table: LabelTable, file: Path
) -> tuple[tuple[str | None, ...] | None, list[Problem], tuple[str, ...]]:
    """The colour of each class of the table, None if the file gives none; wrong ones; and what to say of them."""
    found: dict[str, str] = {}
    problems = []
    for name, value in given.items():
        colour = _COLOUR.fullmatch(value.strip()) if isinstance(value, str) else None
        if name not in table.names[1:]:
            remedy = f"give one of {', '.join(table.names[1:])}"
            problems.append(Problem(str(file), "colours", repr(name)[:_LONGEST_NAME], remedy))
        elif colour is None:
            remedy = "give six hexadecimal digits in quotation marks, as '#b5533c'"
            problems.append(Problem(str(file), f"colours.{name}", repr(value)[:_LONGEST_NAME], remedy))
        else:
            found[name] = colour[1].lower()
    twice = [name for name, colour in found.items() if list(found.values()).count(colour) > 1]
    if twice:
        text = (
            f"{file.name}: colours: {', '.join(twice)} look alike on every picture: give each class a colour of its own"
        )
        return tuple(map(found.get, table.names)), problems, (text,)
    return (tuple(map(found.get, table.names)) if found else None), problems, ()


def _key(key: Any) -> int | str:
    return int(key) if isinstance(key, int) or str(key).isdecimal() else str(key)


def _table_of(name: str, classes: list[str], where: str) -> LabelTable:
    """background, the classes, and body, unless the classes contain it. Raises InputProblems for invalid names."""
    problems = list(islice(_problems_with_names(classes, where), _MOST_PROBLEMS))
    if problems:
        raise InputProblems(problems)
    names = (BACKGROUND, *classes, *([] if BODY in classes else [BODY]))
    if len(names) > 256:
        remedy = "at most 254 fit: leave some out, or put several into one, with a table (--prepare.labels TABLE.yaml)"
        raise problem(where, "names", f"{len(classes)} classes", remedy)
    return LabelTable(_plain(name), names)


def _problems_with_names(classes: list[str], where: str) -> Iterator[Problem]:
    remedy = "give each class one name, on one line, of at most 100 characters"
    for at, name in enumerate(classes):
        if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
            yield Problem(where, "names", repr(name[:_LONGEST_NAME]), remedy)
        elif words(name) == BACKGROUND:
            remedy_of_zero = "0 is background: leave it out, or map it in a table (--prepare.labels TABLE.yaml)"
            yield Problem(where, "names", f"{name!r} for another id than 0", remedy_of_zero)
        elif name in classes[:at]:
            yield Problem(where, "names", f"{name!r} twice", remedy)
        elif twin := next((one for one in classes[:at] if words(one) == words(name)), None):
            merge = (
                f"if they are one class, give a table (--prepare.labels TABLE.yaml) with label_map: {{{name}: {twin}}}"
            )
            yield Problem(where, "names", f"{twin!r} and {name!r}", f"{merge}; else rename one")


def _plain(name: str) -> str:
    """The table's name as part of a line, without characters that names must not have. Names of shipped tables are
    refused."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_.")[:_LONGEST_NAME] or "own"
    return f"own_{plain}" if plain in {*LABEL_TABLES, *FROM_EXPERTS} else plain
