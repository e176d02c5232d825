"""Noise level and autocorrelation inside organs, held to what is known of white and of smoothed noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_support import evaluate_here

from data_shards.labels import AMOS
from segdiff_dist.evaluation.measure.result_files import read_rows, read_summary
from segdiff_dist.evaluation.metrics import overlaps
from segdiff_dist.evaluation.metrics.organ_texture import (
    FEWEST_PIXELS_CORRELATED,
    NOISE_METRICS,
    autocorrelation,
    measure,
    noise_std,
)
from segdiff_dist.spectra import texture_std

LIVER, SPLEEN = AMOS.names.index("liver"), AMOS.names.index("spleen")
SHAPE = (4, 96, 96)


def noise(seed: int, std: float = 1.0) -> Any:
    return np.random.default_rng(seed).normal(0.0, std, SHAPE)


def smoothed(values_BHW: Any) -> Any:
    """By (1 2 1) / 4 along rows and columns: its autocorrelation is 4/6 at one pixel and 1/6 at two, along each."""
    for axis in (1, 2):
        values_BHW = (np.roll(values_BHW, 1, axis) + 2 * values_BHW + np.roll(values_BHW, -1, axis)) / 4
    return values_BHW


def two_organs() -> Any:
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, 4:92, 4:44], mask[:, 4:92, 48:92] = LIVER, SPLEEN
    return mask


def test_white_noise_has_its_own_level_and_no_autocorrelation() -> None:
    mask = two_organs()
    image = 100 + np.where(mask == LIVER, noise(0, 12.0), noise(1, 5.0))
    level = noise_std(texture_std(mask, image, AMOS.num_classes))
    assert level[:, LIVER] == pytest.approx(12.0, rel=0.05)
    assert level[:, SPLEEN] == pytest.approx(5.0, rel=0.05)
    assert autocorrelation(mask, image, AMOS.num_classes)[:, :, [LIVER, SPLEEN]] == pytest.approx(0.0, abs=0.05)


def test_smoothed_noise_has_the_autocorrelation_of_its_filter() -> None:
    mask = two_organs()
    found = autocorrelation(mask, 100 + 20 * smoothed(noise(0)), AMOS.num_classes)
    assert found[0][:, [LIVER, SPLEEN]] == pytest.approx(4 / 6, abs=0.05)
    assert found[1][:, [LIVER, SPLEEN]] == pytest.approx(1 / 6, abs=0.08)


def test_shading_and_what_is_beyond_the_outline_do_not_count() -> None:
    mask = two_organs()
    rows, columns = np.mgrid[:96, :96]
    plain = np.where(mask > 0, noise(0, 10.0), 0)
    shaded = plain + np.where(mask == LIVER, 1.5 * rows - 0.7 * columns, 40 + columns) + np.where(mask > 0, 0, 900)
    found, expected = (autocorrelation(mask, image, AMOS.num_classes) for image in (shaded, plain))
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_few_pixels_and_flat_organs_have_none() -> None:
    mask = np.zeros((1, 40, 40), np.uint8)
    mask[0, :7, :7], mask[0, 20:, 20:] = LIVER, SPLEEN
    image = np.random.default_rng(0).normal(100, 9, mask.shape)
    image[mask == SPLEEN] = 80
    assert (mask == LIVER).sum() > FEWEST_PIXELS_CORRELATED
    assert np.isnan(autocorrelation(mask, image, AMOS.num_classes)).all()
    assert np.isnan(autocorrelation(np.zeros_like(mask), image, AMOS.num_classes)).all()
    columns = measure(image.astype(np.uint8), image.astype(np.uint8), mask, AMOS)
    assert np.isnan(columns["autocorrelation_1_real"]).all()


def test_sensitivity_and_precision_of_known_label_maps() -> None:
    reference, predicted = np.array([[[1, 1, 2, 0]]], np.uint8), np.array([[[1, 0, 3, 1]]], np.uint8)
    counts = overlaps.confusion(reference, predicted, 5)
    np.testing.assert_allclose(overlaps.sensitivity(counts)[0], [0, 1 / 2, 0, np.nan, np.nan])
    np.testing.assert_allclose(overlaps.precision(counts)[0], [0, 1 / 2, np.nan, 0, np.nan])


def test_an_evaluation_has_them_by_image_and_by_organ(shapes: Any, tmp_path: Any) -> None:
    run = evaluate_here(tmp_path / "noisy", shapes, noise=20.0)
    summary = read_summary(run)
    entries = summary["metrics"]
    # The organs of the shapes have too few pixels for an autocorrelation.
    assert set(NOISE_METRICS) <= set(entries)
    # White noise was added to the real images.
    assert entries["noise_std_gen"]["value"] > entries["noise_std_real"]["value"]
    low, high = entries["noise_std_gen"]["ci95"]
    assert low <= entries["noise_std_gen"]["value"] <= high
    columns = ("texture_gen", "headline", "sensitivity_mask_gen", "precision_mask_real")
    rows = {name: np.array(values) for name, values in read_rows(run, columns).to_pydict().items()}
    assert entries["noise_std_gen"]["value"] == pytest.approx(
        noise_std(np.nanmean(rows["texture_gen"][rows["headline"]]))
    )
    organs = [e for e in summary["by_modality_organ"]["MR"].values() if "grey_std_gen" in e]
    assert organs
    assert not any("hu_std_gen" in e for e in organs)
    assert all({"sensitivity_mask_real", "sensitivity_mask_gen"} <= set(e) for e in organs)
