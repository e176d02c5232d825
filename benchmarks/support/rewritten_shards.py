"""A shard set written again with other masks, or with some of its slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_shards.records import SliceRecord
    from data_shards.store.shards import ShardSet


def forget_body(shards_at: Path, out: Path) -> None:
    """Write the same slices with `body` turned into background, in masks and at soft edges; rows stay rows."""

    def without_body(record: SliceRecord, body: int) -> SliceRecord:
        mask_HW = np.where(record.mask_HW == body, np.uint8(0), record.mask_HW)
        edge_2HW = None
        if record.edge_2HW is not None:
            edge_2HW = record.edge_2HW.copy()
            edge_2HW[0][edge_2HW[0] == body] = 0
        present = tuple(label for label in record.meta.labels_present if label != body)
        return replace(record, mask_HW=mask_HW, edge_2HW=edge_2HW, meta=replace(record.meta, labels_present=present))

    def every(shards: ShardSet) -> Iterator[SliceRecord]:
        body = shards.label_table.body_id
        assert body is not None
        return (without_body(shards.read(row), body) for row in range(len(shards)))

    rewrite(shards_at, out, every)


def rewrite(shards_at: Path, out: Path, chosen: Callable[[ShardSet], Iterable[SliceRecord]]) -> None:
    """Write the slices that `chosen` gives of a shard set as another one like it."""
    from data_shards.store.shard_writer import ShardWriter, set_format
    from data_shards.store.shards import ShardSet

    shards = ShardSet.open([str(shards_at)])
    has_edges = "edge" in shards.parts
    format = set_format("webdataset", "raw", 1024, size=shards.size, bits=shards.bits, soft_edge=has_edges)
    writer = ShardWriter(out, format)
    for record in chosen(shards):
        writer.write(record)
    writer.finish({"label_table": asdict(shards.label_table), "preprocessing": shards.index["preprocessing"]})
