"""Solids as approximate signed distances in mm: negative inside, positive outside, smooth where solids meet.

Points are three float32 arrays (x, y, z) of one shape (or shapes that broadcast); results are float32 of that shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import numpy as np

Points = tuple[np.ndarray, np.ndarray, np.ndarray]
Vector = Sequence[float]


def ellipsoid(points: Points, centre: Vector, radii: Vector) -> np.ndarray:
    """First-order distance to an axis-aligned ellipsoid, |q/r| (|q/r| - 1) / |q/r^2|, exact for a sphere."""
    first: np.ndarray | float = 1e-12
    second: np.ndarray | float = 1e-12
    for coordinate, middle, radius in zip(points, centre, radii, strict=True):
        scaled = (coordinate - float(middle)) * (1.0 / float(radius))
        first = first + scaled * scaled
        scaled *= 1.0 / float(radius)
        second = second + scaled * scaled
    norm = np.sqrt(first)
    return np.asarray(norm * (norm - 1.0) / np.sqrt(second))


def tube(points: Points, path: Sequence[Vector], radii: Sequence[float]) -> np.ndarray:
    """Distance to a round-ended tube along the polyline `path`, its radius linear between the path's points."""
    return _path(points, path, radii)


def sheet(points: Points, path_xy: Sequence[Vector], z_centre: float, z_half: float, radius: float) -> np.ndarray:
    """Distance to a rounded sheet: the polyline `path_xy` drawn over z_centre +- z_half, thickened by `radius`."""
    x, y, z = points
    in_plane = _path((x, y), path_xy, [0.0] * len(path_xy))
    beyond = np.maximum(np.abs(z - float(z_centre)) - float(z_half), 0.0)
    return np.asarray(np.sqrt(in_plane * in_plane + beyond * beyond) - float(radius))


def superellipse_cylinder(x: np.ndarray, y: np.ndarray, half_width: np.ndarray, half_depth: np.ndarray) -> np.ndarray:
    """First-order distance to |x/a|^2.5 + |y/b|^2.5 = 1, squarer than an ellipse, as a trunk is."""
    u = np.abs(x) / half_width + 1e-4
    v = np.abs(y) / half_depth + 1e-4
    u_15 = u * np.sqrt(u)
    v_15 = v * np.sqrt(v)
    power = u_15 * u + v_15 * v
    # g = power^(1/2.5); its gradient is g / power * (u^1.5 / a, v^1.5 / b).
    g = np.exp(0.4 * np.log(power))
    slope = np.hypot(u_15 / half_width, v_15 / half_depth)
    return np.asarray((g - 1.0) * power / (g * slope))


def intersection(a: np.ndarray, b: np.ndarray, rounding_mm: float = 4.0) -> np.ndarray:
    """Smooth maximum: the intersection, with its edges rounded over about `rounding_mm`."""
    return -union(-a, -b, rounding_mm)


def union(a: np.ndarray, b: np.ndarray, rounding_mm: float = 4.0) -> np.ndarray:
    """Smooth minimum (the polynomial one, quadratic in the overlap): the union, with rounded joints."""
    overlap = np.maximum(rounding_mm - np.abs(a - b), 0.0)
    return np.asarray(np.minimum(a, b) - overlap * overlap * (0.25 / rounding_mm))


def _path(points: Sequence[np.ndarray], path: Sequence[Vector], radii: Sequence[float]) -> np.ndarray:
    """Distance to a thick polyline, in as many dimensions as there are coordinates."""
    ends = pairwise(zip(path, radii, strict=True))
    return reduce(np.minimum, (_segment(points, start, end, r0, r1) for (start, r0), (end, r1) in ends))


def _segment(points: Sequence[np.ndarray], start: Vector, end: Vector, r_start: float, r_end: float) -> np.ndarray:
    axis = [float(e) - float(s) for s, e in zip(start, end, strict=True)]
    length_squared = sum(a * a for a in axis) + 1e-9
    offsets = [coordinate - float(s) for coordinate, s in zip(points, start, strict=True)]
    projections = [o * (a / length_squared) for o, a in zip(offsets, axis, strict=True) if a != 0.0]
    along = np.clip(reduce(np.add, projections), 0.0, 1.0)
    squared: np.ndarray | float = 0.0
    for offset, a in zip(offsets, axis, strict=True):
        rest = offset - along * a if a != 0.0 else offset
        squared = squared + rest * rest
    return np.asarray(np.sqrt(squared) - (float(r_start) + along * (float(r_end) - float(r_start))))
