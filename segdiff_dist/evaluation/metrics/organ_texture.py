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
# The correlation of this many independent pairs has a standard error of 0.17 in an image.
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
    return _Inside(labels_BHW, num_classes).autocorrelation(images_BHW)


class _Inside:
    """The pixels inside organs, and their pairs, which all images of the same masks share."""

    def __init__(self, labels_BHW: np.ndarray, num_classes: int) -> None:
        self._shape = (len(LAGS), len(labels_BHW), num_classes)
        self._inside_BHW = interior(labels_BHW)
        b_N, row_N, column_N = np.nonzero(self._inside_BHW)
        self._place_N = labels_BHW[:, 1:-1, 1:-1][self._inside_BHW].astype(np.int64) + b_N * num_classes
        self._count = np.bincount(self._place_N, minlength=self._shape[1] * num_classes).astype(np.float64)
        y_N, x_N = self._y_N, self._x_N = self._centred(row_N), self._centred(column_N)
        self._yy, self._xx, self._xy = (self._sums(product) for product in (y_N * y_N, x_N * x_N, y_N * x_N))
        self._pairs = [self._pairs_of(lag) for lag in LAGS]

    def autocorrelation(self, images_BHW: np.ndarray) -> Array:
        """[L, B, K], as of the function above."""
        rest_N = self._less_plane(images_BHW[:, 1:-1, 1:-1][self._inside_BHW].astype(np.float64))
        variance = self._sums(rest_N * rest_N) / np.maximum(self._count, 1)
        variance = np.where((self._count >= FEWEST_PIXELS_CORRELATED) & (variance > 1e-6), variance, 0.0)
        found = []
        for first, second, num_pairs in self._pairs:
            product = np.bincount(self._place_N[first], rest_N[first] * rest_N[second], len(self._count))
            found.append(ratio(product / np.maximum(num_pairs, 1), variance))
        return np.stack(found).reshape(self._shape)

    def _sums(self, values_N: np.ndarray) -> Array:
        return np.bincount(self._place_N, values_N, len(self._count)).astype(np.float64)

    def _centred(self, values_N: np.ndarray) -> Array:
        return np.asarray(values_N - (self._sums(values_N) / np.maximum(self._count, 1))[self._place_N])

    def _less_plane(self, grey_N: Array) -> Array:
        """Grey values less their least-squares plane; less their mean alone where all pixels are on a line."""
        grey_N, y_N, x_N = self._centred(grey_N), self._y_N, self._x_N
        gy, gx = self._sums(grey_N * y_N), self._sums(grey_N * x_N)
        determinant = self._yy * self._xx - self._xy**2
        slope_y = np.nan_to_num(ratio(gy * self._xx - gx * self._xy, determinant))
        slope_x = np.nan_to_num(ratio(gx * self._yy - gy * self._xy, determinant))
        return np.asarray(grey_N - slope_y[self._place_N] * y_N - slope_x[self._place_N] * x_N)

    def _pairs_of(self, lag: int) -> tuple[np.ndarray, np.ndarray, Array]:
        """The pairs of pixels that are `lag` apart along rows or columns, and the number of pairs of each organ.

        Pixels that have eight neighbours of their own label and are one or two apart have the same label.
        """
        number_BHW = np.full(self._inside_BHW.shape, -1)
        number_BHW[self._inside_BHW] = np.arange(len(self._place_N))
        shifted = ((number_BHW[:, :-lag], number_BHW[:, lag:]), (number_BHW[:, :, :-lag], number_BHW[:, :, lag:]))
        kept = [(a[both], b[both]) for a, b in shifted for both in [(a >= 0) & (b >= 0)]]
        first, second = (np.concatenate(numbers) for numbers in zip(*kept, strict=True))
        num_pairs = np.bincount(self._place_N[first], minlength=len(self._count)).astype(np.float64)
        return first, second, num_pairs


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
    is_organ_K = np.isin(np.arange(table.num_classes), table.organ_ids)
    inside = _Inside(np.where(is_organ_K[mask_BHW], mask_BHW, 0), table.num_classes)
    for side, images_BHW in zip(_SIDES, (real_BHW, generated_BHW), strict=True):
        for lag, values_BK in zip(LAGS, inside.autocorrelation(images_BHW), strict=True):
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
