"""How much fine detail images have: power by band of spatial frequency, and texture inside organs.

Pure functions of arrays; training's validation and the evaluation both use them.

Dimensions: B batch, H rows, W columns, F bands (coarse to fine), K label ids (background is id 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Bands of radial frequency as shares of the Nyquist frequency (half a cycle a pixel), so that they mean the same for
# images of every size: wavelengths of 64 to 16, 16 to 8, 8 to 4, 4 to 2.7 and 2.7 to 2 pixels.
BANDS: tuple[tuple[float, float], ...] = ((1 / 32, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 1 / 2), (1 / 2, 3 / 4), (3 / 4, 1.0))
# In percent of the Nyquist frequency, for names of metrics.
BAND_NAMES = tuple(f"{int(100 * low)}_{int(100 * high)}" for low, high in BANDS)
# Narrow bands for a curve.
RINGS = tuple((k / 32, (k + 1) / 32) for k in range(1, 32))
# An image that is narrower without its constant border has too few frequencies for five bands.
FEWEST_PIXELS_A_SIDE = 16
# For white noise, the standard deviation of this many grey values has a standard error of 18 %.
FEWEST_PIXELS_INSIDE = 16


def band_powers(
    real_BHW: np.ndarray, generated_BHW: np.ndarray, bands: tuple[tuple[float, float], ...] = BANDS
) -> tuple[Array, Array]:
    """Mean power [B, F] in each of `bands` of real and of generated images, in grey values squared a frequency.

    The radially averaged power spectrum (Durall et al. 2020, "Watch your up-convolution"), its mean over a band. Both
    images of a pair are cut to the box inside the real one's constant border, so that padding and its edge do not
    count. A Hann window fades both out towards the box's sides. Without it, opposite sides of an image would form an
    edge, with power at all frequencies in both images, which hides power that one of them lacks. NaN if the box is
    narrower than FEWEST_PIXELS_A_SIDE, and in bands without a frequency in such a small image.

    Any number type; ValueError when the shapes differ.
    """
    if real_BHW.ndim != 3 or real_BHW.shape != generated_BHW.shape:
        raise ValueError(f"generated_BHW: {generated_BHW.shape} is not real_BHW's {real_BHW.shape}")
    powers_2BF = np.full((2, len(real_BHW), len(bands)), np.nan)
    for b, real_HW in enumerate(real_BHW):
        window_HW = _window(real_HW)
        if window_HW is not None:
            powers_2BF[0, b] = _band_power(real_HW, window_HW, bands)
            powers_2BF[1, b] = _band_power(generated_BHW[b], window_HW, bands)
    return powers_2BF[0], powers_2BF[1]


def power_ratios(real_BF: Array, generated_BF: Array) -> Array:
    """Generated over real power [F], each summed over the images; NaN if the real images have none."""
    both_BF = np.isfinite(real_BF) & np.isfinite(generated_BF)
    real_F, generated_F = (np.where(both_BF, power_BF, 0.0).sum(axis=0) for power_BF in (real_BF, generated_BF))
    return ratio(generated_F, real_F)


def ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Array:
    """The quotient, of any shape; NaN where the denominator is 0."""
    numerator, denominator = (np.asarray(of, dtype=np.float64) for of in (numerator, denominator))
    quotient: Array = np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1.0), np.nan)
    return quotient


def sharpness(ratio_XF: Array) -> Array:
    """How near the bands' power ratios are to 1, over the last axis: exp(-mean of |ln ratio|), in 0 to 1.

    The geometric mean of ratio or 1 / ratio, whichever is below 1. Missing power costs as much as excess power, and one
    band cannot compensate for another. Bands that are NaN are left out; NaN if all are.
    """
    known_XF = np.isfinite(ratio_XF)
    # A band without any power makes the result 0, as in the limit.
    positive_XF = known_XF & (ratio_XF > 0)
    log_XF = np.abs(np.log(np.where(positive_XF, ratio_XF, 1.0)))
    num_X = known_XF.sum(axis=-1)
    mean_X = log_XF.sum(axis=-1) / np.maximum(num_X, 1)
    has_none_X = (known_XF & ~positive_XF).any(axis=-1)
    return np.where(num_X == 0, np.nan, np.where(has_none_X, 0.0, np.exp(-mean_X)))


def texture_std(labels_BHW: np.ndarray, images_BHW: np.ndarray, num_classes: int) -> Array:
    """texture_stds of one image for each mask."""
    [std_BK] = texture_stds(labels_BHW, [images_BHW], num_classes)
    return std_BK


def texture_stds(labels_BHW: np.ndarray, images: Sequence[np.ndarray], num_classes: int) -> list[Array]:
    """Standard deviation (n) [B, K] of fine detail inside each label id, in grey values, of several images [B, H, W] of
    the same masks.

    Fine detail is the image minus its mean under the 3x3 binomial filter. Only pixels whose eight neighbours have the
    same label count, so an organ's outline does not. NaN if fewer than FEWEST_PIXELS_INSIDE are left, and for
    background.
    """
    inside_BHW = interior(labels_BHW)
    place = labels_BHW[:, 1:-1, 1:-1][inside_BHW].astype(np.int64) + np.nonzero(inside_BHW)[0] * num_classes
    length = len(labels_BHW) * num_classes

    def sums(weights: Array | None) -> npt.NDArray[Any]:
        return np.bincount(place, weights, length).reshape(-1, num_classes)

    count_BK = sums(None)
    num_BK = np.where(count_BK >= FEWEST_PIXELS_INSIDE, count_BK, np.nan)
    found = []
    for images_BHW in images:
        detail = fine_detail(images_BHW)[inside_BHW]
        mean_BK = sums(detail) / num_BK
        found.append(np.sqrt(np.maximum(sums(detail**2) / num_BK - mean_BK**2, 0.0)))
    return found


def fine_detail(images_BHW: np.ndarray) -> Array:
    """The image less its mean under the 3x3 binomial filter, [B, H - 2, W - 2]: of all except the outermost pixels,
    which do not have eight neighbours."""
    # Sixteen times a grey value of 8 bits fits into 16 bits, which is four times as fast and exact, too.
    image_BHW: npt.NDArray[Any] = images_BHW.astype(np.int16 if images_BHW.dtype == np.uint8 else np.float64)
    rows_BHW: npt.NDArray[Any] = image_BHW[:, :-2] + 2 * image_BHW[:, 1:-1] + image_BHW[:, 2:]
    sums_BHW: npt.NDArray[Any] = rows_BHW[:, :, :-2] + 2 * rows_BHW[:, :, 1:-1] + rows_BHW[:, :, 2:]
    return np.asarray((16 * image_BHW[:, 1:-1, 1:-1] - sums_BHW) / 16.0)


def mean_texture(std_BK: Array, organ_ids: Sequence[int]) -> Array:
    """Mean [B] of texture_std over the organs that have one; NaN where none has."""
    organs_BO = std_BK[:, list(organ_ids)]
    known_BO = np.isfinite(organs_BO)
    return ratio(np.where(known_BO, organs_BO, 0.0).sum(axis=1), known_BO.sum(axis=1))


def interior(labels_BHW: np.ndarray) -> npt.NDArray[np.bool_]:
    """Pixels that are not background and have eight neighbours of the same label, bool [B, H - 2, W - 2]: of all except
    the outermost."""
    height, width = labels_BHW.shape[1:]
    centre = labels_BHW[:, 1:-1, 1:-1]
    same_BHW = centre > 0
    for row in range(3):
        for column in range(3):
            same_BHW &= labels_BHW[:, row : row + height - 2, column : column + width - 2] == centre
    return same_BHW


def _window(real_HW: np.ndarray) -> Array | None:
    """A Hann window inside the constant border, 0 elsewhere; None if the inside is too narrow."""
    rows, columns = (_without_border(image) for image in (real_HW, real_HW.T))
    if min(len(rows), len(columns)) < FEWEST_PIXELS_A_SIDE:
        return None
    window_HW = np.zeros(real_HW.shape)
    # It begins half a pixel after its zeros, so that the outermost pixels count a little.
    fade_H, fade_W = (np.sin(np.pi * (np.arange(len(r)) + 0.5) / len(r)) ** 2 for r in (rows, columns))
    window_HW[rows.start : rows.stop, columns.start : columns.stop] = fade_H[:, None] * fade_W
    return window_HW


def _without_border(image_HW: np.ndarray) -> range:
    """The rows from the first to the last that does not consist only of the value of the image's first or last row."""
    first, last = ((image_HW != image_HW[end, end]).any(axis=1) for end in (0, -1))
    if not first.any() or not last.any():
        return range(0)
    return range(int(first.argmax()), len(last) - int(last[::-1].argmax()))


def _band_power(image_HW: np.ndarray, window_HW: Array, bands: tuple[tuple[float, float], ...]) -> Array:
    """Mean power [F] of each band; zeros around the window only make the spectrum's grid finer."""
    centred_HW = image_HW - (image_HW * window_HW).sum() / window_HW.sum()
    power = np.abs(np.fft.rfft2(centred_HW * window_HW)) ** 2 / (window_HW**2).sum()
    band, weight, total_F = _frequencies(*image_HW.shape, bands)
    sum_F = np.bincount(band, (power * weight).ravel(), len(bands) + 1)[: len(bands)]
    return ratio(sum_F, total_F)


@lru_cache(maxsize=16)
def _frequencies(
    height: int, width: int, bands: tuple[tuple[float, float], ...]
) -> tuple[npt.NDArray[np.intp], Array, Array]:
    """For the half spectrum of rfft2: each frequency's band (the number of bands if it is in none), its multiplicity (2
    if it also represents its mirror image), and the sum of multiplicities by band."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) / 0.5
    band = np.full(radius.shape, len(bands), dtype=np.intp)
    for f, (low, high) in enumerate(bands):
        band[(radius >= low) & (radius < high)] = f
    weight = np.full(radius.shape, 2.0)
    weight[:, 0] = 1.0
    if width % 2 == 0:
        weight[:, -1] = 1.0
    total_F = np.bincount(band.ravel(), weight.ravel(), len(bands) + 1)[: len(bands)].astype(np.float64)
    return band.ravel(), weight, total_F
