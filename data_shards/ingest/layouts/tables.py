"""Tables from people and other programs: CSV and TSV in UTF-8 or, as Excel writes them, UTF-16, separated by comma,
semicolon or tab."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from data_shards.documents import read_bytes
from data_shards.ingest.nifti import SPACING_LIMITS_MM
from data_shards.ingest.pictures import Pixel
from data_shards.problems import Problem, problem, refuse

_MOST_BYTES = 64 * 2**20
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Excel's line before the names of the columns.
_SEPARATOR_LINE = re.compile(r"\Asep=.\r?\n")
# What a table says of pictures: mm between rows and columns (one number if they are equal), value = grey * scale +
# offset.
PIXEL_COLUMNS = ("spacing_mm", "scale", "offset")
# Where values without a column are put.
_BEHIND = "\n"
_QUOTE = "write values that contain the separator in quotation marks"
_SPLIT_WORDS = {
    "train": ("train", "training", "tr"),
    "val": ("val", "valid", "validation", "va"),
    "test": ("test", "testing", "ts"),
}


def read_table(file: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """The rows by column, names in lower case, values without blanks around them; columns that a row lacks are empty.

    Raises InputProblems: not text, a required column is missing, or a line has more values than columns.
    """
    rows, columns = _opened(file)
    twice = [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]
    refuse(Problem(str(file), "columns", f"{name} comes twice", "keep the one that is meant") for name in twice)
    missing = [name for name in required if name not in columns]
    refuse(
        Problem(str(file), "columns", f"{', '.join(columns)[:200]}: no {name}", f"give a column `{name}`")
        for name in missing
    )
    rows.fieldnames, rows.restkey = columns, _BEHIND
    found = list(rows)
    refuse(
        Problem(str(file), f"line {number}", f"more values than the {len(columns)} columns", _QUOTE)
        for number, row in enumerate(found, start=2)
        if any(map(_is_filled, row.get(_BEHIND) or ()))
    )
    return [
        {name: (row.get(name) or "").strip() for name in columns} for row in found if any(map(_is_filled, row.values()))
    ]


def read_columns(file: Path) -> list[str]:
    """The names of the columns, in lower case. Raises InputProblems: not text."""
    return _opened(file)[1]


def _opened(file: Path) -> tuple[csv.DictReader[str], list[str]]:
    """The rows, and the names of the columns."""
    remedy = "save it as CSV in UTF-8, with the names of the columns in the first line"
    try:
        content = read_bytes(file, remedy, _MOST_BYTES)
        text = content.decode("utf-16" if content[:2] in _UTF_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise problem(file, "content", f"not UTF-8 ({error.reason})", remedy) from None
    text = _SEPARATOR_LINE.sub("", text)
    first = text.split("\n", 1)[0]
    delimiter = max("\t;,", key=first.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    return rows, [(name or "").strip().lower() for name in rows.fieldnames or ()]


def stated_split(where: Path, word: str) -> str:
    """train, val or test. Raises InputProblems for another word."""
    if split := split_of_word(word.strip()):
        return split
    raise problem(where, "split", repr(word[:40]), "write train, val or test")


def split_of_word(word: str) -> str:
    """train, val or test; empty for another word."""
    return next((split for split, words in _SPLIT_WORDS.items() if word.lower() in words), "")


def stated_pixel(where: Path, row: dict[str, str], pixel_mm: float | None) -> Pixel:
    """What a row says of a picture; `pixel_mm` counts where it says no spacing. Raises InputProblems for what is no
    number, or not the width of a pixel."""
    stated = _numbers(where, "spacing_mm", row, (1, 2))
    low, high = SPACING_LIMITS_MM
    if not all(low <= one <= high for one in stated):
        raise problem(where, "spacing_mm", row["spacing_mm"][:40], f"pixels are {low} to {high:.0f} mm wide")
    spacing = stated or (() if pixel_mm is None else (pixel_mm,))
    scale, offset = _numbers(where, "scale", row, (1,)), _numbers(where, "offset", row, (1,))
    if scale and not scale[0]:
        raise problem(where, "scale", row["scale"][:40], "value = grey * scale + offset: give another number than 0")
    pair = (spacing[0], spacing[-1]) if spacing else None
    return Pixel(pair, scale[0] if scale else 1.0, offset[0] if offset else 0.0, table=where.name)


def _numbers(where: Path, column: str, row: dict[str, str], counts: tuple[int, ...]) -> tuple[float, ...]:
    """The finite numbers of a cell; none if it is empty or missing."""
    text = row.get(column) or ""
    try:
        found = tuple(map(float, text.split()))
    except ValueError:
        found = (math.nan,)
    if text and (len(found) not in counts or not all(map(math.isfinite, found))):
        example = "0.8, or 0.8 0.7 for rows and columns" if 2 in counts else "a number, as 2.5"
        raise problem(where, column, repr(text[:40]), f"write {example}")
    return found


def _is_filled(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
