"""Grey values and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.ingest.intensity import GreyMap, grey_map, restore
from data_shards.ingest.volumes import Volume

SMALL = (30, 20, 10)


def _volume(voxels: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> Volume:
    return Volume(voxels, slope, intercept, np.eye(4), "")


def _grey(volume: Volume, modality: str, **changes: Any) -> GreyMap:
    options: dict[str, Any] = {
        "intensity": "window",
        "hu_window": (-256.0, 256.0),
        "mr_percentiles": (1.0, 99.0),
        "bits": 8,
    }
    return grey_map(volume, modality, **(options | changes))


def _stored(grey: GreyMap, values: np.ndarray) -> np.ndarray:
    return grey.to_grey(values.astype(np.float32) - np.float32(grey.offset))


def _top(grey: GreyMap) -> float:
    return grey.offset + (2**grey.bits - 1) * grey.scale


@given(low=st.integers(-3000, 3000), width=st.integers(100, 6000), bits=st.sampled_from([8, 16]))
def test_hu_is_restored_within_half_a_grey_level(low: int, width: int, bits: int) -> None:
    grey = _grey(_volume(np.zeros((2, 2, 2), np.int16)), "CT", hu_window=(low, low + width), bits=bits)
    hu = np.linspace(low, low + width, 5001, dtype=np.float32)
    stored = _stored(grey, hu)
    assert stored.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert (stored[0], stored[-1]) == (0, 2**bits - 1)
    # float32 itself holds numbers of this size to a thousandth of an HU.
    half = grey.scale / 2 + 4 * np.spacing(np.float32(max(abs(low), abs(low + width))))
    assert np.abs(restore(stored, grey.scale, grey.offset) - hu).max() <= half


def test_values_outside_the_window_are_clipped() -> None:
    for bits in (8, 16):
        grey = _grey(_volume(np.zeros((2, 2, 2), np.int16)), "CT", bits=bits)
        np.testing.assert_array_equal(_stored(grey, np.array([-1024.0, 3071.0])), [0, 2**bits - 1])


@pytest.mark.parametrize("dtype", [np.int16, ">i2", np.uint8, np.int32, np.float32])
@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.25, 7.0), (-2.0, 100.0)])
@pytest.mark.parametrize("chosen", [(1.0, 99.0), (0.0, 100.0), (2.5, 70.3)])
def test_mr_goes_from_percentile_to_percentile(
    dtype: Any, slope: float, intercept: float, chosen: tuple[float, float]
) -> None:
    voxels = np.random.default_rng(0).integers(0, 250, SMALL).astype(dtype)[::-1].transpose(2, 0, 1)
    low, high = np.percentile(voxels.astype(np.float64) * slope + intercept, chosen)
    for bits in (8, 16):
        grey = _grey(_volume(voxels, slope, intercept), "MR", mr_percentiles=chosen, bits=bits)
        assert grey.offset == pytest.approx(low)
        assert _top(grey) == pytest.approx(high)


def test_percentiles_of_wide_sixteen_bit_numbers_are_exact() -> None:
    voxels = np.random.default_rng(0).integers(-32768, 32768, (41, 37, 11)).astype(np.int16)
    grey = _grey(_volume(voxels), "MR")
    np.testing.assert_allclose((grey.offset, _top(grey)), np.percentile(voxels, (1, 99)), rtol=1e-12)


def test_mr_grey_values_do_not_depend_on_the_scanner_s_scale() -> None:
    voxels = np.random.default_rng(0).integers(0, 1000, SMALL).astype(np.int16)
    stored = []
    for factor in (1, 17):
        volume = _volume(voxels * np.int16(factor))
        stored.append(_stored(_grey(volume, "MR"), volume.values(volume.voxels_IJK)))
    np.testing.assert_array_equal(stored[0], stored[1])


def test_an_mr_that_is_all_but_empty_is_refused() -> None:
    voxels = np.zeros((50, 50, 10), np.int16)
    voxels[0, 0, 0] = 9
    with pytest.raises(ValueError, match="both 0"):
        _grey(_volume(voxels), "MR")


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.0), (-1.0, 1024.0)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_paper_takes_the_percentiles_of_the_clipped_ct(dtype: Any, slope: float, intercept: float) -> None:
    voxels = np.random.default_rng(0).normal(1024, 150, SMALL).astype(dtype)
    volume = _volume(voxels, slope, intercept)
    low, high = np.percentile(np.clip(voxels.astype(np.float64) * slope + intercept, -256, 200), (1, 99))
    grey = _grey(volume, "CT", intensity="paper", hu_window=(-256.0, 200.0))
    assert (grey.offset, _top(grey)) == (pytest.approx(low), pytest.approx(high))
    assert high == 200
    assert low > -500
    hu = np.linspace(low, high, 999)
    assert np.abs(restore(_stored(grey, hu), grey.scale, grey.offset) - hu).max() <= grey.scale * 0.501


def test_paper_and_window_agree_on_mr() -> None:
    volume = _volume(np.random.default_rng(0).integers(0, 1000, SMALL).astype(np.int16))
    assert _grey(volume, "MR", intensity="paper") == _grey(volume, "MR")


def test_a_ct_outside_the_window_shows_nothing_in_paper_mode() -> None:
    with pytest.raises(ValueError, match="both -256"):
        _grey(_volume(np.full(SMALL, -1024, np.int16)), "CT", intensity="paper")
