"""Slices of volumes whose every voxel says where it is, shown the radiological way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_shards.ingest.body import BodyField
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.slices import Cutting, Slice, cut
from data_shards.ingest.volumes import Volume, linear_weights, num_resampled

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
    return list(cut(volume, drawn, body or _nobody(volume), grey, Cutting(**(options | changes))))


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


def _block_means(picture: np.ndarray, size: int, axis: int) -> np.ndarray:
    """`picture` shrunk by area: every element repeated `size` times, then the mean of as many as there were."""
    many = np.moveaxis(picture, axis, 0).repeat(size, axis=0)
    return np.moveaxis(many.reshape(size, -1, *many.shape[1:]).mean(axis=1), 0, axis)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 5.0), (0.7, 0.7, 2.0), (1.0, 1.6, 0.9)])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_slice_is_that_of_the_resampled_volume(axis: str, spacing: tuple[float, float, float]) -> None:
    """The whole 1 mm volume is built here, sliced, turned, cropped and shrunk by area."""
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
        expected = _block_means(_block_means(planes[one.slice_index], 7, 0), 7, 1)
        assert np.abs(one.image_HW - expected).max() <= 0.51


def test_sixteen_bits_hold_what_eight_round() -> None:
    volume = _volume(np.random.default_rng(0).integers(-900, 900, (16, 16, 4)).astype(np.int16), (0.8, 1.3, 2.0))
    coarse, fine = (_cut(volume, size=11, grey=GreyMap.between(-1000, 1000, bits)) for bits in (8, 16))
    for eight, sixteen in zip(coarse, fine, strict=True):
        assert (eight.image_HW.dtype, sixteen.image_HW.dtype) == (np.uint8, np.uint16)
        assert np.abs(sixteen.image_HW / 257 - eight.image_HW).max() <= 0.51


def test_padding_shows_all_and_fills_with_the_lowest_grey() -> None:
    volume = _volume(np.full((16, 8, 4), 90, np.int16))
    (one, *_) = _cut(volume, np.full((16, 8, 4), 6, np.uint8), fit="pad", grey=GreyMap(1.0, -10.0))
    np.testing.assert_array_equal(one.image_HW[4:12], 100)
    np.testing.assert_array_equal(one.image_HW[[0, 1, 2, 3, 12, 13, 14, 15]], 0)
    np.testing.assert_array_equal(one.mask_HW > 0, one.image_HW > 0)
    (soft, *_) = _cut(volume, np.full((16, 8, 4), 6, np.uint8), fit="pad", mask_resize="soft", soft_edge=True)
    np.testing.assert_array_equal(soft.mask_HW, one.mask_HW)
    assert soft.edge_2HW is not None
    assert (soft.edge_2HW[0] == 0).all()
    assert (soft.edge_2HW[1] == 255).all()


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


def _blocks(seed: int = 0) -> np.ndarray:
    """Labels 0, 2, 5 and 9 in blocks of 3 x 3 x 2 voxels."""
    ids = np.random.default_rng(seed).choice([0, 2, 5, 9], (8, 9, 5)).astype(np.uint8)
    return ids.repeat(3, 0).repeat(3, 1).repeat(2, 2)


@pytest.mark.parametrize("size", [9, 40])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_soft_mask_is_the_largest_of_its_classes_shown_as_images(axis: str, size: int) -> None:
    """Each class's ones and zeros go through the image path here; the envelope's what no label covers is body."""
    labels, spacing = _blocks(), (0.8, 1.3, 2.5)
    inside = np.zeros(labels.shape, np.float32)
    inside[3:20, 4:24, 1:9] = 1
    options: dict[str, Any] = {"axis": axis, "size": size, "fit": "pad"}
    volume = _volume(labels.astype(np.int16), spacing)
    slices = _cut(volume, labels, BodyField(inside, np.ones(3)), mask_resize="soft", soft_edge=True, **options)

    def shown(ones: np.ndarray) -> list[np.ndarray]:
        grey = GreyMap.between(0, 1, 16)
        return [one.image_HW / 65535 for one in _cut(_volume(ones.astype(np.int16), spacing), grey=grey, **options)]

    organs = {label_id: shown(labels == label_id) for label_id in (2, 5, 9)}
    for i, (one, envelope) in enumerate(zip(slices, shown(inside), strict=True)):
        shares = {label_id: images[i] for label_id, images in organs.items()}
        labelled = sum(shares.values())
        shares[16] = np.maximum(envelope - labelled, 0)
        shares[0] = 1 - np.maximum(envelope, labelled)
        ids = np.array(sorted(shares))
        stack = np.stack([shares[label_id] for label_id in ids])
        ranked = np.sort(stack, axis=0)[::-1]
        order = np.argsort(-stack, axis=0, kind="stable")
        clear = ranked[0] - ranked[1] > 1e-3
        assert clear.mean() > 0.8
        np.testing.assert_array_equal(one.mask_HW[clear], ids[order[0]][clear])
        assert one.edge_2HW is not None
        np.testing.assert_allclose(one.edge_2HW[1] / 255, ranked[0], atol=0.51 / 255 + 1e-4)
        clear &= (ranked[1] - ranked[2] > 1e-3) & (ranked[0] < 0.99)
        np.testing.assert_array_equal(one.edge_2HW[0][clear], ids[order[1]][clear])


@pytest.mark.parametrize(
    ("stripes", "winner", "second", "share"),
    [((3, 5), 3, 5, 128), ((5, 3), 3, 5, 128), ((0, 4), 0, 4, 128), ((7, 1, 2), 1, 2, 85), ((6, 6, 2), 6, 2, 170)],
)
def test_equal_shares_go_to_the_lower_id(stripes: tuple[int, ...], winner: int, second: int, share: int) -> None:
    count = len(stripes)
    labels = np.broadcast_to(np.tile(np.array(stripes, np.uint8), 12)[:, None, None], (12 * count, 12 * count, 3))
    (one, *_) = _cut(_volume(labels.astype(np.int16)), labels, size=12, mask_resize="soft", soft_edge=True)
    assert one.edge_2HW is not None
    assert (one.mask_HW == winner).all()
    assert (one.edge_2HW[0] == second).all()
    assert (one.edge_2HW[1] == share).all()


def test_soft_masks_hold_stored_ids_and_body_alone() -> None:
    labels = np.random.default_rng(0).choice([0, 3, 15], (40, 40, 6)).astype(np.uint8)
    body = BodyField(np.ones(labels.shape, np.float32), np.ones(3))
    for one in _cut(_volume(labels.astype(np.int16)), labels, body, size=13, mask_resize="soft"):
        assert set(np.unique(one.mask_HW)) <= {3, 15, 16}
        assert one.edge_2HW is None


def test_without_labels_a_soft_mask_is_the_body() -> None:
    inside = np.zeros((16, 16, 4), np.float32)
    inside[4:12, 4:12] = 1
    options = {"mask_resize": "soft", "soft_edge": True}
    (one, *_) = _cut(_volume(np.zeros((16, 16, 4), np.int16)), None, BodyField(inside, np.ones(3)), **options)
    assert np.count_nonzero(one.mask_HW == 16) == 64
    assert np.count_nonzero(one.mask_HW) == 64


def test_body_that_the_labels_hold_and_body_from_the_envelope_are_one_class() -> None:
    labels = np.zeros((16, 16, 4), np.uint8)
    labels[:8] = 16
    inside = np.zeros(labels.shape, np.float32)
    inside[4:12] = 1
    options = {"mask_resize": "soft", "soft_edge": True, "size": 24}
    (one, *_) = _cut(_volume(labels.astype(np.int16)), labels, BodyField(inside, np.ones(3)), **options)
    # Shown from right to left: 4 of 16 columns are neither, 12 are body, however they came by it.
    np.testing.assert_array_equal(np.unique(one.mask_HW, axis=0), [[0] * 6 + [16] * 18])
    assert one.edge_2HW is not None
    assert (one.edge_2HW[1][:, 8:] == 255).all()


def test_interpolated_id_numbers_invent_classes_and_the_others_do_not() -> None:
    labels = np.full((16, 16, 4), 2, np.uint8)
    labels[8:] = 9
    found = {
        resize: set(np.unique(_cut(_volume(labels.astype(np.int16)), labels, size=80, mask_resize=resize)[0].mask_HW))
        for resize in ("nearest", "soft", "bilinear_ids")
    }
    assert found["nearest"] == found["soft"] == {2, 9}
    assert found["bilinear_ids"] > {2, 9}


@pytest.mark.parametrize("mask_resize", ["nearest", "soft", "bilinear_ids"])
@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("thin", [(40, 36, 1), (40, 36, 2), (1, 36, 30), (40, 2, 30), (1, 1, 1)], ids=str)
def test_a_volume_of_one_or_two_voxels_is_cut_along_every_axis(thin, axis: str, fit: str, mask_resize: str) -> None:
    volume = _volume(np.full(thin, 100, np.int16))
    found = _cut(
        volume, np.full(thin, 6, np.uint8), axis=axis, fit=fit, mask_resize=mask_resize, body_id=16, slice_stride=1
    )
    assert len(found) == thin[THROUGH[axis]]
    for one in found:
        assert one.image_HW.shape == one.mask_HW.shape == (16, 16)
        if mask_resize == "nearest":
            assert set(np.unique(one.mask_HW)) <= {0, 6}
            assert (one.mask_HW == 6).any()


def test_a_volume_between_the_pixels_is_shown_by_the_pixel_that_holds_it() -> None:
    (one,) = _cut(
        _volume(np.full((160, 1, 1), 100, np.int16)), np.full((160, 1, 1), 6, np.uint8), axis="coronal", fit="pad"
    )
    (row,) = np.flatnonzero((one.mask_HW == 6).any(axis=1))
    np.testing.assert_allclose(_world(one, row, 0)[2], 30.0, atol=one.spacing_mm[0] / 2 + 1e-6)
    assert one.image_HW[row].max() == one.image_HW.max() > 0
