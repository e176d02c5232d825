"""Where a volume is: one rule for sform, qform, pixdim and units, and what of a header is refused."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_shards.ingest.nifti import Geometry, read_geometry
from data_shards.ingest.volumes import UnreadableVolume, read_volume
from data_shards.problems import InputProblems

AFFINE = np.array([[2.0, 0, 0, -7], [0, 3.0, 0, 11], [0, 0, 4.0, 5], [0, 0, 0, 1]])
VOXELS = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


def _written(file: Path, change: Callable[[nib.Nifti1Image], None] | None = None, affine: np.ndarray = AFFINE) -> Path:
    image = nib.Nifti1Image(VOXELS, affine)
    if change is not None:
        change(image)
    nib.save(image, file)
    return file


def _with_codes(file: Path, qform: int, sform: int) -> Path:
    """nibabel writes an sform of its own where there is none: the codes are changed in the file."""
    packed = file.name.endswith(".gz")
    raw = bytearray(gzip.decompress(file.read_bytes()) if packed else file.read_bytes())
    struct.pack_into("<2h", raw, 252, qform, sform)
    file.write_bytes(gzip.compress(bytes(raw)) if packed else raw)
    return file


def _refusal(file: Path) -> str:
    with pytest.raises(InputProblems) as caught:
        read_geometry(file)
    # The voxels' reader refuses the same, as a volume.
    with pytest.raises(UnreadableVolume):
        read_volume(file)
    return str(caught.value)


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000.0), ("meter", 0.001), ("mm", 1.0), ("unknown", 1.0)])
@pytest.mark.parametrize("form", ["sform", "qform", "pixdim"])
def test_units_are_converted_to_millimetres(tmp_path: Path, unit: str, factor: float, form: str) -> None:
    affine = AFFINE.copy()
    affine[:3] *= factor

    file = _written(tmp_path / "v.nii.gz", lambda image: image.header.set_xyzt_units(unit, "sec"), affine)
    _with_codes(file, *{"sform": (0, 2), "qform": (1, 0), "pixdim": (0, 0)}[form])
    geometry, volume = read_geometry(file), read_volume(file)
    np.testing.assert_allclose(geometry.spacing_mm, (2, 3, 4), rtol=1e-6)
    np.testing.assert_allclose(volume.spacing_mm, (2, 3, 4), rtol=1e-6)
    if form != "pixdim":
        np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-5)
    assert any("converted" in note for note in geometry.notes) == (factor != 1.0)
    assert volume.notes == geometry.notes


@pytest.mark.parametrize("spacing", [0.006, 0.04, 51.0, 6250.0, 1e4, 1e12])
@pytest.mark.parametrize("unit", ["mm", "unknown"])
def test_a_spacing_that_no_scanner_has_is_refused(tmp_path: Path, spacing: float, unit: str) -> None:
    file = _written(tmp_path / "v.nii", lambda i: i.header.set_xyzt_units(unit), np.diag([1.0, 1.0, spacing, 1.0]))
    message = _refusal(file)
    assert "spacing" in message
    assert "xyzt_units" in message


def test_a_unit_that_does_not_fit_the_numbers_is_refused(tmp_path: Path) -> None:
    for unit in ("meter", "micron"):
        message = _refusal(_written(tmp_path / "v.nii", lambda i, unit=unit: i.header.set_xyzt_units(unit)))
        assert "etres" in message


def test_an_unknown_unit_code_is_refused(tmp_path: Path) -> None:
    def change(image: nib.Nifti1Image) -> None:
        image.header["xyzt_units"] = 5

    assert "code 5" in _refusal(_written(tmp_path / "v.nii", change))


def test_without_either_form_the_sides_are_a_guess(tmp_path: Path) -> None:
    file = _with_codes(_written(tmp_path / "v.nii"), 0, 0)
    geometry = read_geometry(file)
    assert "guess" in geometry.notes[0]
    np.testing.assert_allclose(geometry.affine, nib.load(file).affine)


def _other_qform(affine: np.ndarray) -> Callable[[nib.Nifti1Image], None]:
    def change(image: nib.Nifti1Image) -> None:
        image.header.set_qform(affine, 1)
        image.header["sform_code"] = 1

    return change


def test_sform_against_qform_about_sides_is_a_guess_that_is_said(tmp_path: Path) -> None:
    geometry = read_geometry(_written(tmp_path / "v.nii", _other_qform(AFFINE @ np.diag([-1.0, 1, 1, 1]))))
    assert "RAS" in geometry.notes[0]
    assert "LAS" in geometry.notes[0]
    np.testing.assert_allclose(geometry.affine, AFFINE)


def _turned(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


@pytest.mark.parametrize(("degrees", "noted"), [(2.0, False), (20.0, True)])
def test_sform_turned_against_qform_is_said(tmp_path: Path, degrees: float, noted: bool) -> None:
    geometry = read_geometry(_written(tmp_path / "v.nii", _other_qform(_turned(degrees) @ AFFINE)))
    assert bool(geometry.notes) == noted


@pytest.mark.parametrize(("factor", "refused"), [(1.0, False), (1.005, False), (1.2, True), (10.0, True)])
def test_sform_against_pixdim_about_the_size_of_a_voxel_is_refused(
    tmp_path: Path, factor: float, refused: bool
) -> None:
    def change(image: nib.Nifti1Image) -> None:
        image.header["pixdim"][3] = 4.0 * factor

    file = _written(tmp_path / "v.nii", change)
    if refused:
        assert "by sform" in _refusal(file)
    else:
        np.testing.assert_allclose(read_geometry(file).affine, AFFINE)


@pytest.mark.parametrize(("degrees", "refused"), [(0.0, False), (0.3, False), (4.0, True), (20.0, True)])
def test_sheared_axes_are_refused(tmp_path: Path, degrees: float, refused: bool) -> None:
    affine = AFFINE.copy()
    affine[1, 2] = np.tan(np.deg2rad(degrees)) * 4.0
    file = _written(tmp_path / "v.nii", affine=affine)
    if refused:
        assert "right angle" in _refusal(file)
    else:
        read_geometry(file)


def test_a_qform_of_no_rotation_is_refused_where_it_counts_and_said_where_not(tmp_path: Path) -> None:
    def change(image: nib.Nifti1Image) -> None:
        image.header["quatern_b"] = 3.0
        image.header["qform_code"] = 1

    file = _written(tmp_path / "v.nii", change)
    assert "qform is broken" in read_geometry(file).notes[0]
    assert "qform" in _refusal(_with_codes(file, 1, 0))


def _patched(file: Path, at: int, layout: str, *values: float) -> Path:
    """The written volume with some bytes of its header changed."""
    _written(file)
    raw = bytearray(gzip.decompress(file.read_bytes()) if file.name.endswith(".gz") else file.read_bytes())
    struct.pack_into(layout, raw, at, *values)
    file.write_bytes(gzip.compress(bytes(raw)) if file.name.endswith(".gz") else raw)
    return file


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize(
    ("at", "layout", "values", "field"),
    [
        (108, "<f", (1e12,), "vox_offset"),
        (108, "<f", (float("nan"),), "vox_offset"),
        (108, "<f", (0.0,), "vox_offset"),
        (108, "<f", (-400.0,), "header"),
        (42, "<3h", (30_000, 30_000, 30_000), "shape"),
        (42, "<3h", (5, -6, 7), "shape"),
        (42, "<3h", (2000, 2000, 2000), "shape"),
        (70, "<h", (128,), "data type"),
        (70, "<h", (999,), "header"),
        (112, "<2f", (1.0, float("nan")), "scl_inter"),
        (0, "<i", (7,), "header"),
        (344, "<4s", (b"ni1\0",), "header"),
        (280, "<4f", (float("nan"), 0, 0, 0), "affine"),
    ],
)
def test_a_header_that_cannot_be_meant_is_refused_without_memory(
    tmp_path: Path, name: str, at: int, layout: str, values: tuple[float, ...], field: str
) -> None:
    assert f": {field}: " in _refusal(_patched(tmp_path / name, at, layout, *values))


@pytest.mark.parametrize("pair", [(float("inf"), 0.0), (0.0, 5.0), (float("nan"), 3.0)])
def test_a_slope_that_says_nothing_is_none(tmp_path: Path, pair: tuple[float, float]) -> None:
    volume = read_volume(_patched(tmp_path / "v.nii", 112, "<2f", *pair))
    assert (volume.slope, volume.intercept) == (1.0, 0.0)
    np.testing.assert_array_equal(volume.voxels_IJK, VOXELS)


def test_values_too_large_to_resample_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVolume, match="slope"):
        read_volume(_patched(tmp_path / "v.nii", 112, "<2f", 1e36, 0.0))


def test_a_long_extension_or_tail_is_not_read(tmp_path: Path) -> None:
    """A file that goes on behind its voxels is refused, packed or not, however long it is."""
    file = _written(tmp_path / "v.nii")
    content = file.read_bytes()
    with file.open("ab") as stream:
        stream.truncate(40 * 2**30)  # sparse: no bytes on the disk
    assert "behind the voxels" in _refusal(file)
    zeros = gzip.compress(bytes(2**24))
    (tmp_path / "w.nii.gz").write_bytes(gzip.compress(content) + zeros * 640)  # 10 GiB in 10 MB
    with pytest.raises(UnreadableVolume, match="behind the voxels"):
        read_volume(tmp_path / "w.nii.gz")
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(content + bytes(2**20)))
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii.gz").voxels_IJK, VOXELS)


def test_files_are_what_their_bytes_are(tmp_path: Path) -> None:
    plain = _written(tmp_path / "v.nii").read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    for name in ("plain.nii.gz", "packed.nii"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).voxels_IJK, VOXELS)


def test_a_geometry_says_what_it_needs(tmp_path: Path) -> None:
    geometry = read_geometry(_written(tmp_path / "v.nii.gz"))
    assert isinstance(geometry, Geometry)
    assert (geometry.shape, geometry.voxel_bytes, geometry.notes) == (VOXELS.shape, VOXELS.nbytes, ())
