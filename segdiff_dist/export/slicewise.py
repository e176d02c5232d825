"""Images of a label volume, slice by slice: cut as `segdiff prepare` cuts, generated, put back on the volume's voxels.

Dimensions: I, J, K canonical (right, anterior, superior); S slices generated; H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.ingest.body import BodyField
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.slices import Cutting, Slice, cut
from data_shards.ingest.volumes import Volume, linear_weights
from data_shards.labels import LabelTable

if TYPE_CHECKING:
    import scipy.sparse

# uint8 [S, H, W] images of masks [S, H, W] with these slice indices; with one noise for all of them or not.
Generate = Callable[[np.ndarray, list[int], bool], np.ndarray]


@dataclass(frozen=True)
class SlicePlacement:
    """Where generated slices are among the stored voxels of a canonical volume, by the slices' own affines.

    view: canonical dimension through the slices, down the rows, along the columns. rows, columns: stored index of pixel
    0, and its increment for a pixel. through_S: stored index of each slice, rising.
    """

    view: tuple[int, int, int]
    rows: tuple[float, float]
    columns: tuple[float, float]
    through_S: np.ndarray

    @classmethod
    def of(cls, volume: Volume, slices: list[Slice], first_pixel: int) -> SlicePlacement:
        """The geometry of slices of `volume` that are cropped to the pixels from `first_pixel` on."""
        from_mm = np.linalg.inv(volume.affine)
        to_stored = from_mm @ np.array(slices[0].affine).reshape(4, 4)
        row, column = (int(np.abs(to_stored[:3, c]).argmax()) for c in (0, 1))
        through = 3 - row - column
        start = to_stored[:3, 3] + first_pixel * (to_stored[:3, 0] + to_stored[:3, 1])
        at_S = [(from_mm @ np.array(one.affine).reshape(4, 4))[through, 3] for one in slices]
        steps = (float(to_stored[row, 0]), float(to_stored[column, 1]))
        return cls((through, row, column), (start[row], steps[0]), (start[column], steps[1]), np.array(at_S))

    def between(self, plane: int) -> list[tuple[int, float]]:
        """The slices for stored plane `plane`, with their weights: the nearest one if slices are closer than planes, as
        labels are resampled; else the two beside it."""
        if len(self.through_S) < 2 or self.through_S[1] - self.through_S[0] <= 1.0:
            return [(int(np.abs(self.through_S - plane).argmin()), 1.0)]
        above = int(np.searchsorted(self.through_S, plane - 1e-6))
        if above == 0 or above == len(self.through_S):
            return [(min(above, len(self.through_S) - 1), 1.0)]
        low, high = self.through_S[above - 1 : above + 1]
        share = float((plane - low) / (high - low))
        return [(above, 1.0)] if share > 1 - 1e-6 else [(above - 1, 1.0 - share), (above, share)]

    def needed(self, num_planes: int) -> list[int]:
        """The slices that any plane uses; the others need not be generated."""
        return sorted({index for plane in range(num_planes) for index, _ in self.between(plane)})

    def back(self, image_of: dict[int, np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """float32 [I, J, K] by linear interpolation, by area where pixels shrink, 0 where there is no pixel; and bool
        [I, J, K] broadcast, where there is one."""
        through, row, column = self.view
        size = len(next(iter(image_of.values())))
        rows, columns = _weights(self.rows, shape[row], size), _weights(self.columns, shape[column], size)
        planes = np.empty((shape[through], shape[row], shape[column]), np.float32)
        for k in range(len(planes)):
            mixed_HW = sum(np.float32(weight) * image_of[index] for index, weight in self.between(k))
            planes[k] = (columns @ (rows @ mixed_HW).T).T
        shown = np.outer(np.diff(rows.indptr) > 0, np.diff(columns.indptr) > 0)
        order = np.argsort(self.view)
        return planes.transpose(order), np.broadcast_to(shown, planes.shape).transpose(order)

    def labels_back(self, labels_of: dict[int, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """uint8 [I, J, K]: the label of the nearest pixel of the nearest slice, 0 where there is no pixel."""
        through, row, column = self.view
        size = len(next(iter(labels_of.values())))
        at_rows, at_columns = _nearest(self.rows, shape[row], size), _nearest(self.columns, shape[column], size)
        planes = np.zeros((shape[through], shape[row], shape[column]), np.uint8)
        inside = np.ix_(np.flatnonzero(at_rows >= 0), np.flatnonzero(at_columns >= 0))
        pixels = np.ix_(at_rows[at_rows >= 0], at_columns[at_columns >= 0])
        for k in range(len(planes)):
            nearest = max(self.between(k), key=lambda one: one[1])[0]
            planes[k][inside] = labels_of[nearest][pixels]
        return planes.transpose(np.argsort(self.view))


@dataclass(frozen=True)
class CutMask:
    """The slices of a label volume that its planes need: uint8 [S, H, W] masks, their slice indices, their place."""

    mask_SHW: np.ndarray
    indices: list[int]
    place: SlicePlacement
    needed: list[int]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, labels: Volume, how: Cutting, model_size: int, body: BodyField | None = None) -> CutMask:
        """Cut by `how`; of the slices the model gets the central `model_size` pixels. `body`: the patient's voxels,
        which fill what no organ does; without it the mask stays as it is."""
        if body is None:
            body = BodyField(np.broadcast_to(np.float32(0), labels.voxels_IJK.shape), np.ones(3))
        # There is no image. The label ids are passed in its place, and the grey values of the result are not used.
        slices = list(cut(labels, labels, body, GreyMap(1.0, 0.0), how))
        first = (how.size - model_size) // 2
        place, shape = SlicePlacement.of(labels, slices, first), labels.voxels_IJK.shape
        needed = place.needed(shape[place.view[0]])
        window = slice(first, first + model_size)
        mask_SHW = np.stack([slices[s].mask_HW[window, window] for s in needed])
        return cls(mask_SHW, [slices[s].slice_index for s in needed], place, needed, shape)

    def back(self, image_SHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [I, J, K] grey values of the images on the volume's voxels, and bool [I, J, K], where there are
        any."""
        return self.place.back(dict(zip(self.needed, image_SHW, strict=True)), self.shape)

    def labels_back(self, labels_SHW: np.ndarray) -> np.ndarray:
        """uint8 [I, J, K]: labels of the slices, uint8, on the volume's voxels."""
        return self.place.labels_back(dict(zip(self.needed, labels_SHW, strict=True)), self.shape)


def cutting(preprocessing: Mapping[str, Any], axis: str, table: LabelTable) -> Cutting:
    """Every slice along an axis, as those of a set with this preprocessing were cut."""
    defaults = PrepareConfig()
    names = ("size", "spacing_mm", "fit", "mask_resize")
    how = {name: preprocessing.get(name, getattr(defaults, name)) for name in names}
    return Cutting(axis=axis, slice_stride=1, body_id=table.body_id or 0, **how)


def values_of(grey_IJK: np.ndarray, grey: GreyMap) -> np.ndarray:
    """int16: the values that grey values mean, HU for CT."""
    return np.rint(grey_IJK * np.float32(grey.scale) + np.float32(grey.offset)).astype(np.int16)


def _nearest(pixels: tuple[float, float], num_stored: int, size: int) -> np.ndarray:
    """int64 [num_stored]: the pixel nearest to each stored voxel of a dimension; -1 if there is none."""
    start, step = pixels
    pixel = np.rint((np.arange(num_stored) - start) / step).astype(np.int64)
    return np.where((pixel >= 0) & (pixel < size), pixel, -1)


def _weights(pixels: tuple[float, float], num_stored: int, size: int) -> scipy.sparse.csr_array:
    """[num_stored, size]: the pixels that make each stored voxel of a dimension; an empty row if there is none."""
    start, step = pixels
    first = 0 if step > 0 else num_stored - 1
    with np.errstate(invalid="ignore"):  # voxels without a pixel near them have weights of 0 / 0, which become 0
        weights = linear_weights(num_stored, size, step=abs(1.0 / step), start=(first - start) / step)
    return weights if step > 0 else weights[::-1].tocsr()
