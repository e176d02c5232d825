"""NIfTI volumes: read whole and checked, turned to canonical orientation, and the linear maps that resample them.

Resampling is separable, so a slice needs no 1 mm volume: each axis of a slice is one sparse matrix, and a slice is
that matrix on either side of the few stored planes it lies between. The result is what slicing the resampled volume
gives. Sparse products also sum in one fixed order, so they do not depend on the number of threads.

Dimensions: I right, J anterior, K superior (canonical, RAS+).
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse


class UnreadableVolume(ValueError):
    """A volume whose voxels cannot be used: which file, and why, in one line."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = file, reason

    def __reduce__(self) -> tuple[type[UnreadableVolume], tuple[str, str]]:
        return UnreadableVolume, (self.file, self.reason)


@dataclass(frozen=True)
class Volume:
    """A stored volume in canonical orientation; no voxel is copied or converted until it is asked for.

    voxels_IJK: as stored, value = voxel * slope + intercept. affine: 4x4, voxel index to RAS mm; an oblique volume
    keeps its own axes, each named after the nearest anatomical one. sha256: of the file.
    """

    voxels_IJK: np.ndarray
    slope: float
    intercept: float
    affine: np.ndarray
    sha256: str

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between neighbouring voxels along I, J and K."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def values(self, voxels: np.ndarray) -> np.ndarray:
        """Stored voxels as float32 values."""
        return voxels.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)


def read_volume(path: Path) -> Volume:
    """Read a 3-D .nii or .nii.gz. Raises UnreadableVolume for what a header cannot show: a file cut short, a bad gzip
    checksum, values that are not finite."""
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    stored = path.read_bytes()
    sha256 = hashlib.sha256(stored).hexdigest()
    try:
        content = gzip.decompress(stored) if path.name.endswith(".gz") else stored
        del stored
        image = nib.load(path)
    except (OSError, EOFError, zlib.error, ImageFileError) as error:
        raise UnreadableVolume(str(path), f"truncated or damaged file: {error}") from error
    header = image.header
    shape, dtype, start = header.get_data_shape(), header.get_data_dtype(), int(image.dataobj.offset)
    needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) < start + needed:
        raise UnreadableVolume(str(path), f"truncated file: {len(content) - start} bytes of voxels, {needed} expected")
    voxels = np.ndarray(shape[:3], dtype, buffer=content, offset=start, order="F")
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        count = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        raise UnreadableVolume(str(path), f"{count} voxels are NaN or infinite")
    orientation = nib.io_orientation(image.affine)
    canonical = nib.apply_orientation(voxels, orientation)
    affine = image.affine @ nib.orientations.inv_ornt_aff(orientation, shape[:3])
    return Volume(canonical, float(image.dataobj.slope), float(image.dataobj.inter), affine, sha256)


def read_labels(path: Path, num_ids: int) -> Volume:
    """Read a label volume; voxels become uint8. Raises UnreadableVolume also for ids outside 0..num_ids-1."""
    volume = read_volume(path)
    ids = volume.voxels_IJK
    if (volume.slope, volume.intercept) != (1.0, 0.0):
        ids = volume.values(ids)
    if ids.dtype.kind == "f":
        if not np.array_equal(ids, np.rint(ids)):
            raise UnreadableVolume(str(path), "label ids are not whole numbers")
        ids = ids.astype(np.int64)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= num_ids:
        wrong = lowest if lowest < 0 else highest
        raise UnreadableVolume(str(path), f"label id {wrong} is outside the table, which ends at {num_ids - 1}")
    return Volume(ids.astype(np.uint8, copy=False), 1.0, 0.0, volume.affine, volume.sha256)


def num_resampled(num_stored: int, step: float) -> int:
    """Samples of a line of `num_stored` voxels, `step` voxels apart: the first falls on the first voxel's centre and
    none lies beyond the last one's, so nothing outside the measured field is made up."""
    return int(np.floor((num_stored - 1) / step + 1e-6)) + 1


def linear_weights(
    num_out: int, num_in: int, *, step: float, start: float = 0.0, window: tuple[int, int] | None = None
) -> scipy.sparse.csr_array:
    """Sparse [num_out, num_in] float32: samples at start + k * step, in units of input elements.

    Linear interpolation; where step > 1 the triangle widens with it, so that shrinking averages instead of skipping
    (the antialiased bilinear filter of Pillow and torch). Weights sum to 1 over `window` (default: all of the input),
    whose edge elements are repeated outwards; what of the window lies outside the input counts as zeros.
    """
    import scipy.sparse

    low, high = window or (0, num_in)
    position = start + step * np.arange(num_out, dtype=np.float64)[:, None]
    reach = max(1.0, step)
    element = np.floor(position - reach).astype(np.int64) + np.arange(int(np.ceil(2 * reach)) + 2)
    weight = np.maximum(0.0, 1.0 - np.abs(element - position) / reach)
    weight[(element < low) | (element >= high)] = 0.0
    weight /= weight.sum(axis=1, keepdims=True)
    row, tap = np.nonzero((weight > 0) & (element >= 0) & (element < num_in))
    entries = (weight[row, tap].astype(np.float32), (row, element[row, tap]))
    return scipy.sparse.csr_array(entries, shape=(num_out, num_in))


def nearest_elements(num_out: int, num_in: int, *, step: float) -> np.ndarray:
    """int64 [num_out]: the input element nearest to each of the samples that linear_weights would take."""
    return np.minimum(np.floor(step * np.arange(num_out) + 0.5).astype(np.int64), num_in - 1)
