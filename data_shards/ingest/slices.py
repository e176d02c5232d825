"""Volumes to slices, shown the radiological way: the patient's right on the image's left, front and head up.

axial     rows from anterior to posterior, columns from the patient's right to left
coronal   rows from head to feet,          columns from the patient's right to left
sagittal  rows from head to feet,          columns from anterior to posterior
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.ingest.body import BodyField
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.mask_slices import FilledMasks, NearestLabels, SoftMasks
from data_shards.ingest.resampling import Line, Planes, Resampling
from data_shards.ingest.volumes import Volume, num_resampled

# Canonical dimension (0 I right, 1 J anterior, 2 K superior) that runs through the slices, down the rows and along the
# columns. Rows and columns all run against their canonical dimension.
VIEWS = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}


@dataclass(frozen=True)
class Slice:
    """One slice, size x size: uint8 or uint16 grey values and uint8 label ids, and its place in the volume
    (records.SliceMeta).

    edge_2HW, with soft edges: uint8, [0] the id of the class with the second largest share of the pixel, [1] the share
    of mask_HW's class; 255 is the whole pixel, and then [0] is 0.
    """

    image_HW: np.ndarray
    mask_HW: np.ndarray
    slice_index: int
    spacing_mm: tuple[float, float]
    affine: tuple[float, ...]
    edge_2HW: np.ndarray | None = None


def num_slices(shape: Sequence[int], spacing_mm: np.ndarray, axis: str, grid_mm: float) -> int:
    """Slices along `axis` of a volume of canonical `shape` and spacing, resampled to `grid_mm`: `cut` numbers them from
    0 and gives every slice_stride-th, from slice_stride // 2 on."""
    through = VIEWS[axis][0]
    return num_resampled(shape[through], grid_mm / float(spacing_mm[through]))


@dataclass(frozen=True)
class Cutting:
    """How a volume is cut: every `slice_stride`-th slice along `axis` of the volume resampled to `spacing_mm`, resized
    to size x size; or those of `indices`, in rising order.

    Images are interpolated linearly, and reduced by area; labels by `mask_resize`, soft_edge only with `soft`.
    `body_id` fills unlabelled parts of the body. fit `crop` keeps the middle square of the short side. `pad` shows all,
    in a square of the long side, with the lowest grey around. `auto` crops axial slices and pads the others, in which
    cropping would cut the body. `least_mm`: the square's side is at least this; a smaller volume is in its middle.
    """

    axis: str
    size: int
    spacing_mm: float
    slice_stride: int
    fit: str
    body_id: int
    mask_resize: str = "nearest"
    soft_edge: bool = False
    indices: Sequence[int] | None = None
    least_mm: float = 0.0

    def __post_init__(self) -> None:
        assert self.mask_resize == "soft" or not self.soft_edge, "soft edges need soft masks"


def cut(volume: Volume, labels: Volume | None, body: BodyField, grey: GreyMap, how: Cutting) -> Iterator[Slice]:
    """The slices of a volume, with the labels' masks. Values are clipped last, so a grey value is that of the
    resampled volume."""
    view = VIEWS[how.axis]
    steps = how.spacing_mm / volume.spacing_mm
    least = round(how.least_mm / how.spacing_mm)
    lines = _lines(volume.voxels_IJK.shape, steps, view, how.size, _fit_of(how.fit, how.axis), least)
    num_grid = num_slices(volume.voxels_IJK.shape, volume.spacing_mm, how.axis, how.spacing_mm)
    of_voxels = Resampling.of(volume.voxels_IJK.shape, steps, view, lines, num_grid)
    images = Planes(volume.voxels_IJK, view, of_voxels)
    bodies = Planes(
        body.inside_IJK, view, Resampling.of(body.inside_IJK.shape, steps / body.steps, view, lines, num_grid)
    )
    ids = None if labels is None else labels.voxels_IJK
    masks: SoftMasks | FilledMasks
    if how.mask_resize == "soft":
        masks = SoftMasks(ids, view, of_voxels, how.body_id, how.soft_edge)
    elif how.mask_resize == "nearest" or ids is None:
        masks = FilledMasks(NearestLabels(ids, view, lines, num_grid, steps[view[0]]).at, how.body_id)
    else:
        numbers = Planes(ids, view, of_voxels)
        masks = FilledMasks(lambda k: np.rint(numbers.mixed(k, _as_float32)).astype(np.uint8), how.body_id)

    def above_offset(plane: np.ndarray) -> np.ndarray:
        values = volume.values(plane)
        values -= np.float32(grey.offset)
        return values

    every = range(how.slice_stride // 2, num_grid, how.slice_stride)
    for index in every if how.indices is None else how.indices:
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
    shape: tuple[int, ...], steps: np.ndarray, view: tuple[int, int, int], size: int, fit: str, least: int
) -> tuple[Line, Line]:
    num_grid = {d: num_resampled(shape[d], steps[d]) for d in view[1:]}
    length = max(least, (min if fit == "crop" else max)(num_grid.values()))
    rows, columns = (Line(shape[d], steps[d], num_grid[d], (num_grid[d] - length) // 2, length, size) for d in view[1:])
    return rows, columns


def _placed(
    affine: np.ndarray, dimensions: tuple[int, ...], through_index: float, rows: Line, columns: Line
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
