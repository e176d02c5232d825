"""Padding that is not air is taken as air; CT that is no HU, and MR that looks like HU, are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_shards.ingest.body import find_body
from data_shards.ingest.grey_values import (
    Padding,
    problem_with_values,
    take_padding_as_air,
    take_window_end_as_air,
)
from data_shards.ingest.intensity import percentiles
from data_shards.ingest.volumes import Volume

SHAPE = (60, 50, 12)


def _values(modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Values with a scanner's noise, and where the body is."""
    rng = np.random.default_rng(0)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    body = (x / 0.7) ** 2 + (y / 0.6) ** 2 < 1
    organ = (x - 0.2) ** 2 + y**2 < 0.06
    if modality == "CT":
        values = np.where(organ, 60.0, np.where(body, -95.0, -1000.0)) + rng.normal(0, 12, SHAPE)
    else:
        values = np.abs(np.where(organ, 600.0, np.where(body, 300.0, 30.0)) + rng.normal(0, 6, SHAPE))
    return values.round(), body


def _volume(values: np.ndarray, dtype: Any = np.int16, slope: float = 1.0, intercept: float = 0.0) -> Volume:
    stored = (values - intercept) / slope
    stored = stored.round() if np.dtype(dtype).kind in "iu" else stored
    return Volume(np.asfortranarray(stored.astype(dtype)), slope, intercept, np.diag([4.0, 4.0, 5.0, 1.0]), "")


def _frame(kind: str) -> np.ndarray:
    """Where nothing was measured: beyond a round field, beside the image, or in whole planes."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    return {"round": x**2 + y**2 > 0.9, "side": x < -0.72, "planes": z > 0.75}[kind]


@pytest.mark.parametrize("kind", ["round", "side", "planes"])
@pytest.mark.parametrize(
    ("modality", "padding"),
    [("CT", -2000), ("CT", -3024), ("CT", 0), ("CT", 1000), ("MR", -2000), ("MR", 2000), ("MR", 450), ("MR", 0)],
)
@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [(np.int16, 1.0, 0.0), (np.float32, 1.0, 0.0), (np.int32, -0.5, 8.0), (np.int16, 2.0, -1024.0)],
)
def test_padding_is_taken_as_air(
    modality: str, padding: float, kind: str, dtype: Any, slope: float, intercept: float
) -> None:
    values, _ = _values(modality)
    if slope != 1.0:
        values = np.round((values - intercept) / slope) * slope + intercept
    padded = _frame(kind)
    volume = _volume(np.where(padded, padding, values), dtype, slope, intercept)
    before = volume.values(volume.voxels_IJK).copy()
    found = take_padding_as_air(volume, modality)
    assert f"padding of {padding}" in found.notes[0]
    assert found.num_voxels == pytest.approx(np.count_nonzero(padded), rel=0.02)
    after = volume.values(volume.voxels_IJK)
    np.testing.assert_array_equal(after[~padded & (before != padding)], before[~padded & (before != padding)])
    assert (after[padded] == after.min()).all()
    assert after.min() == values[~padded].min()
    # Percentiles are those of what was measured.
    measured = percentiles(volume, (1.0, 99.0), (-np.inf, np.inf), found.num_voxels)
    np.testing.assert_allclose(measured, np.percentile(values[~padded], (1, 99)), atol=2 * abs(slope))
    assert problem_with_values(volume, modality, found.num_voxels, stated=False) is None


@pytest.mark.parametrize("kind", ["round", "side", "planes"])
@pytest.mark.parametrize(
    ("modality", "padding"), [("CT", 0), ("CT", -2000), ("MR", 0), ("MR", 2000), ("MR", 450), ("MR", -2000)]
)
def test_padding_does_not_move_the_body(modality: str, padding: float, kind: str) -> None:
    values, body = _values(modality)
    padded = _frame(kind)
    volume = _volume(np.where(padded, padding, values))
    found = take_padding_as_air(volume, modality)
    inside = find_body(volume, modality, is_padded=found.num_voxels > 0).inside_IJK >= 0.5
    alone = find_body(_volume(values), modality).inside_IJK >= 0.5
    steps = np.array(alone.shape) / np.array(SHAPE)
    assert (steps > 0.9).all()  # the body's grid is about that of the voxels
    measured = ~padded[tuple(slice(0, n) for n in alone.shape)]
    assert np.count_nonzero((inside != alone) & measured) < 0.02 * np.count_nonzero(alone & measured)
    if kind != "planes":
        assert inside.mean() < 1.1 * body.mean()


def test_two_paddings_one_in_the_other() -> None:
    values, _ = _values("CT")
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    outer, inner = (np.abs(x) > 0.9) | (np.abs(y) > 0.9), x**2 + y**2 > 0.75
    volume = _volume(np.where(outer, -3024, np.where(inner, -2000, values)))
    found = take_padding_as_air(volume, "CT")
    assert len(found.notes) == 2
    assert found.num_voxels == np.count_nonzero(outer | inner)
    assert volume.voxels_IJK.min() == values[~(outer | inner)].min()


@pytest.mark.parametrize("clip", [(-1000, 3000), (-1024, 3000), (-160, 240), (-75, 175), None])
def test_clipped_air_is_no_padding_and_such_ct_is_read(clip: tuple[int, int] | None) -> None:
    values, _ = _values("CT")
    volume = _volume(values if clip is None else np.clip(values, *clip))
    before = volume.voxels_IJK.copy()
    assert take_padding_as_air(volume, "CT") == Padding(0, ())
    np.testing.assert_array_equal(volume.voxels_IJK, before)
    assert problem_with_values(volume, "CT", 0, stated=False) is None


@pytest.mark.parametrize(("dtype", "slope", "intercept"), [(np.int16, 1, 0), (np.float32, 1, 0), (np.int16, -0.5, 8)])
def test_the_air_of_a_ct_that_was_cut_to_a_window_is_as_black_as_others(
    dtype: Any, slope: float, intercept: float
) -> None:
    values, _ = _values("CT")
    volume = _volume(np.clip(values, -160, 240), dtype, slope, intercept)
    note = take_window_end_as_air(volume, "CT")
    assert note is not None
    assert "-160 HU" in note
    found = volume.values(volume.voxels_IJK)
    np.testing.assert_allclose(found[values <= -160], -1000)
    np.testing.assert_allclose(found[values > -160], np.clip(values, -160, 240)[values > -160], atol=0.5)
    assert take_window_end_as_air(volume, "CT") is None  # there is nothing left to do
    eight_bits = _volume(np.clip(values, -160, 240), np.uint8, 400 / 255, -160)
    for other, modality in (
        (_volume(values), "CT"),
        (_volume(np.clip(values, -1000, 240)), "CT"),
        (_volume(np.clip(values, -75, 175)), "CT"),  # fat is there too
        (eight_bits, "CT"),  # which can hold no lower number
        (_volume(np.clip(values, -160, 240)), "MR"),
    ):
        before = other.voxels_IJK.copy()
        assert take_window_end_as_air(other, modality) is None
        np.testing.assert_array_equal(other.voxels_IJK, before)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_air_that_a_scanner_cuts_off_at_zero_is_no_padding(dtype: Any, factor: float) -> None:
    values, body = _values("MR")
    air = np.random.default_rng(1).normal(-1, 2.2, SHAPE).clip(0).round()
    if dtype == np.uint8:
        values, factor = (values / 4).round(), 1.0
    assert take_padding_as_air(_volume(factor * np.where(body, values, air), dtype), "MR") == Padding(0, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hu: (hu + 1024).clip(0), "no voxel of this CT is below 0"),
        (lambda hu: hu + 1024, "below 0"),
        (lambda hu: np.where(_frame("round"), -2000, (hu + 1024).clip(0)), "below 0"),
        (lambda hu: np.where(_frame("round"), 0, (hu + 1024).clip(0)), "below 0"),
        (lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255).round(), "below 0"),
        (lambda hu: hu / 1000, "span"),
        (lambda hu: hu - 1024, "no tissue"),
    ],
    ids=["offset lost", "not clipped", "padded", "padded with 0", "grey values", "scaled", "offset twice"],
)
def test_ct_that_is_no_hu_is_refused(change: Any, message: str) -> None:
    values = change(_values("CT")[0])
    volume = _volume(values, np.float32 if abs(values).max() < 10 else np.int16)
    padding = take_padding_as_air(volume, "CT")
    assert message in (problem_with_values(volume, "CT", padding.num_voxels, stated=False) or "")


def test_mr_that_looks_like_hu_is_refused_unless_it_is_stated() -> None:
    volume = _volume(_values("CT")[0])
    assert "--prepare.modality" in (problem_with_values(volume, "MR", 0, stated=False) or "")
    assert problem_with_values(volume, "MR", 0, stated=True) is None
    signed = _volume(_values("MR")[0] - 20)
    assert problem_with_values(signed, "MR", 0, stated=False) is None


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (1, 8, 8)])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_tiny_and_constant_volumes_are_looked_at_without_harm(shape: tuple[int, ...], modality: str) -> None:
    for voxels in (np.full(shape, 7, np.int16), np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)):
        volume = Volume(voxels, 1.0, 0.0, np.eye(4), "")
        padding = take_padding_as_air(volume, modality)
        problem_with_values(volume, modality, padding.num_voxels, stated=False)
