"""docs/data.md is a specification: its reader reads real sets, its tables are the ones in use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests_support import write_shapes

from data_shards.labels import AMOS, AMOS_TO_WHOLEBODY, UNUSED, WHOLEBODY
from data_shards.store.samples_table import PARTS, WHERE, schema
from data_shards.store.shards import ShardSet

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read_set() -> Callable[[Path], Iterator[tuple[dict[str, Any], Any, Any, Any]]]:
    """The reader that the page prints, as someone would copy it."""
    [source] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    return names["read_set"]


@pytest.mark.parametrize(("bits", "soft_edge"), [(8, False), (8, True), (16, True)])
def test_the_printed_reader_reads_what_was_written(read_set: Any, tmp_path: Path, bits: int, soft_edge: bool) -> None:
    path = write_shapes(tmp_path / "set", bits=bits, soft_edge=soft_edge)
    shards = ShardSet.open(path)
    num_read = 0
    for row, (meta, image_HW, mask_HW, edge_2HW) in enumerate(read_set(path)):
        expected = shards.read(row)
        assert meta["key"] == expected.meta.key
        assert meta["affine"] == list(expected.meta.affine)
        assert image_HW.dtype == expected.image_HW.dtype
        np.testing.assert_array_equal(image_HW, expected.image_HW)
        np.testing.assert_array_equal(mask_HW, expected.mask_HW)
        assert (edge_2HW is None) == (expected.edge_2HW is None)
        if edge_2HW is not None:
            np.testing.assert_array_equal(edge_2HW, expected.edge_2HW)
        num_read += 1
    assert num_read == len(shards)


def test_the_printed_reader_refuses_what_it_cannot_read(read_set: Any, tmp_path: Path) -> None:
    path = write_shapes(tmp_path / "set", num_patients=1, slices=1, store="zarr")
    with pytest.raises(ValueError, match="not a raw set of format 2 or 3"):
        next(read_set(path))


def test_the_printed_columns_are_those_of_the_table() -> None:
    [table] = re.findall(r"\| column \|.*?\n\n", PAGE, re.DOTALL)
    printed = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    spelt = {
        "code": "dictionary<values=string, indices=uint8, ordered=0>",
        "text": "dictionary<values=string, indices=int32, ordered=0>",
        "list of 2 float64": "fixed_size_list<item: double>[2]",
        "list of 16 float64": "fixed_size_list<item: double>[16]",
        "list of uint8": "list<item: uint8>",
        "float64": "double",
    }
    expected = {}
    for name, kind in printed.items():
        for column in [name.replace("PART", part) for part in PARTS] if name.startswith("PART") else [name]:
            expected[column] = spelt.get(kind, kind)
    assert expected == {field.name: str(field.type) for field in schema()}
    assert {name.removeprefix("PART_") for name in printed if name.startswith("PART")} == set(WHERE)


def test_the_printed_label_tables_are_those_in_use() -> None:
    amos, wholebody = re.findall(r"```text\n(0 background .*?)```", PAGE, re.DOTALL)
    entries = re.findall(r"(\d+) ([A-Za-z_]\w*)(?: > (\d+))?", amos)
    assert [name for _, name, _ in entries] == list(AMOS.names)
    assert [int(number) for number, _, _ in entries] == list(range(AMOS.num_classes))
    assert [int(other) for _, _, other in entries if other] == list(AMOS_TO_WHOLEBODY[1:])
    entries_of_71 = re.findall(r"(\d+) (\w+)", wholebody)
    assert [(int(number), name) for number, name in entries_of_71] == list(enumerate(WHOLEBODY.names))
    assert f"Id {WHOLEBODY.names.index(UNUSED)} is unused" in PAGE
