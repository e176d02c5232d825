"""A DICOM series as a volume: its slices in the order of their positions, and everything that is wrong with it.

A series is used only if its slices are one regular stack, complete, of one orientation and one acquisition.
Dimensions: I along a row (column index), J along a column, K from slice to slice. DICOM counts to the left, the back
and the head (LPS, PS3.3 C.7.6.2.1.1); affines here lead to RAS mm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.dicom_files import Header, differing, library, quiet
from data_shards.ingest.nifti import Geometry, StoredAs, problems_in_space, problems_with_extent
from data_shards.modalities import is_modality
from data_shards.problems import InputProblems, Problem, problem

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# As for labels (data_shards.ingest.cases): positions are written with one or two decimals.
_TOLERANCE_VOXELS = 0.1
# Direction cosines are written with 6 digits or more.
_SAME_DIRECTION = 1e-3
# From this multiple of the usual distance on, a slice is missing.
_MISSING = 1.5
_REMEDY = "take it out of the folder, or leave it out with --prepare.on-bad-case skip"
_BLOCK_BYTES = 2**20
_INCOMPLETE = "it declares more bytes than it has, has a value of an unknown kind, or too few pixels"
# PS3.5 7.1.1: a value that ends with a delimiter.
_UNDEFINED_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True)
class DicomSeries:
    """`name`: what messages call it. `files` in the order of positions; one if `is_multiframe`. `shape` and `affine`
    (4x4, to RAS mm) of the volume; None if it is not one. `is_whole`: its values are whole numbers."""

    name: str
    files: tuple[Path, ...]
    shape: tuple[int, int, int] | None = None
    affine: np.ndarray | None = field(default=None, compare=False)
    is_multiframe: bool = False
    is_whole: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def sha256(self) -> str:
        """Over the files in their order."""
        return files_sha256(self.name, self.files)


def files_sha256(name: str, files: Sequence[Path]) -> str:
    """The checksum of files. Errors have `name` in place of a file's name."""
    total = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                for block in iter(partial(stream.read, _BLOCK_BYTES), b""):
                    total.update(block)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None
    return total.hexdigest()


def series_of(
    name: str, headers: Sequence[Header], modality: str, *, one_slice: bool = False
) -> tuple[DicomSeries, list[Problem]]:
    """The volume of a series' images, and the reasons why it is none. `one_slice`: a single image counts as a volume of
    one plane, as thick as it says."""
    files = tuple(one.file for one in headers)
    refused = list(_problems_with_kind(name, headers, modality, one_slice))
    if refused:
        return DicomSeries(name, files), refused
    try:
        return _multiframe(name, headers, modality) if headers[0].num_frames > 1 else _stack(name, headers)
    except InputProblems as error:
        return DicomSeries(name, files), list(error.problems)


def read_geometry(series: DicomSeries) -> Geometry:
    """The position of the volume. Raises InputProblems if the series is none."""
    if series.shape is None or series.affine is None:
        raise problem(series, "series", "is no volume", _REMEDY)
    dtype: np.dtype[Any] = np.dtype(np.int16 if series.is_whole else np.float32)
    return Geometry(series.shape, series.affine, (), StoredAs(dtype))


def read_stored(series: DicomSeries) -> np.ndarray:
    """The values, [I, J, K], whole numbers or float32. Raises OSError for damaged files."""
    if series.is_multiframe:
        return _read_frames(series)
    planes = [_read_plane(series, number) for number in range(len(series.files))]
    dtype = np.result_type(*planes)
    volume = np.empty(series.shape or (), np.float32 if dtype.kind == "f" else dtype, order="F")
    for k, plane in enumerate(planes):
        volume[:, :, k] = plane
    return volume


def _read_plane(series: DicomSeries, number: int) -> np.ndarray:
    """The values of a slice, [I, J]; GDCM applies its slope and intercept."""
    sitk = library("SimpleITK", series)
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    what = f"slice {number + 1} of {len(series.files)}"
    if not _is_complete(series.files[number]):
        raise OSError(f"{what} cannot be decoded: {_INCOMPLETE}")
    try:
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(series.files[number]), imageIO="GDCMImageIO"))
    except RuntimeError:  # its message has the file's name
        raise OSError(f"{what} cannot be decoded") from None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
    if series.shape is None or values.shape != (1, series.shape[1], series.shape[0]):
        raise OSError(f"{what} has {values.shape} pixels")
    return np.asarray(values[0].T)


def _is_complete(file: Path) -> bool:
    """Whether the file has pixels, every value ends within it, and each has a value representation that is known:
    GDCM allocates what a length declares, and reads the length of an unknown one from other bytes."""
    pydicom = library("pydicom", file.parent)
    try:
        with quiet():
            is_packed = pydicom.filereader.read_file_meta_info(file).TransferSyntaxUID.is_deflated
            data = pydicom.dcmread(file, defer_size=None if is_packed else 1024)
            raw = [one for one in data.values() if isinstance(one, pydicom.dataelem.RawDataElement)]
            ends = [one.value_tell + one.length for one in raw if one.length != _UNDEFINED_LENGTH]
            known = {*(vr.value for vr in pydicom.valuerep.VR), None}  # None in files whose syntax leaves it out
            if not all(vr in known for part in (data.file_meta, data) for vr in _representations(part)):
                return False
            has_pixels = "PixelData" in data and (is_packed or max(ends) <= file.stat().st_size)
            return has_pixels and _pixel_bytes(data) >= _needed_bytes(data)
    except Exception:  # pydicom raises whatever the bytes lead it to
        return False


def _representations(data: Any) -> Iterator[str | None]:
    """The value representations of a data set's elements as they are stored, also within sequences."""
    for tag, element in list(data.items()):
        yield element.VR
        if element.VR == "SQ":
            for item in data[tag].value:
                yield from _representations(item)


def _pixel_bytes(data: Any) -> float:
    """Bytes of the stored pixels; of compressed ones their decoder finds out whether they are complete."""
    if data.file_meta.TransferSyntaxUID.is_encapsulated:
        return np.inf
    stored = data.get_item("PixelData")
    return float(stored.length if hasattr(stored, "length") else len(stored.value))


def _needed_bytes(data: Any) -> float:
    """Bytes of all pixels, uncompressed."""
    bits = int(data.Rows) * int(data.Columns) * int(data.get("SamplesPerPixel") or 1) * int(data.BitsAllocated)
    return bits * int(data.get("NumberOfFrames") or 1) / 8


def _read_frames(series: DicomSeries) -> np.ndarray:
    highdicom = library("highdicom", series)
    if not _is_complete(series.files[0]):
        raise OSError(f"its frames cannot be decoded: {_INCOMPLETE}")
    try:
        with quiet():
            image = highdicom.imread(series.files[0])
            volume = image.get_volume(apply_real_world_transform=False, apply_presentation_lut=False, dtype=np.float64)
    except Exception as error:
        raise OSError(f"its frames cannot be decoded ({type(error).__name__})") from None
    return np.asarray(volume.array, np.float32).T


def _problems_with_kind(name: str, headers: Sequence[Header], modality: str, one_slice: bool) -> Iterator[Problem]:
    """What is wrong with single images."""
    first, num = headers[0], len(headers)
    if not is_modality(modality):
        remedy = f"{_REMEDY}, or state the modality with --prepare.modality"
        yield Problem(name, "Modality", repr(first.modality[:16]), remedy)
    elif any(one.is_localiser for one in headers):
        yield Problem(name, "ImageType", "a localiser", _REMEDY)
    elif not all(one.is_grey for one in headers):
        yield Problem(name, "PhotometricInterpretation", "not one MONOCHROME2 value a pixel", _REMEDY)
    elif any(one.has_table for one in headers):
        yield Problem(name, "ModalityLUTSequence", "values by a table", f"convert it to slope and intercept; {_REMEDY}")
    elif wrong := _rescale_problems(
        name, modality, [one.states_rescale for one in headers], [one.rescale_type for one in headers]
    ):
        yield from wrong
    elif num > 1 and any(one.num_frames > 1 for one in headers):
        yield Problem(name, "NumberOfFrames", f"{num} files, of which some have several frames", _REMEDY)
    elif num == 1 and first.num_frames == 1 and not (one_slice and first.thickness > 0):
        value = "a single slice without SliceThickness" if one_slice else "a single slice without labels"
        yield Problem(name, "slices", value, _REMEDY)
    elif len(sizes := {one.shape for one in headers}) > 1:
        yield Problem(name, "Rows, Columns", " and ".join(f"{r} x {c}" for r, c in sorted(sizes)[:3]), _REMEDY)


def _rescale_problems(name: str, modality: str, stated: Sequence[object], types: Sequence[str]) -> list[Problem]:
    """Of single images or frames: what they state of slope and intercept, and the types of their values."""
    if len(set(stated)) > 1:
        num = len(stated) - max(map(list(stated).count, stated))
        value = f"stated otherwise, or not at all, in {num} of {len(stated)} images"
        return [Problem(name, "RescaleSlope, RescaleIntercept", value, f"export the series again; {_REMEDY}")]
    strange = [one for one in types if one[:2].upper() not in ("", "HU", "US")]
    if modality != "CT" or not strange:
        return []
    return [Problem(name, "RescaleType", f"{strange[0][:16]!r} of a CT, not HU", _REMEDY)]


def _stack(name: str, headers: Sequence[Header]) -> tuple[DicomSeries, list[Problem]]:
    """Files of a slice each."""
    for attribute, values in (
        ("FrameOfReferenceUID", {one.frame_uid for one in headers}),
        ("PatientID", {one.patient for one in headers}),
    ):
        if len(values) > 1:
            return DicomSeries(name, ()), [Problem(name, attribute, f"{len(values)} in one series", _REMEDY)]
    lacking = [one for one in headers if (len(one.position), len(one.orientation), len(one.spacing)) != (3, 6, 2)]
    if lacking:
        value = f"{len(lacking)} of {len(headers)} images have no position, orientation or pixel spacing"
        return DicomSeries(name, ()), [Problem(name, "ImagePositionPatient", value, _REMEDY)]
    directions = np.array([one.orientation for one in headers])
    turned = np.abs(directions - directions[0]).max(axis=1) > _SAME_DIRECTION
    if turned.any():
        value = f"mixed orientations: {int(turned.sum())} of {len(headers)} images are turned against the first"
        return DicomSeries(name, ()), [Problem(name, "ImageOrientationPatient", value, _REMEDY)]
    spacings = np.array([one.spacing for one in headers])
    if np.ptp(spacings, axis=0).max() > 1e-3 * spacings.min():
        value = f"{spacings.min():.4g} to {spacings.max():.4g} mm"
        return DicomSeries(name, ()), [Problem(name, "PixelSpacing", value, _REMEDY)]
    normal = np.cross(directions[0, :3], directions[0, 3:])
    along = np.array([one.position for one in headers]) @ normal
    ordered = [headers[at] for at in np.argsort(along, kind="stable")]
    refused = list(_problems_with_positions(name, ordered, np.sort(along)))
    affine = _affine(ordered)
    shape = (headers[0].shape[1], headers[0].shape[0], len(headers))
    whole = all(float(number).is_integer() for one in headers for number in one.rescale)
    series = DicomSeries(name, tuple(one.file for one in ordered), shape, affine, is_whole=whole)
    refused = refused or list(_problems_with_line(name, ordered)) or _problems_in_space(series)
    return series, refused


def _affine(ordered: Sequence[Header]) -> np.ndarray:
    """Index I, J, K to RAS mm (PS3.3 equation C.7.6.2.1-1); PixelSpacing begins with that between rows."""
    first, last = ordered[0], ordered[-1]
    between_rows, between_columns = first.spacing
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * between_columns
    affine[:3, 1] = np.array(first.orientation[3:]) * between_rows
    if len(ordered) == 1:
        affine[:3, 2] = np.cross(first.orientation[:3], first.orientation[3:]) * first.thickness
    else:
        affine[:3, 2] = (np.array(last.position) - np.array(first.position)) / (len(ordered) - 1)
    affine[:3, 3] = first.position
    return LPS_TO_RAS @ affine


def _problems_with_positions(name: str, ordered: Sequence[Header], along: np.ndarray) -> Iterator[Problem]:
    """Positions that are there twice, or missing. `along` the normal, in mm, rising."""
    steps = np.diff(along)
    usual = float(np.median(steps[steps > 1e-3])) if (steps > 1e-3).any() else 0.0
    same = steps <= max(1e-3, _TOLERANCE_VOXELS * usual)
    if same.any():
        yield _duplicates(name, ordered, same)
        return
    wrong = np.abs(steps - usual) > _TOLERANCE_VOXELS * usual
    if not wrong.any():
        return
    at = int(np.argmax(np.abs(steps - usual)))
    places = f"slices are {usual:.4g} mm apart, but {steps[at]:.4g} mm behind slice {at + 1} of {len(along)}"
    gap = steps[at] >= _MISSING * usual
    what = "missing slices" if gap else "uneven distances"
    remedy = "export the series again, complete" if gap else "resample it to even distances"
    yield Problem(name, "slices", f"{what}: {places}", f"{remedy}; {_REMEDY}")


def _duplicates(name: str, ordered: Sequence[Header], same: np.ndarray) -> Problem:
    number = int(np.concatenate([[True], ~same]).sum())
    at = int(np.argmax(same))
    differ = differing([ordered[at], ordered[at + 1]])
    if differ:
        value = f"several acquisitions: {len(ordered)} images at {number} positions, by {', '.join(differ)}"
        return Problem(name, "slices", value, f"make a series of each; {_REMEDY}")
    value = f"duplicate positions: {len(ordered)} images at {number} positions"
    return Problem(name, "slices", value, f"remove copies of files; {_REMEDY}")


def _problems_with_line(name: str, ordered: Sequence[Header]) -> Iterator[Problem]:
    """Slices that are not on the straight, even line from the first to the last."""
    positions = np.array([one.position for one in ordered])
    if len(ordered) == 1:
        return
    share = np.linspace(0.0, 1.0, len(ordered))[:, None]
    off = np.linalg.norm(positions - (positions[0] + share * (positions[-1] - positions[0])), axis=1)
    limit = _TOLERANCE_VOXELS * min(min(ordered[0].spacing), float(np.linalg.norm(positions[1] - positions[0])))
    if off.max() > max(limit, 0.02):
        value = f"slice {int(off.argmax()) + 1} of {len(ordered)} is {off.max():.3g} mm beside the line of the others"
        yield Problem(name, "ImagePositionPatient", value, _REMEDY)


def _problems_in_space(series: DicomSeries) -> list[Problem]:
    assert series.affine is not None
    where = Path(series.name)
    return problems_in_space(where, series.affine) or problems_with_extent(where, read_geometry(series))


def _multiframe(name: str, headers: Sequence[Header], modality: str) -> tuple[DicomSeries, list[Problem]]:
    """One file of all slices."""
    highdicom, file = library("highdicom", name), headers[0].file
    refused: list[Problem] = []
    try:
        with quiet():
            image = highdicom.imread(file, lazy_frame_retrieval=True)
            geometry = image.get_volume_geometry(allow_missing_positions=False, allow_duplicate_positions=False)
            refused = _rescale_problems(name, modality, *_rescale_of_frames(image))
    except Exception:  # highdicom and pydicom raise whatever the bytes lead them to
        geometry = None
    if geometry is None:
        value = f"its {headers[0].num_frames} frames are not one even stack, or it is not an enhanced image"
        return DicomSeries(name, (file,)), [Problem(name, "frames", value, f"convert it to single frames; {_REMEDY}")]
    series = DicomSeries(name, (file,), geometry.spatial_shape[::-1], to_ras(geometry), True, is_whole=False)
    return series, refused or _problems_in_space(series)


def _rescale_of_frames(image: Any) -> tuple[list[bool], list[str]]:
    """Whether each frame states slope and intercept, and the type of its values (PS3.3 C.7.6.16.2.9)."""
    shared = image.get("SharedFunctionalGroupsSequence") or [{}]
    groups = [
        frame.get("PixelValueTransformationSequence") or shared[0].get("PixelValueTransformationSequence") or []
        for frame in image.get("PerFrameFunctionalGroupsSequence") or ()
    ]
    return [bool(one) for one in groups], [str(one[0].get("RescaleType") or "") for one in groups if one]


def to_ras(geometry: Any) -> np.ndarray:
    """Index I, J, K to RAS mm of a highdicom volume, whose indices are slice, row, column."""
    affine = np.array(geometry.affine, np.float64)
    return LPS_TO_RAS @ affine[:, [2, 1, 0, 3]]
