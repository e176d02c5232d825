"""The grid of a patient on which the anatomy is drawn: grey values with partial volume, texture strength and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_shards.labels import AMOS, AMOS_TO_WHOLEBODY, WHOLEBODY
from data_shards.phantom.patient import Box, Grid, Patient
from data_shards.phantom.shapes import Points, intersection

# Width over which one tissue fades into the next: about an in-plane voxel, as a scanner's point spread does.
_EDGE_MM = 3.0
# Fat between neighbouring organs, unless they also touch in a body.
GAP_MM = 5.0
# Organs end where an axial section falls below this share of the widest one, within these areas. They are blunter than
# in life, so that their first and last slices can be distinguished from their neighbours on coarse grids.
_END_SHARE = 0.25
_END_RANGE_MM2 = (150.0, 500.0)
# Larger than any gap, so that parts trimmed off an organ leave no hole in its neighbours.
_OUTSIDE_MM = 20.0
_FAR_MM = 1e3

Corner = tuple[float, float, float]


@dataclass(frozen=True)
class Tissue:
    """Mean grey value and the standard deviation of its smooth texture: HU for CT, relative signal for MR."""

    value: float
    texture: float


class Canvas:
    """Draws solids over one another. `image` and `texture` float32, `labels` uint8, all [X, Y, Z] in RAS order;
    `wholebody`, if it is asked for, also uint8: the class of every voxel of the patient, in the whole-body table's
    ids."""

    def __init__(self, grid: Grid, patient: Patient, tissues: Mapping[str, Tissue], *, wholebody: bool = False) -> None:
        self.grid, self.patient, self.tissues = grid, patient, tissues
        self.points = grid.reference_points(patient)
        air = tissues["air"]
        self.image = np.full(grid.shape, air.value, np.float32)
        self.texture = np.full(grid.shape, air.texture, np.float32)
        self.labels = np.zeros(grid.shape, np.uint8)
        self.wholebody = np.zeros(grid.shape, np.uint8) if wholebody else None
        self.organ_distance = np.full(grid.shape, _FAR_MM, np.float32)
        self._placed: dict[int, tuple[Box, np.ndarray]] = {}

    @property
    def whole(self) -> Box:
        """The box of the whole volume."""
        x, y, z = self.grid.shape
        return slice(0, x), slice(0, y), slice(0, z)

    def box(self, low_mm: Corner, high_mm: Corner) -> Box:
        """Voxels that a reference box may reach."""
        return self.grid.box(self.patient, low_mm, high_mm)

    def at(self, box: Box) -> Points:
        """Reference coordinates of a box's voxels."""
        x, y, z = self.points
        return x[box], y[box], z[box]

    def paint(self, tissue: str, box: Box, distance_mm: np.ndarray, part: str | None = None) -> None:
        """Cover the inside of `distance_mm` (shape of the box) with a tissue, blended at the edge. `part`: its class in
        `wholebody`, which stays unchanged without one."""
        if distance_mm.size == 0:
            return
        if part is not None:
            self.name(part, box, distance_mm < 0.0)
        cover = np.clip(0.5 - distance_mm * (1.0 / _EDGE_MM), 0.0, 1.0)
        values = self.tissues[tissue]
        for field, value in ((self.image, values.value), (self.texture, values.texture)):
            voxels = field[box]
            voxels += cover * (value - voxels)

    def name(self, part: str, box: Box, inside: np.ndarray) -> None:
        """Set the whole-body class of a part of a box; {side} in its name becomes right or left."""
        if self.wholebody is None:
            return
        voxels = self.wholebody[box]
        if "{side}" in part:
            is_right = self.points[0][box] > 0.0
            voxels[inside & is_right] = WHOLEBODY.names.index(part.format(side="right"))
            voxels[inside & ~is_right] = WHOLEBODY.names.index(part.format(side="left"))
        else:
            voxels[inside] = WHOLEBODY.names.index(part)

    def solid(self, tissue: str, low_mm: Corner, high_mm: Corner, shape: Callable[[Points], np.ndarray]) -> None:
        """Draw an unlabelled solid inside a reference box."""
        box = self.box(low_mm, high_mm)
        self.paint(tissue, box, shape(self.at(box)))

    def organ(
        self, label: int, tissue: str, box: Box, distance_mm: np.ndarray, *, touching: tuple[int, ...] = ()
    ) -> np.ndarray:
        """Place an organ: cut it GAP_MM clear of those placed before (0 for `touching` ones), draw and label it.

        Returns its final distance over the box, from which its wall, contents and vessels can be drawn.
        """
        for other, (other_box, other_distance) in self._placed.items():
            mine, theirs = _overlap(box, other_box)
            if mine is None or theirs is None:
                continue
            gap = 0.0 if other in touching else GAP_MM
            distance_mm[mine] = intersection(distance_mm[mine], gap - other_distance[theirs])
        self._trim(distance_mm)
        self._placed[label] = (box, distance_mm)
        self.paint(tissue, box, distance_mm, self._part_of(label))
        np.minimum(self.organ_distance[box], distance_mm, out=self.organ_distance[box])
        self.labels[box][distance_mm < 0.0] = label
        return distance_mm

    def _part_of(self, label: int) -> str:
        """An organ's class in the whole-body table. That table has no uterus: it is muscle there, as it is in life."""
        if AMOS.names[label] == "prostate_uterus" and self.patient.is_female:
            return "muscle"
        return WHOLEBODY.names[AMOS_TO_WHOLEBODY[label]]

    def _trim(self, distance_mm: np.ndarray) -> None:
        """Keep an organ's largest piece and blunt its ends, in place, so that no small rest is left in a single
        slice."""
        inside = distance_mm < 0.0
        if not inside.any():
            return
        pieces, count = ndimage.label(inside)
        if count > 1:
            distance_mm[inside & (pieces != 1 + np.argmax(np.bincount(pieces.ravel())[1:]))] = _OUTSIDE_MM
        areas_mm2 = (distance_mm < 0.0).sum((0, 1)) * (self.grid.spacing_mm[0] * self.grid.spacing_mm[1])
        least_mm2 = np.clip(_END_SHARE * areas_mm2.max(), *_END_RANGE_MM2)
        ends = distance_mm[:, :, areas_mm2 < least_mm2]
        distance_mm[:, :, areas_mm2 < least_mm2] = np.maximum(ends, _OUTSIDE_MM)


def _overlap(a: Box, b: Box) -> tuple[Box, Box] | tuple[None, None]:
    starts = [max(s.start, t.start) for s, t in zip(a, b, strict=True)]
    stops = [min(s.stop, t.stop) for s, t in zip(a, b, strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None, None
    in_a, in_b = (
        tuple(slice(start - s.start, stop - s.start) for start, stop, s in zip(starts, stops, box, strict=True))
        for box in (a, b)
    )
    return in_a, in_b  # type: ignore[return-value]
