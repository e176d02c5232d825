"""Noise level and autocorrelation inside organs, real and generated: functions of arrays, columns, entries.

Noise level: the standard deviation of fine detail (spectra.texture_std) as white noise would have it. Autocorrelation:
of grey values less the plane fitted to the organ, so that shading across an organ does not count.

Dimensions: B batch, H rows, W columns, K label ids (background is id 0), L lags, N pixels inside organs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from segdiff_dist.evaluation.metrics.arrays import Array
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.metrics.sums import Interval, PatientSums, SumKey
from segdiff_dist.spectra import interior, mean_texture, ratio

if TYPE_CHECKING:
    from data_shards.labels import LabelTable

LAGS = (1, 2)
_SIDES = ("real", "gen")
# The correlation of so many independent pairs has a standard error of 0.17 in an image.
FEWEST_PIXELS_CORRELATED = 36
# The standard deviation of white noise of 1 that is left after the 3x3 binomial mean is subtracted: 1 - 2 h(0) plus
# the sum of h squared, with h(0) = 4/16.
_LEFT_OF_WHITE_NOISE = float(np.sqrt(1 - 2 * 4 / 16 + (6 / 16) ** 2))
NOISE_METRICS = tuple(f"noise_std_{side}" for side in _SIDES)
CORRELATION_METRICS = tuple(f"autocorrelation_{lag}_{side}" for lag in LAGS for side in _SIDES)
ORGAN_TEXTURE_METRICS = (*NOISE_METRICS, *CORRELATION_METRICS)


def noise_std(detail_std: Array) -> Array:
    """The standard deviation of the white noise that has this standard deviation of fine detail, of any shape."""
    return np.asarray(detail_std / _LEFT_OF_WHITE_NOISE)


def autocorrelation(labels_BHW: np.ndarray, images_BHW: np.ndarray, num_classes: int) -> Array:
    """Autocorrelation [L, B, K] of grey values inside each label id, LAGS pixels apart along rows and columns.

    Grey values less their least-squares plane over the organ's pixels whose eight neighbours have the same label. 0 for
    white noise (less some 3 / N, for the plane). NaN where fewer than FEWEST_PIXELS_CORRELATED are left, where all are
    equal, and for background.
    """
    inside_BHW = interior(labels_BHW)
    b_N, y_N, x_N = np.nonzero(inside_BHW)
    place_N = labels_BHW[:, 1:-1, 1:-1][inside_BHW].astype(np.int64) + b_N * num_classes
    length = len(labels_BHW) * num_classes
    count = np.bincount(place_N, minlength=length).astype(np.float64)

    def sums(weights_N: np.ndarray) -> Array:
        return np.bincount(place_N, weights_N, length)

    def centred(values_N: np.ndarray) -> Array:
        return np.asarray(values_N - (sums(values_N) / np.maximum(count, 1))[place_N])

    y_N, x_N, grey_N = centred(y_N), centred(x_N), centred(images_BHW[:, 1:-1, 1:-1][inside_BHW].astype(np.float64))
    yy, xx, xy, gy, gx = (sums(p) for p in (y_N**2, x_N**2, y_N * x_N, grey_N * y_N, grey_N * x_N))
    determinant = yy * xx - xy**2
    slope_y, slope_x = ratio(gy * xx - gx * xy, determinant), ratio(gx * yy - gy * xy, determinant)
    # NaN where the pixels are on a line: such an organ has too few anyhow.
    rest_N = np.nan_to_num(grey_N - slope_y[place_N] * y_N - slope_x[place_N] * x_N)
    rest_BHW, label_BHW = np.zeros(inside_BHW.shape), np.zeros(inside_BHW.shape, np.int64)
    rest_BHW[inside_BHW], label_BHW[inside_BHW] = rest_N, place_N
    variance = np.where(count >= FEWEST_PIXELS_CORRELATED, sums(rest_N**2) / np.maximum(count, 1), 0.0)
    variance = np.where(variance > 1e-6, variance, 0.0)
    found = [ratio(_mean_product(rest_BHW, label_BHW, inside_BHW, lag, length), variance) for lag in LAGS]
    return np.stack(found).reshape(len(LAGS), -1, num_classes)


def _mean_product(rest_BHW: Array, place_BHW: np.ndarray, inside_BHW: np.ndarray, lag: int, length: int) -> Array:
    """Mean by place of the product of two pixels `lag` apart, both inside. Pixels that have eight neighbours of their
    own label and are one or two apart have the same label."""
    product, pairs = np.zeros(length), np.zeros(length)
    for first, second in (((slice(None, -lag), slice(None)), (slice(lag, None), slice(None))),
                          ((slice(None), slice(None, -lag)), (slice(None), slice(lag, None)))):  # fmt: skip
        a, b = (slice(None), *first), (slice(None), *second)
        both = inside_BHW[a] & inside_BHW[b]
        place = place_BHW[a][both]
        product += np.bincount(place, rest_BHW[a][both] * rest_BHW[b][both], length)
        pairs += np.bincount(place, minlength=length)
    return np.asarray(product / np.maximum(pairs, 1))


def organ_texture_columns(table: LabelTable) -> list[str]:
    """Names of the columns of samples.parquet, in order. Noise levels are those of `texture_SIDE` there."""
    organs = [table.names[i] for i in table.organ_ids]
    return [*CORRELATION_METRICS, *(f"{name}/{organ}" for name in CORRELATION_METRICS for organ in organs)]


def measure(
    real_BHW: np.ndarray, generated_BHW: np.ndarray, mask_BHW: np.ndarray, table: LabelTable
) -> dict[str, np.ndarray]:
    """Float64 [B] by column, of uint8 images and the masks that the generated ones were made from.

    `autocorrelation_LAG_SIDE` is the mean over organs of `autocorrelation_LAG_SIDE/ORGAN`; NaN where none has one.
    """
    columns: dict[str, np.ndarray] = {}
    for side, images_BHW in zip(_SIDES, (real_BHW, generated_BHW), strict=True):
        for lag, values_BK in zip(LAGS, autocorrelation(mask_BHW, images_BHW, table.num_classes), strict=True):
            name = f"autocorrelation_{lag}_{side}"
            columns[name] = mean_texture(values_BK, table.organ_ids)
            columns |= {f"{name}/{table.names[i]}": values_BK[:, i] for i in table.organ_ids}
    return columns


def organ_texture_entries(
    sums: PatientSums, which: Callable[[SumKey], bool], interval: Interval, organ: str | None = None
) -> dict[str, dict[str, Any]]:
    """Entries of ORGAN_TEXTURE_METRICS over the samples that `which` selects: of one organ, or of all together."""
    column = {name: name.replace("noise_std", "texture") for name in ORGAN_TEXTURE_METRICS}
    if organ is not None:
        column = {name: f"{of}/{organ}" for name, of in column.items()}
    means = sums.means(list(column.values()), which, interval)
    num_samples, entries = sums.num_samples(which), {}
    for name, of in column.items():
        mean, scale = means[of], 1 / _LEFT_OF_WHITE_NOISE if name in NOISE_METRICS else 1.0
        if mean is not None:
            entries[name] = {
                "value": mean.value * scale,
                "ci95": None if mean.interval is None else [end * scale for end in mean.interval],
                "n": mean.num_samples,
                "num_patients": mean.num_patients,
                "unit": "grey values" if name in NOISE_METRICS else "1",
                "better": DEFINITIONS[name].better or None,
            }
            if organ is None:
                entries[name]["num_left_out"] = num_samples - mean.num_samples
    return entries
