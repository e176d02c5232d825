"""JSON and YAML from untrusted files: bounded in bytes and depth, refused with file and place.

The result is plain values: finite numbers, text that can be printed and be a path, no key twice. The reader of a format
checks that they are values of that format: with `checked`, or within `reading`, which turns an error into one problem
with file and remedy.
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
# Our files are at most 8 deep. Python fails near 1,000, and code that walks through values fails earlier.
_MOST_DEPTH = 64
# Characters of a value or an error that are shown to the user.
_MOST_SHOWN = 160
# The most problems that are listed for one file: with more it is a file of another kind.
_MOST_PROBLEMS = 8
# -2^63 and 2^64 - 1 have 20 characters.
_MOST_DIGITS = 20
# Characters that cannot be written as UTF-8, or be part of a path.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
# Errors that occur when plain values are read as those of a format and are not.
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
    """The JSON object in the file `path`. Raises InputProblems: missing, not a file, too large, not an object."""
    return parse_json(read_bytes(path, remedy, most_bytes), path, remedy, what)


def parse_json(content: bytes, where: object, remedy: str, what: str = "a JSON object") -> dict[str, Any]:
    """The JSON object in `content`. `what`: the expected content, for the message: "a shard set's index"."""
    values = parse_json_value(content, where, remedy, what)
    if not isinstance(values, dict):
        raise problem(where, "content", f"a {type(values).__name__}, not {what}", remedy)
    return values


def parse_json_value(content: bytes, where: object, remedy: str, what: str = "JSON") -> Any:
    """The JSON value in `content`. Raises InputProblems if it is not JSON, or nested too deeply."""
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
    """All bytes of a file. Raises InputProblems: missing, a folder or a pipe, longer than `most_bytes`."""
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
    """A context around the reader of a format: any error becomes one problem of `where`, "not `what`".

    The reader's own InputProblems pass unchanged. A program error would also become a problem, so the context should
    contain nothing else.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputProblems) or not is_misread(error):
            raise
        missing = f"{error} is missing" if type(error) is KeyError else error
        raise problem(where, field, f"not {what} ({shown(missing)})", remedy) from error


def is_misread(error: Exception) -> bool:
    """Whether a reader raises this for a file of another format. Some of Arrow's errors are not a ValueError."""
    return isinstance(error, MISREAD) or type(error).__module__.startswith("pyarrow.")


def checked(values: Any, kind: Any, where: object, what: str, remedy: str) -> None:
    """Compare plain values with a type, for example a TypedDict; further keys are allowed.

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
    """One line of limited length that a terminal can print, for values from any source."""
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
    """Raise ValueError for nesting beyond _MOST_DEPTH and for text that files and paths cannot hold."""
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
