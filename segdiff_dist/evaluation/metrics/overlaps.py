"""Measures of two label maps: Dice and its variants, false organs and area errors, from counts of pixels.

Dimensions: B batch, H rows, W columns, K label ids (background is id 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segdiff_dist.evaluation.metrics.arrays import Array, Counts

# MONAI's DiceLoss adds this to numerator and denominator; it is what makes a class absent from both count 1.
_LEGACY_SMOOTH = 1e-5


def confusion(reference_BHW: np.ndarray, predicted_BHW: np.ndarray, num_classes: int) -> Counts:
    """Pixel counts [B, K, K], rows by reference id and columns by predicted id; every Dice is made from these.

    Both uint8 label maps of the same shape. ValueError when an id is outside 0..num_classes-1.
    """
    if reference_BHW.shape != predicted_BHW.shape:
        raise ValueError(f"label maps differ in shape: {reference_BHW.shape} and {predicted_BHW.shape}")
    highest = max(int(reference_BHW.max(initial=0)), int(predicted_BHW.max(initial=0)))
    if highest >= num_classes:
        raise ValueError(f"label id {highest} is outside the label table of {num_classes} ids")
    num_samples = reference_BHW.shape[0]
    pair = reference_BHW.astype(np.int64) * num_classes + predicted_BHW
    pair += np.arange(num_samples, dtype=np.int64)[:, None, None] * num_classes**2
    counts = np.bincount(pair.ravel(), minlength=num_samples * num_classes**2)
    return counts.reshape(num_samples, num_classes, num_classes)


def dice_per_class(confusion_BKK: Counts) -> Array:
    """Dice [B, K] of each id, 2 |A and B| / (|A| + |B|); NaN where the id is absent from the reference. Dice 1945."""
    overlap, reference, predicted = _overlaps(confusion_BKK)
    dice: Array = np.where(reference > 0, 2.0 * overlap / np.maximum(reference + predicted, 1), np.nan)
    return dice


def dice_either(confusion_BKK: Counts) -> Array:
    """The same Dice [B, K], but NaN only where the id is absent from both maps.

    An id that the prediction has and the reference does not have counts 0.
    """
    overlap, reference, predicted = _overlaps(confusion_BKK)
    either = reference + predicted
    dice: Array = np.where(either > 0, 2.0 * overlap / np.maximum(either, 1), np.nan)
    return dice


def sensitivity(confusion_BKK: Counts) -> Array:
    """Share [B, K] of each id's reference pixels that the prediction has too; NaN where the reference has none."""
    overlap, reference, _ = _overlaps(confusion_BKK)
    return np.asarray(np.where(reference > 0, overlap / np.maximum(reference, 1), np.nan))


def precision(confusion_BKK: Counts) -> Array:
    """Share [B, K] of each id's predicted pixels that the reference has too; NaN where the prediction has none.

    0 for an id that the reference does not have.
    """
    overlap, _, predicted = _overlaps(confusion_BKK)
    return np.asarray(np.where(predicted > 0, overlap / np.maximum(predicted, 1), np.nan))


def false_positive_pixels(confusion_BKK: Counts) -> Array:
    """Predicted pixels [B, K] of each id that is absent from the reference; NaN where the reference has it."""
    _, reference, predicted = _overlaps(confusion_BKK)
    pixels: Array = np.where(reference > 0, np.nan, predicted.astype(np.float64))
    return pixels


def mean_dice(dice_BK: Array, organ_ids: Sequence[int]) -> Array:
    """Mean Dice [B] over the organs present in each sample's reference; NaN for a sample that holds none."""
    return mean_over_organs(dice_BK, organ_ids)


def mean_over_organs(values_BK: Array, organ_ids: Sequence[int]) -> Array:
    """Mean [B] of a measure over the organs present in a sample's reference (not NaN); NaN if there is none.

    `values_BK` by label id: Dice, surface Dice or area error.
    """
    organs = values_BK[:, list(organ_ids)]
    present = ~np.isnan(organs)
    total = np.where(present, organs, 0.0).sum(axis=1)
    means: Array = np.full(len(organs), np.nan)
    np.divide(total, present.sum(axis=1), out=means, where=present.any(axis=1))
    return means


def legacy_dice(confusion_BKK: Counts) -> Array:
    """Dice [B] as in the paper's Table 1: the mean over all ids, background and absent ones included.

    It is one minus MONAI's DiceLoss over one-hot maps with include_background=True. An id absent from both counts 1;
    one stray pixel of an absent id makes it about 0. It is kept only for comparison with the published numbers.
    """
    overlap, reference, predicted = _overlaps(confusion_BKK)
    return ((2.0 * overlap + _LEGACY_SMOOTH) / (reference + predicted + _LEGACY_SMOOTH)).mean(axis=1)


def area_errors(confusion_BKK: Counts) -> Array:
    """| |A| - |B| | / |B| [B, K] of each id, B being the reference; NaN where the id is absent from the reference.

    The relative volume difference of Heimann et al. 2009 without its sign, on a slice.
    """
    _, reference, predicted = _overlaps(confusion_BKK)
    error: Array = np.where(reference > 0, np.abs(predicted - reference) / np.maximum(reference, 1), np.nan)
    return error


def _overlaps(confusion_BKK: Counts) -> tuple[Counts, Counts, Counts]:
    """Pixels of each id in both, in the reference and in the prediction, each [B, K]."""
    return (
        np.diagonal(confusion_BKK, axis1=1, axis2=2),
        confusion_BKK.sum(axis=2),
        confusion_BKK.sum(axis=1),
    )
