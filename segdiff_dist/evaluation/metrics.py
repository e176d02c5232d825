"""The metrics as pure functions of arrays, and nothing else; docs and report quote their definitions from here.

Dimensions: B batch, H rows, W columns, K label ids (background is id 0), D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
# Wang et al. 2004, section III.B and III.C: an 11x11 Gaussian window, and constants that keep 0/0 out.
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_SSIM_C1, _SSIM_C2 = (0.01 * GREY_RANGE) ** 2, (0.03 * GREY_RANGE) ** 2
# Wang, Simoncelli, Bovik 2003, section 3.2: how much each scale counts, fine to coarse.
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The window still fits into the coarsest scale, which halves the image four times.
MS_SSIM_SMALLEST_SIDE = (2 * _SSIM_RADIUS + 1) * 2 ** (len(_MS_SSIM_WEIGHTS) - 1)

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


def dice_either(confusion_BKK: Counts) -> Array:
    """The same Dice [B, K], but NaN only where the id is absent from both maps: an id that the prediction has and the
    reference has not counts 0."""
    overlap, reference, predicted = _overlaps(confusion_BKK)
    either = reference + predicted
    dice: Array = np.where(either > 0, 2.0 * overlap / np.maximum(either, 1), np.nan)
    return dice


def false_positive_pixels(confusion_BKK: Counts) -> Array:
    """Predicted pixels [B, K] of each id that is absent from the reference; NaN where the reference has it."""
    _, reference, predicted = _overlaps(confusion_BKK)
    pixels: Array = np.where(reference > 0, np.nan, predicted.astype(np.float64))
    return pixels


def mean_dice(dice_BK: Array, organ_ids: Sequence[int]) -> Array:
    """Mean Dice [B] over the organs present in each sample's reference; NaN for a sample that holds none."""
    return mean_over_organs(dice_BK, organ_ids)


def mean_over_organs(values_BK: Array, organ_ids: Sequence[int]) -> Array:
    """Mean [B] of a figure of each organ over those present in a sample's reference (not NaN); NaN where there is none.

    `values_BK` by label id: Dice, surface Dice or area error.
    """
    organs = values_BK[:, list(organ_ids)]
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


def area_errors(confusion_BKK: Counts) -> Array:
    """| |A| - |B| | / |B| [B, K] of each id, B being the reference; NaN where the id is absent from the reference.

    The relative volume difference of Heimann et al. 2009 without its sign, on a slice.
    """
    _, reference, predicted = _overlaps(confusion_BKK)
    error: Array = np.where(reference > 0, np.abs(predicted - reference) / np.maximum(reference, 1), np.nan)
    return error


def grey_moments(labels_BHW: np.ndarray, images_BHW: np.ndarray, num_classes: int) -> tuple[Array, Array]:
    """Mean and standard deviation (n) [B, K] of uint8 images inside each label id; NaN where the id is absent."""
    num_samples = len(labels_BHW)
    place = labels_BHW.astype(np.int64) + np.arange(num_samples)[:, None, None] * num_classes
    counts, sums, squares = (
        np.bincount(place.ravel(), weights, num_samples * num_classes).reshape(num_samples, num_classes)
        for weights in (None, images_BHW.ravel(), images_BHW.astype(np.int64).ravel() ** 2)
    )
    inside = np.where(counts > 0, counts, np.nan)
    mean = sums / inside
    return mean, np.sqrt(np.maximum(squares / inside - mean**2, 0.0))


def psnr_db(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> Array:
    """Peak signal-to-noise ratio [B] in dB of uint8 images in one window, 0..255; infinite for identical images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_images(real_BHW, generated_BHW)
    values = peak_signal_noise_ratio(
        generated_BHW.double(), real_BHW.double(), data_range=GREY_RANGE, reduction="none", dim=(1, 2)
    )
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def ssim(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> Array:
    """Structural similarity [B] of uint8 images of at least 6x6: Gaussian window, sigma 1.5, data range 255.

    Wang et al. 2004, eq. 13. Every pixel counts; beyond the border the image is reflected, as torchmetrics has it.
    """
    _check_images(real_BHW, generated_BHW)
    similarity_B, _ = _similarities(real_BHW.float(), generated_BHW.float())
    return np.asarray(similarity_B.double().cpu().numpy())


def ssim_and_ms_ssim(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> tuple[Array, Array]:
    """SSIM [B] as above, and multi-scale SSIM [B] of uint8 images of at least MS_SSIM_SMALLEST_SIDE pixels a side.

    Wang, Simoncelli, Bovik 2003, eq. 7, with exponents for five scales; a scale whose mean contrast term is negative
    counts 0. Contrast terms are of windows inside the image, the coarsest scale's SSIM of all, as torchmetrics has it.
    """
    _check_images(real_BHW, generated_BHW)
    if min(real_BHW.shape[1:]) < MS_SSIM_SMALLEST_SIDE:
        raise ValueError(
            f"real_BHW: {tuple(real_BHW.shape)} is too small; MS-SSIM needs {MS_SSIM_SMALLEST_SIDE} pixels"
        )
    from torch.nn.functional import avg_pool2d

    x_BHW, y_BHW = real_BHW.float(), generated_BHW.float()
    single_scale_B, contrast_B = similarity_B, _ = _similarities(x_BHW, y_BHW)
    product_B = contrast_B.clamp(min=0) ** _MS_SSIM_WEIGHTS[0]
    for weight in _MS_SSIM_WEIGHTS[1:]:
        x_BHW, y_BHW = avg_pool2d(x_BHW, 2), avg_pool2d(y_BHW, 2)
        similarity_B, contrast_B = _similarities(x_BHW, y_BHW)
        # Luminance enters at the coarsest scale alone.
        term_B = similarity_B if weight is _MS_SSIM_WEIGHTS[-1] else contrast_B
        product_B = product_B * term_B.clamp(min=0) ** weight
    return (
        np.asarray(single_scale_B.double().cpu().numpy()),
        np.asarray(product_B.double().cpu().numpy()),
    )


def _similarities(x_BHW: torch.Tensor, y_BHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of SSIM over all pixels, and of its contrast and structure term alone over windows that lie inside the
    image, each [B]. Wang et al. 2004, eq. 13 and 9, 10."""
    import torch

    rows_HH, columns_WW = (_blur_matrix(side).to(x_BHW.device) for side in x_BHW.shape[1:])
    # The Gaussian as two matrix products: the window is separable, and this is several times faster than a convolution.
    maps = torch.stack((x_BHW, y_BHW, x_BHW * x_BHW, y_BHW * y_BHW, x_BHW * y_BHW))
    mean_x, mean_y, xx, yy, xy = rows_HH @ (maps @ columns_WW.T)
    var_x, var_y, covariance = xx - mean_x * mean_x, yy - mean_y * mean_y, xy - mean_x * mean_y
    contrast = (2 * covariance + _SSIM_C2) / (var_x + var_y + _SSIM_C2)
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x * mean_x + mean_y * mean_y + _SSIM_C1)
    inside = slice(_SSIM_RADIUS, -_SSIM_RADIUS)
    return (luminance * contrast).mean(dim=(1, 2)), contrast[:, inside, inside].mean(dim=(1, 2))


@lru_cache(maxsize=16)
def _blur_matrix(side: int) -> torch.Tensor:
    """float32 [side, side]: the Gaussian window along one axis, what lies beyond the border reflected into it."""
    import torch

    if side <= _SSIM_RADIUS:
        raise ValueError(f"images of {side} pixels a side are too small for SSIM's window; give {_SSIM_RADIUS + 1}")
    offsets = np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    matrix = np.zeros((side, side))
    at = np.abs(np.arange(side)[:, None] + offsets)
    at = np.where(at >= side, 2 * (side - 1) - at, at)
    np.add.at(matrix, (np.arange(side)[:, None], at), weights / weights.sum())
    return torch.from_numpy(matrix.astype(np.float32))


def _check_images(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> None:
    """8 bits on both sides: floating point could hold NaN, and would leave the window open to question."""
    import torch

    for name, images in (("real_BHW", real_BHW), ("generated_BHW", generated_BHW)):
        if images.dtype != torch.uint8:
            raise ValueError(f"{name}: {images.dtype}; give uint8 grey values")
    if real_BHW.ndim != 3 or real_BHW.shape != generated_BHW.shape:
        raise ValueError(f"generated_BHW: {tuple(generated_BHW.shape)} is not real_BHW's {tuple(real_BHW.shape)}")


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
    _, index = np.unique(np.asarray(patients)[finite], return_inverse=True)
    sums_P, counts_P = np.bincount(index, weights=values[finite]), np.bincount(index).astype(np.int64)
    return estimate_from_sums(sums_P.astype(np.float64), counts_P, resamples=resamples, seed=seed)


def estimate_from_sums(sums_P: Array, counts_P: Counts, *, resamples: int, seed: int) -> Estimate:
    """The same from each patient's sum and number of finite values, P patients with at least one: all it needs."""
    assert len(sums_P)
    assert (counts_P > 0).all()
    num_patients, interval = len(sums_P), None
    if num_patients >= 2:
        draws = redrawn(num_patients, resamples, seed)
        low, high = np.percentile((draws @ sums_P) / (draws @ counts_P), _INTERVAL)
        interval = (float(low), float(high))
    return Estimate(float(sums_P.sum() / counts_P.sum()), interval, int(counts_P.sum()), num_patients)


@lru_cache(maxsize=16)
def redrawn(num_patients: int, resamples: int, seed: int) -> Counts:
    """How often each patient is drawn, [resamples, num_patients]; the same for every metric of as many patients."""
    return np.random.default_rng(seed).multinomial(num_patients, np.full(num_patients, 1 / num_patients), resamples)


def _overlaps(confusion_BKK: Counts) -> tuple[Counts, Counts, Counts]:
    """Pixels of each id in both, in the reference and in the prediction, each [B, K]."""
    return (
        np.diagonal(confusion_BKK, axis1=1, axis2=2),
        confusion_BKK.sum(axis=2),
        confusion_BKK.sum(axis=1),
    )
