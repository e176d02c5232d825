"""Colours that can be told apart, and a legend that fits as many classes as a set holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.contact_sheet import class_colours, draw_contact_sheet, overlay
from data_shards.fan_out import ray_session
from data_shards.labels import AMOS, LABEL_TABLES, WHOLEBODY
from data_shards.prepare import PrepareConfig, prepare
from data_shards.shards import ShardSet


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


def test_amos_keeps_its_colours() -> None:
    assert class_colours(AMOS)[[1, 6, 15, 16]].tolist() == [[230, 25, 75], [145, 30, 180], [128, 0, 0], [255, 190, 80]]


def test_whole_body_classes_are_tinted_and_unused_has_no_colour() -> None:
    assert (class_colours(WHOLEBODY)[20] == 0).all()
    mask = np.full((8, 8), WHOLEBODY.names.index("muscle"), np.uint8)
    shown = overlay(np.full((8, 8), 100, np.uint8), mask, WHOLEBODY)
    assert not np.array_equal(shown[4, 4], [100] * 3)


def test_a_large_tables_legend_names_what_occurs(archive, tmp_path: Path) -> None:
    masks = tmp_path / "whole"
    for number in (1, 2, 3, 501, 502, 504):
        _, label = archive.patient("CT", number)
        archive.save(masks / f"amos_{number:04d}.nii.gz", label)  # liver as `stomach`, spleen as itself
    config = PrepareConfig(size=32, slice_stride=9, label_set="wholebody", num_workers=1)
    with ray_session():
        prepare(archive.root, tmp_path / "set", config, wholebody=masks)
    draw_contact_sheet(ShardSet.open(tmp_path / "set"), tmp_path / "sheet.png")
    pixels = {tuple(colour) for colour in np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3).tolist()}
    colours = {name: tuple(class_colours(WHOLEBODY)[i].tolist()) for i, name in enumerate(WHOLEBODY.names)}
    assert {colours[name] for name in ("spleen", "stomach", "body")} <= pixels
    assert not {colours[name] for name in ("hip_left", "vertebra_body", "sternum")} & pixels
