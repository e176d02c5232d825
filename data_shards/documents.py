"""JSON and YAML from files that anybody may have written: bounded in bytes and depth, refused with file and place.

What comes out is plain values. Whether they are those of a format is for that format's reader to say, within `reading`,
which turns what goes wrong there into one problem with file and remedy.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from data_shards.problems import InputProblems, problem

# The index of ten million slices in ten thousand shards takes 8 MB; a configuration a few KB.
_MOST_JSON_BYTES, _MOST_YAML_BYTES = 256 * 1024**2, 1024**2
# Ours are at most 8 deep. Python gives up near 1,000, and code that walks through values before that.
_MOST_DEPTH = 64
# Of a value or an error, what a person is shown.
_MOST_SHOWN = 160
# What reading plain values as those of a format raises where they are not.
_MISREAD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
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
        values = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise problem(where, "content", f"not {what} ({shown(error)})", remedy) from None
    if _is_deep(values):
        raise problem(where, "content", f"nested more than {_MOST_DEPTH} deep", remedy)
    return values


def parse_yaml(content: bytes, where: object, remedy: str) -> Any:
    """Whatever YAML `content` is. Anchors are refused: a few of them stand for more values than any memory holds."""
    if len(content) > _MOST_YAML_BYTES:
        raise problem(where, "content", f"{len(content):,} bytes; {_MOST_YAML_BYTES:,} are read", remedy)
    try:
        values = yaml.load(content.decode("utf-8-sig"), _Loader)
    except (yaml.YAMLError, *_MISREAD) as error:
        raise problem(where, "content", f"not YAML: {shown(error)}", remedy) from None
    if _is_deep(values):
        raise problem(where, "content", f"nested more than {_MOST_DEPTH} deep", remedy)
    return values


def read_bytes(path: Path, remedy: str, most_bytes: int = _MOST_JSON_BYTES) -> bytes:
    """All bytes of a file. Raises InputProblems: not there, a folder or a pipe, longer than `most_bytes`."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise problem(path, "content", "not a file", remedy)
        if about.st_size > most_bytes:
            raise problem(path, "content", f"{about.st_size:,} bytes; at most {most_bytes:,} are read", remedy)
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
    except InputProblems:
        raise
    except _MISREAD as error:
        missing = f"{error} is missing" if type(error) is KeyError else error
        raise problem(where, field, f"not {what} ({shown(missing)})", remedy) from error


def shown(value: object, most: int = _MOST_SHOWN) -> str:
    """One line of bounded length that a terminal can print, whoever wrote the value."""
    text = str(value)[: 8 * most]
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    if not text and isinstance(value, BaseException):
        text = type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


class _Loader(yaml.SafeLoader):
    """YAML without anchors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            text = f"*{event.anchor} is an alias; write out what it stands for"
            raise yaml.composer.ComposerError(None, None, text, event.start_mark)
        return super().compose_node(parent, index)


def _is_deep(values: Any) -> bool:
    """Whether lists and objects lie in each other more than _MOST_DEPTH deep."""
    layer = [values] if isinstance(values, dict | list) else []
    for _ in range(_MOST_DEPTH):
        inside = (v for one in layer for v in (one.values() if isinstance(one, dict) else one))
        layer = [v for v in inside if isinstance(v, dict | list)]
    return bool(layer)
