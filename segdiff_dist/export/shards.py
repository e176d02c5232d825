"""Samples as a shard set that our own loader reads; its index says that they are synthetic, whose masks they
are of, and names the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.records import SliceRecord
from data_shards.store.shard_writer import ShardWriter, set_format
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.samples import GREY_16_OF_8

if TYPE_CHECKING:
    from segdiff_dist.export.samples import FinishedSamples, Sample

_SAMPLES_PER_SHARD = 1024  # as PrepareConfig's


def write_shard_set(
    out: Path,
    samples: FinishedSamples,
    iterated: Iterable[Sample],
    config: ExportConfig,
    *,
    bits: int = 8,
    soft_edge: bool = False,
) -> dict[str, Any]:
    """Write the set to `out`; returns its index. `bits`, `soft_edge`: those of a real set, so that both can be opened
    together. There are still 256 grey values, and every pixel has a single class."""
    form = set_format(config.store, config.codec, _SAMPLES_PER_SHARD, size=samples.size, bits=bits, soft_edge=soft_edge)
    writer = ShardWriter(out, form)
    for sample in iterated:
        record = sample.record
        if config.split is not None:
            record = replace(record, meta=replace(record.meta, split=config.split))
        if bits == 16:
            record = _in_16_bits(record)
        if soft_edge:
            whole = np.full_like(record.mask_HW, 255)
            record = replace(record, edge_2HW=np.stack((np.zeros_like(record.mask_HW), whole)))
        writer.write(record)
    table = samples.label_table
    header = {
        "label_table": table.described,
        "preprocessing": samples.preprocessing | {"bits": bits, "soft_edge": soft_edge},
        "source": {item["case"]: {"patient": item["patient"]} for item in samples.items},
        "synthetic": samples.provenance,
    }
    return writer.finish(header)


def _in_16_bits(record: SliceRecord) -> SliceRecord:
    meta = replace(record.meta, bits=16, intensity_scale=record.meta.intensity_scale / GREY_16_OF_8)
    return replace(record, image_HW=record.image_HW.astype(np.uint16) * GREY_16_OF_8, meta=meta)
