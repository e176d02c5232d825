"""Where the patient ends: an envelope found in the image itself, for label sets without whole-body classes.

Found on a coarse grid, where it is quick, and brought to each slice by linear interpolation of the inside (1) and
outside (0), cut at one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_shards.volumes import Volume, linear_weights, num_resampled

# Coarse enough that a thorax takes well under a second, fine enough that a half-voxel error is a skin's thickness.
_GRID_MM = 3.0
# Between lung and air (below -500 HU) and fat (about -100 HU).
_CT_TISSUE_HU = -300.0
# Table tops, sheets and cables are thinner than this and go; limbs are thicker and stay.
_THINNEST_PART_MM = 12.0


@dataclass(frozen=True)
class BodyField:
    """inside_IJK: float32, 1 inside the patient, 0 outside, on a grid whose points lie `steps` stored voxels apart."""

    inside_IJK: np.ndarray
    steps: np.ndarray


def find_body(volume: Volume, modality: str) -> BodyField:
    """The patient's envelope: skin to skin, lungs and gas inside it, table outside it."""
    steps = np.maximum(1.0, _GRID_MM / volume.spacing_mm)
    coarse = _coarse(volume, steps)
    spacing_mm = steps * volume.spacing_mm
    tissue = coarse > _CT_TISSUE_HU if modality == "CT" else _mr_tissue(coarse)
    inside = _envelope(tissue, spacing_mm)
    return BodyField(inside.astype(np.float32), steps)


def _coarse(volume: Volume, steps: np.ndarray) -> np.ndarray:
    shape = volume.voxels_IJK.shape
    right, front, up = (linear_weights(num_resampled(n, s), n, step=s) for n, s in zip(shape, steps, strict=True))
    planes = [(front @ (right @ volume.values(volume.voxels_IJK[:, :, k])).T).T for k in range(shape[2])]
    stack = np.stack(planes, axis=-1)
    return (up @ stack.reshape(-1, shape[2]).T).T.reshape(*stack.shape[:2], -1)


def _mr_tissue(coarse: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(coarse, (1.0, 1.0, 0.0))
    floor, ceiling = np.percentile(smooth, (1.0, 99.0))
    # Square roots draw dark tissue (suppressed fat, bone) away from the air it would otherwise be counted with.
    root = np.sqrt(np.clip((smooth - floor) / max(ceiling - floor, 1e-6), 0.0, 1.0))
    return root > _otsu(root)


def _otsu(values: np.ndarray) -> float:
    """The threshold in [0, 1] that best parts the values into two classes (Otsu 1979, eq. 18)."""
    counts, edges = np.histogram(values, bins=256, range=(0.0, 1.0))
    centres = 0.5 * (edges[1:] + edges[:-1])
    below = np.cumsum(counts) / counts.sum()
    mean = np.cumsum(counts * centres) / counts.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (mean[-1] * below - mean) ** 2 / (below * (1.0 - below))
    return float(edges[1 + int(np.nanargmax(between[:-1]))])


def _envelope(tissue: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    radius = _THINNEST_PART_MM / 2.0 / float(spacing_mm[:2].max())
    opened = ndimage.binary_opening(tissue, _disk(radius))
    parts, count = ndimage.label(opened)
    if count == 0:
        return np.zeros_like(tissue)
    largest = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    return _filled(largest)


def _disk(radius: float) -> np.ndarray:
    """A disk in the axial plane, bool [D, D, 1]."""
    reach = np.arange(-int(radius), int(radius) + 1)
    return (reach[:, None] ** 2 + reach[None, :] ** 2 <= radius**2 + 1e-6)[:, :, None]


def _filled(inside: np.ndarray) -> np.ndarray:
    """Holes closed in every axial slice: what is not inside and does not reach the slice's border."""
    from scipy import ndimage

    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1, :, 1] = in_plane[:, 1, 1] = True
    parts, count = ndimage.label(~inside, in_plane)
    open_to_border = np.zeros(count + 1, dtype=bool)
    for border in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        open_to_border[border.ravel()] = True
    open_to_border[0] = False
    return ~open_to_border[parts]
