"""Volumes to slices, shown the radiological way: the patient's right on the image's left, front and head up.

axial     rows from anterior to posterior, columns from the patient's right to left
coronal   rows from head to feet,          columns from the patient's right to left
sagittal  rows from head to feet,          columns from anterior to posterior
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.body import BodyField
from data_shards.intensity import GreyMap
from data_shards.volumes import Volume, linear_weights, nearest_elements, num_resampled

if TYPE_CHECKING:
    import scipy.sparse

# Canonical dimension (0 I right, 1 J anterior, 2 K superior) that runs through the slices, down the rows and along the
# columns. Rows and columns all run against their canonical dimension.
_VIEWS = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
FITS = ("auto", "crop", "pad")


@dataclass(frozen=True)
class Slice:
    """One slice, size x size: uint8 grey values and label ids, with where it lies (see records.SliceMeta)."""

    image_HW: np.ndarray
    mask_HW: np.ndarray
    slice_index: int
    spacing_mm: tuple[float, float]
    affine: tuple[float, ...]


@dataclass(frozen=True)
class _Line:
    """One in-plane dimension on its way to `size` pixels: stored voxels -> spacing_mm grid, turned round -> window of
    `length` grid points from `first` -> pixels. `step`: stored voxels from one grid point to the next."""

    num_stored: int
    step: float
    num_grid: int
    first: int
    length: int
    size: int

    @property
    def pixel(self) -> float:
        """Grid points from one pixel to the next."""
        return self.length / self.size

    def weights(self, num_in: int, step: float) -> scipy.sparse.csr_array:
        """[size, num_in] from an input whose elements lie on every 1 / `step`-th grid point, zero outside of it."""
        window = (self.first, self.first + self.length)
        start = self.first + 0.5 * self.pixel - 0.5
        shown = linear_weights(self.size, self.num_grid, step=self.pixel, start=start, window=window)
        return (shown[:, ::-1] @ linear_weights(self.num_grid, num_in, step=step)).tocsr()

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """Stored voxel of each pixel, and whether the pixel lies inside the volume: int64 [size], bool [size]."""
        shown = self.first + np.floor((np.arange(self.size) + 0.5) * self.pixel).astype(np.int64)
        inside = (shown >= 0) & (shown < self.num_grid)
        grid = np.where(inside, self.num_grid - 1 - shown, 0)
        return nearest_elements(self.num_grid, self.num_stored, step=self.step)[grid], inside

    def stored_index(self) -> tuple[float, float]:
        """Stored voxel index of pixel 0, and how much it grows from one pixel to the next."""
        start = self.first + 0.5 * self.pixel - 0.5
        return (self.num_grid - 1 - start) * self.step, -self.pixel * self.step


def cut(
    volume: Volume,
    labels: Volume | None,
    body: BodyField,
    grey: GreyMap,
    *,
    axis: str,
    size: int,
    spacing_mm: float,
    slice_stride: int,
    fit: str,
    body_id: int,
) -> Iterator[Slice]:
    """Every `slice_stride`-th slice along `axis` of the volume resampled to `spacing_mm`, resized to size x size.

    Images are linear and antialiased, labels nearest; `body_id` fills what of the body carries no label. fit `crop`
    keeps the middle square of the short side, `pad` shows all, in a square of the long side, with the lowest grey
    around; `auto` crops axial slices and pads the others, where cropping would cut the body. Values are clipped
    last, so a grey value is that of the resampled volume.
    """
    through, *in_plane = _VIEWS[axis]
    steps = spacing_mm / volume.spacing_mm
    rows, columns = _lines(volume.voxels_IJK.shape, steps, in_plane, size, _fit_of(fit, axis))
    planes = np.moveaxis(volume.voxels_IJK, (through, *in_plane), (0, 1, 2))
    num_stored = planes.shape[0]
    num_grid = num_resampled(num_stored, steps[through])
    images = _Planes(
        planes, rows.weights(rows.num_stored, rows.step), columns.weights(columns.num_stored, columns.step)
    )
    image_mix = linear_weights(num_grid, num_stored, step=steps[through])
    envelope = np.moveaxis(body.inside_IJK, (through, *in_plane), (0, 1, 2))
    of_row, of_column = ((steps[d] / body.steps[d], body.inside_IJK.shape[d]) for d in in_plane)
    bodies = _Planes(envelope, rows.weights(of_row[1], of_row[0]), columns.weights(of_column[1], of_column[0]))
    body_mix = linear_weights(num_grid, envelope.shape[0], step=steps[through] / body.steps[through])
    nearest = _NearestLabels(labels, (through, *in_plane), rows, columns, num_grid, steps[through])

    def above_offset(plane: np.ndarray) -> np.ndarray:
        return volume.values(plane) - np.float32(grey.offset)

    for index in range(slice_stride // 2, num_grid, slice_stride):
        image = grey.to_uint8(images.mixed(image_mix, index, above_offset))
        mask = nearest.at(index)
        mask[(mask == 0) & (bodies.mixed(body_mix, index, np.asarray) >= 0.5)] = body_id
        affine, spacing = _placed(volume.affine, (through, *in_plane), index * steps[through], rows, columns)
        yield Slice(image, mask, index, spacing, affine)


def _fit_of(fit: str, axis: str) -> str:
    if fit == "auto":
        return "crop" if axis == "axial" else "pad"
    return fit


def _lines(shape: tuple[int, ...], steps: np.ndarray, in_plane: list[int], size: int, fit: str) -> tuple[_Line, _Line]:
    num_grid = {d: num_resampled(shape[d], steps[d]) for d in in_plane}
    length = (min if fit == "crop" else max)(num_grid.values())
    rows, columns = (
        _Line(shape[d], steps[d], num_grid[d], (num_grid[d] - length) // 2, length, size) for d in in_plane
    )
    return rows, columns


class _Planes:
    """Stored planes brought to size x size, each once, while slices that lie between them are made in order."""

    def __init__(
        self, planes: np.ndarray, row_weights: scipy.sparse.csr_array, column_weights: scipy.sparse.csr_array
    ) -> None:
        self._planes, self._rows, self._columns = planes, row_weights, column_weights
        self._ready: dict[int, np.ndarray] = {}

    def mixed(self, mix: scipy.sparse.csr_array, index: int, value: Any) -> np.ndarray:
        """Row `index` of `mix` times the planes: float32 [size, size]."""
        taps = slice(mix.indptr[index], mix.indptr[index + 1])
        wanted, weights = mix.indices[taps], mix.data[taps]
        self._ready = {i: plane for i, plane in self._ready.items() if i >= wanted.min()}
        total = np.zeros((self._rows.shape[0], self._columns.shape[0]), dtype=np.float32)
        for i, weight in zip(wanted.tolist(), weights, strict=True):
            if i not in self._ready:
                self._ready[i] = (self._columns @ (self._rows @ value(self._planes[i])).T).T
            total += weight * self._ready[i]
        return total


class _NearestLabels:
    """Label slices, nearest neighbour; all background where there are no labels."""

    def __init__(
        self,
        labels: Volume | None,
        dimensions: tuple[int, ...],
        rows: _Line,
        columns: _Line,
        num_grid: int,
        step: float,
    ) -> None:
        self._planes = None if labels is None else np.moveaxis(labels.voxels_IJK, dimensions, (0, 1, 2))
        (self._row, row_inside), (self._column, column_inside) = rows.nearest(), columns.nearest()
        self._outside = ~np.outer(row_inside, column_inside)
        self._through = (
            np.zeros(0) if self._planes is None else nearest_elements(num_grid, len(self._planes), step=step)
        )

    def at(self, index: int) -> np.ndarray:
        """uint8 [size, size], fresh."""
        if self._planes is None:
            return np.zeros(self._outside.shape, dtype=np.uint8)
        mask = self._planes[self._through[index]][np.ix_(self._row, self._column)]
        mask[self._outside] = 0
        return mask


def _placed(
    affine: np.ndarray, dimensions: tuple[int, ...], through_index: float, rows: _Line, columns: _Line
) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Affine from (row, column, 0, 1) to RAS mm, flattened, and the distances between rows and between columns."""
    through, row, column = dimensions
    to_stored = np.zeros((4, 4))
    to_stored[3, 3] = 1.0
    to_stored[through, 3] = through_index
    to_stored[through, 2] = 1.0
    to_stored[row, 3], to_stored[row, 0] = rows.stored_index()
    to_stored[column, 3], to_stored[column, 1] = columns.stored_index()
    placed = affine @ to_stored
    spacing = np.linalg.norm(placed[:3, :2], axis=0)
    return tuple(placed.ravel().tolist()), (float(spacing[0]), float(spacing[1]))
