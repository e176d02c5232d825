"""In whatever order a volume is stored, its slices are the same bytes, and a pixel shows the voxel at its position.

Volumes go through real NIfTI files. Entries of the affines are whole 64ths, which float32 headers hold exactly.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_shards.ingest.body import find_body
from data_shards.ingest.intensity import GreyMap, grey_map, restore
from data_shards.ingest.slices import Cutting, Slice, cut
from data_shards.ingest.volumes import Volume, read_labels, read_volume
from data_shards.records import AXES

CODES = [
    "".join(("RL", "AP", "SI")[d][flip[d]] for d in order)
    for order in itertools.permutations(range(3))
    for flip in itertools.product((0, 1), repeat=3)
]
SPACING_MM = np.array((1.25, 0.75, 2.5))
SHAPE = (24, 36, 12)
BODY_ID = 60


def _affine(tilt: str) -> np.ndarray:
    """Straight, or turned by 20 to 30 degrees about each axis."""
    turn = np.eye(3)
    for (a, b), degrees in zip(((0, 1), (1, 2), (0, 2)), (25, -20, 30), strict=True):
        one = np.eye(3)
        one[[a, b], [a, b]] = np.cos(np.deg2rad(degrees))
        one[a, b], one[b, a] = -np.sin(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn = turn @ one if tilt == "oblique" else turn
    affine = np.eye(4)
    affine[:3, :3] = np.round(64 * turn * SPACING_MM) / 64
    affine[:3, 3] = (-12.5, 40.0, 7.75)
    return affine


def _store(folder: Path, voxels: np.ndarray, affine: np.ndarray, code: str) -> Path:
    """Voxels in RAS order as a file in which they are in the order `code`."""
    image = nib.Nifti1Image(voxels, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(code))
    stored = image.as_reoriented(turn)
    assert "".join(nib.aff2axcodes(stored.affine)) == code
    nib.save(stored, folder / "volume.nii.gz")
    return folder / "volume.nii.gz"


def _cut(volume: Volume, labels: Volume, axis: str, grey: GreyMap, **changes: Any) -> list[Slice]:
    options = {"size": 20, "spacing_mm": 1.0, "slice_stride": 4, "fit": "auto", "body_id": BODY_ID} | changes
    return list(cut(volume, labels, find_body(volume, "MR"), grey, Cutting(axis=axis, **options)))


def _bytes_of_all_slices(folder: Path, tilt: str, code: str) -> list[bytes]:
    """Image, mask, edge and affine of slices along each axis, with nearest and with soft masks."""
    rng = np.random.default_rng(0)
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    image = np.where(i**2 + j**2 < 0.8, 300 + 100 * i + 40 * k, 0) + rng.integers(0, 20, SHAPE)
    blocks = rng.integers(0, 5, (6, 9, 4)).repeat(4, 0).repeat(4, 1).repeat(3, 2)
    affine = _affine(tilt)
    volume = read_volume(_store(folder, image.astype(np.int16), affine, code))
    labels = read_labels(_store(folder, blocks.astype(np.uint8), affine, code), 5)
    grey = grey_map(volume, "MR", intensity="window", hu_window=(0, 1), mr_percentiles=(1, 99), bits=8)
    found: list[bytes] = []
    for axis, (resize, soft_edge) in itertools.product(AXES, (("nearest", False), ("soft", True))):
        for one in _cut(volume, labels, axis, grey, mask_resize=resize, soft_edge=soft_edge):
            found += [one.image_HW.tobytes(), one.mask_HW.tobytes(), np.array(one.affine).tobytes()]
            found += [] if one.edge_2HW is None else [one.edge_2HW.tobytes()]
    return found


@pytest.fixture(scope="module")
def upright(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The slices of the volume stored as RAS."""
    return functools.cache(lambda tilt: _bytes_of_all_slices(tmp_path_factory.mktemp("ras"), tilt, "RAS"))


@pytest.mark.parametrize("tilt", ["straight", "oblique"])
@pytest.mark.parametrize("code", CODES)
def test_every_stored_order_gives_the_same_slices(tmp_path: Path, upright: Any, code: str, tilt: str) -> None:
    assert len(upright(tilt)) > 80
    assert _bytes_of_all_slices(tmp_path, tilt, code) == upright(tilt)


def _inside(index_HW3: np.ndarray, margin: float) -> np.ndarray:
    """Pixels that are so many voxels inside the volume along each dimension, bool [H, W]."""
    return ((index_HW3 > margin) & (index_HW3 < np.array(SHAPE) - 1 - margin)).all(axis=-1)


@pytest.mark.parametrize("tilt", ["straight", "oblique"])
@pytest.mark.parametrize(("code", "fit", "size"), [("RAS", "pad", 20), ("SPL", "crop", 20), ("ILA", "pad", 44)])
@pytest.mark.parametrize("axis", AXES)
def test_pixels_hold_the_place_that_their_slice_says(
    tmp_path: Path, axis: str, code: str, fit: str, size: int, tilt: str
) -> None:
    """Voxels hold their own place: one world coordinate in mm in the image, and in the mask which
    layer of four voxels."""
    affine = _affine(tilt)
    index_IJK3 = np.stack(np.indices(SHAPE), axis=-1)
    world_IJK3 = index_IJK3 @ affine[:3, :3].T + affine[:3, 3]
    row, column = np.indices((size, size))
    checked = 0
    for d in range(3):
        volume = read_volume(_store(tmp_path, world_IJK3[..., d].astype(np.float32), affine, code))
        labels = read_labels(_store(tmp_path, (index_IJK3[..., d] // 4 + 1).astype(np.uint8), affine, code), BODY_ID)
        grey = GreyMap.between(world_IJK3[..., d].min(), world_IJK3[..., d].max(), 16)
        options = {"size": size, "fit": fit}
        for one, soft in zip(
            _cut(volume, labels, axis, grey, **options),
            _cut(volume, labels, axis, grey, mask_resize="soft", **options),
            strict=True,
        ):
            places = np.stack((row, column, 0 * row, 1 + 0 * row), axis=-1) @ np.array(one.affine).reshape(4, 4).T
            index_HW3 = (places @ np.linalg.inv(affine).T)[..., :3]
            inside = _inside(index_HW3, 2.5)
            checked += np.count_nonzero(inside)
            # A mean over one and a third voxels is off its middle by up to a tenth of one.
            shown = restore(one.image_HW, grey.scale, grey.offset)
            np.testing.assert_allclose(shown[inside], places[inside][:, d], atol=0.2)
            # Nearest rounds to the 1 mm grid before it takes a voxel; soft does not round before it compares.
            for mask_HW, rounding in ((one.mask_HW, 0.5 / SPACING_MM[d] + 1e-3), (soft.mask_HW, 0.2)):
                from_middle = np.abs(4.0 * (mask_HW - 1.0) + 1.5 - index_HW3[..., d])
                assert (from_middle[inside] <= 2 + rounding).all()
            outside = ~_inside(index_HW3, -2.5)
            assert not one.image_HW[outside].any()
            assert not one.mask_HW[outside].any()
            assert not soft.mask_HW[outside].any()
    assert checked > 500
