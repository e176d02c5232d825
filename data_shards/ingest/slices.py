"""Volumes to slices, shown the radiological way: the patient's right on the image's left, front and head up.

axial     rows from anterior to posterior, columns from the patient's right to left
coronal   rows from head to feet,          columns from the patient's right to left
sagittal  rows from head to feet,          columns from anterior to posterior
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_shards.ingest.body import BodyField
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.volumes import Volume, linear_weights, nearest_elements, num_resampled

if TYPE_CHECKING:
    import scipy.sparse

# Canonical dimension (0 I right, 1 J anterior, 2 K superior) that runs through the slices, down the rows and along the
# columns. Rows and columns all run against their canonical dimension.
_VIEWS = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
FITS = ("auto", "crop", "pad")
# nearest: the nearest voxel's id. soft: every class resampled like an image, the largest share wins. bilinear_ids: id
# numbers resampled like grey values and rounded, as the paper's code does; invents classes at borders.
MASK_RESIZES = ("nearest", "soft", "bilinear_ids")
# Of every processor that this runs on.
_CACHE_LINE_BYTES = 64
# Shares are sums of a few dozen float32 products; nearer than this they count as equal.
_EQUAL_SHARES = 1e-5


@dataclass(frozen=True)
class Slice:
    """One slice, size x size: uint8 or uint16 grey values and uint8 label ids, with where it lies (records.SliceMeta).

    edge_2HW, with soft edges: uint8, [0] the id of the class with the second largest share of the pixel, [1] the share
    that mask_HW's class has, 255 being all of it; where it has all, [0] is 0.
    """

    image_HW: np.ndarray
    mask_HW: np.ndarray
    slice_index: int
    spacing_mm: tuple[float, float]
    affine: tuple[float, ...]
    edge_2HW: np.ndarray | None = None


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

    def nearest(self) -> tuple[slice, np.ndarray]:
        """The pixels that lie inside the volume, and the stored voxel of each, int64."""
        shown = self.first + np.floor((np.arange(self.size) + 0.5) * self.pixel).astype(np.int64)
        inside = np.flatnonzero((shown >= 0) & (shown < self.num_grid))
        voxels = nearest_elements(self.num_grid, self.num_stored, step=self.step)
        return slice(inside[0], inside[-1] + 1), voxels[self.num_grid - 1 - shown[inside]]

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
    mask_resize: str = "nearest",
    soft_edge: bool = False,
) -> Iterator[Slice]:
    """Every `slice_stride`-th slice along `axis` of the volume resampled to `spacing_mm`, resized to size x size.

    Images are linear, by area where they shrink; labels as `mask_resize` says, soft_edge with `soft` only. `body_id`
    fills what of the body carries no label. fit `crop` keeps the middle square of the short side, `pad` shows all, in a
    square of the long side, with the lowest grey around; `auto` crops axial slices and pads the others, where cropping
    would cut the body. Values are clipped last, so a grey value is that of the resampled volume.
    """
    assert mask_resize == "soft" or not soft_edge, "soft edges come of soft masks"
    view = _VIEWS[axis]
    steps = spacing_mm / volume.spacing_mm
    lines = _lines(volume.voxels_IJK.shape, steps, view, size, _fit_of(fit, axis))
    num_grid = num_resampled(volume.voxels_IJK.shape[view[0]], steps[view[0]])
    of_voxels = _Resampling.of(volume.voxels_IJK.shape, steps, view, lines, num_grid)
    images = _Planes(volume.voxels_IJK, view, of_voxels)
    bodies = _Planes(
        body.inside_IJK, view, _Resampling.of(body.inside_IJK.shape, steps / body.steps, view, lines, num_grid)
    )
    ids = None if labels is None else labels.voxels_IJK
    masks: _SoftMasks | _FilledMasks
    if mask_resize == "soft":
        masks = _SoftMasks(ids, view, of_voxels, body_id, soft_edge)
    elif mask_resize == "nearest" or ids is None:
        masks = _FilledMasks(_NearestLabels(ids, view, lines, num_grid, steps[view[0]]).at, body_id)
    else:
        numbers = _Planes(ids, view, of_voxels)
        masks = _FilledMasks(lambda k: np.rint(numbers.mixed(k, _as_float32)).astype(np.uint8), body_id)

    def above_offset(plane: np.ndarray) -> np.ndarray:
        values = volume.values(plane)
        values -= np.float32(grey.offset)
        return values

    for index in range(slice_stride // 2, num_grid, slice_stride):
        image = grey.to_grey(images.mixed(index, above_offset))
        mask, edge = masks.at(index, bodies.mixed(index, np.asarray))
        affine, spacing = _placed(volume.affine, view, index * steps[view[0]], *lines)
        yield Slice(image, mask, index, spacing, affine, edge)


def _as_float32(plane: np.ndarray) -> np.ndarray:
    return plane.astype(np.float32)


def _fit_of(fit: str, axis: str) -> str:
    if fit == "auto":
        return "crop" if axis == "axial" else "pad"
    return fit


def _lines(
    shape: tuple[int, ...], steps: np.ndarray, view: tuple[int, int, int], size: int, fit: str
) -> tuple[_Line, _Line]:
    num_grid = {d: num_resampled(shape[d], steps[d]) for d in view[1:]}
    length = (min if fit == "crop" else max)(num_grid.values())
    rows, columns = (
        _Line(shape[d], steps[d], num_grid[d], (num_grid[d] - length) // 2, length, size) for d in view[1:]
    )
    return rows, columns


@dataclass(frozen=True)
class _Resampling:
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
        lines: tuple[_Line, _Line],
        num_grid: int,
    ) -> _Resampling:
        """For a volume of this shape, `steps` of whose elements lie between the points of the resampled volume."""
        through = linear_weights(num_grid, shape[view[0]], step=steps[view[0]])
        return cls(through, *(line.weights(shape[d], steps[d]) for line, d in zip(lines, view[1:], strict=True)))

    def taps(self, index: int) -> list[tuple[int, np.float32]]:
        """The planes that a slice lies between, each with its weight."""
        taps = slice(self.through.indptr[index], self.through.indptr[index + 1])
        return list(zip(self.through.indices[taps].tolist(), self.through.data[taps], strict=True))


class _Stack:
    """Planes of a volume along one dimension, fetched in order.

    Where neighbours in memory lie in neighbouring planes, a plane alone would take one voxel of each cache line. There
    a block of planes is copied as it lies, and the planes are taken from that while it is still in the cache.
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


class _Planes:
    """Stored planes brought to size x size, each once, while slices that lie between them are made in order."""

    def __init__(self, voxels_IJK: np.ndarray, view: tuple[int, int, int], resampling: _Resampling) -> None:
        self._planes, self._resampling = _Stack(voxels_IJK, view), resampling
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


class _NearestLabels:
    """Label slices, nearest neighbour; all background where there are no labels."""

    def __init__(
        self,
        ids_IJK: np.ndarray | None,
        view: tuple[int, int, int],
        lines: tuple[_Line, _Line],
        num_grid: int,
        step: float,
    ) -> None:
        self._planes = None if ids_IJK is None else _Stack(ids_IJK, view)
        (row_pixels, rows), (column_pixels, columns) = (line.nearest() for line in lines)
        self._pixels, self._voxels = (row_pixels, column_pixels), np.ix_(rows, columns)
        self._shape = (lines[0].size, lines[1].size)
        self._through = (
            np.zeros(0) if self._planes is None else nearest_elements(num_grid, len(self._planes), step=step)
        )

    def at(self, index: int) -> np.ndarray:
        """uint8 [size, size], fresh."""
        mask = np.zeros(self._shape, dtype=np.uint8)
        if self._planes is not None:
            mask[self._pixels] = self._planes[self._through[index]][self._voxels]
        return mask


@dataclass(frozen=True)
class _FilledMasks:
    """Masks whose pixels are one class each; what of the body carries no label becomes `body_id`."""

    labels: Callable[[int], np.ndarray]
    body_id: int

    def at(self, index: int, inside_HW: np.ndarray) -> tuple[np.ndarray, None]:
        """uint8 ids [size, size]; no edge."""
        mask_HW = self.labels(index)
        mask_HW[(mask_HW == 0) & (inside_HW >= 0.5)] = self.body_id
        return mask_HW, None


_Box = tuple[slice, slice]
_Shares = dict[int, tuple[_Box, np.ndarray]]


class _SoftMasks:
    """Masks of the classes with the largest shares: each class is resampled as if it were an image of ones and zeros.

    Only classes that a plane holds are touched, each in the box that holds it there.
    """

    def __init__(
        self,
        ids_IJK: np.ndarray | None,
        view: tuple[int, int, int],
        resampling: _Resampling,
        body_id: int,
        soft_edge: bool,
    ) -> None:
        self._planes = None if ids_IJK is None else _Stack(ids_IJK, view)
        self._resampling, self._body_id, self._soft_edge = resampling, body_id, soft_edge
        self._row_reach, self._column_reach = _reach(resampling.rows), _reach(resampling.columns)
        self._ready: dict[int, _Shares] = {}

    def at(self, index: int, inside_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 ids [size, size], and the edge as in Slice where it is wanted.

        The body has what of the envelope's share no label takes, the background what is then left.
        """
        everywhere = (slice(None), slice(None))
        shares = self._mixed(index)
        labelled_HW = np.zeros_like(inside_HW)
        for box, share in shares.values():
            labelled_HW[box] += share
        body_HW = np.maximum(inside_HW - labelled_HW, 0.0)
        if self._body_id in shares:
            box, share = shares[self._body_id]
            body_HW[box] += share
        shares[self._body_id] = (everywhere, body_HW)
        background_HW = np.maximum(1.0 - np.maximum(inside_HW, labelled_HW), 0.0)
        return _largest(background_HW, shares, self._soft_edge)

    def _mixed(self, index: int) -> _Shares:
        """Each class's share of the pixels of slice `index`, float32, in the box outside of which it has none."""
        if self._planes is None:
            return {}
        taps = self._resampling.taps(index)
        self._ready = {k: shares for k, shares in self._ready.items() if k >= taps[0][0]}
        for k, _ in taps:
            if k not in self._ready:
                self._ready[k] = self._of_plane(np.ascontiguousarray(self._planes[k]))
        mixed: _Shares = {}
        for label_id in sorted({label_id for k, _ in taps for label_id in self._ready[k]}):
            parts = [(weight, *self._ready[k][label_id]) for k, weight in taps if label_id in self._ready[k]]
            top, left = (min(box[d].start for _, box, _ in parts) for d in (0, 1))
            bottom, right = (max(box[d].stop for _, box, _ in parts) for d in (0, 1))
            total = np.zeros((bottom - top, right - left), dtype=np.float32)
            for weight, (rows, columns), share in parts:
                total[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] += weight * share
            mixed[label_id] = ((slice(top, bottom), slice(left, right)), total)
        return mixed

    def _of_plane(self, plane: np.ndarray) -> _Shares:
        from scipy import ndimage

        shares: _Shares = {}
        for label_id, found in enumerate(ndimage.find_objects(plane), start=1):
            if found is None:
                continue
            row_part = _part(self._resampling.rows, self._row_reach, found[0])
            column_part = _part(self._resampling.columns, self._column_reach, found[1])
            if row_part is None or column_part is None:
                continue
            (to_rows, from_rows, shown_rows), (to_columns, from_columns, shown_columns) = row_part, column_part
            is_class = (plane[from_rows, from_columns] == label_id).astype(np.float32)
            shares[label_id] = ((shown_rows, shown_columns), (to_columns @ (to_rows @ is_class).T).T)
        return shares


def _reach(weights: scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """First and last pixel that each input element takes part in; (number of pixels, -1) where there is none."""
    num_pixels, num_in = weights.shape
    pixel = np.repeat(np.arange(num_pixels), np.diff(weights.indptr))
    first, last = np.full(num_in, num_pixels), np.full(num_in, -1)
    np.minimum.at(first, weights.indices, pixel)
    np.maximum.at(last, weights.indices, pixel)
    return first, last


def _part(
    weights: scipy.sparse.csr_array, reach: tuple[np.ndarray, np.ndarray], found: slice
) -> tuple[scipy.sparse.csr_array, slice, slice] | None:
    """The weights of the pixels that the elements `found` take part in, the elements that these pixels need, and the
    pixels; None where no pixel shows them."""
    import scipy.sparse

    start, stop = int(reach[0][found].min()), int(reach[1][found].max()) + 1
    if start >= stop:
        return None
    entries = slice(weights.indptr[start], weights.indptr[stop])
    element, end = weights.indices[entries], weights.indptr[start : stop + 1] - weights.indptr[start]
    low, high = int(element.min()), int(element.max()) + 1
    part = scipy.sparse.csr_array((weights.data[entries], element - low, end), shape=(stop - start, high - low))
    return part, slice(low, high), slice(start, stop)


def _largest(background_HW: np.ndarray, shares: _Shares, with_edge: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The id with the largest share of each pixel, the lower one of equals; and Slice.edge_2HW where it is wanted."""
    most_HW, second_HW = background_HW, np.zeros_like(background_HW)
    mask_HW, second_id_HW = np.zeros((2, *background_HW.shape), dtype=np.uint8)
    for label_id, (box, share) in sorted(shares.items(), key=lambda item: item[0]):
        most, winner = most_HW[box], mask_HW[box]
        wins = share > most + _EQUAL_SHARES
        if with_edge:
            second, second_id = second_HW[box], second_id_HW[box]
            closer = wins | (share > second + _EQUAL_SHARES)
            np.copyto(second, np.where(wins, most, share), where=closer)
            np.copyto(second_id, np.where(wins, winner, np.uint8(label_id)), where=closer)
        np.copyto(most, share, where=wins)
        winner[wins] = label_id
    if not with_edge:
        return mask_HW, None
    share_HW = np.rint(255.0 * np.minimum(most_HW, 1.0)).astype(np.uint8)
    second_id_HW[share_HW == 255] = 0
    return mask_HW, np.stack((second_id_HW, share_HW))


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
