"""Colours that a reader can distinguish, and a legend that fits as many classes as a set holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.labels import LABEL_TABLES, WHOLEBODY
from data_shards.records import SliceMeta, SliceRecord
from data_shards.store.contact_sheet import class_colours, draw_contact_sheet, overlay
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet


@pytest.mark.parametrize("name", LABEL_TABLES)
def test_every_class_has_a_colour_of_its_own(name: str) -> None:
    table = LABEL_TABLES[name]
    colours = class_colours(table)
    shown = [*table.organ_ids, table.body_id]
    assert len({tuple(colour) for colour in colours[shown].tolist()}) == len(shown)
    assert (colours[0] == 0).all()
    apart = np.abs(colours[shown][:, None].astype(int) - colours[shown]).max(axis=2)
    assert apart[~np.eye(len(shown), dtype=bool)].min() >= 25
    assert (colours[shown].max(axis=1) >= 75).all(), "none is taken for background"


def test_an_organ_has_one_colour_in_every_table() -> None:
    tables = [LABEL_TABLES[name] for name in LABEL_TABLES]
    by_name = [dict(zip(table.names, class_colours(table).tolist(), strict=True)) for table in tables]
    for organ in ("liver", "aorta", "kidney_left", "body", "background"):
        assert all(colours[organ] == by_name[0][organ] for colours in by_name)


def test_whole_body_classes_are_tinted_and_unused_has_no_colour() -> None:
    assert (class_colours(WHOLEBODY)[20] == 0).all()
    mask = np.full((8, 8), WHOLEBODY.names.index("muscle"), np.uint8)
    shown = overlay(np.full((8, 8), 100, np.uint8), mask, WHOLEBODY)
    assert not np.array_equal(shown[4, 4], [100] * 3)


def write_wholebody_set(out: Path, *names_of_slice: list[str]) -> ShardSet:
    """A CT slice a case, of stripes of the classes named; the first slice trains, the others test."""
    writer = ShardWriter(out, set_format("webdataset", "raw", 10, size=32, bits=8, soft_edge=False))
    for number, names in enumerate(names_of_slice, start=1):
        ids = np.array([WHOLEBODY.names.index(name) for name in names], np.uint8)
        mask_HW = np.resize(ids, 32)[:, None].repeat(32, axis=1)
        meta = SliceMeta(
            f"amos_{number:04d}", "CT", "axial", 0, "train" if number == 1 else "test", (1.0, 1.0),
            tuple(np.eye(4).ravel()), 2.0, -256.0, "wholebody", tuple(np.unique(mask_HW).tolist()), True, "0" * 64,
            "wholebody",
        )  # fmt: skip
        writer.write(SliceRecord(np.full((32, 32), 90, np.uint8), mask_HW, meta))
    table = {"name": WHOLEBODY.name, "names": WHOLEBODY.names}
    writer.finish({"label_table": table, "preprocessing": {"size": 32, "bits": 8}})
    return ShardSet.open(out)


def colours_in(picture: Path) -> set[str]:
    """Classes whose very colour is in it, as it is in the legend alone."""
    pixels = {tuple(colour) for colour in np.asarray(Image.open(picture)).reshape(-1, 3).tolist()}
    return {WHOLEBODY.names[i] for i in SHOWN if tuple(class_colours(WHOLEBODY)[i].tolist()) in pixels}


SHOWN = [*WHOLEBODY.organ_ids, WHOLEBODY.body_id]


def test_a_large_tables_legend_names_what_occurs(tmp_path: Path) -> None:
    names = ["spleen", "stomach", "hip_right", "vertebra_body", "muscle", "bone_other", "intestine", "body"]
    draw_contact_sheet(write_wholebody_set(tmp_path / "set", names), tmp_path / "sheet.png")
    assert colours_in(tmp_path / "sheet.png") == set(names)


def test_a_legend_of_every_class_fits_on_the_sheet(tmp_path: Path) -> None:
    names = [WHOLEBODY.names[i] for i in SHOWN]
    shard_set = write_wholebody_set(tmp_path / "set", names[:24], names[24:48], names[48:])
    draw_contact_sheet(shard_set, tmp_path / "sheet.png")
    assert colours_in(tmp_path / "sheet.png") == set(names)
