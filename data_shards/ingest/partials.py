"""The files that prepare keeps of a finished volume until all are done: its slices, ready to be written, in two files.

    CASE.bin     the parts of every slice, one after another, each an LZ4 block: a third of the bytes to write and read
                 for a tenth of a millisecond
    CASE.json    written last: stamp, what was recognised in the volume, and the meta and the parts' lengths of every
                 slice

Slices go to the disk as they are cut, so a volume's slices are never in memory together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from data_shards.documents import checked, read_json
from data_shards.files import new_file, write_atomic
from data_shards.records import SliceMeta
from data_shards.store.shard_writer import Format, Payloads


def write_partial(
    path: Path,
    samples: Iterable[tuple[SliceMeta, Payloads]],
    stamp: str,
    notes: Sequence[str] = (),
    images: object = "",
) -> None:
    """Write PATH.bin and PATH.json. Zarr's parts are arrays; they are stored as their bytes. `notes`, and `images`, as
    text a digest of all images, are read when all samples are written, so that their source can add to them."""
    described = []
    with new_file(path.with_suffix(".bin")) as unfinished, unfinished.open("wb") as stream:
        for meta, payloads in samples:
            lengths = {part: stream.write(_lz4().encode(payload)) for part, payload in payloads.items()}
            described.append([meta.to_json(), lengths])
    length = path.with_suffix(".bin").stat().st_size
    content = {"stamp": stamp, "bytes": length, "notes": list(notes), "images": str(images), "samples": described}
    write_atomic(path.with_suffix(".json"), json.dumps(content).encode())


def stamp_of(path: Path) -> str | None:
    """The stamp of a finished partial; None if there is none, or only an incomplete one of a lost machine."""
    try:
        content = _described(path)
        for values, _ in content["samples"]:
            SliceMeta.from_json(values)
        summarise(path)
        return str(content["stamp"]) if path.with_suffix(".bin").stat().st_size == content["bytes"] else None
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Summary:
    """The contents of a finished partial; mask_sources: the sources of its masks, each once; notes: texts about what
    was recognised; images: a digest of its images, empty if they show nothing."""

    stamp: str
    num_samples: int
    mask_sources: frozenset[str]
    notes: tuple[str, ...]
    images: str = ""


def summarise(path: Path) -> Summary:
    """The contents of a finished partial."""
    content = _described(path)
    sources = frozenset(meta["mask_source"] for meta, _ in content["samples"])
    notes, images = tuple(content.get("notes", ())), content.get("images", "")
    return Summary(content["stamp"], len(content["samples"]), sources, notes, images)


@dataclass(frozen=True)
class PartialRun:
    """Samples start to stop of a finished partial: a shard_writer.Source."""

    path: Path
    start: int
    stop: int
    stamp: str
    format: Format

    def samples(self) -> Iterator[tuple[SliceMeta, Payloads]]:
        """Meta and parts, as given to write_partial."""
        described = _described(self.path)["samples"]
        before = sum(sum(lengths.values()) for _, lengths in described[: self.start])
        with self.path.with_suffix(".bin").open("rb") as stream:
            stream.seek(before)
            for values, lengths in described[self.start : self.stop]:
                payloads = {part: self._as_given(part, stream.read(n)) for part, n in lengths.items()}
                yield SliceMeta.from_json(values), payloads

    def _as_given(self, part: str, block: bytes) -> Any:
        payload: bytes = _lz4().decode(block)
        if self.format.store != "zarr":
            return payload
        shape, dtype = self.format.shapes[part]
        return np.frombuffer(payload, dtype).reshape(shape)


class _Content(TypedDict):
    stamp: str
    bytes: int
    notes: NotRequired[list[str]]
    images: NotRequired[str]
    samples: list[Annotated[list[dict[str, Any]], Field(min_length=2, max_length=2)]]


def _described(path: Path) -> dict[str, Any]:
    """PATH.json. Raises InputProblems if it is not as write_partial wrote it."""
    file, what, remedy = path.with_suffix(".json"), "the description of a volume's slices", "remove it"
    content = read_json(file, remedy, what)
    checked(content, _Content, file, what, remedy)
    for _, lengths in content["samples"]:
        checked(lengths, dict[str, Annotated[int, Field(ge=0)]], file, what, remedy)
    return content


@cache
def _lz4() -> Any:
    from numcodecs import LZ4

    return LZ4(acceleration=1)
