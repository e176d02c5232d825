"""Whatever a label is named, pages and figures are drawn, and MLflow takes the metrics' names."""

from __future__ import annotations

import io

import numpy as np
import pytest
from evaluation_support import Page
from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name

from data_shards.labels import LabelTable, shown_name
from data_shards.store.contact_sheet import draw_text
from segdiff_dist.evaluation.measure.segmenter_check import segmenter_messages
from segdiff_dist.evaluation.report import comparison_figures, figure_style, number_figures
from segdiff_dist.evaluation.report.page import render
from segdiff_dist.tracking.records import metric_key

NAMES = (
    r"$\frac{x$",
    "$a$",
    "<script>alert(1)</script>",
    "x" * 3000,
    "Leber \u809d \U0001fac0",
    "50 %s %d {0}",
    "two\nlines\tand\x1b[31mcolour",
    "../../up",
    "a/b",
    "a b",
    "_",
    "'\"; --",
)


def entries() -> dict:
    names = ("dice_mask_real", "dice_mask_gen", "dice_either_mask_gen", "texture", "hu_mean_real", "hu_mean_gen")
    names = (*names, "hu_std_real", "hu_std_gen", "hu_mean_error")
    return {name: {"value": 0.01, "ci95": None, "n": 3, "num_patients": 1} for name in names}


def summary() -> dict:
    organs = {name: entries() for name in NAMES}
    return {
        **{"num_samples": 3, "num_patients": 1, "metrics": entries(), "by_modality": {"CT": entries() | good()}},
        **{"by_axis": {}, "by_organ": organs, "by_modality_organ": {"CT": organs}, "body": {}, "cross_modality": {}},
        **{"diversity": {}, "not_available": {}, "provenance": {"label_table": NAMES[0]}},
        "trust": {"leakage": {"num_leaked": 0, "patients": [], "files": []}},
    }


def good() -> dict:
    return {"dice_mask_real": {"value": 0.9, "ci95": None, "n": 3}}


@pytest.mark.parametrize("draw", [number_figures.dice_by_organ, lambda s: number_figures.intensity_by_organ(s, "CT")])
def test_figures_by_organ(draw):
    with figure_style.styled():
        drawn = draw(summary())
        assert drawn is not None
        figure_style.save(drawn[0], file := io.BytesIO())
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_legend_and_runs_names():
    names = [name for name in NAMES if len(name) <= 100 and name.isprintable()]
    table = LabelTable("odd", ("background", *names))
    with figure_style.styled():
        canvas, axes = figure_style.tiles(1, 1, ("mask",))
        figure_style.show_labels(axes[0][0], np.arange(len(table.names), dtype=np.uint8)[None], table)
        figure_style.legend(canvas, table, [np.arange(len(table.names), dtype=np.uint8)])
        figure_style.save(canvas, io.BytesIO())
        metrics = {"All": [{"dice_mask_gen": {"value": 0.5, "ci95": None}}] * 2}
        drawn = comparison_figures.metrics_of_runs([r"$\frac{x$", "$_$"], metrics, ["dice_mask_gen"])
        assert drawn is not None
        figure_style.save(drawn[0], io.BytesIO())


def test_the_page_shows_text_and_runs_nothing():
    page = Page(render("run", summary(), [], None))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert page.row(r"$\frac{x$")[1] != ""
    assert max(len(row[0]) for row in page.rows) < 100
    # Names that differ only in how they are shown have a row each.
    assert len([row for row in page.rows if row[0] in ("a b", "a/b")]) >= 4


def test_messages_are_one_line():
    messages = segmenter_messages(summary())
    assert len(messages) > 0
    assert [message for message in messages if not message.isprintable()] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_shown_name_is_short_and_printable(name):
    assert 1 <= len(shown_name(name)) <= 40
    assert shown_name(name).isprintable()


def test_contact_sheets_write_them():
    from PIL import Image, ImageDraw

    for name in NAMES:
        picture = Image.new("RGB", (200, 40))
        draw_text(ImageDraw.Draw(picture), (0, 0), shown_name(name), (255, 255, 255), 11)
        assert picture.getbbox() is not None, f"nothing is drawn of {name!r}"


def test_mlflow_takes_the_metrics_names_and_none_becomes_another():
    names = [f"{group}organ/{name}/dice_mask_gen" for group in ("", "CT/") for name in (*NAMES, "a_b", "$_$", "%_%")]
    keys = [metric_key(name) for name in names]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert validate_param_and_metric_name(key)
        assert "\n" not in key
        assert not path_not_unique(key)
        assert len(key) <= 250
        assert key.endswith("/dice_mask_gen")
        assert metric_key(key) == key


@pytest.mark.parametrize("name", ["psnr_db", "CT/organ/liver/dice_mask_gen", "system/cpu_percent", "train/loss"])
def test_plain_names_stay(name):
    assert metric_key(name) == name
