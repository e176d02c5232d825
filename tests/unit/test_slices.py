"""Slices of volumes whose every voxel says where it lies, shown the radiological way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_shards.body import BodyField
from data_shards.intensity import GreyMap
from data_shards.slices import Slice, cut
from data_shards.volumes import Volume, linear_weights, num_resampled

# World direction in which rows and columns run, as (dimension, sign): R, A, S are positive.
SHOWN = {
    "axial": ((1, -1), (0, -1)),
    "coronal": ((2, -1), (0, -1)),
    "sagittal": ((2, -1), (1, -1)),
}
THROUGH = {"axial": 2, "coronal": 1, "sagittal": 0}


def _volume(voxels: np.ndarray, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = (-12.0, 5.0, 30.0)
    return Volume(voxels, 1.0, 0.0, affine, "")


def _nobody(volume: Volume) -> BodyField:
    return BodyField(np.zeros(volume.voxels_IJK.shape, np.float32), np.ones(3))


def _cut(volume: Volume, labels: np.ndarray | None = None, body: BodyField | None = None, **changes) -> list[Slice]:
    options: dict[str, Any] = {
        "axis": "axial",
        "size": 16,
        "spacing_mm": 1.0,
        "slice_stride": 1,
        "fit": "auto",
        "body_id": 16,
    }
    drawn = None if labels is None else Volume(labels, 1.0, 0.0, volume.affine, "")
    grey = changes.pop("grey", GreyMap(1.0, 0.0))
    return list(cut(volume, drawn, body or _nobody(volume), grey, **(options | changes)))


def _world(one: Slice, row: float, column: float) -> np.ndarray:
    return (np.array(one.affine).reshape(4, 4) @ [row, column, 0, 1])[:3]


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_each_pixel_holds_the_voxel_that_its_affine_points_to(axis: str, dimension: int) -> None:
    voxels = np.indices((16, 16, 16))[dimension].astype(np.int16) * 10
    volume = _volume(voxels)
    slices = _cut(volume, voxels // 10 % 13, axis=axis)
    assert [one.slice_index for one in slices] == list(range(16))
    to_voxel = np.linalg.inv(volume.affine)
    for one in slices[::5]:
        for row, column in ((0, 0), (3, 11), (15, 15)):
            i, j, k, _ = to_voxel @ [*_world(one, row, column), 1]
            stored = voxels[round(i), round(j), round(k)]
            assert one.image_HW[row, column] == stored
            assert one.mask_HW[row, column] == stored // 10 % 13
            assert (round(i), round(j), round(k))[THROUGH[axis]] == one.slice_index


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_slices_are_shown_the_radiological_way(axis: str) -> None:
    (one, *_) = _cut(_volume(np.zeros((16, 16, 16), np.int16)), axis=axis)
    for (dimension, sign), step in zip(SHOWN[axis], ((1, 0), (0, 1)), strict=True):
        moved = _world(one, *step) - _world(one, 0, 0)
        np.testing.assert_allclose(moved, sign * np.eye(3)[dimension], atol=1e-9)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 5.0), (0.7, 0.7, 2.0), (1.0, 1.6, 0.9)])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_slice_is_that_of_the_resampled_volume(axis: str, spacing: tuple[float, float, float]) -> None:
    """The whole 1 mm volume is built here, sliced, turned, cropped and resized by torch."""
    torch = pytest.importorskip("torch")
    voxels = np.random.default_rng(0).integers(0, 255, (20, 24, 9)).astype(np.int16)
    grid = voxels.astype(np.float32)
    for d in range(3):
        count = num_resampled(voxels.shape[d], 1 / spacing[d])
        weights = linear_weights(count, voxels.shape[d], step=1 / spacing[d]).toarray()
        grid = np.moveaxis(np.tensordot(weights, grid, (1, d)), 0, d)
    row_dimension, column_dimension = (d for d, _ in SHOWN[axis])
    planes = np.moveaxis(grid, (THROUGH[axis], row_dimension, column_dimension), (0, 1, 2))[:, ::-1, ::-1]
    side = min(planes.shape[1:])
    top, left = ((n - side) // 2 for n in planes.shape[1:])
    planes = planes[:, top : top + side, left : left + side]
    for one in _cut(_volume(voxels, spacing), axis=axis, size=7, fit="crop", slice_stride=4):
        plane = torch.from_numpy(planes[one.slice_index].copy())[None, None]
        expected = torch.nn.functional.interpolate(plane, (7, 7), mode="bilinear", antialias=True)[0, 0].numpy()
        assert np.abs(one.image_HW - expected).max() <= 0.51


def test_padding_shows_all_and_fills_with_the_lowest_grey() -> None:
    volume = _volume(np.full((16, 8, 4), 90, np.int16))
    (one, *_) = _cut(volume, np.full((16, 8, 4), 6, np.uint8), fit="pad", grey=GreyMap(1.0, -10.0))
    np.testing.assert_array_equal(one.image_HW[4:12], 100)
    np.testing.assert_array_equal(one.image_HW[[0, 1, 2, 3, 12, 13, 14, 15]], 0)
    np.testing.assert_array_equal(one.mask_HW > 0, one.image_HW > 0)


def test_cropping_keeps_the_middle_of_the_long_side() -> None:
    voxels = np.broadcast_to(np.arange(32, dtype=np.int16)[:, None, None], (32, 16, 4))
    (one, *_) = _cut(_volume(voxels), fit="crop")
    np.testing.assert_array_equal(one.image_HW[0], np.arange(23, 7, -1))


@pytest.mark.parametrize(("axis", "expected"), [("axial", "crop"), ("coronal", "pad"), ("sagittal", "pad")])
def test_auto_crops_axial_slices_only(axis: str, expected: str) -> None:
    volume = _volume(np.random.default_rng(0).integers(0, 255, (16, 12, 20)).astype(np.int16))
    automatic, chosen = _cut(volume, axis=axis), _cut(volume, axis=axis, fit=expected)
    np.testing.assert_array_equal([s.image_HW for s in automatic], [s.image_HW for s in chosen])


def test_stride_takes_every_nth_slice_from_the_middle_of_its_stretch() -> None:
    volume = _volume(np.arange(16 * 16 * 11, dtype=np.int16).reshape(16, 16, 11) % 255)
    every, some = _cut(volume), _cut(volume, slice_stride=4)
    assert [one.slice_index for one in some] == [2, 6, 10]
    for one in some:
        np.testing.assert_array_equal(one.image_HW, every[one.slice_index].image_HW)


def test_shrunk_labels_are_stored_ids_and_nothing_between() -> None:
    labels = np.random.default_rng(0).choice([0, 3, 15], (40, 40, 6)).astype(np.uint8)
    for one in _cut(_volume(labels.astype(np.int16)), labels, size=13):
        assert set(np.unique(one.mask_HW)) <= {0, 3, 15}


def test_pixel_spacing_follows_the_resize() -> None:
    (one, *_) = _cut(_volume(np.zeros((41, 41, 3), np.int16), (2.0, 2.0, 5.0)), size=27)
    assert one.spacing_mm == pytest.approx((3.0, 3.0))


def test_body_fills_what_carries_no_label() -> None:
    volume = _volume(np.zeros((16, 16, 4), np.int16))
    inside = np.zeros((16, 16, 4), np.float32)
    inside[4:12, 4:12] = 1
    labels = np.zeros((16, 16, 4), np.uint8)
    labels[2:6, 2:6] = 6
    (one, *_) = _cut(volume, labels, BodyField(inside, np.ones(3)))
    assert np.count_nonzero(one.mask_HW == 6) == 16
    assert np.count_nonzero(one.mask_HW == 16) == 64 - 4
