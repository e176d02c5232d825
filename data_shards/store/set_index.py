"""index.json: the contents of a shard set, and the comparison with the files on the disk.

    OUT/index.json         written last; a folder without it is unfinished
    OUT/samples.arrow      one row a sample: its meta, and where its bytes are (samples_table.py)
    OUT/shards/            tars (tar_store.py) or a Zarr group (zarr_store.py)

docs/data.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, get_args

from pydantic import Field
from typing_extensions import TypedDict

from data_shards import __version__
from data_shards.choices import Store
from data_shards.documents import checked, parse_json, read_bytes, reading, shown
from data_shards.files import write_atomic
from data_shards.labels import LabelTable
from data_shards.problems import Problem, problem, refuse
from data_shards.records import is_path_inside
from data_shards.store.codecs import CODECS

# 3: a set whose modalities are not CT and MR, which `modalities` names; else it is the same.
FORMAT_VERSION, NEWEST_VERSION = 2, 3
STORES = get_args(Store)
INDEX = "index.json"
SAMPLES = "samples.arrow"
SHARDS = "shards"
UNFINISHED = "shards.unfinished"
MODALITIES_KEY = "modalities"
PARTIAL = ".partial"  # folder in which prepare keeps finished volumes until all are done

_RESTORE = "restore the file, or remove the folder and prepare it again"
_PREPARE_AGAIN = "prepare the set again"
# Pixels a side. A slice is decoded whole, and prepare writes up to 2,048.
_LARGEST_SIZE = 4096


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_crc32c(path: Path) -> int:
    """CRC-32C of a file, read a few megabytes at a time."""
    import google_crc32c

    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(4 * 1024**2):
            value = google_crc32c.extend(value, chunk)
    return int(value)


def read_index(path: Path) -> dict[str, Any]:
    """The parsed index.json of the set in the folder `path`. Raises InputProblems: missing, broken, another format."""
    if not os.path.isdir(path):  # False too for a name that is too long, or is none
        raise problem(path, "shard set", "not a folder", "give the folder that `segdiff prepare` or `convert` wrote")
    if not (path / INDEX).is_file():
        remedy = "give the folder that `segdiff prepare` or `convert` wrote"
        if any((path / name).exists() for name in (PARTIAL, UNFINISHED, SHARDS)):
            remedy = "start the command that made it again: it continues where it stopped"
        raise problem(path, INDEX, "missing: the set is unfinished", remedy)
    return parse_index(read_bytes(path / INDEX, _RESTORE), path / INDEX)


def parse_index(content: bytes, where: object) -> dict[str, Any]:
    """index.json's content, checked. Raises InputProblems that name `where`."""
    index = parse_json(content, where, _PREPARE_AGAIN, "a shard set's index")
    version = index.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool):
        value = f"not a shard set's index (format_version {shown(repr(version))})"
        raise problem(where, "content", value, _PREPARE_AGAIN)
    if version > NEWEST_VERSION:
        remedy = f"this version reads {NEWEST_VERSION}: install the segdiff-dist that wrote it, or a newer one"
        raise problem(where, "format_version", version, remedy)
    if version < FORMAT_VERSION:
        raise problem(where, "format_version", version, f"this version reads {FORMAT_VERSION}: prepare the set again")
    checked(index, _Index, where, "a shard set's index", _PREPARE_AGAIN)
    with reading(where, "a shard set's index", _PREPARE_AGAIN):
        LabelTable.of(index["label_table"])
    refuse(
        Problem(str(where), "file", shown(repr(entry["file"])), "the path leads out of the set: do not use this set")
        for entry in (*index["shards"], index["samples"], *index["metadata"])
        if not is_path_inside(entry["file"])
    )
    return index


def write_index(
    out: Path,
    header: dict[str, Any],
    shards: Sequence[dict[str, Any]],
    metadata: Sequence[dict[str, Any]],
    num_samples: int,
) -> dict[str, Any]:
    """Move OUT/shards.unfinished and OUT/samples.arrow.unfinished into place, then write index.json; returns it.

    From the first step until the new index is written there is no index: a kill in between leaves an unfinished set.
    """
    samples_file = out / f"{SAMPLES}.unfinished"
    about_samples = {
        "file": SAMPLES,
        "bytes": samples_file.stat().st_size,
        "sha256": file_sha256(samples_file),
        "crc32c": file_crc32c(samples_file),
    }
    index = {
        "format_version": NEWEST_VERSION if MODALITIES_KEY in header else FORMAT_VERSION,
        "producer": {"name": "segdiff-dist", "version": __version__},
        **header,
        "num_samples": num_samples,
        "shards": list(shards),
        "samples": about_samples,
        "metadata": list(metadata),
    }
    (out / INDEX).unlink(missing_ok=True)
    shutil.rmtree(out / SHARDS, ignore_errors=True)
    (out / UNFINISHED).rename(out / SHARDS)
    samples_file.rename(out / SAMPLES)
    write_atomic(out / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n", durable=True)
    return index


def broken_files(path: Path, index: dict[str, Any], *, verify: bool) -> Iterator[Problem]:
    """Problems of files that are missing or have another length than in index.json and, with `verify`, of files whose
    bytes have changed."""
    for entry in (*index["shards"], index["samples"], *(index["metadata"] if verify else ())):
        file = path / entry["file"]
        if not os.path.isfile(file):  # False too for a name that is too long
            yield Problem(str(file), "file", "missing", _RESTORE)
        elif (num_bytes := file.stat().st_size) != entry["bytes"]:
            yield Problem(str(file), "bytes", f"{num_bytes} where index.json says {entry['bytes']}", _RESTORE)
        elif verify and (digest := file_sha256(file)) != entry["sha256"]:
            value = f"{digest[:12]}... where index.json says {entry['sha256'][:12]}..."
            yield Problem(str(file), "sha256", value, _RESTORE)


def check_samples_file(path: Path, where: object, index: dict[str, Any], remedy: str) -> None:
    """Compare samples.arrow at `path` with its entry in index.json. Raises InputProblems that name `where`.

    CRC-32C is used, ten times as fast as sha256, which is used if an older writer left out the CRC-32C.
    """
    entry = index["samples"]
    known = entry.get("crc32c")
    name, found, expected = (
        ("sha256", file_sha256(path), entry["sha256"]) if known is None else ("crc32c", file_crc32c(path), known)
    )
    if found != expected:
        value = f"{str(found)[:12]} where {INDEX} says {str(expected)[:12]}: its bytes are not those that were written"
        raise problem(where, name, value, remedy)


# Names are used in legends, columns and lines of a terminal.
_Name = Annotated[str, Field(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Pair = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]


class _File(TypedDict):
    file: str
    bytes: _Count
    sha256: _Sha256


class _SamplesFile(_File):
    crc32c: NotRequired[Annotated[int, Field(ge=0, lt=2**32)]]


class _Shard(_File):
    samples: _Count
    parts: list[Literal["image", "mask", "edge"]]


class _LabelTable(TypedDict):
    name: _Name
    names: Annotated[list[_Name], Field(min_length=1, max_length=256)]
    colours: NotRequired[list[str | None] | None]


class _Preprocessing(TypedDict):
    # Fields that another writer has left out get prepare's defaults when they are read.
    size: Annotated[int, Field(ge=1, le=_LARGEST_SIZE)]
    bits: NotRequired[Literal[8, 16]]
    spacing_mm: NotRequired[_Positive]
    slice_stride: NotRequired[Annotated[int, Field(ge=1)]]
    fit: NotRequired[str]
    mask_resize: NotRequired[str]
    intensity: NotRequired[str]
    intensities: NotRequired[dict[str, str]]
    hu_window: NotRequired[_Pair]
    mr_percentiles: NotRequired[_Pair]


class _Index(TypedDict):
    store: Literal[STORES]  # type: ignore[valid-type]
    codec: Literal[CODECS]  # type: ignore[valid-type]
    label_table: _LabelTable
    preprocessing: _Preprocessing
    num_samples: _Count
    shards: list[_Shard]
    samples: _SamplesFile
    metadata: list[_File]
    failed: NotRequired[list[dict[str, str]]]
    source: NotRequired[dict[str, dict[str, Any]] | None]
    mask_sources: NotRequired[dict[str, int]]
