"""Normalised surface Dice: the share of two outlines of an organ that is within a tolerance of the other.

Dimensions: H rows, W columns, O organs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_shards.labels import LabelTable
from segdiff_dist.evaluation.metrics.arrays import Array

# FLARE 2022's tolerances (Ma et al. 2024, the challenge's evaluation code), in mm.
_FLARE_TOLERANCE_MM = {
    "liver": 5.0,
    "kidney_right": 3.0,
    "kidney_left": 3.0,
    "spleen": 3.0,
    "pancreas": 5.0,
    "aorta": 2.0,
    "inferior_vena_cava": 2.0,
    "adrenal_gland_right": 2.0,
    "adrenal_gland_left": 2.0,
    "gallbladder": 2.0,
    "esophagus": 3.0,
    "stomach": 5.0,
    "duodenum": 7.0,
}
# For organs that FLARE did not have: the middle of its tolerances.
_OTHER_TOLERANCE_MM = 3.0


def tolerances_mm(table: LabelTable) -> dict[str, float]:
    """The tolerance of each organ of a label table, by name."""
    return {table.names[i]: _FLARE_TOLERANCE_MM.get(table.names[i], _OTHER_TOLERANCE_MM) for i in table.organ_ids}


def surface_dice(
    reference_HW: np.ndarray,
    predicted_HW: np.ndarray,
    organ_ids: Sequence[int],
    tolerance_mm_O: Sequence[float],
    spacing_mm: tuple[float, float],
) -> Array:
    """Normalised surface Dice [O] of two uint8 label maps; NaN where the organ is absent from the reference.

    An outline is an organ's pixels with a neighbour outside it. A tolerance below one pixel (the larger side of
    `spacing_mm`, rows then columns) counts as one pixel: masks are not finer. Nikolov et al. 2021; MONAI's
    compute_surface_dice gives the same and takes ten times as long.
    """
    from scipy.ndimage import find_objects

    dice_O: Array = np.full(len(organ_ids), np.nan)
    # max_label, so that an organ absent from a map has a place too, with None.
    boxes = [
        find_objects(labels_HW.astype(np.int32), max_label=max(organ_ids)) for labels_HW in (reference_HW, predicted_HW)
    ]
    for i, organ in enumerate(organ_ids):
        reference_box, predicted_box = (side[organ - 1] for side in boxes)
        if reference_box is None:
            continue
        if predicted_box is None:
            dice_O[i] = 0.0
            continue
        window = _around(reference_box, predicted_box)
        tolerance_mm = max(tolerance_mm_O[i], *spacing_mm)
        dice_O[i] = _within(reference_HW[window] == organ, predicted_HW[window] == organ, tolerance_mm, spacing_mm)
    return dice_O


def _within(first_HW: np.ndarray, second_HW: np.ndarray, tolerance_mm: float, spacing_mm: tuple[float, float]) -> float:
    from scipy.ndimage import binary_erosion, distance_transform_edt

    outlines = [organ_HW & ~binary_erosion(organ_HW) for organ_HW in (first_HW, second_HW)]
    close = 0
    for one_HW, other_HW in (outlines, outlines[::-1]):
        distance_mm_HW = distance_transform_edt(~other_HW, sampling=spacing_mm)
        close += int((distance_mm_HW[one_HW] <= tolerance_mm).sum())
    return close / sum(int(outline_HW.sum()) for outline_HW in outlines)


def _around(first: tuple[slice, ...], second: tuple[slice, ...]) -> tuple[slice, ...]:
    """The box of both and one more pixel, so that an outline in the box is the outline in the full image."""
    return tuple(
        slice(max(min(a.start, b.start) - 1, 0), max(a.stop, b.stop) + 1) for a, b in zip(first, second, strict=True)
    )
