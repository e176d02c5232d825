"""The patient's outline (envelope), found in the image itself, for label sets without whole-body classes.

It is found on a coarse grid, which is fast. Inside (1) and outside (0) are interpolated linearly to each slice, with a
threshold of one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_shards.ingest.volumes import Volume, linear_weights, num_resampled

# Coarse enough that a thorax takes less than a second, fine enough that half a voxel is no thicker than skin.
_GRID_MM = 3.0
# Between lung and air (below -500 HU) and fat (about -100 HU).
_CT_TISSUE_HU = -300.0
# Table tops, sheets and cables are thinner than this and are removed; limbs are thicker and stay.
_THINNEST_PART_MM = 12.0
# An arm beside the body is part of the patient; parts that are thinner or smaller than this belong to the table.
_THINNEST_LIMB_MM = 24.0
_SMALLEST_LIMB = 0.01
# More than the noise that clipping leaves, less than the step from air to fat.
_ABOVE_CLIPPED_AIR_HU = 30.0
_MR_SMOOTHING_MM = 4.0
# Share of the range of values; air is at its lower end.
_BRIGHTEST_AIR = 0.25
# Share of the range of values: the difference of equal numbers after sums in single precision.
_ROUNDING = 1e-4
# The middle of a blurred edge, a little below one half because air is not quite dark.
_EDGE_OF_BRIGHTEST = 0.4


@dataclass(frozen=True)
class BodyField:
    """inside_IJK: float32, 1 inside the patient, 0 outside, on a grid whose points are `steps` stored voxels apart."""

    inside_IJK: np.ndarray
    steps: np.ndarray


def find_body(volume: Volume, modality: str, *, is_padded: bool = False) -> BodyField:
    """The patient's envelope: skin to skin, with lungs and gas inside and the table outside. `is_padded`: the lowest
    value is that of padding, which does not help to find the border between air and tissue in MR."""
    from scipy import ndimage

    steps = np.maximum(1.0, _GRID_MM / volume.spacing_mm)
    spacing_mm = steps * volume.spacing_mm
    if modality == "CT":
        return BodyField(_envelope(_ct_tissue(_coarse(volume, steps)), spacing_mm).astype(np.float32), steps)
    smooth = _coarse(volume, steps)
    measured = smooth > smooth.min() + _ROUNDING * np.ptp(smooth) if is_padded else None
    if measured is not None and not measured.any():
        measured = None  # one value everywhere, or a few pixels so bright that all others look alike
    ndimage.gaussian_filter(smooth, (0.7, 0.7, 0.0), output=smooth)
    inside = _envelope(_mr_tissue(smooth, measured), spacing_mm)
    del measured
    inside = _without_halo(inside, smooth).astype(np.float32)
    # Skin that fades into noise leaves a ragged edge; a patient's outline is smooth.
    ndimage.gaussian_filter(inside, _MR_SMOOTHING_MM / spacing_mm, output=inside)
    # The outline must be smooth, not blurred: from inside to outside within a step of the grid, as in CT. A Gaussian
    # leaves an edge with the slope 1 / (sigma sqrt(2 pi)).
    inside -= 0.5
    inside *= max(1.0, _MR_SMOOTHING_MM * np.sqrt(2.0 * np.pi) / _GRID_MM)
    return BodyField(np.clip(inside + np.float32(0.5), 0.0, 1.0), steps)


def _coarse(volume: Volume, steps: np.ndarray) -> np.ndarray:
    shape = volume.voxels_IJK.shape
    right, front, up = (linear_weights(num_resampled(n, s), n, step=s) for n, s in zip(shape, steps, strict=True))
    coarse = np.zeros((right.shape[0], front.shape[0], up.shape[0]), dtype=np.float32)
    reached = up.tocsc()
    for k in range(shape[2]):
        plane = (front @ (right @ volume.values(volume.voxels_IJK[:, :, k])).T).T
        taps = slice(reached.indptr[k], reached.indptr[k + 1])
        for level, weight in zip(reached.indices[taps], reached.data[taps], strict=True):
            coarse[:, :, level] += weight * plane
    return coarse


def _ct_tissue(coarse: np.ndarray) -> np.ndarray:
    lowest = float(coarse.min())
    # Archives hold CTs that were cut to a soft-tissue window: their air is the window's lower end, just below fat.
    return coarse > max(_CT_TISSUE_HU, lowest + _ABOVE_CLIPPED_AIR_HU)


def _mr_tissue(smooth: np.ndarray, measured: np.ndarray | None) -> np.ndarray:
    """Voxels brighter than air; `measured`: the voxels that decide the threshold, by default all."""
    floor, ceiling = np.percentile(smooth if measured is None else smooth[measured], (1.0, 99.0))
    grey = smooth - floor
    grey /= max(float(ceiling - floor), 1e-6)
    if measured is None:
        return grey > _triangle_threshold(grey)
    # If padding has replaced air, tissue may have the higher peak: that of air is among the dark values.
    return grey > _triangle_threshold(grey[measured], peak_below=_BRIGHTEST_AIR)


def _without_halo(inside: np.ndarray, smooth: np.ndarray) -> np.ndarray:
    """A threshold that is low enough for dark skin is outside the edge of bright skin, so the rim must also reach a
    share of the brightest value nearby."""
    from scipy import ndimage

    rim = inside & ~ndimage.binary_erosion(inside, _disk(2.0), border_value=1)
    threshold = ndimage.maximum_filter(smooth, size=(5, 5, 1))
    threshold *= _EDGE_OF_BRIGHTEST
    dark_rim = rim & (smooth < threshold)
    del threshold
    return _filled(inside & ~dark_rim)


def _triangle_threshold(grey: np.ndarray, peak_below: float = 1.0) -> float:
    """The threshold between the peak of air and tissue, for grey values in [0, 1]: the bin farthest below the line from
    the histogram's peak to its end (Zack et al. 1977). Otsu's threshold would leave out dark tissue: lung, bone,
    suppressed fat."""
    counts, edges = np.histogram(np.clip(grey, 0.0, 1.0), bins=256, range=(0.0, 1.0))
    peak = int(np.argmax(counts[: min(int(256 * peak_below), 255)]))
    fall = counts[peak:-1].astype(np.float64)
    line = np.linspace(fall[0], 0.0, len(fall))
    return float(edges[peak + 1 + int(np.argmax(line - fall))])


def _envelope(tissue: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    def disk(diameter_mm: float) -> np.ndarray:
        return _disk(diameter_mm / 2.0 / float(spacing_mm[:2].max()))

    opened = ndimage.binary_opening(tissue, disk(_THINNEST_PART_MM))
    parts, count = ndimage.label(opened)
    if count == 0:
        return np.zeros_like(tissue)
    thick = ndimage.binary_erosion(opened, disk(_THINNEST_LIMB_MM), border_value=1)
    del opened
    # Plane by plane, because bincount converts its input to eight bytes a voxel.
    voxels, thick_voxels = np.zeros((2, count + 1), dtype=np.int64)
    for plane, is_thick in zip(parts, thick, strict=True):
        voxels += np.bincount(plane.ravel(), minlength=count + 1)
        thick_voxels += np.bincount(plane[is_thick], minlength=count + 1)
    voxels[0] = 0
    keep = (thick_voxels > 0) & (voxels >= _SMALLEST_LIMB * voxels.max())
    keep[np.argmax(voxels)] = True
    keep[0] = False
    return _filled(keep[parts])


def _disk(radius: float) -> np.ndarray:
    """A disk in the axial plane, bool [D, D, 1]."""
    reach = np.arange(-int(radius), int(radius) + 1)
    return (reach[:, None] ** 2 + reach[None, :] ** 2 <= radius**2 + 1e-6)[:, :, None]


def _filled(inside: np.ndarray) -> np.ndarray:
    """Close holes in every axial slice: parts that are not inside and do not reach the slice's border."""
    from scipy import ndimage

    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1, :, 1] = in_plane[:, 1, 1] = True
    parts, count = ndimage.label(~inside, in_plane)
    open_to_border = np.zeros(count + 1, dtype=bool)
    for border in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        open_to_border[border.ravel()] = True
    open_to_border[0] = False
    return ~open_to_border[parts]
