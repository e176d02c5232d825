"""WebDataset shards: plain tars of KEY.image.EXT, KEY.mask.EXT, KEY.meta.json and, with soft edges, KEY.edge.EXT.

Members have fixed times, owners, modes and order, so the same samples give the same bytes. webdataset's TarWriter does
not return the position of its bytes. Beside each tar is an index in the format of DALI's wds2idx, v1.2.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_shards import lean_imports
from data_shards.problems import Problem, refuse
from data_shards.records import SliceMeta
from data_shards.store.codecs import EXTENSIONS, crc32c

# ustar: every member is one header block, then its bytes padded to whole blocks.
_BLOCK = 512
# Bytes that are copied at once: more than a member has.
_WHOLE_MEMBERS = 1 << 24


def shard_name(split: str, number: int) -> str:
    """File name of a split's `number`-th tar."""
    return f"{split}-{number:06d}.tar"


def write_tar(
    path: Path, samples: Iterable[tuple[SliceMeta, dict[str, bytes]]], codec: str
) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    """Write a tar and its .idx; samples are (meta, part -> encoded bytes).

    Returns the samples' rows (see samples_table), and the entries of the tar and its .idx in index.json.
    """
    extension = EXTENSIONS[codec]
    rows: list[dict[str, Any]] = []
    dali_index: list[str] = []
    end = 0
    with path.open("wb") as file:
        stream = _Hashing(file)
        tar = _tar_writer(stream)
        for meta, payloads in samples:
            refuse(dot_problems(path, [meta.case_id]))
            values = meta.to_json()
            members = {f"{part}.{extension}": payload for part, payload in payloads.items()}
            members["meta.json"] = json.dumps(values, sort_keys=True).encode()
            tar.write({"__key__": meta.key, **members})
            offsets, end = _offsets(members, end)
            row: dict[str, Any] = {"key": meta.key, **values}
            for part, payload in payloads.items():
                row |= _where(part, offsets[f"{part}.{extension}"], payload, codec)
            rows.append(row)
            places = (f"{name} {offset} {len(members[name])} {meta.key}.{name}" for name, offset in offsets.items())
            dali_index.append(" ".join(places))
        tar.close()
    assert stream.num_bytes >= end, "the tar is shorter than its members"
    content = ("\n".join([f"v1.2 {len(rows)}", *dali_index]) + "\n").encode()
    path.with_suffix(".idx").write_bytes(content)
    tar_entry = {"bytes": stream.num_bytes, "samples": len(rows), "sha256": stream.sha256.hexdigest()}
    idx_entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return rows, tar_entry, [idx_entry]


def dot_problems(where: object, case_ids: Iterable[str]) -> list[Problem]:
    """Problems of case ids with dots, which tars cannot hold: WebDataset splits a member's name at the first dot."""
    if (dotted := next((case_id for case_id in case_ids if "." in case_id), None)) is None:
        return []
    remedy = "tars (store webdataset) hold ids without dots: use store zarr, or rename the case"
    return [Problem(str(where), "case id", repr(dotted), remedy)]


def problems_with_members(path: Path, expected: dict[str, tuple[int, int]]) -> Iterator[Problem]:
    """Compare a tar with the set's table. `expected`: offset and length of the bytes by key and part, as "KEY.PART".
    Members are never unpacked, so a name that leads out of a folder does no harm here. It is still reported, since
    other tools unpack."""
    remedy = "do not use this tar: restore it, or prepare the set again"
    found = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or "/" in member.name or "\\" in member.name or member.name.startswith("."):
                    kind = "a path" if member.isfile() else "not a plain file"
                    yield Problem(str(path), "member", f"{member.name!r} is {kind}", remedy)
                    continue
                key, _, name = member.name.partition(".")
                found[f"{key}.{name.partition('.')[0]}"] = (member.offset_data, member.offset_data + member.size)
    except tarfile.TarError as error:
        yield Problem(str(path), "content", f"not a whole tar ({error})", remedy)
        return
    for name, (offset, length) in expected.items():
        start, stop = found.get(name, (0, 0))
        if not (start <= offset and offset + length == stop):
            value = f"at {offset} with {length} bytes by the table, at {start} to {stop} in the tar"
            yield Problem(str(path), name, value if name in found else "not in the tar", remedy)
    extra = {name for name in found if not name.endswith(".meta")} - expected.keys()
    for name in sorted(extra)[:3]:
        yield Problem(str(path), name, "not in the set's table", remedy)


def _tar_writer(stream: _Hashing) -> Any:
    """A webdataset.TarWriter whose bytes are a function of the samples."""
    with lean_imports.without("torch"):
        import webdataset

    tar = webdataset.TarWriter(stream, encoder=False, mtime=0, user="segdiff", group="segdiff", mode=0o644)
    # TarWriter's own stream copies every member in pieces of 10 kB; this one writes each in one piece. Plain ustar
    # refuses names that would take a second header block, after which every offset would be wrong.
    tar.tarstream = tarfile.TarFile(
        fileobj=cast(Any, stream), mode="w", format=tarfile.USTAR_FORMAT, copybufsize=_WHOLE_MEMBERS
    )
    return tar


def _offsets(members: Mapping[str, bytes], start: int) -> tuple[dict[str, int], int]:
    """The offset of each member's bytes if the first header is at `start`, as TarWriter orders them; and their end."""
    offsets = {}
    for name in sorted(members):
        offsets[name] = start + _BLOCK
        start += _BLOCK + -(-len(members[name]) // _BLOCK) * _BLOCK
    return offsets, start


def _where(part: str, offset: int, payload: bytes, codec: str) -> dict[str, int]:
    """Columns of samples.arrow. For a NumPy file the range leaves out the header, so it has only the pixels."""
    # NumPy 1.0 files: 8 bytes of magic and version, 2 of the header's length, the header.
    header = 10 + int.from_bytes(payload[8:10], "little") if codec == "raw" else 0
    pixels = payload[header:]
    values = {"file": 0, "offset": offset + header, "bytes": len(pixels), "crc32c": crc32c(pixels)}
    return {f"{part}_{name}": value for name, value in values.items()}


class _Hashing:
    """A file that is hashed while it is written, so that no shard is read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        if self._file.closed:  # a failed tar is closed a second time when its object is deleted
            return 0
        self._file.write(content)
        self.sha256.update(content)
        self.num_bytes += len(content)
        return len(content)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()
