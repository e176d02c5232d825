"""NIfTI volumes: read completely and checked, turned to canonical orientation, and the linear maps that resample them.

Resampling is separable, so a slice needs no 1 mm volume: each axis of a slice is one sparse matrix, and a slice is that
matrix on either side of the few stored planes around it. The result equals slices of the resampled volume. Sparse
products also sum in one fixed order, so they do not depend on the number of threads.

Dimensions: I right, J anterior, K superior (canonical, RAS+).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.host_memory import host_memory
from data_shards.ingest import dicom_series, itk_files
from data_shards.ingest.dicom_labels import DicomLabels, read_ids
from data_shards.ingest.dicom_series import DicomSeries
from data_shards.ingest.nifti import MOST_BYTES_BEHIND_VOXELS, Geometry, is_packed, value_scale
from data_shards.ingest.pictures import Pixel, is_picture
from data_shards.ingest.pictures import read_stored as read_picture
from data_shards.ingest.volume_files import read_geometry
from data_shards.problems import InputProblems

if TYPE_CHECKING:
    import scipy.sparse

# Labels that were saved as floats come back as 0.99998 or 2.0004; with a larger difference they are other numbers.
_WHOLE = 1e-3
# Volumes larger than this are compared with the free memory.
LARGE_BYTES = 2**30
# Resampling sums float32 products of values; beyond this they overflow.
_LARGEST_VALUE = 1e30
# An overlap this small counts as none: it is left if a stretch ends on an element's edge.
_ROUNDING = 1e-9
_NOT_FINITE = "voxels are NaN or infinite: write numbers there, as the lowest value where nothing was measured, or id 0"


# Stored numbers of any shape, slope and intercept, to uint8 ids.
_ToIds = Callable[[np.ndarray, float, float], np.ndarray]


class UnreadableVolume(ValueError):
    """A volume whose voxels cannot be used: the file and the reason, in one line."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = file, reason

    def __reduce__(self) -> tuple[type[UnreadableVolume], tuple[str, str]]:
        return UnreadableVolume, (self.file, self.reason)


@dataclass(frozen=True)
class Volume:
    """A stored volume in canonical orientation; no voxel is copied or converted until it is used.

    voxels_IJK: as stored, value = voxel * slope + intercept. affine: 4x4, voxel index to RAS mm; an oblique volume
    keeps its own axes, each named after the nearest anatomical one. sha256: of the file. notes: conversions and guesses
    of its header, see nifti.Geometry.
    """

    voxels_IJK: np.ndarray
    slope: float
    intercept: float
    affine: np.ndarray
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between neighbouring voxels along I, J and K."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def values(self, voxels: np.ndarray) -> np.ndarray:
        """Stored voxels as float32 values."""
        values = voxels.astype(np.float32)
        # In place, and only if something changes: planes are larger than a core's cache.
        if self.slope != 1.0:
            values *= np.float32(self.slope)
        if self.intercept != 0.0:
            values += np.float32(self.intercept)
        return values


def read_volume(
    path: Path | DicomSeries, *, one_slice: bool = False, channel: int | None = None, pixel: Pixel | None = None
) -> Volume:
    """Read a 3-D volume in little more memory than the voxels take. `one_slice`, `channel`, `pixel` as of
    read_geometry.

    Raises UnreadableVolume for faults that a header cannot show: a truncated file, a bad gzip checksum, extra bytes,
    values that are not finite; and for files that `read_geometry` refuses.
    """
    volume = _read(path, None, one_slice=one_slice, channel=channel, pixel=pixel)
    ends = np.array([volume.voxels_IJK.min(), volume.voxels_IJK.max()], dtype=np.float64)
    if not (np.abs(ends * volume.slope + volume.intercept) < _LARGEST_VALUE).all():
        reason = f"its values reach {_LARGEST_VALUE:g} (slope {volume.slope:g}, intercept {volume.intercept:g})"
        raise UnreadableVolume(str(path), reason)
    return volume


def read_dicom_labels(labels: DicomLabels, ids: Mapping[int, int], body_id: int | None) -> Volume:
    """The labels of a DICOM series on its grid, as uint8 ids, see dicom_labels.read_ids. Raises UnreadableVolume."""
    try:
        (voxels, notes), sha256 = read_ids(labels, ids, body_id), labels.sha256()
    except (OSError, ValueError) as error:
        raise UnreadableVolume(str(labels), str(error)) from error
    return replace(_turned(voxels, dicom_series.read_geometry(labels.series), sha256), notes=notes)


def read_labels(
    path: Path,
    num_ids: int,
    *,
    ids: Mapping[int, int] | None = None,
    one_slice: bool = False,
    pixel: Pixel | None = None,
) -> Volume:
    """Read a label volume as uint8, whatever type it is stored as, in no more memory than that takes. Numbers within
    0.001 of a whole one are rounded. Raises UnreadableVolume also for ids outside 0..num_ids-1 and for other numbers.
    `ids`: the new id of each stored id; then other ids are refused, and num_ids is not used. `one_slice`, `pixel` as
    of read_geometry.
    """
    known = None if ids is None else np.array(sorted(ids.items()), np.int64)

    def to_ids(plane: np.ndarray, slope: float, intercept: float) -> np.ndarray:
        """Whole-number label ids of stored numbers, any shape."""
        try:
            stored_ids = whole_numbers(plane, slope, intercept)
        except ValueError as error:
            raise UnreadableVolume(str(path), str(error)) from error
        if known is not None:
            return _renumbered(path, stored_ids, known)
        lowest, highest = int(stored_ids.min()), int(stored_ids.max())
        if lowest < 0 or highest >= num_ids:
            wrong = lowest if lowest < 0 else highest
            raise UnreadableVolume(str(path), f"label id {wrong} is outside the table, which ends at {num_ids - 1}")
        return stored_ids.astype(np.uint8, copy=False)

    return _read(path, to_ids, one_slice=one_slice, pixel=pixel)


def _renumbered(path: Path, stored_ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """uint8: the second column of `known` for the stored ids in its first column, which is ascending."""
    at = np.minimum(np.searchsorted(known[:, 0], stored_ids), len(known) - 1)
    if (strange := known[at, 0] != stored_ids).any():
        wrong = int(stored_ids[strange].flat[0])
        remedy = f"name it, or map it in a table of the classes, as label_map: {{{wrong}: background}}"
        raise UnreadableVolume(str(path), f"label id {wrong} is not among those that are named: {remedy}")
    return known[at, 1].astype(np.uint8)


def whole_numbers(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """The label ids of stored numbers: themselves, or rounded where all are within 0.001 of whole ones. Raises
    ValueError with the first number that is not, and its origin."""
    if stored.dtype.kind in "iu" and (slope, intercept) == (1.0, 0.0):
        return stored
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = stored if (slope, intercept) == (1.0, 0.0) else stored * slope + intercept
        whole = np.rint(numbers)
        far = ~(np.abs(numbers - whole) <= _WHOLE)
    if far.any():
        at = np.unravel_index(int(np.argmax(far)), far.shape)
        cause = ""
        if (slope, intercept) != (1.0, 0.0):
            cause = f": stored {stored[at]:g}, scl_slope {slope:.4g}, scl_inter {intercept:.4g} in the header"
        remedy = "save the label again as whole numbers, with slope 1 and intercept 0"
        raise ValueError(f"label ids are not whole numbers: {numbers[at]:.6g}{cause}; {remedy}")
    return whole


def planes_in_memory(voxels_IJK: np.ndarray) -> Iterator[np.ndarray]:
    """The volume in two-dimensional pieces that are each contiguous in memory, in no particular order: they are fast to
    read, and cheap to convert one at a time."""
    yield from voxels_IJK.transpose(np.argsort(np.abs(voxels_IJK.strides), kind="stable")[::-1])


def num_resampled(num_stored: int, step: float) -> int:
    """Samples of a line of `num_stored` voxels, `step` voxels apart: the first is at the first voxel's centre and none
    is beyond the last one's, so nothing outside the measured field is invented."""
    return int(np.floor((num_stored - 1) / step + 1e-6)) + 1


def linear_weights(
    num_out: int, num_in: int, *, step: float, start: float = 0.0, window: tuple[int, int] | None = None
) -> scipy.sparse.csr_array:
    """Sparse [num_out, num_in] float32: samples at start + k * step, in units of input elements.

    A sample is the mean over the stretch of width max(1, step) around it, of a line on which each element fills one
    unit: an element weighs as much as it overlaps the stretch. Without reduction the width is 1, which is exactly
    linear interpolation, 1 - distance. With reduction every element counts by its area, and for a whole step that is
    the mean of a block, as in Pillow's BOX and torch's `area`. Weights sum to 1 over `window` (default: all of the
    input), at whose edges stretches are cut; parts of the window outside the input count as zeros.
    """
    import scipy.sparse

    low, high = window or (0, num_in)
    position = start + step * np.arange(num_out, dtype=np.float64)[:, None]
    width = max(1.0, step)
    reach = (width + 1.0) / 2.0
    element = np.floor(position - reach).astype(np.int64) + np.arange(int(np.ceil(2 * reach)) + 2)
    weight = np.clip(reach - np.abs(element - position), 0.0, 1.0)
    weight[(element < low) | (element >= high)] = 0.0
    weight /= weight.sum(axis=1, keepdims=True)
    row, tap = np.nonzero((weight > _ROUNDING) & (element >= 0) & (element < num_in))
    entries = (weight[row, tap].astype(np.float32), (row, element[row, tap]))
    return scipy.sparse.csr_array(entries, shape=(num_out, num_in))


def nearest_elements(num_out: int, num_in: int, *, step: float) -> np.ndarray:
    """int64 [num_out]: the input element nearest to each of the samples that linear_weights would take."""
    return np.minimum(np.floor(step * np.arange(num_out) + 0.5).astype(np.int64), num_in - 1)


def _read(
    path: Path | DicomSeries,
    to_ids: _ToIds | None,
    *,
    one_slice: bool = False,
    channel: int | None = None,
    pixel: Pixel | None = None,
) -> Volume:
    """`to_ids` turns each stored plane, with slope and intercept, into uint8."""
    try:
        geometry = read_geometry(path, one_slice=one_slice, channel=channel, pixel=pixel)
        if isinstance(path, DicomSeries):
            _refuse_too_large(path, geometry)
            return _turned(dicom_series.read_stored(path), geometry, path.sha256())
        if pixel is not None and is_picture(path):
            stored, sha256 = read_picture(path, geometry, pixel)
            stored = np.array(stored) if to_ids is None else to_ids(stored, 1.0, 0.0)
            return replace(_turned(stored, geometry, sha256), slope=pixel.scale, intercept=pixel.offset)
        voxels, sha256 = (_itk_voxels if itk_files.is_itk(path) else _nifti_voxels)(path, geometry, to_ids)
    except InputProblems as error:
        reason = "; ".join(f"{one.field}: {one.value}; {one.remedy}" for one in error.problems)
        raise UnreadableVolume(str(path), reason) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableVolume(str(path), f"truncated or damaged file: {error}") from error
    except MemoryError as error:
        reason = f"{geometry.voxel_bytes / 2**30:.1f} GiB of voxels do not fit into memory: resample it"
        raise UnreadableVolume(str(path), reason) from error
    slope, intercept = (1.0, 0.0) if to_ids or itk_files.is_itk(path) else value_scale(geometry.header)
    return replace(_turned(voxels, geometry, sha256), slope=slope, intercept=intercept)


def _turned(voxels: np.ndarray, geometry: Geometry, sha256: str) -> Volume:
    """The volume in canonical orientation."""
    import nibabel as nib

    orientation = nib.io_orientation(geometry.affine)
    canonical = nib.apply_orientation(voxels, orientation)
    affine = geometry.affine @ nib.orientations.inv_ornt_aff(orientation, voxels.shape)
    return Volume(canonical, 1.0, 0.0, affine, sha256, geometry.notes)


def _nifti_voxels(path: Path, geometry: Geometry, to_ids: _ToIds | None) -> tuple[np.ndarray, str]:
    """The voxels in the order of the file, and the file's sha256."""
    _refuse_too_large(path, geometry)
    with path.open("rb", buffering=0) as file:
        hashed = _Hashed(file)
        content = gzip.GzipFile(fileobj=hashed, mode="rb") if is_packed(path) else hashed
        return _stored_voxels(path, geometry, content, to_ids), hashed.sha256.hexdigest()


def _itk_voxels(path: Path, geometry: Geometry, to_ids: _ToIds | None) -> tuple[np.ndarray, str]:
    """The same for a file that SimpleITK reads, which is completely in memory; the sha256 is over header and voxels."""
    _refuse_too_large(path, geometry)
    voxels = itk_files.read_stored(path, geometry)
    if voxels.dtype.kind == "f" and (not_finite := voxels.size - int(np.count_nonzero(np.isfinite(voxels)))):
        raise UnreadableVolume(str(path), f"{not_finite} {_NOT_FINITE}")
    sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in itk_files.files_of(path))).hexdigest()
    return voxels if to_ids is None else to_ids(voxels, 1.0, 0.0), sha256


def _refuse_too_large(path: Path | DicomSeries, geometry: Geometry) -> None:
    memory = host_memory() if geometry.voxel_bytes > LARGE_BYTES else None
    if memory is not None and geometry.voxel_bytes > memory.available:
        # A process that allocates more is killed without a message, and a file of a few MB can unpack to that size.
        reason = (
            f"{geometry.voxel_bytes / 2**30:.1f} GiB of voxels, {memory.available / 2**30:.1f} GiB of memory are free: "
            f"resample it"
        )
        raise UnreadableVolume(str(path), reason)


def _stored_voxels(path: Path, geometry: Geometry, content: io.IOBase, to_ids: _ToIds | None) -> np.ndarray:
    """The voxels in the order of the file, read plane by plane into the one array that stays. Reads to the end of the
    file, where gzip's checksum is; a file that continues without end after its voxels is refused."""
    shape, dtype = geometry.shape, geometry.header.get_data_dtype()
    slope, intercept = value_scale(geometry.header)
    channel, num_channels = geometry.channel
    _skip(int(geometry.header.get_data_offset()) + channel * geometry.voxel_bytes, content)
    voxels = np.empty(shape, dtype if to_ids is None else np.uint8, order="F")
    plane = np.empty(shape[:2], dtype, order="F")
    not_finite = 0
    for k in range(shape[2]):
        stored = voxels[:, :, k] if to_ids is None else plane
        filled = _fill(stored, content)
        if filled < stored.nbytes:
            missing = f"{k * stored.nbytes + filled} bytes of voxels, {geometry.voxel_bytes} expected"
            raise UnreadableVolume(str(path), f"truncated file: {missing}")
        if dtype.kind == "f":
            not_finite += stored.size - int(np.count_nonzero(np.isfinite(stored)))
        if to_ids is not None and not not_finite:
            voxels[:, :, k] = to_ids(stored, slope, intercept)
    behind = 0
    rest = np.empty(2**16, np.uint8)
    while got := _fill(rest, content):
        behind += got
        if behind > MOST_BYTES_BEHIND_VOXELS + (num_channels - 1 - channel) * geometry.voxel_bytes:
            reason = f"damaged file: more than {MOST_BYTES_BEHIND_VOXELS // 2**20} MiB behind the voxels it declares"
            raise UnreadableVolume(str(path), reason)
    if not_finite:
        raise UnreadableVolume(str(path), f"{not_finite} {_NOT_FINITE}")
    return voxels


def _skip(num_bytes: int, content: io.IOBase) -> None:
    block = np.empty(min(num_bytes, 2**20), np.uint8)
    while num_bytes > 0 and (got := _fill(block[: min(num_bytes, len(block))], content)):
        num_bytes -= got


def _fill(array: np.ndarray, content: io.IOBase) -> int:
    """Fill a contiguous array from `content`; returns the number of bytes that were read."""
    rest = array.reshape(-1, order="A").view(np.uint8).data
    filled = 0
    while filled < len(rest) and (got := content.readinto(rest[filled:])):  # type: ignore[attr-defined]
        filled += got
    return filled


class _Hashed(io.RawIOBase):
    """A file that computes the checksum of the bytes that are read from it."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:got])
        return got
