"""The linear maps from a volume to its slices: lines of pixels, and planes of voxels interpolated between slices.

scipy.ndimage.zoom and SimpleITK are not used: they resample a whole volume in memory, and by points. Here slices are
made one at a time, images are reduced by area, and image, mask shares and envelope have the same weights.
Dimensions: I, J, K as in volumes.py; H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_shards.ingest.volumes import linear_weights, nearest_elements

if TYPE_CHECKING:
    import scipy.sparse

# True for every processor that this runs on.
_CACHE_LINE_BYTES = 64


@dataclass(frozen=True)
class Line:
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
        """[size, num_in] from an input whose elements are on every 1 / `step`-th grid point, zero outside of it."""
        window = (self.first, self.first + self.length)
        start = self.first + 0.5 * self.pixel - 0.5
        shown = linear_weights(self.size, self.num_grid, step=self.pixel, start=start, window=window)
        return (shown[:, ::-1] @ linear_weights(self.num_grid, num_in, step=step)).tocsr()

    def nearest(self) -> tuple[slice, np.ndarray]:
        """The pixels that are inside the volume, and the stored voxel of each, int64. A volume that is so thin that no
        pixel's centre is inside appears in the pixel that holds its middle."""
        shown = self.first + np.floor((np.arange(self.size) + 0.5) * self.pixel).astype(np.int64)
        inside = np.flatnonzero((shown >= 0) & (shown < self.num_grid))
        if len(inside) == 0:
            middle = self.num_grid // 2
            inside = np.array([int((middle - self.first + 0.5) / self.pixel)])
            shown[inside] = middle
        voxels = nearest_elements(self.num_grid, self.num_stored, step=self.step)
        return slice(inside[0], inside[-1] + 1), voxels[self.num_grid - 1 - shown[inside]]

    def stored_index(self) -> tuple[float, float]:
        """Stored voxel index of pixel 0, and its increment from one pixel to the next."""
        start = self.first + 0.5 * self.pixel - 0.5
        return (self.num_grid - 1 - start) * self.step, -self.pixel * self.step


@dataclass(frozen=True)
class Resampling:
    """From the elements of a volume to the pixels of its slices, as sparse matrices: [slices, planes], [size, rows of a
    plane] and [size, columns of a plane]."""

    through: scipy.sparse.csr_array
    rows: scipy.sparse.csr_array
    columns: scipy.sparse.csr_array

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        steps: np.ndarray,
        view: tuple[int, int, int],
        lines: tuple[Line, Line],
        num_grid: int,
    ) -> Resampling:
        """For a volume of this shape; the points of the resampled volume are `steps` of its elements apart."""
        through = linear_weights(num_grid, shape[view[0]], step=steps[view[0]])
        return cls(through, *(line.weights(shape[d], steps[d]) for line, d in zip(lines, view[1:], strict=True)))

    def taps(self, index: int) -> list[tuple[int, np.float32]]:
        """The planes on either side of a slice, each with its weight."""
        taps = slice(self.through.indptr[index], self.through.indptr[index + 1])
        return list(zip(self.through.indices[taps].tolist(), self.through.data[taps], strict=True))


class Stack:
    """Planes of a volume along one dimension, fetched in order.

    If neighbours in memory are in neighbouring planes, a single plane would use one voxel of each cache line. Then a
    block of planes is copied in its memory order, and the planes are taken from the copy while it is still in the
    cache.
    """

    def __init__(self, voxels_IJK: np.ndarray, view: tuple[int, int, int]) -> None:
        self._planes = voxels_IJK.transpose(view)
        strides = np.abs(self._planes.strides)
        line = _CACHE_LINE_BYTES // self._planes.itemsize
        self._block_planes = line if strides[0] < strides[1:].min() else 1
        self._first, self._block = -1, self._planes[:0]

    def __len__(self) -> int:
        return len(self._planes)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._block_planes == 1:
            return self._planes[index]
        first = index - index % self._block_planes
        if first != self._first:
            self._first, self._block = first, self._planes[first : first + self._block_planes].copy(order="K")
        return self._block[index - first]


class Planes:
    """Stored planes resampled to size x size, each once, while the slices between them are made in order."""

    def __init__(self, voxels_IJK: np.ndarray, view: tuple[int, int, int], resampling: Resampling) -> None:
        self._planes, self._resampling = Stack(voxels_IJK, view), resampling
        self._ready: dict[int, np.ndarray] = {}

    def mixed(self, index: int, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Slice `index` of the resampled volume: float32 [size, size]."""
        rows, columns = self._resampling.rows, self._resampling.columns
        taps = self._resampling.taps(index)
        self._ready = {k: plane for k, plane in self._ready.items() if k >= taps[0][0]}
        total = np.zeros((columns.shape[0], rows.shape[0]), dtype=np.float32)
        for k, weight in taps:
            if k not in self._ready:
                self._ready[k] = columns @ (rows @ value(self._planes[k])).T
            total += weight * self._ready[k]
        return np.ascontiguousarray(total.T)
