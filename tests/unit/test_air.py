"""Air around the patient and the lattice of 2x2 pixels, of made images with a known answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_support import evaluate_here

from data_shards.labels import AMOS, LabelTable
from segdiff_dist.evaluation.measure.result_files import read_rows, read_summary
from segdiff_dist.evaluation.metrics.air import AIR_METRICS, air, lattice_message, measure
from segdiff_dist.evaluation.report.tables import air_table

SIDE = 64


def patient(places: slice = slice(20, 44)) -> Any:
    """A mask whose body is a square."""
    mask = np.zeros((1, SIDE, SIDE), np.uint8)
    mask[:, places, places] = AMOS.body_id
    return mask


def tiled(values: list[list[float]]) -> Any:
    return np.tile(np.array(values), (SIDE // 2, SIDE // 2))[None]


def found(image: Any, mask: Any, table: LabelTable = AMOS) -> dict[str, float]:
    """Values of the generated side; the real image is black."""
    columns = measure(np.zeros_like(mask), image, mask, table)
    assert set(columns) == set(AIR_METRICS)
    return {name.removesuffix("_gen"): float(of[0]) for name, of in columns.items() if name.endswith("_gen")}


def test_a_lattice_of_known_depth() -> None:
    mask = patient()
    image = np.where(mask > 0, 100 + tiled([[0, 0], [0, 6]]), tiled([[0, 1], [2, 5]]))
    values = found(image.astype(np.uint8), mask)
    assert values["air_lattice"] == pytest.approx(5, abs=0.02)
    assert values["air_mean"] == pytest.approx(2, abs=0.02)
    assert values["air_std"] == pytest.approx(np.std([0, 1, 2, 5]), abs=0.02)
    assert values["patient_lattice"] == pytest.approx(6, abs=0.3)  # its outermost pixels have other neighbours
    shifted = found(np.roll(image, 1, axis=2).astype(np.uint8), np.roll(mask, 1, axis=2))
    assert shifted["air_lattice"] == pytest.approx(5, abs=0.02)


def test_shading_and_waves_of_four_pixels_are_no_lattice() -> None:
    mask = patient(slice(20, 46))  # 24 rows without the outermost: whole waves
    rows, columns = np.mgrid[:SIDE, :SIDE]
    image = 40 + rows + columns / 2 + 20 * (rows % 4 > 1)
    values = found(np.broadcast_to(image, mask.shape), mask)
    assert values["air_lattice"] == pytest.approx(0, abs=0.5)
    assert values["patient_lattice"] == pytest.approx(0, abs=0.5)


def test_white_noise_has_the_lattice_of_chance() -> None:
    mask = np.repeat(patient(), 40, axis=0)
    noise = np.random.default_rng(0).normal(100, 10, mask.shape)
    columns = measure(noise, noise, mask, AMOS)
    num = air(mask)[0].sum() / 4
    # Fine detail less the part that four places share; the mean range of four normal values is 2.06.
    assert columns["air_lattice_gen"].mean() == pytest.approx(2.06 * 10 / np.sqrt(num), rel=0.15)
    assert columns["air_std_gen"].mean() == pytest.approx(10, rel=0.02)


def test_air_is_three_pixels_from_any_label() -> None:
    mask = patient(slice(20, 44))
    rows = np.flatnonzero(air(mask)[0, :, 30])
    assert (rows + 1).tolist() == [*range(1, 18), *range(46, SIDE - 1)]


def test_without_a_body_or_with_too_little_air_there_is_none() -> None:
    image = np.full((1, SIDE, SIDE), 7, np.uint8)
    organs = LabelTable("organs", ("background", "liver"))
    assert np.isnan(found(image, (patient() > 0).astype(np.uint8), organs)["air_mean"])
    assert np.isnan(found(image, np.where(patient() > 0, AMOS.names.index("liver"), 0).astype(np.uint8))["air_mean"])
    values = found(image, patient(slice(3, SIDE - 3)))
    assert np.isnan(values["air_lattice"])
    assert values["patient_lattice"] == 0


def test_an_evaluation_has_it_by_modality_and_on_the_page(shapes: Any, tmp_path: Any) -> None:
    run = evaluate_here(tmp_path / "noisy", shapes, noise=20.0)
    summary = read_summary(run)
    entries = summary["metrics"]
    assert set(AIR_METRICS) <= set(entries)
    assert set(AIR_METRICS) <= set(summary["by_modality"]["CT"])
    assert entries["air_mean_gen"]["value"] > entries["air_mean_real"]["value"]  # noise below black is cut off
    rows = {name: np.array(v) for name, v in read_rows(run, ["air_mean_gen", "headline"]).to_pydict().items()}
    assert entries["air_mean_gen"]["value"] == pytest.approx(np.nanmean(rows["air_mean_gen"][rows["headline"]]))
    table = air_table(summary)
    assert [row.name for row in table.rows] == ["All", "CT", "MR"]
    assert len(table.columns) == len(AIR_METRICS) + 1


def test_the_message_names_a_lattice_that_real_images_have_not() -> None:
    entries = {"air_lattice_real": {"value": 0.1}, "air_lattice_gen": {"value": 3.4}}
    assert "3.40 grey values (real images: 0.10)" in lattice_message(entries)
    assert not lattice_message(entries | {"air_lattice_real": {"value": 3.3}})
    assert not lattice_message({})
