"""Reading and resampling, against volumes whose voxels say where they are, and against MONAI."""

from __future__ import annotations

import gzip
import itertools
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_shards.volumes import (
    UnreadableVolume,
    linear_weights,
    nearest_elements,
    num_resampled,
    read_labels,
    read_volume,
)

CODES = [
    "".join(letters[d][flip[d]] for d in order)
    for letters in (("RL", "AP", "SI"),)
    for order in itertools.permutations(range(3))
    for flip in itertools.product((0, 1), repeat=3)
]
AFFINE = np.array([[2.0, 0, 0, -7], [0, 3.0, 0, 11], [0, 0, 4.0, 5], [0, 0, 0, 1]])


def _coded(shape: tuple[int, int, int] = (5, 6, 7)) -> np.ndarray:
    i, j, k = np.indices(shape)
    return (100 * i + 10 * j + k).astype(np.int16)


@pytest.mark.parametrize("code", CODES)
def test_every_stored_orientation_becomes_the_same_volume(tmp_path: Path, code: str) -> None:
    canonical = nib.Nifti1Image(_coded(), AFFINE)
    to_code = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code))
    stored = canonical.as_reoriented(to_code)
    assert "".join(nib.aff2axcodes(stored.affine)) == code
    nib.save(stored, tmp_path / "v.nii.gz")
    volume = read_volume(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(volume.voxels_IJK, _coded())
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(volume.spacing_mm, (2, 3, 4))


def test_an_oblique_volume_keeps_its_grid_named_after_the_nearest_axes(tmp_path: Path) -> None:
    angle = np.deg2rad(25)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-2.0, 3.0, 4.0])
    nib.save(nib.Nifti1Image(_coded(), affine), tmp_path / "v.nii")
    volume = read_volume(tmp_path / "v.nii")
    np.testing.assert_array_equal(volume.voxels_IJK, _coded()[::-1])
    # The same voxel lies at the same place in the patient.
    np.testing.assert_allclose(volume.affine @ [4, 1, 2, 1], affine @ [0, 1, 2, 1], atol=1e-5)


def test_stored_numbers_are_scaled_by_the_header(tmp_path: Path) -> None:
    image = nib.Nifti1Image(_coded(), AFFINE)
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, tmp_path / "v.nii.gz")
    volume = read_volume(tmp_path / "v.nii.gz")
    expected = nib.load(tmp_path / "v.nii.gz").get_fdata()
    np.testing.assert_allclose(volume.values(volume.voxels_IJK), expected, rtol=1e-5)


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip_checksum(content: bytes) -> bytes:
    return content[:-8] + bytes([content[-8] ^ 255]) + content[-7:]


def _cut_inside(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content)[:-10])


@pytest.mark.parametrize("spoil", [_truncate, _flip_checksum, _cut_inside])
def test_a_damaged_file_is_named_and_its_error_travels_between_processes(tmp_path: Path, spoil) -> None:
    file = tmp_path / "v.nii.gz"
    noise = np.random.default_rng(0).integers(0, 1000, (20, 20, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(noise, AFFINE), file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UnreadableVolume) as caught:
        read_volume(file)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.file == str(file)
    assert "truncated" in again.reason or "damaged" in again.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    voxels = _coded().astype(np.float32)
    voxels[1, 2, 3] = bad
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / "v.nii.gz")
    with pytest.raises(UnreadableVolume, match="1 voxels are NaN or infinite"):
        read_volume(tmp_path / "v.nii.gz")


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [(np.uint8, 16, "label id 16"), (np.int16, -1, "label id -1"), (np.float32, 2.5, "not whole numbers")],
)
def test_label_ids_outside_the_table_are_refused(tmp_path: Path, dtype: type, value: float, message: str) -> None:
    voxels: np.ndarray = np.zeros((4, 4, 4), dtype)
    voxels[0, 0, 0] = value
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / "l.nii.gz")
    with pytest.raises(UnreadableVolume, match=message):
        read_labels(tmp_path / "l.nii.gz", 16)


def test_labels_stored_as_floats_are_read(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 16, (4, 5, 6))
    nib.save(nib.Nifti1Image(voxels.astype(np.float64), AFFINE), tmp_path / "l.nii.gz")
    labels = read_labels(tmp_path / "l.nii.gz", 16).voxels_IJK
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, voxels)


@pytest.mark.parametrize(("num_stored", "step", "expected"), [(10, 1.0, 10), (63, 0.2, 311), (10, 2.0, 5), (1, 0.3, 1)])
def test_the_resampled_line_ends_inside_the_stored_one(num_stored: int, step: float, expected: int) -> None:
    assert num_resampled(num_stored, step) == expected


@pytest.mark.parametrize("step", [0.2, 0.73, 1.0, 1.37, 3.0])
def test_a_ramp_stays_a_ramp(step: float) -> None:
    count = num_resampled(40, step)
    ramp = linear_weights(count, 40, step=step) @ np.arange(40, dtype=np.float32)
    inner = slice(int(np.ceil(1 / step)) + 1, count - int(np.ceil(1 / step)) - 2)
    # Where the triangle is sampled by few elements, its centre moves by up to a twentieth of one.
    tolerance = 0.05 if step > 1 else 1e-5
    np.testing.assert_allclose(ramp[inner], (np.arange(count) * step)[inner], atol=tolerance, rtol=1e-5)


def test_weights_at_the_stored_spacing_change_nothing() -> None:
    np.testing.assert_array_equal(linear_weights(9, 9, step=1.0).toarray(), np.eye(9, dtype=np.float32))


def test_nearest_elements() -> None:
    np.testing.assert_array_equal(nearest_elements(6, 3, step=0.4), [0, 0, 1, 1, 2, 2])


def test_resampling_is_that_of_monai_where_nothing_shrinks() -> None:
    torch = pytest.importorskip("torch")
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    voxels = np.random.default_rng(1).normal(size=(6, 7, 5)).astype(np.float32)
    affine = np.diag([1.5, 2.0, 5.0, 1.0])
    spacing = Spacing(pixdim=(1.0, 1.0, 1.0), mode="bilinear", padding_mode="border", align_corners=False)
    expected = spacing(MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine)))[0].numpy()
    ours = voxels
    for dimension, stored_mm in enumerate((1.5, 2.0, 5.0)):
        weights = linear_weights(
            num_resampled(voxels.shape[dimension], 1 / stored_mm), voxels.shape[dimension], step=1 / stored_mm
        )
        ours = np.moveaxis(np.tensordot(weights.toarray(), ours, (1, dimension)), 0, dimension)
    common = tuple(slice(0, min(a, b)) for a, b in zip(ours.shape, expected.shape, strict=True))
    np.testing.assert_allclose(ours[common], expected[common], atol=1e-4)


def test_shrinking_is_that_of_torch_antialiased() -> None:
    torch = pytest.importorskip("torch")
    picture = torch.rand(1, 1, 50, 37, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(picture, (16, 16), mode="bilinear", antialias=True)[0, 0].numpy()
    rows = linear_weights(16, 50, step=50 / 16, start=0.5 * 50 / 16 - 0.5).toarray()
    columns = linear_weights(16, 37, step=37 / 16, start=0.5 * 37 / 16 - 0.5).toarray()
    np.testing.assert_allclose(rows @ picture[0, 0].numpy() @ columns.T, expected, atol=1e-5)
