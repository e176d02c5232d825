"""A mean over samples with its 95 % bootstrap interval over patients.

Dimensions: N samples, P patients, R bootstrap samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from segdiff_dist.evaluation.metrics.arrays import Array, Counts

_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its 95 % interval over patients; `interval` is None for fewer than two patients."""

    value: float
    interval: tuple[float, float] | None
    num_samples: int
    num_patients: int


def estimate(values: np.ndarray, patients: np.ndarray, *, resamples: int, seed: int) -> Estimate | None:
    """Mean of `values` with a 95 % percentile bootstrap interval over patients, not over slices.

    `values` [N] (NaN and infinities are left out), `patients` [N] their case ids. Slices of a patient resemble each
    other, so that a bootstrap over slices would give far too narrow intervals. None when no finite value is left.
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
    """The same from each patient's sum and number of finite values; P patients with at least one value."""
    assert len(sums_P)
    assert (counts_P > 0).all()
    num_patients, interval = len(sums_P), None
    if num_patients >= 2:
        draws_RP = bootstrap_counts(num_patients, resamples, seed)
        low, high = np.percentile((draws_RP @ sums_P) / (draws_RP @ counts_P), _INTERVAL)
        interval = (float(low), float(high))
    return Estimate(float(sums_P.sum() / counts_P.sum()), interval, int(counts_P.sum()), num_patients)


@lru_cache(maxsize=16)
def bootstrap_counts(num_patients: int, resamples: int, seed: int) -> Counts:
    """How often each bootstrap sample holds each patient, [R, P]; the same for every metric of as many patients."""
    return np.random.default_rng(seed).multinomial(num_patients, np.full(num_patients, 1 / num_patients), resamples)
