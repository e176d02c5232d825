"""Label maps of slices: the nearest label, or the class with the largest share of a pixel, and its soft edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_shards.ingest.resampling import Line, Resampling, Stack
from data_shards.ingest.volumes import nearest_elements

if TYPE_CHECKING:
    import scipy.sparse

# Shares are sums of a few dozen float32 products; with a smaller difference than this they count as equal.
_EQUAL_SHARES = 1e-5


class NearestLabels:
    """Label slices, nearest neighbour; all background if there are no labels."""

    def __init__(
        self,
        ids_IJK: np.ndarray | None,
        view: tuple[int, int, int],
        lines: tuple[Line, Line],
        num_grid: int,
        step: float,
    ) -> None:
        self._planes = None if ids_IJK is None else Stack(ids_IJK, view)
        (row_pixels, rows), (column_pixels, columns) = (line.nearest() for line in lines)
        self._pixels, self._voxels = (row_pixels, column_pixels), np.ix_(rows, columns)
        self._shape = (lines[0].size, lines[1].size)
        self._through = (
            np.zeros(0) if self._planes is None else nearest_elements(num_grid, len(self._planes), step=step)
        )

    def at(self, index: int) -> np.ndarray:
        """uint8 [size, size], a new array."""
        mask = np.zeros(self._shape, dtype=np.uint8)
        if self._planes is not None:
            mask[self._pixels] = self._planes[self._through[index]][self._voxels]
        return mask


@dataclass(frozen=True)
class FilledMasks:
    """Masks whose pixels have one class each; unlabelled parts of the body become `body_id`."""

    labels: Callable[[int], np.ndarray]
    body_id: int

    def at(self, index: int, inside_HW: np.ndarray) -> tuple[np.ndarray, None]:
        """uint8 ids [size, size]; no edge."""
        mask_HW = self.labels(index)
        mask_HW[(mask_HW == 0) & (inside_HW >= 0.5)] = self.body_id
        return mask_HW, None


_Box = tuple[slice, slice]
_Shares = dict[int, tuple[_Box, np.ndarray]]


class SoftMasks:
    """Masks of the classes with the largest shares: each class is resampled as if it were an image of ones and zeros.

    Only classes that occur in a plane are computed, each in its box there.
    """

    def __init__(
        self,
        ids_IJK: np.ndarray | None,
        view: tuple[int, int, int],
        resampling: Resampling,
        body_id: int,
        soft_edge: bool,
    ) -> None:
        self._planes = None if ids_IJK is None else Stack(ids_IJK, view)
        self._resampling, self._body_id, self._soft_edge = resampling, body_id, soft_edge
        self._row_reach, self._column_reach = _reach(resampling.rows), _reach(resampling.columns)
        self._ready: dict[int, _Shares] = {}

    def at(self, index: int, inside_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 ids [size, size], and the edge as in Slice if it is wanted.

        The share of `body` is that of the envelope minus the labels; the share of the background is the rest.
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
    """First and last pixel to which each input element contributes; (number of pixels, -1) if there is none."""
    num_pixels, num_in = weights.shape
    pixel = np.repeat(np.arange(num_pixels), np.diff(weights.indptr))
    first, last = np.full(num_in, num_pixels), np.full(num_in, -1)
    np.minimum.at(first, weights.indices, pixel)
    np.maximum.at(last, weights.indices, pixel)
    return first, last


def _part(
    weights: scipy.sparse.csr_array, reach: tuple[np.ndarray, np.ndarray], found: slice
) -> tuple[scipy.sparse.csr_array, slice, slice] | None:
    """The weights of the pixels to which the elements `found` contribute, the elements that these pixels need, and the
    pixels; None if there is no such pixel."""
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
    """The id with the largest share of each pixel, the lower id of equal shares; and Slice.edge_2HW if it is wanted."""
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
