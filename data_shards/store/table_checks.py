"""Whether the table of a set, its index and its files are of one set.

Dimensions: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.modalities import MODALITIES
from data_shards.problems import Problem
from data_shards.store import samples_table, tar_store
from data_shards.store.samples_table import PARTS
from data_shards.store.set_index import INDEX, MODALITIES_KEY, SAMPLES

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Part:
    """The position of one part (image, mask or edge) of every sample: arrays of N, without a copy from the table."""

    file_N: np.ndarray
    offset_N: np.ndarray
    bytes_N: np.ndarray
    crc32c_N: np.ndarray

    @classmethod
    def of(cls, table: pa.Table, part: str) -> Part:
        """The columns of one part."""
        return cls(*(samples_table.numbers(table, f"{part}_{name}") for name in samples_table.WHERE))


def disagreements(root: str, index: dict[str, Any], table: pa.Table, *, verify: bool) -> Iterator[Problem]:
    """Problems from comparing the index with the table and, with `verify`, the table with the tars' members."""
    remedy = "the files are of different sets: restore them, or prepare the set again"
    if table.num_rows != index["num_samples"]:
        value = f"{index['num_samples']} where {SAMPLES} has {table.num_rows} rows"
        yield Problem(f"{root}/{INDEX}", "num_samples", value, remedy)
        return
    if index.get(MODALITIES_KEY, list(MODALITIES)) != list(samples_table.modalities_in(table)):
        value = f"{index.get(MODALITIES_KEY)} where {SAMPLES} has {', '.join(samples_table.modalities_in(table))}"
        yield Problem(f"{root}/{INDEX}", MODALITIES_KEY, value, remedy)
        return
    num_labels = len(index["label_table"]["names"])
    if (largest := samples_table.largest_label(table)) >= num_labels:
        value = f"{largest}, of {num_labels} labels in {INDEX}"
        yield Problem(f"{root}/{SAMPLES}", "labels_present", value, remedy)
        return
    entries = index["shards"]
    files = {part: Part.of(table, part) for part in PARTS}
    counted = {}
    for part, where in files.items():
        if len(where.file_N) and ((where.file_N[1:] < where.file_N[:-1]).any() or where.file_N[-1] >= len(entries)):
            value = f"does not rise, or beyond the {len(entries)} of index.json"
            yield Problem(f"{root}/{SAMPLES}", f"{part}_file", value, remedy)
            return
        sizes = np.array([entry["bytes"] for entry in entries] + [0], np.int64)[where.file_N]  # the last one is 0
        there = where.file_N >= 0
        outside = there & ((where.offset_N < 0) | (where.bytes_N < 0) | (where.offset_N > sizes - where.bytes_N))
        if outside.any() or (where.file_N < -1).any() or (part != "edge" and not there.all()):
            value = "outside the file that it names, or not there"
            yield Problem(f"{root}/{SAMPLES}", f"{part}_offset", value, remedy)
            return
        counted[part] = np.diff(np.searchsorted(where.file_N, np.arange(len(entries) + 1)))
    for number, entry in enumerate(entries):
        for part in entry["parts"]:
            if counted[part][number] != entry["samples"]:
                value = f"{entry['samples']} where {SAMPLES} has {counted[part][number]} with this {part}"
                yield Problem(f"{root}/{entry['file']}", "samples", value, remedy)
    if verify and index["store"] == "webdataset":
        keys = table["key"].to_pylist()
        for number, entry in enumerate(entries):
            expected = {}
            for part in entry["parts"]:
                where = files[part]
                for row in range(*np.searchsorted(where.file_N, (number, number + 1)).tolist()):
                    expected[f"{keys[row]}.{part}"] = (int(where.offset_N[row]), int(where.bytes_N[row]))
            yield from tar_store.problems_with_members(Path(root) / entry["file"], expected)
