"""Configuration at the border: YAML in, checked dataclasses out, and back to YAML, with errors for people.

The sections are beside the code that they configure. segdiff_dist.experiment.Experiment holds all of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_shards.documents import parse_yaml, read_bytes, shown
from data_shards.problems import InputProblems, Problem, problem
from data_shards.ranges import requirement

T = TypeVar("T")

_MOST_BYTES = 1024**2


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from `path`."""
    if not path.is_file():
        raise problem(
            path, "config", "no such file", "give the path of a YAML file, for example launch/configs/demo.yaml"
        )
    values = parse_yaml(read_bytes(path, "correct the file", most_bytes=_MOST_BYTES), path, "correct the file")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise problem(path, "config", f"a {type(values).__name__}", "the file must hold a mapping of sections")
    return values


def next_command(stage: str, *flags: str, run: Path) -> str:
    """A command as one types it, in backticks. Paths that contain blanks are quoted."""
    return f"`segdiff {stage} --run {shlex.quote(str(run))}{''.join(f' {shlex.quote(flag)}' for flag in flags)}`"


def how_to_make(stage: str, missing: Path) -> str:
    """The command that makes the missing folder. If the run folder has no configuration, it is the command that
    explains the stage."""
    for run in list(missing.absolute().parents)[:2]:  # RUN/weights, RUN/segmenter/weights
        if (run / "config.yaml").is_file():
            return next_command(stage, run=run)
    return f"`segdiff {stage} --help` says how"


def validate(cls: type[T], values: Mapping[str, Any], where: object) -> T:
    """`values` as a `cls`. All unknown keys and values out of range are reported at once, as problems of `where`."""
    try:
        kind: Any = cls  # a hashable one, which mypy does not see
        [config] = _adapter(kind).validate_python([values])
        return config
    except ValidationError as error:
        raise InputProblems(_explain(error, str(where), cls)) from None


def as_dict(config: Any) -> dict[str, Any]:
    """Plain values that YAML and JSON can write."""
    kind: Any = type(config)
    [values] = _adapter(kind).dump_python([config], mode="json")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` laid over it, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever the two differ."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: what a tracker lists."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def to_yaml(values: Mapping[str, Any]) -> str:
    """The values as YAML, in their own order."""
    return yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=100)


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    # pydantic takes the config of plain dataclasses from their container, hence the list.
    return TypeAdapter(list[cls], config=ConfigDict(extra="forbid"))


def _explain(error: ValidationError, where: str, cls: type[Any]) -> Iterator[Problem]:
    """One problem for each setting; pydantic reports every part of its type."""
    explained = set()
    for one in error.errors(include_url=False):
        keys = _setting_of(one["loc"][1:], cls)
        *section, name = keys or ("",)
        field = ".".join(map(str, keys)) or "(top)"
        if field in explained:
            continue
        explained.add(field)
        value, hints = shown(repr(one["input"])), _hints(cls, section)
        hint = hints.get(str(name))
        if one["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            likely = get_close_matches(str(name), hints, n=1)
            remedy = f"did you mean {likely[0]}" if likely else "correct the spelling or remove it"
            yield Problem(where, field, "unknown key", f"{remedy}; --help-all lists the keys")
        elif hint is not None and is_dataclass(hint):
            yield Problem(where, field, value, f"give keys of this section and their values, {name}: {{KEY: VALUE}}")
        elif hint is None:
            yield Problem(where, field, value, one["msg"].removeprefix("Input ").rstrip("."))
        else:
            yield Problem(where, field, value, f"give {requirement(hint)}")


def _setting_of(place: Sequence[Any], cls: type[Any]) -> Sequence[Any]:
    """The keys of the setting at a place. The place may be one value of a tuple, or one member of a union."""
    for depth in range(1, len(place)):
        hint = _hints(cls, place[: depth - 1]).get(str(place[depth - 1]))
        if hint is not None and not is_dataclass(hint):
            return place[:depth]
    return place


def _hints(cls: Any, section: Sequence[Any]) -> dict[str, Any]:
    """The keys of a section and their types. The section is named by its path in the dataclass `cls`; no keys if it is
    not a dataclass."""
    for name in section:
        cls = get_type_hints(cls).get(str(name)) if is_dataclass(cls) else None
    return get_type_hints(cls, include_extras=True) if is_dataclass(cls) else {}
