"""Reading and resampling, against volumes whose voxels say where they are, and against MONAI."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_shards.host_memory import HostMemory
from data_shards.ingest.volumes import (
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
    # The same voxel is at the same place in the patient.
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


def _flip_a_bit(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 8]) + content[len(content) // 2 + 1 :]


def _append_rubbish(content: bytes) -> bytes:
    return content + b"rubbish"


def _claim_more(content: bytes) -> bytes:
    """A header that promises 30,000 voxels along each axis, from a file of a few kilobytes."""
    stored = bytearray(gzip.decompress(content))
    stored[42:48] = np.array([30_000] * 3, "<i2").tobytes()
    return gzip.compress(bytes(stored))


@pytest.mark.parametrize(
    "spoil",
    [_truncate, _flip_checksum, _cut_inside, _flip_a_bit, _append_rubbish, _claim_more],
    ids=lambda f: f.__name__,
)
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


def test_a_file_in_several_gzip_members_is_read_whole_with_its_checksum(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(_coded(), AFFINE), tmp_path / "v.nii")
    content = (tmp_path / "v.nii").read_bytes()
    packed = gzip.compress(content[:500]) + gzip.compress(content[500:]) + bytes(20)
    (tmp_path / "w.nii.gz").write_bytes(packed)
    plain, members = read_volume(tmp_path / "v.nii"), read_volume(tmp_path / "w.nii.gz")
    np.testing.assert_array_equal(members.voxels_IJK, _coded())
    np.testing.assert_array_equal(plain.voxels_IJK, _coded())
    assert (plain.sha256, members.sha256) == (hashlib.sha256(content).hexdigest(), hashlib.sha256(packed).hexdigest())


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


def test_labels_scaled_by_their_header_are_read(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 8, (4, 5, 6))
    image = nib.Nifti1Image((2 * voxels).astype(np.int16), AFFINE)
    image.header.set_slope_inter(0.5, 1)
    nib.save(image, tmp_path / "l.nii.gz")
    expected = nib.load(tmp_path / "l.nii.gz").get_fdata()
    np.testing.assert_array_equal(read_labels(tmp_path / "l.nii.gz", 16).voxels_IJK, expected)


@pytest.mark.parametrize(("off", "is_read"), [(0.0, True), (4e-5, True), (-9e-4, True), (2e-3, False), (0.012, False)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_labels_a_little_off_are_rounded_and_others_refused_with_value_and_slope(
    tmp_path: Path, off: float, is_read: bool, dtype: type
) -> None:
    """As floats, and as integers that nibabel scales by a slope of its own."""
    ids = np.random.default_rng(0).integers(0, 16, (4, 5, 6))
    values = np.where(ids == 3, ids + off, ids)
    image = nib.Nifti1Image(values.astype(np.float64), AFFINE)
    image.header.set_data_dtype(dtype)
    if dtype is np.int16:
        image.header.set_slope_inter(1 / 2048, 8)
        stored = np.rint((values - 8) * 2048).astype(np.int16)
        image = nib.Nifti1Image(stored, AFFINE, image.header)
        image.header.set_slope_inter(1 / 2048, 8)
    nib.save(image, tmp_path / "l.nii.gz")
    if is_read:
        np.testing.assert_array_equal(read_labels(tmp_path / "l.nii.gz", 16).voxels_IJK, ids)
        return
    with pytest.raises(UnreadableVolume, match=r"not whole numbers: 3\.0") as caught:
        read_labels(tmp_path / "l.nii.gz", 16)
    assert ("scl_slope 0.000488" in caught.value.reason) == (dtype is np.int16)


@pytest.mark.parametrize(("num_stored", "step", "expected"), [(10, 1.0, 10), (63, 0.2, 311), (10, 2.0, 5), (1, 0.3, 1)])
def test_the_resampled_line_ends_inside_the_stored_one(num_stored: int, step: float, expected: int) -> None:
    assert num_resampled(num_stored, step) == expected


@pytest.mark.parametrize("step", [0.2, 0.73, 1.0, 1.37, 3.0])
def test_a_ramp_stays_a_ramp(step: float) -> None:
    count = num_resampled(40, step)
    ramp = linear_weights(count, 40, step=step) @ np.arange(40, dtype=np.float32)
    inner = slice(int(np.ceil(1 / step)) + 1, count - int(np.ceil(1 / step)) - 2)
    # The mean over part of an element is off by up to an eighth of one, divided by the width.
    tolerance = 0.125 / step if step > 1 else 1e-5
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


def _resized(num_out: int, num_in: int) -> np.ndarray:
    """Weights of a resize whose ends stay where they are."""
    step = num_in / num_out
    return linear_weights(num_out, num_in, step=step, start=0.5 * step - 0.5).toarray()


@pytest.mark.parametrize(("height", "width", "mode"), [(16, 9, "area"), (24, 12, "area"), (80, 47, "bilinear")])
def test_resizing_is_that_of_torch(height: int, width: int, mode: str) -> None:
    torch = pytest.importorskip("torch")
    picture = torch.rand(1, 1, 48, 36, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(picture, (height, width), mode=mode)[0, 0].numpy()
    ours = _resized(height, 48) @ picture[0, 0].numpy() @ _resized(width, 36).T
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(("num_out", "num_in"), [(16, 50), (7, 9), (13, 100), (5, 5)])
def test_shrinking_weighs_by_overlap(num_out: int, num_in: int) -> None:
    """Every element is cut into num_out pieces here, and each sample is the mean of num_in of them."""
    pieces = np.repeat(np.eye(num_in), num_out, axis=0).reshape(num_out, num_in, num_in)
    np.testing.assert_allclose(_resized(num_out, num_in), pieces.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("step", [0.31, 1.0, 1.8, 4.0, 9.7])
@pytest.mark.parametrize("start", [0.0, 3.4])
def test_a_constant_stays_the_same_up_to_the_edges(step: float, start: float) -> None:
    count = int((29 - start) / step) + 1
    sums = linear_weights(count, 30, step=step, start=start).sum(axis=1)
    np.testing.assert_allclose(sums, 1.0, rtol=1e-6)


def test_stretches_are_cut_at_the_window_and_outside_the_input_is_zero() -> None:
    third, half = 1 / 3, 1 / 2
    outside = linear_weights(4, 6, step=3.0, start=-2.0, window=(-3, 8)).toarray()
    np.testing.assert_allclose(outside[[0, 3]], 0.0)
    np.testing.assert_allclose(outside[1:3], [[third] * 3 + [0] * 3, [0] * 3 + [third] * 3], rtol=1e-6)
    cut = linear_weights(2, 6, step=3.0, start=1.0, window=(1, 5)).toarray()
    np.testing.assert_allclose(cut, [[0, half, half, 0, 0, 0], [0, 0, 0, half, half, 0]])


def test_more_voxels_than_memory_are_refused_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_shards.ingest import volumes

    nib.save(nib.Nifti1Image(_coded(), AFFINE), tmp_path / "v.nii.gz")
    monkeypatch.setattr(volumes, "LARGE_BYTES", 0)
    read_volume(tmp_path / "v.nii.gz")
    monkeypatch.setattr(volumes, "host_memory", lambda: HostMemory(1000, 100))
    with pytest.raises(UnreadableVolume, match="GiB of memory are free"):
        read_volume(tmp_path / "v.nii.gz")
