"""One patient: size, shape, pose, missing organs; and the voxel grid of the image.

Two frames, both in mm and RAS (+x patient right, +y anterior, +z superior): `reference`, in which the anatomy is
laid out once for everybody (origin on the midline, level with the navel), and `scan`, the world of the volume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_shards.labels import AMOS
from data_shards.phantom.config import PhantomConfig
from data_shards.phantom.shapes import Points

Box = tuple[slice, slice, slice]

# The reference patient from pelvic floor to heart, and the level at which a scan without pelvis ends.
Z_BOTTOM_MM, Z_TOP_MM = -160.0, 134.0
Z_ABOVE_PELVIS_MM = -72.0
_WARP_TERMS = 3
_WARP_AMPLITUDE_MM = 2.6
# Distance by which the warp and the smooth unions may move a shape out of its reference box.
_BOX_MARGIN_MM = 16.0


@dataclass(frozen=True)
class Patient:
    """The differences between patients. `scale` is along x, y, z; `rotation` maps reference to scan directions; `warp`
    holds, for each of x, y, z, rows of (amplitude mm, wave numbers 1/mm [3], phases [3])."""

    scale: np.ndarray
    rotation: np.ndarray
    warp: np.ndarray
    organ_shift_mm: np.ndarray
    organ_scale: np.ndarray
    fat_mm: float
    vertebra_phase_mm: float
    is_female: bool
    missing: frozenset[str]
    has_pelvis: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, config: PhantomConfig, *, complete: bool) -> Patient:
        """A patient from `rng`; a `complete` one has every organ. The same number of draws is made either way."""
        size = rng.uniform(0.99, 1.06)
        scale = size * np.array([rng.uniform(0.96, 1.04), rng.uniform(0.94, 1.06), rng.uniform(0.96, 1.04)])
        angles = np.deg2rad(rng.uniform(-1.0, 1.0, 3) * [2.5, 2.5, 4.0])
        warp = np.empty((3, _WARP_TERMS, 7))
        warp[..., 0] = rng.normal(0.0, _WARP_AMPLITUDE_MM, (3, _WARP_TERMS))
        warp[..., 1:4] = rng.uniform(1 / 60.0, 1 / 35.0, (3, _WARP_TERMS, 3))
        warp[..., 4:7] = rng.uniform(0.0, 2.0 * np.pi, (3, _WARP_TERMS, 3))
        num_labels = AMOS.num_classes
        lacks = rng.random(3) < np.array([1.0, 0.5, 1.0]) * config.missing_rate
        kidney = ("kidney_right", "kidney_left")[int(rng.integers(2))]
        missing = {name for name, gone in (("gallbladder", lacks[0]), (kidney, lacks[1])) if gone and not complete}
        return cls(
            scale=scale,
            rotation=_rotation(angles),
            warp=warp,
            organ_shift_mm=np.clip(rng.normal(0.0, 1.6, (num_labels, 3)), -4.0, 4.0),
            organ_scale=np.clip(rng.normal(1.0, 0.04, num_labels), 0.92, 1.1),
            fat_mm=float(rng.uniform(8.0, 24.0)),
            vertebra_phase_mm=float(rng.uniform(0.0, 32.0)),
            is_female=bool(rng.random() < 0.5),
            missing=frozenset(missing),
            has_pelvis=complete or not lacks[2],
        )

    def to_scan(self, points_N3: np.ndarray) -> np.ndarray:
        """Reference to scan frame [N, 3], without the warp."""
        return np.asarray((points_N3 * self.scale) @ self.rotation.T)

    def organ(self, label: int, *centre: float) -> tuple[float, float, float]:
        """A reference point of organ `label`, moved by this patient's own shift of that organ."""
        dx, dy, dz = self.organ_shift_mm[label]
        return centre[0] + float(dx), centre[1] + float(dy), centre[2] + float(dz)


@dataclass(frozen=True)
class Grid:
    """The volume's voxels in RAS order: shape, spacing and the scan coordinates of voxel (0, 0, 0), mm."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]

    @classmethod
    def draw(cls, rng: np.random.Generator, config: PhantomConfig, patient: Patient, half_width_mm: float) -> Grid:
        """A square field of view around a trunk of that half width (reference mm), as a scanner would set it."""
        matrix = int(rng.integers(config.matrix[0] // 8, config.matrix[1] // 8 + 1)) * 8
        matrix = min(max(matrix, config.matrix[0]), config.matrix[1])
        shift = rng.uniform(-7.0, 7.0, 2)
        needed = 2.0 * (half_width_mm * float(patient.scale[0]) + float(np.abs(shift).max()) + 8.0)
        field_of_view = min(max(360.0, needed) + float(rng.uniform(0.0, 14.0)), 420.0)
        thickness = float(np.round(rng.uniform(*config.slice_thickness_mm) * 4.0) / 4.0)
        bottom = Z_BOTTOM_MM if patient.has_pelvis else Z_ABOVE_PELVIS_MM
        bottom, top = bottom * float(patient.scale[2]), Z_TOP_MM * float(patient.scale[2])
        num_slices = int(np.ceil((top - bottom) / thickness))
        spacing = round(field_of_view / matrix, 3)
        half = 0.5 * (matrix - 1) * spacing
        origin = (float(shift[0]) - half, float(shift[1]) - half, bottom + 0.5 * thickness)
        return cls((matrix, matrix, num_slices), (spacing, spacing, thickness), origin)

    def axes(self) -> Points:
        """Scan coordinates along each axis, shaped to broadcast: [X, 1, 1], [1, Y, 1], [1, 1, Z]."""
        x, y, z = (
            (origin + step * np.arange(count)).astype(np.float32)
            for origin, step, count in zip(self.origin_mm, self.spacing_mm, self.shape, strict=True)
        )
        return x[:, None, None], y[None, :, None], z[None, None, :]

    def reference_points(self, patient: Patient) -> Points:
        """Reference coordinates [X, Y, Z] of every voxel: pose and scale undone, then the smooth warp added."""
        axes = self.axes()
        inverse = (patient.rotation.T / patient.scale[:, None]).astype(np.float64)
        straight = [sum(axis * float(c) for axis, c in zip(axes, row, strict=True)) for row in inverse]
        points = []
        for coordinate, terms in zip(straight, patient.warp, strict=True):
            for amplitude, *wave in terms:
                cosines = [np.cos(a * k + p) for a, k, p in zip(axes, wave[:3], wave[3:], strict=True)]
                coordinate = coordinate + (cosines[0] * float(amplitude)) * cosines[1] * cosines[2]
            points.append(np.asarray(coordinate, dtype=np.float32))
        return points[0], points[1], points[2]

    def box(self, patient: Patient, low_mm: tuple[float, ...], high_mm: tuple[float, ...]) -> Box:
        """Voxels that a reference box may reach, margin included; empty slices when it is outside the volume."""
        corners = np.array([[(low_mm, high_mm)[i >> a & 1][a] for a in range(3)] for i in range(8)])
        scan = patient.to_scan(corners)
        first = (scan.min(0) - _BOX_MARGIN_MM - self.origin_mm) / self.spacing_mm
        last = (scan.max(0) + _BOX_MARGIN_MM - self.origin_mm) / self.spacing_mm
        first = np.clip(np.floor(first), 0, self.shape).astype(int)
        last = np.clip(np.ceil(last) + 1, first, self.shape).astype(int)
        return slice(first[0], last[0]), slice(first[1], last[1]), slice(first[2], last[2])


def _rotation(angles_rad: np.ndarray) -> np.ndarray:
    """Rotations about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles_rad):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix
