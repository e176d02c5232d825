"""Samples as a shard set that our own loader reads; its index says that they are synthetic, and what made them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.store.shard_writer import ShardWriter, set_format
from segdiff_dist.export.config import ExportConfig

if TYPE_CHECKING:
    from segdiff_dist.export.samples import FinishedSamples, Sample

_SAMPLES_PER_SHARD = 1024  # as PrepareConfig's


def write_shard_set(
    out: Path, samples: FinishedSamples, iterated: Iterable[Sample], config: ExportConfig
) -> dict[str, Any]:
    """The set in `out`; returns its index."""
    form = set_format(config.store, config.codec, _SAMPLES_PER_SHARD, size=samples.size, bits=8, soft_edge=False)
    writer = ShardWriter(out, form)
    for sample in iterated:
        record = sample.record
        if config.split is not None:
            record = replace(record, meta=replace(record.meta, split=config.split))
        writer.write(record)
    table = samples.label_table
    header = {
        "label_table": {"name": table.name, "names": list(table.names)},
        "preprocessing": samples.preprocessing,
        "synthetic": samples.provenance,
    }
    return writer.finish(header)
