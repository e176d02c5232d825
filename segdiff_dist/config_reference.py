"""The reference page of all settings, in Markdown, made from the sections' classes.

`python -m segdiff_dist.config_reference` prints it. The site builds it with `settings_page`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any, get_type_hints

from data_shards.field_source import ADDRESS_FROM_A_PERSON, FROM_A_PERSON
from data_shards.ranges import requirement
from data_shards.settings import Effect
from segdiff_dist.config import as_dict
from segdiff_dist.experiment import Experiment

_HEAD = """# Settings

Every key of a `--config` file. Each is also a flag: `train: {zero_stage: 1}` is `--train.zero-stage 1`. A value that
its key does not allow is refused before work starts.

The column *effect* says what another value does:

| effect | meaning |
| --- | --- |
"""
_MEANINGS = {
    Effect.RESULT: "The result is another one. The value is recorded with it.",
    Effect.RESULT_WHERE_SET: "The result is another one. The value is recorded if it is not the default.",
    Effect.RECORDED_OTHERWISE: "The result is another one. The digest of the file, or the values of a preset, is "
    "recorded in its place.",
    Effect.RESUMABLE: "The result is the same, up to rounding. A training can be resumed with another value.",
    Effect.EXECUTION: "The result is the same. The setting says where, how fast or how long.",
}
_COLUMNS = "| key | default | values | effect | meaning |\n| --- | --- | --- | --- | --- |"
_SOURCES = {
    str(FROM_A_PERSON): "It is never taken from a run folder.",
    str(ADDRESS_FROM_A_PERSON): "An address is never taken from a run folder.",
}


def settings_page() -> str:
    """All sections in the order of the work, a table for each."""
    effects = [f"| {effect.value} | {_MEANINGS[effect]} |" for effect in Effect]
    values = as_dict(Experiment())
    tables = [_table(Experiment, values, "")]
    for section, prefix in _sections(Experiment, ""):
        default: Any = values
        for name in prefix.split("."):
            default = default[name]
        tables.append(f"## {prefix}\n\n{_summary(section)}\n\n{_table(section, default, f'{prefix}.')}")
    return "\n\n".join([_HEAD + "\n".join(effects), "## Folders and files", *tables]) + "\n"


def _sections(section: type, prefix: str) -> Iterator[tuple[type, str]]:
    """Sections within a section, depth first, with their dotted names."""
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            nested: Any = hint
            yield nested, f"{prefix}{name}"
            yield from _sections(nested, f"{prefix}{name}.")


def _table(section: Any, defaults: dict[str, Any], prefix: str) -> str:
    hints, texts = get_type_hints(section, include_extras=True), _docstrings(section)
    rows = [_COLUMNS]
    for one in fields(section):
        hint = hints[one.name]
        if is_dataclass(hint):
            continue
        effects = [mark.value for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Effect)]
        source = _SOURCES.get(str(dict(one.metadata)), "")
        meaning = f"{texts.get(one.name, '')} {source}".strip()
        default = json.dumps(defaults[one.name], ensure_ascii=False)
        cells = (f"`{prefix}{one.name}`", f"`{default}`", requirement(hint), *(effects or [""]), meaning)
        rows.append(f"| {' | '.join(map(_in_cell, cells))} |")
    return "\n".join(rows)


def _docstrings(section: type) -> dict[str, str]:
    """The text under each field of a section."""
    module = ast.parse(inspect.getsource(sys.modules[section.__module__]))
    body = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == section.__name__).body
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _summary(section: type) -> str:
    return inspect.getdoc(section) or ""


def _in_cell(text: str) -> str:
    """Text in a cell of a table. Angle brackets are escaped, so that they are not read as HTML."""
    return re.sub(r"<([^>]*)>", r"&lt;\1&gt;", text).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(settings_page())
