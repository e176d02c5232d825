"""The metrics as pure functions of arrays, and nothing else; docs and report quote their definitions from here.

Dimensions: B batch, H rows, W columns, K label ids (background is id 0), D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

# One window for both images: the whole range of the stored uint8 grey values.
GREY_RANGE = 255.0
# MONAI's DiceLoss adds this to numerator and denominator; it is what makes a class absent from both count 1.
_LEGACY_SMOOTH = 1e-5
_INTERVAL = (2.5, 97.5)

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def confusion(reference_BHW: np.ndarray, predicted_BHW: np.ndarray, num_classes: int) -> Counts:
    """Pixel counts [B, K, K], rows by reference id and columns by predicted id; every Dice is made from these.

    Both uint8 label maps of the same shape. ValueError when an id lies outside 0..num_classes-1.
    """
    if reference_BHW.shape != predicted_BHW.shape:
        raise ValueError(f"label maps differ in shape: {reference_BHW.shape} and {predicted_BHW.shape}")
    highest = max(int(reference_BHW.max(initial=0)), int(predicted_BHW.max(initial=0)))
    if highest >= num_classes:
        raise ValueError(f"label id {highest} lies outside the label table of {num_classes} ids")
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


def mean_dice(dice_BK: Array, organ_ids: Sequence[int]) -> Array:
    """Mean Dice [B] over the organs present in each sample's reference; NaN for a sample that holds none."""
    organs = dice_BK[:, list(organ_ids)]
    present = ~np.isnan(organs)
    total = np.where(present, organs, 0.0).sum(axis=1)
    means: Array = np.full(len(organs), np.nan)
    np.divide(total, present.sum(axis=1), out=means, where=present.any(axis=1))
    return means


def legacy_dice(confusion_BKK: Counts) -> Array:
    """Dice [B] as the paper's Table 1 reports it: the mean over all ids, background and absent ones included.

    An id absent from both counts 1, one stray pixel of an absent id about 0: one minus MONAI's DiceLoss over one-hot
    maps with include_background=True. Comparable with the published numbers and, for that reason only, kept.
    """
    overlap, reference, predicted = _overlaps(confusion_BKK)
    return ((2.0 * overlap + _LEGACY_SMOOTH) / (reference + predicted + _LEGACY_SMOOTH)).mean(axis=1)


def psnr_db(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> Array:
    """Peak signal-to-noise ratio [B] in dB of uint8 images in one window, 0..255; infinite for identical images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values = peak_signal_noise_ratio(
        generated_BHW.double(), real_BHW.double(), data_range=GREY_RANGE, reduction="none", dim=(1, 2)
    )
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def ssim(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> Array:
    """Structural similarity [B] of uint8 images of at least 12x12: Gaussian window, sigma 1.5, data range 255.

    Wang et al. 2004, eq. 13. Every pixel counts; beyond the border the image is reflected, as torchmetrics has it.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        generated_BHW[:, None].float(), real_BHW[:, None].float(), data_range=GREY_RANGE, reduction="none"
    )
    assert not isinstance(values, tuple)
    return np.asarray(values.reshape(-1).cpu().numpy(), dtype=np.float64)


def pixel_std(images_BHW: np.ndarray, mask_HW: np.ndarray) -> float:
    """How much images made from one mask differ: the standard deviation over B (B >= 2, n - 1) of each pixel, in
    grey values, averaged over the patient (mask > 0); NaN for an empty mask."""
    inside = mask_HW > 0
    if not inside.any():
        return float("nan")
    return float(images_BHW[:, inside].astype(np.float64).std(axis=0, ddof=1).mean())


@dataclass
class FeatureStatistics:
    """Count, mean [D] and scatter [D, D] (sum of outer products about the mean) of features, in float64.

    Streams and merges without keeping features. About the mean, because raw sums of squares lose the digits of a
    small spread around a large mean. Chan, Golub, LeVeque 1983, eq. 2.1.
    """

    count: int
    mean_D: Array
    scatter_DD: Array

    @classmethod
    def empty(cls, num_features: int) -> FeatureStatistics:
        """Statistics of nothing yet."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def of(cls, features_BD: np.ndarray) -> FeatureStatistics:
        """Statistics of one batch of features, B >= 0."""
        features = np.asarray(features_BD, dtype=np.float64)
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both together; neither operand changes."""
        count = self.count + other.count
        if not count:
            return FeatureStatistics.empty(len(self.mean_D))
        delta = other.mean_D - self.mean_D
        mean = self.mean_D + delta * (other.count / count)
        scatter = self.scatter_DD + other.scatter_DD
        if self.count and other.count:
            scatter = scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, scatter)

    @property
    def covariance_DD(self) -> Array:
        """Unbiased covariance; needs two samples."""
        assert self.count >= 2, "a covariance needs at least two samples"
        return self.scatter_DD / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians, |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)); each side needs two samples.

    Dowson and Landau 1982, eq. 4; Heusel et al. 2017, eq. 6. With C1 = L L', C1 C2 has the eigenvalues of the symmetric
    L' C2 L, so they stay real, and accurate where the covariances are singular (fewer samples than features).
    """
    from scipy.linalg import eigvalsh

    cov_1, cov_2 = first.covariance_DD, second.covariance_DD
    factor_DR = _factor(cov_1)
    product_RR = factor_DR.T @ cov_2 @ factor_DR
    cross = np.sqrt(np.clip(eigvalsh((product_RR + product_RR.T) / 2), 0.0, None)).sum() if product_RR.size else 0.0
    delta = first.mean_D - second.mean_D
    distance = delta @ delta + np.trace(cov_1) + np.trace(cov_2) - 2.0 * cross
    return float(max(distance, 0.0))


def _factor(covariance_DD: Array) -> Array:
    """L [D, R] with L L' = covariance, R its rank: Cholesky with pivoting, an order cheaper than eigenvectors."""
    from scipy.linalg.lapack import dpstrf

    packed, pivots, rank, info = dpstrf(covariance_DD, lower=1)
    assert info >= 0, "dpstrf takes any finite symmetric matrix"
    factor = np.zeros((len(covariance_DD), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its interval over patients. `interval` is None where there are fewer than two."""

    value: float
    interval: tuple[float, float] | None
    num_samples: int
    num_patients: int


def estimate(values: np.ndarray, patients: np.ndarray, *, resamples: int, seed: int) -> Estimate | None:
    """Mean of `values` with a 95 % percentile-bootstrap interval that redraws whole patients, not slices.

    `values` [N] (NaN and infinities are left out), `patients` [N] their case ids. Slices of a patient resemble each
    other, so redrawing slices would give intervals that are far too narrow. None when no finite value is left.
    Field and Welsh 2007 (cluster bootstrap).
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    names, index = np.unique(np.asarray(patients)[finite], return_inverse=True)
    sums = np.bincount(index, weights=values[finite])
    counts = np.bincount(index)
    interval = None
    if len(names) >= 2:
        draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
        low, high = np.percentile((draws @ sums) / (draws @ counts), _INTERVAL)
        interval = (float(low), float(high))
    return Estimate(float(sums.sum() / counts.sum()), interval, int(counts.sum()), len(names))


def _overlaps(confusion_BKK: Counts) -> tuple[Counts, Counts, Counts]:
    """Pixels of each id in both, in the reference and in the prediction, each [B, K]."""
    return (
        np.diagonal(confusion_BKK, axis1=1, axis2=2),
        confusion_BKK.sum(axis=2),
        confusion_BKK.sum(axis=1),
    )
