"""Organs that nobody asked for lower the headline number; a segmenter that fails is said and marked. Closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_support import Page, evaluate_here

from data_shards.labels import AMOS
from segdiff_dist.evaluation.measure.result_files import read_summary
from segdiff_dist.evaluation.measure.segmenter_check import MARK, mark_unreliable, segmenter_messages
from segdiff_dist.evaluation.measure.summary import scalars
from segdiff_dist.evaluation.measure.summary_text import (
    TOP_METRICS,
    UNRELIABLE,
    format_table,
    headline_dice,
    top_metrics,
)
from segdiff_dist.evaluation.metrics import overlaps
from segdiff_dist.evaluation.metrics.columns import overlap_columns
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.report.comparison import open_runs
from segdiff_dist.evaluation.report.comparison_page import write_comparison
from segdiff_dist.evaluation.report.entry_text import format_number
from segdiff_dist.evaluation.report.page import write_report

LIVER, SPLEEN = AMOS.names.index("liver"), AMOS.names.index("spleen")
SIDE = 8


def label_map(**areas: int) -> np.ndarray:
    """[1, 8, 8]: so many pixels of each organ, one row of pixels an organ."""
    found = np.zeros((1, SIDE, SIDE), np.uint8)
    for organ, pixels in areas.items():
        found[0, AMOS.names.index(organ) % SIDE, :pixels] = AMOS.names.index(organ)
    return found


class Measured:
    """The columns of one mask and the labels predicted on the image made from it: pixels of 2 x 3 mm."""

    def __init__(self, mask: np.ndarray, predicted: np.ndarray) -> None:
        self.columns = overlap_columns("mask_gen", mask, predicted, AMOS, [(2.0, 3.0)] * len(mask))

    def __call__(self, name: str) -> float:
        return float(self.columns[name][0])


class TestFalseOrgans:
    def test_a_right_liver_with_a_false_spleen(self):
        of = Measured(label_map(liver=6), label_map(liver=6, spleen=5))
        assert of("dice_mask_gen") == 1.0
        assert of("dice_either_mask_gen") == 0.5
        assert (of("dice_either_mask_gen/liver"), of("dice_either_mask_gen/spleen")) == (1.0, 0.0)
        assert of("false_positive_rate_mask_gen/spleen") == 1.0
        assert of("false_positive_area_mm2_mask_gen/spleen") == 5 * 2 * 3
        # The liver is in the mask: it cannot be false there. All others are absent from both.
        assert np.isnan(of("false_positive_rate_mask_gen/liver"))
        assert of("false_positive_rate_mask_gen/pancreas") == of("false_positive_area_mm2_mask_gen/pancreas") == 0
        assert of("false_positive_rate_mask_gen") == pytest.approx(1 / (len(AMOS.organ_ids) - 1))
        assert of("false_positive_area_mm2_mask_gen") == 30

    def test_nothing_false_changes_nothing(self):
        of = Measured(label_map(liver=6, spleen=4), label_map(liver=3, spleen=4))
        assert of("dice_either_mask_gen") == of("dice_mask_gen") == pytest.approx((2 * 3 / 9 + 1) / 2)
        assert of("false_positive_rate_mask_gen") == of("false_positive_area_mm2_mask_gen") == 0

    def test_a_mask_without_organs(self):
        false = Measured(label_map(), label_map(spleen=1))
        assert np.isnan(false("dice_mask_gen"))
        assert false("dice_either_mask_gen") == 0
        assert np.isnan(Measured(label_map(), label_map())("dice_either_mask_gen"))

    def test_body_and_background_are_no_organs(self):
        of = Measured(label_map(liver=6), label_map(liver=6, body=8))
        assert of("dice_either_mask_gen") == 1.0
        assert of("false_positive_area_mm2_mask_gen") == 0

    @pytest.mark.parametrize("seed", range(3))
    def test_is_never_above_the_one_without_false_organs(self, seed):
        random = np.random.default_rng(seed)
        maps = random.integers(0, AMOS.num_classes, (2, 5, 6, 6)).astype(np.uint8)
        counts = overlaps.confusion(*maps, AMOS.num_classes)
        plain, either = (
            overlaps.mean_dice(dice, AMOS.organ_ids)
            for dice in (overlaps.dice_per_class(counts), overlaps.dice_either(counts))
        )
        assert (either <= plain).all()


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A run evaluated with an untrained segmenter."""
    return evaluate_here(tmp_path_factory.mktemp("runs") / "failing", shapes)


class TestSegmenterThatFails:
    def test_is_said_and_marked_everywhere(self, failing: Path, tmp_path: Path):
        summary = read_summary(failing)
        assert summary["metrics"]["dice_mask_real"]["value"] < 0.1
        messages = segmenter_messages(summary)
        assert "The segmenter fails on all real images: Dice of mask and prediction is 0.0" in messages[0]
        text = format_table(summary).splitlines()
        rows = {line.split()[0]: line for line in text[1:]}
        for name in ("dice_either_mask_gen", "dice_mask_gen", "segmenter_precision"):
            assert UNRELIABLE in rows[name]
        # What is no figure of the segmenter, or says that it fails, is not marked.
        for name in ("psnr_db", "ssim", "sharpness", "dice_mask_real"):
            assert UNRELIABLE not in rows[name]
        # The first rows are those that cannot flatter.
        top = [name for name in TOP_METRICS if name in summary["metrics"]]  # few patients have no patient precision
        assert [line.split()[0] for line in text[1 : 1 + len(top)]] == top
        assert len(top) >= 6
        page = Page(write_report(failing).read_text())
        assert messages[0] in page.text
        assert MARK in page.row(DEFINITIONS["dice_mask_gen"].label)[1]
        assert MARK not in page.row("PSNR")[1]
        runs = open_runs([failing, evaluate_here(tmp_path / "other", failing_shapes(summary), noise=60)])
        page = Page(write_comparison(runs, tmp_path / "comparison.html").read_text())
        assert "Some of these numbers mean nothing" in page.text
        row = page.rows.index(page.row(DEFINITIONS["dice_mask_gen"].label))
        assert MARK in page.rows[row][1]
        # Never the best of them.
        assert not [best for best in page.best if MARK in page.rows[best[0]][best[1]]]

    def test_by_organ_and_modality(self):
        summary = _summary(ct=0.8, mr=0.02, spleen=0.01)
        mark_unreliable(summary)
        assert "unreliable" not in summary["metrics"]["dice_mask_gen"]
        assert summary["by_modality"]["MR"]["dice_mask_gen"]["unreliable"]
        assert "unreliable" not in summary["by_modality"]["CT"]["dice_mask_gen"]
        organs = summary["by_modality_organ"]["CT"]
        assert organs["spleen"]["dice_mask_gen"]["unreliable"]
        assert "unreliable" not in organs["liver"]["dice_mask_gen"]
        # Images of the modality that it fails on, whatever their masks are of.
        assert summary["cross_modality"]["CT_to_MR"]["dice_mask_gen"]["unreliable"]
        assert "unreliable" not in summary["by_modality"]["MR"]["psnr_db"]
        assert "unreliable" not in summary["by_modality"]["MR"]["dice_mask_real"]
        fails, organ = segmenter_messages(summary)
        assert "fails on real MR images" in fails
        assert "does not find spleen (0.010)" in organ

    def test_one_that_works_is_not_spoken_of(self):
        summary = mark_unreliable(_summary(ct=0.8, mr=0.7, spleen=0.6))
        assert segmenter_messages(summary) == []
        assert "unreliable" not in str(summary)

    def test_an_evaluation_of_an_earlier_version_has_the_earlier_dice_on_top(self):
        earlier = [{"dice_mask_gen": {"value": 0.5}, "dice_mask_real": {"value": 0.6}}]
        assert top_metrics(earlier)[:2] == ["dice_mask_gen", "dice_mask_real"]
        assert headline_dice(earlier) == "dice_mask_gen"


def failing_shapes(summary: dict[str, Any]) -> Path:
    return Path(summary["provenance"]["shards"])


def _summary(*, ct: float, mr: float, spleen: float) -> dict[str, Any]:
    def entries(real: float) -> dict[str, Any]:
        return {"dice_mask_real": {"value": real}, "dice_mask_gen": {"value": 0.5}, "psnr_db": {"value": 20.0}}

    return {
        "metrics": entries((ct + mr) / 2),
        "by_modality": {"CT": entries(ct), "MR": entries(mr)},
        "by_modality_organ": {"CT": {"liver": entries(0.9), "spleen": entries(spleen)}},
        "cross_modality": {"CT_to_MR": {"dice_mask_gen": {"value": 0.5}}},
    }


def test_names_in_mlflow_have_both(failing: Path):
    flat = scalars(read_summary(failing))
    assert {
        "dice_either_mask_gen",
        "dice_mask_gen",
        "false_positive_rate_mask_gen",
        "false_positive_area_mm2_mask_gen",
    } <= set(flat)


@pytest.mark.parametrize("value", [-0.0, -0.0004, 0.0])
def test_no_negative_zero(value: float):
    assert format_number(value, 3) == "0.000"
    entry = {"value": -0.0, "ci95": [value, value], "n": 1}
    assert "-0.000" not in format_table({"metrics": {"dice_mask_gen": entry}, "by_modality": {}})


def test_definitions_need_no_other_to_be_understood():
    assert [name for name, definition in DEFINITIONS.items() if definition.text.startswith("The same")] == []
