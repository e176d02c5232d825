"""JSON and YAML from untrusted files: bounded in bytes and depth, refused with file and place.

The result is plain values: finite numbers, text that can be printed and be a path, no key twice. The reader of a format
checks that they are values of that format: with `checked`, or within `reading`, which turns an error there into one
problem with file and remedy.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from data_shards.plain_yaml import load_yaml
from data_shards.problems import InputProblems, Problem, problem

# The index of ten million slices in ten thousand shards takes 8 MB. A configuration takes a few KB; PyYAML reads 50 KB
# a second.
_MOST_JSON_BYTES, _MOST_YAML_BYTES = 256 * 1024**2, 256 * 1024
# Ours are at most 8 deep. Python gives up near 1,000, and code that walks through values before that.
_MOST_DEPTH = 64
# Of a value or an error, what a person is shown.
_MOST_SHOWN = 160
# The most problems that are listed of one file: with more it is a file of another kind.
_MOST_PROBLEMS = 8
# -2^63 and 2^64 - 1 have 20 characters.
_MOST_DIGITS = 20
# What cannot be written as UTF-8, or be part of a path.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
# What reading plain values as those of a format raises where they are not.
MISREAD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


def read_json(
    path: Path, remedy: str, what: str = "a JSON object", most_bytes: int = _MOST_JSON_BYTES
) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises InputProblems: not there, not a file, too large, not an object."""
    return parse_json(read_bytes(path, remedy, most_bytes), path, remedy, what)


def parse_json(content: bytes, where: object, remedy: str, what: str = "a JSON object") -> dict[str, Any]:
    """The JSON object that `content` is. `what` it should be, for the message: "a shard set's index"."""
    values = parse_json_value(content, where, remedy, what)
    if not isinstance(values, dict):
        raise problem(where, "content", f"a {type(values).__name__}, not {what}", remedy)
    return values


def parse_json_value(content: bytes, where: object, remedy: str, what: str = "JSON") -> Any:
    """Whatever JSON `content` is. Raises InputProblems where it is none, or nested too deeply."""
    try:
        values = json.loads(
            content.removeprefix(b"\xef\xbb\xbf"),
            object_pairs_hook=_without_twins,
            parse_int=_bounded_int,
            parse_float=_finite,
            parse_constant=_no_number,
        )
        _refuse_unusable(values)
    except (ValueError, RecursionError) as error:
        raise problem(where, "content", f"not {what} ({shown(error)})", remedy) from None
    return values


def parse_yaml(content: bytes, where: object, remedy: str) -> Any:
    """The values of YAML. Anchors are refused: a few of them expand to more values than any memory holds."""
    if len(content) > _MOST_YAML_BYTES:
        raise problem(where, "content", f"{len(content):,} bytes; {_MOST_YAML_BYTES:,} are read", remedy)
    try:
        values = load_yaml(content.decode("utf-8-sig"), _MOST_DEPTH)
        _refuse_unusable(values)
    except MISREAD as error:
        raise problem(where, "content", f"not YAML: {shown(error)}", remedy) from None
    return values


def read_bytes(path: Path, remedy: str, most_bytes: int = _MOST_JSON_BYTES) -> bytes:
    """All bytes of a file. Raises InputProblems: not there, a folder or a pipe, longer than `most_bytes`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise problem(path, "content", "not a file", remedy)
        if status.st_size > most_bytes:
            raise problem(path, "content", f"{status.st_size:,} bytes; at most {most_bytes:,} are read", remedy)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, InputProblems):
            raise
        raise problem(path, "content", f"cannot be read ({shown(error)})", remedy) from None


@contextmanager
def reading(where: object, what: str, remedy: str, field: str = "content") -> Iterator[None]:
    """Around the reader of a format: whatever it trips over is one problem of `where`, which is not `what`.

    InputProblems of its own pass. A program error in the reader would read as one too, so nothing else belongs inside.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputProblems) or not is_misread(error):
            raise
        missing = f"{error} is missing" if type(error) is KeyError else error
        raise problem(where, field, f"not {what} ({shown(missing)})", remedy) from error


def is_misread(error: Exception) -> bool:
    """Whether a reader raises this of a file that is not of its format. Some of Arrow's errors are no ValueError."""
    return isinstance(error, MISREAD) or type(error).__module__.startswith("pyarrow.")


def checked(values: Any, kind: Any, where: object, what: str, remedy: str) -> None:
    """Compare plain values with a type, a TypedDict for example; keys that it does not name may be there.

    Raises InputProblems: the first few places that are missing or of another type.
    """
    try:
        _adapter(kind).validate_python(values, strict=True)
    except ValidationError as error:
        raise InputProblems(
            Problem(
                str(where),
                "content",
                f"not {what} ({shown('.'.join(map(str, one['loc'])))}: {shown(repr(one['input']), 60)})",
                f"{shown(one['msg'])}; {remedy}",
            )
            for one in error.errors(include_url=False)[:_MOST_PROBLEMS]
        ) from None


def shown(value: object, most: int = _MOST_SHOWN) -> str:
    """One line of bounded length that a terminal can print, whoever wrote the value."""
    text = str(value)[: 8 * most]
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    if not text and isinstance(value, BaseException):
        text = type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _refuse_unusable(values: Any) -> None:
    """Raise ValueError for nesting beyond _MOST_DEPTH and for text that no file and no path can hold."""
    layer = [values]
    for _ in range(_MOST_DEPTH + 1):
        inside: list[Any] = []
        for one in layer:
            if isinstance(one, dict):
                inside += one.keys()
                inside += one.values()
            elif isinstance(one, list):
                inside += one
            elif isinstance(one, str) and (found := _UNUSABLE.search(one)):
                raise ValueError(f"character {found[0]!a} in a text")
        layer = inside
    if layer:
        raise ValueError(f"nested more than {_MOST_DEPTH} deep")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for i, key in enumerate(keys) if key in keys[:i])[:40]!r} comes twice")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
