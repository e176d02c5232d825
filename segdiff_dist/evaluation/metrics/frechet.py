"""Mean and covariance of features in a stream, and the Frechet distance of two such Gaussians.

Dimensions: B batch, D features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segdiff_dist.evaluation.metrics.arrays import Array


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
