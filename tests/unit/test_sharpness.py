"""Sharpness in an evaluated run: columns, entries with intervals, words, report, comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation_support import Page, evaluate_here

from data_shards.labels import AMOS
from segdiff_dist.evaluation.evaluate import draw
from segdiff_dist.evaluation.measure.summary import scalars
from segdiff_dist.evaluation.measure.summary_text import format_table
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.metrics.sharpness import SHARPNESS_METRICS, measure, sharpness_entries, sharpness_messages
from segdiff_dist.evaluation.metrics.sums import Interval, PatientSums, SumKey
from segdiff_dist.evaluation.report.comparison import best_of, open_runs
from segdiff_dist.evaluation.report.comparison_page import write_comparison

ISSUE_BANDS = dict(zip(SHARPNESS_METRICS[1:-1], (1.03, 0.87, 0.59, 0.20, 0.04), strict=True))


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate_here(tmp_path_factory.mktemp("sharpness") / "noisy", shapes, noise=20.0)


def summary_of(run: Path) -> Any:
    return json.loads((run / "evaluation" / "summary.json").read_text())


def test_an_evaluation_has_every_figure_with_interval(run: Path) -> None:
    summary = summary_of(run)
    for group in (summary["metrics"], *summary["by_modality"].values(), *summary["by_axis"].values()):
        assert set(SHARPNESS_METRICS) <= set(group)
        for name in SHARPNESS_METRICS:
            assert group[name]["n"] + group[name]["num_left_out"] == group["psnr_db"]["n"]
            assert group[name]["ci95"][0] <= group[name]["value"] <= group[name]["ci95"][1]
    # Noise is added to real images: too much fine detail.
    assert summary["metrics"]["sharpness_75_100"]["value"] > 2
    assert summary["metrics"]["texture"]["value"] > 1.2
    assert any("texture" in entries for entries in summary["by_organ"].values())
    flat = scalars(summary)
    assert flat["sharpness"] == summary["metrics"]["sharpness"]["value"]
    assert "CT/sharpness_75_100" in flat
    assert any(name.startswith("organ/") and name.endswith("/texture") for name in flat)
    assert "sharpness_75_100" in format_table(summary)


def test_figures_are_ratios_of_the_rows_sums(run: Path) -> None:
    rows = pq.read_table(run / "evaluation" / "samples.parquet").to_pydict()
    headline = np.array(rows["headline"])
    power = {side: np.array(rows[f"power_{side}_50_75"])[headline] for side in ("real", "gen")}
    found = summary_of(run)["metrics"]["sharpness_50_75"]
    assert found["value"] == pytest.approx(power["gen"].sum() / power["real"].sum())
    assert np.isnan(np.array(rows["power_real_50_75"])[~headline]).all()
    assert np.nanmax(rows["sharpness"]) <= 1


def test_images_of_the_other_modality_are_held_to_real_ones_of_it(run: Path) -> None:
    rows = pq.read_table(run / "evaluation" / "samples.parquet").to_pydict()
    target, source = np.array(rows["target_modality"]), np.array(rows["source_modality"])
    real = np.array(rows["power_real_50_75"])[np.array(rows["headline"]) & (target == "MR")]
    generated = np.array(rows["power_gen_50_75"])[(target == "MR") & (source == "CT")]
    found = summary_of(run)["cross_modality"]["CT_to_MR"]
    assert found["sharpness_50_75"]["value"] == pytest.approx(generated.mean() / real.mean())
    assert found["sharpness_50_75"]["n"] == len(generated)
    assert found["sharpness"]["ci95"] is None
    assert set(SHARPNESS_METRICS) <= set(found)


def test_the_same_images_are_sharp(run: Path, shapes: Path, tmp_path: Path) -> None:
    summary = summary_of(evaluate_here(tmp_path / "same", shapes, noise=0.0))
    for name in SHARPNESS_METRICS:
        assert summary["metrics"][name]["value"] == pytest.approx(1.0)


def test_blur_lowers_what_dice_does_not_see() -> None:
    """Organs that keep their mean and their outline, and lose their grain."""
    rng = np.random.default_rng(0)
    mask = np.zeros((6, 64, 64), np.uint8)
    mask[:, 8:56, 8:30], mask[:, 8:56, 34:56] = AMOS.names.index("liver"), AMOS.names.index("spleen")
    base = np.where(mask > 0, 110, 100)
    real = (base + rng.normal(0, 15, mask.shape)).clip(0, 255).astype(np.uint8)
    columns = measure(real, base.astype(np.uint8), mask, AMOS)
    sums = PatientSums(list(columns))
    keys = [SumKey("headline", f"p{i % 3}", "CT", "CT", "axial") for i in range(6)]
    sums.add(keys, np.stack(list(columns.values()), axis=1))
    found = sharpness_entries(sums, lambda key: True, Interval(50, 0))
    assert found["sharpness_75_100"]["value"] < 0.05
    assert found["sharpness"]["value"] < 0.3
    assert found["texture"]["value"] < 0.01
    assert found["sharpness"]["num_patients"] == 3
    # One patient has no interval.
    one = sharpness_entries(sums, lambda key: key.case_id == "p0", Interval(50, 0))
    assert {entry["ci95"] for entry in one.values()} == {None}
    assert not sharpness_entries(sums, lambda key: False, Interval(50, 0))


def test_words_name_what_is_blurred_and_what_is_noise() -> None:
    def described(**bands: float) -> str:
        return " ".join(sharpness_messages({name: {"value": value} for name, value in bands.items()}))

    assert described(**ISSUE_BANDS) == (
        "Generated images are blurred: their power as a share of the real images', by wavelength: 4.0% at 2 to 2.67 "
        "pixels, 20% at 2.67 to 4 pixels."
    )
    assert "noisier than real ones" in described(sharpness_75_100=3.0)
    assert (
        "flatter than real ones: their power as a share of the real images', by wavelength: 30% at 16 to 64 pixels"
        in described(sharpness_3_12=0.3, sharpness_75_100=1.0)
    )
    assert "too uneven" in described(sharpness_12_25=2.5)
    assert described(sharpness_75_100=0.9).startswith("Generated images have between half and twice")
    assert described(texture=0.3) == "Inside organs, fine texture is 30% of the real images'."
    assert described() == ""


def test_the_report_says_it_at_the_top(run: Path) -> None:
    page = Page(draw(run, progress=False)[0].read_text())
    assert "noisier than real ones" in page.text.split("Published results")[0]
    assert page.row("Power ratio, finest")[1]
    assert page.row("Sharpness")[1]
    assert "Power by wavelength" in page.text
    assert "texture inside organs" in page.text


def test_runs_are_compared_by_it(run: Path, shapes: Path, tmp_path: Path) -> None:
    same = evaluate_here(tmp_path / "same", shapes, noise=0.0)
    page = Page(write_comparison(open_runs([run, same]), tmp_path / "c.html").read_text())
    rows = [row[0] for row in page.rows]
    for label in ("Sharpness", "Power ratio, finest", "Texture in organs"):
        at = next(i for i, name in enumerate(rows) if name.startswith(label))
        assert (at, 2) in page.best
        assert (at, 1) not in page.best


def test_nearest_to_one_is_best_by_factor() -> None:
    definition = DEFINITIONS["sharpness_75_100"]
    assert best_of([0.5, 1.9, 2.1], definition) == {1}
    assert best_of([0.0, 3.0, None], definition) == {1}
    assert best_of([0.5, 2.0], definition) == {0, 1}
