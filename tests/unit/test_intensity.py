"""Grey values and back."""

from __future__ import annotations

import numpy as np
import pytest

from data_shards.intensity import ct_grey_map, mr_grey_map, restore
from data_shards.volumes import Volume


def _volume(voxels: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> Volume:
    return Volume(voxels, slope, intercept, np.eye(4), "")


@pytest.mark.parametrize("window", [(-256.0, 256.0), (-160.0, 240.0), (-1000.0, 1000.0)])
def test_hu_is_restored_within_half_a_grey_level(window: tuple[float, float]) -> None:
    grey = ct_grey_map(window)
    hu = np.linspace(window[0], window[1], 5001, dtype=np.float32)
    stored = grey.to_uint8(hu - np.float32(grey.offset))
    assert stored.dtype == np.uint8
    assert (stored[0], stored[-1]) == (0, 255)
    assert np.abs(restore(stored, grey.scale, grey.offset) - hu).max() <= grey.scale / 2 * 1.001


def test_values_outside_the_window_are_clipped() -> None:
    grey = ct_grey_map((-256.0, 256.0))
    hu = np.array([-1024.0, 3071.0], dtype=np.float32)
    np.testing.assert_array_equal(grey.to_uint8(hu - np.float32(grey.offset)), [0, 255])


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.25, 7.0), (-2.0, 100.0)])
def test_mr_goes_from_its_first_to_its_99th_percentile(slope: float, intercept: float) -> None:
    voxels = np.random.default_rng(0).integers(0, 5000, (30, 20, 10)).astype(np.int16)
    values = voxels * slope + intercept
    low, high = np.percentile(values, (1, 99))
    grey = mr_grey_map(_volume(voxels, slope, intercept), (1.0, 99.0))
    assert grey.offset == pytest.approx(low)
    assert grey.offset + 255 * grey.scale == pytest.approx(high)


def test_mr_grey_values_do_not_depend_on_the_scanner_s_scale() -> None:
    voxels = np.random.default_rng(0).integers(0, 1000, (30, 20, 10)).astype(np.int16)
    stored = []
    for factor in (1, 17):
        volume = _volume(voxels * np.int16(factor))
        grey = mr_grey_map(volume, (1.0, 99.0))
        stored.append(grey.to_uint8(volume.values(volume.voxels_IJK) - np.float32(grey.offset)))
    np.testing.assert_array_equal(stored[0], stored[1])


def test_an_mr_that_is_all_but_empty_is_refused() -> None:
    voxels = np.zeros((50, 50, 10), np.int16)
    voxels[0, 0, 0] = 9
    with pytest.raises(ValueError, match="both 0"):
        mr_grey_map(_volume(voxels), (1.0, 99.0))
