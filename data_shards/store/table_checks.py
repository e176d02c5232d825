"""Whether the table of a set, its index and its files are of one set.

Dimensions: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

_REMEDY = "the files are of different sets: restore them, or prepare the set again"


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

    def rows_in(self, file: int) -> range:
        """The samples whose part is in this file of the set. Their file numbers must rise."""
        bounds = np.array((file, file + 1), self.file_N.dtype)  # of another dtype, the column would be copied
        return range(*np.searchsorted(self.file_N, bounds).tolist())


def disagreements(root: str, index: dict[str, Any], table: pa.Table, *, verify: bool) -> Iterator[Problem]:
    """Problems from comparing the index with the table and, with `verify`, the table with the tars' members. What is
    compared last needs a table that is right as far as it was compared before."""
    entries = index["shards"]
    parts = {part: Part.of(table, part) for part in PARTS}
    for first in (_wrong_totals(root, index, table), _wrong_places(root, entries, parts)):
        found = next(first, None)
        if found is not None:
            yield found
            return
    yield from _wrong_counts(root, entries, parts)
    if verify and index["store"] == "webdataset":
        keys = table["key"].to_pylist()
        for number, entry in enumerate(entries):
            members = _members(number, entry, parts, keys)
            yield from tar_store.problems_with_members(Path(root) / entry["file"], members)


def _wrong_totals(root: str, index: dict[str, Any], table: pa.Table) -> Iterator[Problem]:
    """Numbers of rows, modalities and labels that the index and the table do not share."""
    if table.num_rows != index["num_samples"]:
        value = f"{index['num_samples']} where {SAMPLES} has {table.num_rows} rows"
        yield Problem(f"{root}/{INDEX}", "num_samples", value, _REMEDY)
    modalities = samples_table.modalities_in(table)
    if index.get(MODALITIES_KEY, list(MODALITIES)) != list(modalities):
        value = f"{index.get(MODALITIES_KEY)} where {SAMPLES} has {', '.join(modalities)}"
        yield Problem(f"{root}/{INDEX}", MODALITIES_KEY, value, _REMEDY)
    num_labels = len(index["label_table"]["names"])
    if (largest := samples_table.largest_label(table)) >= num_labels:
        value = f"{largest}, of {num_labels} labels in {INDEX}"
        yield Problem(f"{root}/{SAMPLES}", "labels_present", value, _REMEDY)


def _wrong_places(root: str, entries: Sequence[dict[str, Any]], parts: dict[str, Part]) -> Iterator[Problem]:
    """Parts of samples that are in no file of the index, or outside the bytes of theirs."""
    # The last entry is that of file -1, in which no part is.
    num_bytes = np.array([entry["bytes"] for entry in entries] + [0], np.int64)
    for part, where in parts.items():
        file_N = where.file_N
        if len(file_N) and ((file_N[1:] < file_N[:-1]).any() or file_N[-1] >= len(entries)):
            value = f"does not rise, or beyond the {len(entries)} of index.json"
            yield Problem(f"{root}/{SAMPLES}", f"{part}_file", value, _REMEDY)
            return  # these files have no lengths to compare with
        has_part_N = file_N >= 0
        last_offset_N = num_bytes[file_N] - where.bytes_N
        outside_N = has_part_N & ((where.offset_N < 0) | (where.bytes_N < 0) | (where.offset_N > last_offset_N))
        if outside_N.any() or (file_N < -1).any() or (part != "edge" and not has_part_N.all()):
            value = "outside the file that it names, or not there"
            yield Problem(f"{root}/{SAMPLES}", f"{part}_offset", value, _REMEDY)


def _wrong_counts(root: str, entries: Sequence[dict[str, Any]], parts: dict[str, Part]) -> Iterator[Problem]:
    """Files that hold another number of samples than the index says."""
    for number, entry in enumerate(entries):
        for part in entry["parts"]:
            num_samples = len(parts[part].rows_in(number))
            if num_samples != entry["samples"]:
                value = f"{entry['samples']} where {SAMPLES} has {num_samples} with this {part}"
                yield Problem(f"{root}/{entry['file']}", "samples", value, _REMEDY)


def _members(
    number: int, entry: dict[str, Any], parts: dict[str, Part], keys: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Offset and length of the bytes in tar `number`, by key and part as "KEY.PART"."""
    return {
        f"{keys[row]}.{part}": (int(parts[part].offset_N[row]), int(parts[part].bytes_N[row]))
        for part in entry["parts"]
        for row in parts[part].rows_in(number)
    }
