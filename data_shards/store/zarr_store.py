"""Zarr v3: a group a split, in it the arrays image, mask and, with soft edges, edge; one chunk a sample, sharded, zstd.

Any Zarr reader opens them. samples.arrow also holds the position of each chunk in its shard file, so the loader reads a
sample with one seek, as from a tar, and decodes it itself. This file owns Zarr in data_shards.

Dimensions: N samples, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.records import SliceMeta
from data_shards.store.codecs import ZSTD_LEVEL, crc32c
from data_shards.store.set_index import file_sha256


def create_arrays(
    root: Path,
    num_samples: dict[str, int],
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]],
    samples_per_shard: int,
    attributes: dict[str, Any],
) -> None:
    """Make or enlarge the arrays of each split under `root`; shapes: of one sample and its dtype, by part."""
    import zarr
    from zarr.codecs import ZstdCodec

    group = zarr.open_group(root, mode="a", zarr_format=3, attributes=attributes)
    for split, count in num_samples.items():
        in_split = group.require_group(split)
        for part, (shape, dtype) in shapes.items():
            if part in in_split:
                in_split[part].resize((count, *shape))  # type: ignore[union-attr]
                continue
            in_split.create_array(
                part,
                shape=(count, *shape),
                dtype=dtype,
                chunks=(1, *shape),
                shards=(samples_per_shard, *shape),
                # The frame's own checksum lets any reader find a flipped byte.
                compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
                fill_value=0,
            )


def write_region(
    root: Path, split: str, number: int, samples: Sequence[tuple[SliceMeta, dict[str, np.ndarray]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the `number`-th shard of each of the split's arrays. Shards do not overlap, so writers need no lock.

    Returns the samples' rows (see samples_table; files counted from 0) and the files' entries in index.json.
    """
    import zarr

    rows: list[dict[str, Any]] = [{"key": meta.key, **meta.to_json()} for meta, _ in samples]
    entries = []
    for file_number, part in enumerate(samples[0][1]):
        # A slice of zeros is stored as well, so that every sample has bytes with a position.
        array = zarr.open_array(root / split / part, mode="r+").with_config({"write_empty_chunks": True})
        assert array.shards is not None
        first = number * array.shards[0]
        array[first : first + len(samples)] = np.stack([parts[part] for _, parts in samples])
        name = f"{split}/{part}/c/{number}" + "/0" * (array.ndim - 1)
        path = root / name
        for row, (offset, length) in zip(rows, _chunks(path, array.shards[0]), strict=False):
            with path.open("rb") as stream:
                stream.seek(offset)
                payload = stream.read(length)
            values = {"file": file_number, "offset": offset, "bytes": length, "crc32c": crc32c(payload)}
            row |= {f"{part}_{key}": value for key, value in values.items()}
        size = {"bytes": path.stat().st_size, "samples": len(samples), "sha256": file_sha256(path)}
        entries.append({"file": name, "split": split, "parts": [part], **size})
    return rows, entries


def metadata_files(root: Path) -> list[dict[str, Any]]:
    """Entries in index.json for the zarr.json files under `root`."""
    files = sorted(root.rglob("zarr.json"))
    return [
        {"file": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    ]


def _chunks(shard: Path, chunks_per_shard: int) -> list[tuple[int, int]]:
    """Offset and length of each chunk in a shard file, from the index at its end: little-endian pairs of uint64, then a
    CRC-32C (Zarr sharding codec 1.0)."""
    num_bytes = 16 * chunks_per_shard
    with shard.open("rb") as stream:
        stream.seek(-(num_bytes + 4), 2)
        pairs = np.frombuffer(stream.read(num_bytes), "<u8").reshape(-1, 2)
    return [(int(offset), int(length)) for offset, length in pairs.tolist()]
