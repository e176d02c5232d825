"""Small shard sets of random slices, in every codec and store, for the tests of the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import SliceMeta, SliceRecord
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet

SIZE, PER_SHARD = 24, 4
COUNTS = {"train": 10, "val": 3, "test": 1}


def samples(bits: int = 8, soft_edge: bool = False) -> list[SliceRecord]:
    rng = np.random.default_rng(0)
    made: list[SliceRecord] = []
    for split, count in COUNTS.items():
        for index in range(count):
            meta = SliceMeta(
                case_id=f"amos_{len(made):04d}",
                modality="CT" if index % 2 == 0 else "MR",
                axis="axial" if index % 3 else "coronal",
                slice_index=index,
                split=split,
                spacing_mm=(1.5, 0.1),
                affine=tuple(np.linspace(-1, 1, 16).tolist()),
                intensity_scale=512 / 255,
                intensity_offset=-256.0,
                label_set="amos",
                labels_present=(1, 6, 16),
                labelled=index != 1,
                source_sha256="ab" * 32,
                mask_source="expert" if index != 1 else "none",
                bits=bits,
            )
            image = rng.integers(0, 2**bits, (SIZE, SIZE)).astype(f"uint{bits}")
            mask, *edge = rng.integers(0, 17, (3, SIZE, SIZE)).astype(np.uint8)
            made.append(SliceRecord(image, mask, meta, np.stack(edge) if soft_edge else None))
    return made


def write_set(out: Path, store: str = "webdataset", codec: str = "raw", bits: int = 8, soft_edge: bool = False) -> Path:
    writer = ShardWriter(out, set_format(store, codec, PER_SHARD, size=SIZE, bits=bits, soft_edge=soft_edge))
    for record in samples(bits, soft_edge):
        writer.write(record)
    table = {"name": AMOS.name, "names": list(AMOS.names)}
    writer.finish({"label_table": table, "preprocessing": {"size": SIZE, "bits": bits}, "failed": []})
    return out


def format_of(path: Path) -> tuple[str, str, int, bool]:
    """How a set was written."""
    shards = ShardSet.open(path)
    return shards.index["store"], shards.codec, shards.bits, "edge" in shards.parts


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(InputProblems) as caught:
        ShardSet.open(path, **options)
    return str(caught.value)
