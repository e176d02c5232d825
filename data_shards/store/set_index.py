"""index.json: what a shard set holds, and the check of that against what lies on disk.

    OUT/index.json         written last; a folder without it is unfinished
    OUT/samples.arrow      one row a sample: its meta, and where its bytes lie (samples_table.py)
    OUT/shards/            tars (tar_store.py) or a Zarr group (zarr_store.py)

docs/data.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_shards import __version__
from data_shards.labels import LabelTable
from data_shards.problems import InputProblems, Problem, problem, removed_on_failure
from data_shards.records import is_path_inside
from data_shards.store.codecs import CODECS

FORMAT_VERSION = 2
STORES = ("webdataset", "zarr")
INDEX = "index.json"
SAMPLES = "samples.arrow"
SHARDS = "shards"
UNFINISHED = "shards.unfinished"
PARTIAL = ".partial"  # where prepare keeps finished volumes until all are done

_RESTORE = "restore the file, or remove the folder and prepare it again"


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_index(path: Path) -> dict[str, Any]:
    """The parsed index.json of the set in the folder `path`. Raises InputProblems: missing, broken, another format."""
    if not path.is_dir():
        raise problem(path, "shard set", "not a folder", "give the folder that `segdiff prepare` or `convert` wrote")
    if not (path / INDEX).is_file():
        remedy = "give the folder that `segdiff prepare` or `convert` wrote"
        if any((path / name).exists() for name in (PARTIAL, UNFINISHED, SHARDS)):
            remedy = "start the command that was making it again, it goes on where it stopped"
        raise problem(path, INDEX, "missing: the set is unfinished", remedy)
    return parse_index((path / INDEX).read_bytes(), path / INDEX)


def parse_index(content: bytes, where: object) -> dict[str, Any]:
    """index.json's content, checked. Raises InputProblems naming `where`."""
    try:
        index = json.loads(content)
        version = index["format_version"]
        if not isinstance(version, int):
            raise TypeError(f"format_version {version!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise problem(where, "content", f"not a shard set's index ({error})", "prepare the set again") from error
    if version > FORMAT_VERSION:
        remedy = f"this version reads {FORMAT_VERSION}: install the segdiff-dist that wrote it, or a newer one"
        raise problem(where, "format_version", version, remedy)
    if version < FORMAT_VERSION:
        raise problem(where, "format_version", version, f"this version reads {FORMAT_VERSION}: prepare the set again")
    try:
        LabelTable(index["label_table"]["name"], tuple(index["label_table"]["names"]))
        for entry in (*index["shards"], index["samples"], *index["metadata"]):
            _refuse_tricks(entry["file"], where)
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise TypeError(f"{entry['file']}: bytes or sha256")
        for entry in index["shards"]:
            if not (isinstance(entry["samples"], int) and set(entry["parts"]) <= {"image", "mask", "edge"}):
                raise TypeError(f"{entry['file']}: samples or parts")
        known = (
            index["store"] in STORES and index["codec"] in CODECS and index["preprocessing"].get("bits", 8) in (8, 16)
        )
        if (
            not known
            or not isinstance(index["num_samples"], int)
            or not isinstance(index["preprocessing"]["size"], int)
        ):
            raise ValueError("store, codec, bits, size or num_samples")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputProblems):
            raise
        raise problem(where, "content", f"not a shard set's index ({error!r})", "prepare the set again") from error
    return dict(index)


def write_index(
    out: Path,
    header: dict[str, Any],
    shards: Sequence[dict[str, Any]],
    metadata: Sequence[dict[str, Any]],
    num_samples: int,
) -> dict[str, Any]:
    """Move OUT/shards.unfinished and OUT/samples.arrow.unfinished into place, then write index.json; returns it.

    From the first step until the new index stands there is none: a kill in between leaves a set that says it is
    unfinished.
    """
    samples_file = out / f"{SAMPLES}.unfinished"
    index = {
        "format_version": FORMAT_VERSION,
        "producer": {"name": "segdiff-dist", "version": __version__},
        **header,
        "num_samples": num_samples,
        "shards": list(shards),
        "samples": {"file": SAMPLES, "bytes": samples_file.stat().st_size, "sha256": file_sha256(samples_file)},
        "metadata": list(metadata),
    }
    (out / INDEX).unlink(missing_ok=True)
    shutil.rmtree(out / SHARDS, ignore_errors=True)
    (out / UNFINISHED).rename(out / SHARDS)
    samples_file.rename(out / SAMPLES)
    write_atomically(out / INDEX, (json.dumps(index, indent=1, sort_keys=True) + "\n").encode())
    return index


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so that a reader never sees half a file."""
    with removed_on_failure(path.with_name(f"{path.name}.unfinished")) as unfinished:
        unfinished.write_bytes(content)
        unfinished.rename(path)


def broken_files(path: Path, index: dict[str, Any], *, verify: bool) -> Iterator[Problem]:
    """Files missing or of another length than index.json says and, with `verify`, whose bytes changed."""
    for entry in (*index["shards"], index["samples"], *(index["metadata"] if verify else ())):
        file = path / entry["file"]
        if not file.is_file():
            yield Problem(str(file), "file", "missing", _RESTORE)
        elif (num_bytes := file.stat().st_size) != entry["bytes"]:
            yield Problem(str(file), "bytes", f"{num_bytes} where index.json says {entry['bytes']}", _RESTORE)
        elif verify and (digest := file_sha256(file)) != entry["sha256"]:
            value = f"{digest[:12]}... where index.json says {entry['sha256'][:12]}..."
            yield Problem(str(file), "sha256", value, _RESTORE)


def _refuse_tricks(file: object, where: object) -> None:
    """Files of a set lie inside its folder."""
    if not is_path_inside(file):
        raise problem(where, "file", repr(file), "the path leads out of the set: do not use this set")
