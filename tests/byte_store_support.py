"""Two files of random bytes, and ranges of them, for the tests of byte stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_shards.store.byte_ranges import Range
from data_shards.store.byte_store import LocalFiles
from data_shards.store.remote_files import RemoteFiles

NAMES = ["shards/a.tar", "shards/b.tar"]
SIZES = [300_000, 200_000]
SAMPLE = 10_000  # bytes of the ranges below


def contents() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.uint8).tobytes() for size in SIZES]


FILES = contents()


def write_files(folder: Path) -> Path:
    (folder / "shards").mkdir(parents=True)
    for name, content in zip(NAMES, FILES, strict=True):
        (folder / name).write_bytes(content)
    return folder


def wanted(file: int, offset: int, num_bytes: int = SAMPLE) -> Range:
    """Three views, as for image, headers and mask."""
    half = num_bytes // 2 - 50
    return Range(file, offset, num_bytes, [memoryview(bytearray(n)) for n in (half, 100, num_bytes - half - 100)])


def got(filled: Range) -> bytes:
    return b"".join(bytes(view) for view in filled.views)


def check(store: LocalFiles | RemoteFiles, ranges: Sequence[Range]) -> None:
    assert store.read(ranges) == [None] * len(ranges)
    for filled in ranges:
        assert got(filled) == FILES[filled.file][filled.offset : filled.offset + filled.num_bytes]
