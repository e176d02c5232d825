"""Air around the patient, and the lattice of 2x2 pixels, real and generated: functions of arrays, columns, entries.

Air in CT is black, so that a fault of a network shows there first. A network that folds 2x2 pixels into one place may
draw each of the four pixels with a brightness of its own: a lattice, which is too weak to see in the spectrum.

Dimensions: B batch, H rows, W columns, F the four places of a pixel in a square of 2x2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from segdiff_dist.evaluation.metrics.arrays import Array
from segdiff_dist.spectra import fine_detail, ratio

if TYPE_CHECKING:
    import numpy.typing as npt

    from data_shards.labels import LabelTable

    Pixels = npt.NDArray[np.bool_]

# Air begins this many pixels from the nearest label: the outline of a mask may be a pixel or two off.
FROM_LABELS = 3
# For each of the four places: the mean of this many pixels of white noise has a standard error of a quarter of its
# standard deviation.
FEWEST_PIXELS_A_PLACE = 16
_SIDES = ("real", "gen")
_AIR = ("air_mean", "air_std", "air_lattice")
# A lattice gets a message from half a grey value on, which rounds to one.
_VISIBLE = 0.5
AIR_METRICS = tuple(f"{name}_{side}" for name in (*_AIR, "patient_lattice") for side in _SIDES)


def measure(
    real_BHW: np.ndarray, generated_BHW: np.ndarray, mask_BHW: np.ndarray, table: LabelTable
) -> dict[str, np.ndarray]:
    """AIR_METRICS, float64 [B] by name, of uint8 images and the masks that the generated ones were made from.

    NaN where there are too few pixels. Without the class `body`, the background holds the rest of the patient, and
    nothing is known to be air.
    """
    columns: dict[str, np.ndarray] = {}
    has_body_B = (mask_BHW == (-1 if table.body_id is None else table.body_id)).any(axis=(1, 2))
    air_places = Places(air(mask_BHW) & has_body_B[:, None, None])
    patient_places = Places(within(mask_BHW > 0))
    for side, images_BHW in zip(_SIDES, (real_BHW, generated_BHW), strict=True):
        detail_BHW = fine_detail(images_BHW)
        columns[f"air_mean_{side}"], columns[f"air_std_{side}"] = air_places.moments(images_BHW[:, 1:-1, 1:-1])
        columns[f"air_lattice_{side}"] = air_places.lattice(detail_BHW)
        columns[f"patient_lattice_{side}"] = patient_places.lattice(detail_BHW)
    return columns


def air(mask_BHW: np.ndarray) -> Pixels:
    """Background at least FROM_LABELS pixels from any label, along rows and columns; bool [B, H - 2, W - 2]: of all
    except the outermost pixels."""
    return ~_near(mask_BHW > 0, FROM_LABELS - 1)[:, 1:-1, 1:-1]


def within(pixels_BHW: Pixels) -> Pixels:
    """Those of these pixels whose eight neighbours are among them too; bool [B, H - 2, W - 2]."""
    return ~_near(~pixels_BHW, 1)[:, 1:-1, 1:-1]


class Places:
    """Pixels bool [B, H, W] by their place in a square of 2x2, for images of the same masks."""

    def __init__(self, pixels_BHW: Pixels) -> None:
        num, height, width = pixels_BHW.shape
        self._pixels_BHW, self._shape = pixels_BHW, (num, 4)
        place_HW = 2 * (np.arange(height) % 2)[:, None] + np.arange(width) % 2
        self._place_N = (4 * np.arange(num)[:, None, None] + place_HW)[pixels_BHW]
        counts_BF = np.bincount(self._place_N, minlength=4 * num).reshape(self._shape)
        self._counts_BF = np.where((counts_BF >= FEWEST_PIXELS_A_PLACE).all(axis=1, keepdims=True), counts_BF, 0)

    def moments(self, image_BHW: np.ndarray) -> tuple[Array, Array]:
        """Mean and standard deviation (n) [B] of grey values; NaN where a place has too few pixels."""
        grey_N, count_B = image_BHW[self._pixels_BHW].astype(np.float64), self._counts_BF.sum(axis=1)
        mean_B, square_B = (ratio(self._sums(of_N).sum(axis=1), count_B) for of_N in (grey_N, grey_N**2))
        return mean_B, np.sqrt(np.maximum(square_B - mean_B**2, 0.0))

    def lattice(self, detail_BHW: Array) -> Array:
        """The range [B] of the four means of fine detail, in grey values; NaN where a place has too few pixels.

        The 3x3 binomial mean gives each of the four places a quarter. So fine detail, which is the image less that
        mean, keeps a lattice and removes the shading.
        """
        mean_BF = ratio(self._sums(detail_BHW[self._pixels_BHW]), self._counts_BF)
        return np.asarray(mean_BF.max(axis=1) - mean_BF.min(axis=1))

    def _sums(self, values_N: Array) -> Array:
        return np.bincount(self._place_N, values_N, self._counts_BF.size).astype(np.float64).reshape(self._shape)


def lattice_message(entries: dict[str, Any]) -> str:
    """A sentence if air of the generated images has a lattice that the real ones have not; `entries` of summary.json by
    metric."""
    real, generated = (entries.get(f"air_lattice_{side}", {}).get("value") for side in _SIDES)
    if generated is None or generated - (real or 0.0) < _VISIBLE:
        return ""
    of_real = "" if real is None else f" (real images: {real:.2f})"
    return (
        f"In air, generated images have a pattern that repeats every two pixels: {generated:.2f} grey values{of_real}."
    )


def _near(pixels_BHW: Pixels, distance: int) -> Pixels:
    """Pixels at most this far, along rows and along columns, from one of these."""
    near_BHW = pixels_BHW.copy()
    for axis in (1, 2):
        along = np.moveaxis(near_BHW, axis, 0)
        before = along.copy()
        for shift in range(1, distance + 1):
            along[shift:] |= before[:-shift]
            along[:-shift] |= before[shift:]
    return near_BHW
