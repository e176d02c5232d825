"""Distances between two sets of features, and the bounded sample that keeps the features.

Dimensions: N real images, M generated ones, D features, K neighbours. A patient is an integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from segdiff_dist.evaluation.metrics.arrays import Array

# Rows of a distance matrix held at a time.
_BLOCK = 1024
# Kynkaanniemi et al. 2019; Naeem et al. 2020.
_NEIGHBOURS_PRECISION, _NEIGHBOURS_DENSITY = 3, 5
FEWEST_FOR_NEIGHBOURS = _NEIGHBOURS_DENSITY + 1


class Extractor(Protocol):
    """Features [B, D] of uint8 images [B, H, W]; `modality_B`: the segmenter's ids of modalities."""

    def __call__(self, image_BHW: Any, modality_B: Any) -> Any: ...


class FeatureSample:
    """At most `capacity` features float32 [N, D], with their patients: those of the smallest priorities.

    A priority is a fixed pseudo-random rank of its image. So the sample is uniform, and it holds at most twice
    `capacity` images. It does not depend on the order or the parts in which images come: keeping the smallest commutes
    with merging. Cohen and Kaplan 2007 (bottom-k sketches).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, priority_N: np.ndarray, features_ND: np.ndarray, patient_N: np.ndarray) -> None:
        """Add features with their priorities and patients, both int64."""
        assert len(priority_N) == len(features_ND) == len(patient_N)
        self._parts.append((priority_N, np.asarray(features_ND, np.float32), patient_N))
        if self.num_held > 2 * self.capacity:
            self._compact()

    def merge(self, others: Sequence[FeatureSample]) -> FeatureSample:
        """The sample of this one and all the others; none of them changes."""
        merged = FeatureSample(self.capacity)
        for sample in (self, *others):
            for part in sample._parts:
                merged.add(*part)
        return merged

    @property
    def features_ND(self) -> np.ndarray:
        """The features that are kept, in order of priority."""
        self._compact()
        return self._parts[0][1] if self._parts else np.zeros((0, 0), np.float32)

    @property
    def patient_N(self) -> np.ndarray:
        """The patient of each of `features_ND`."""
        self._compact()
        return self._parts[0][2] if self._parts else np.zeros(0, np.int64)

    @property
    def num_held(self) -> int:
        """Number of features in memory: those that are kept, and those added since."""
        return sum(len(part[0]) for part in self._parts)

    def __len__(self) -> int:
        return len(self.features_ND)

    def _compact(self) -> None:
        if self._parts:
            priority_N, features_ND, patient_N = (np.concatenate(column) for column in zip(*self._parts, strict=True))
            kept = np.argsort(priority_N, kind="stable")[: self.capacity]
            self._parts = [(priority_N[kept], features_ND[kept], patient_N[kept])]


def kernel_distance(real_ND: np.ndarray, gen_MD: np.ndarray) -> float:
    """Squared maximum mean discrepancy, unbiased, kernel (x.y / D + 1)^3; each side needs two samples.

    Gretton et al. 2012, eq. 3; Binkowski et al. 2018. KID averages this over random subsets; over all pairs, as here,
    it has the same expectation and less variance. May be negative.
    """
    assert min(len(real_ND), len(gen_MD)) >= 2
    real, gen = (_kernel_mean(side, side, same=True) for side in (real_ND, gen_MD))
    return real + gen - 2 * _kernel_mean(real_ND, gen_MD, same=False)


@dataclass(frozen=True)
class Neighbourhoods:
    """How many images are in the neighbourhoods of others. Each value is in [0, 1] except `density`."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(real_ND: np.ndarray, gen_MD: np.ndarray) -> Neighbourhoods:
    """Precision and recall with K = 3, density and coverage with K = 5; each side needs FEWEST_FOR_NEIGHBOURS.

    Kynkaanniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020. Euclidean; the neighbourhood of an image is
    the closed ball that reaches to its K-th neighbour, itself not counted.
    """
    n, m = len(real_ND), len(gen_MD)
    assert min(n, m) >= FEWEST_FOR_NEIGHBOURS
    real, gen = _centred(real_ND, gen_MD)
    real_few_N, real_more_N = _radii(real, (_NEIGHBOURS_PRECISION, _NEIGHBOURS_DENSITY))
    (gen_few_M,) = _radii(gen, (_NEIGHBOURS_PRECISION,))
    precise_M = np.zeros(m, dtype=bool)
    recalled = covered = balls = 0
    for start, square_BM in _square_distances(real, gen):
        block = slice(start, start + len(square_BM))
        precise_M |= (square_BM <= real_few_N[block, None]).any(axis=0)
        recalled += int((square_BM <= gen_few_M).any(axis=1).sum())
        inside_BM = square_BM <= real_more_N[block, None]
        balls += int(inside_BM.sum())
        covered += int(inside_BM.any(axis=1).sum())
    return Neighbourhoods(float(precise_M.mean()), recalled / n, balls / (_NEIGHBOURS_DENSITY * m), covered / n)


@dataclass(frozen=True)
class PatientNeighbourhoods:
    """Precision and recall, in [0, 1], with neighbourhoods that reach to images of other patients."""

    patient_precision: float
    patient_recall: float


def patient_neighbourhoods(
    real_ND: np.ndarray, real_patient_N: np.ndarray, gen_MD: np.ndarray, gen_patient_M: np.ndarray
) -> PatientNeighbourhoods | None:
    """Precision and recall whose neighbourhoods reach to the third nearest image of *another* patient of the same side.

    Kynkaanniemi et al. 2019 assume that images are drawn independently. Slices of one patient are not: the third
    nearest of a slice is the next slice but one. A ball that reaches only so far contains almost no slice of any other
    patient, real ones included. The patient of a generated image is that of its mask. None if a slice of either side
    has fewer than three images of other patients.
    """
    for patient_N in (real_patient_N, gen_patient_M):
        _, counts = np.unique(patient_N, return_counts=True)
        if len(patient_N) - max(counts, default=0) < _NEIGHBOURS_PRECISION:
            return None
    real, gen = _centred(real_ND, gen_MD)
    real_radius_N, gen_radius_M = _patient_radii(real, real_patient_N), _patient_radii(gen, gen_patient_M)
    precise_M, recalled = np.zeros(len(gen), dtype=bool), 0
    for start, square_BM in _square_distances(real, gen):
        precise_M |= (square_BM <= real_radius_N[start : start + len(square_BM), None]).any(axis=0)
        recalled += int((square_BM <= gen_radius_M).any(axis=1).sum())
    return PatientNeighbourhoods(float(precise_M.mean()), recalled / len(real))


def nearest(to_ND: np.ndarray, from_MD: np.ndarray, *, skip_self: bool = False) -> tuple[Array, np.ndarray]:
    """For each of `to` [N] the Euclidean distance to its nearest among `from`, and that one's index.

    `skip_self`: both are the same set, and an image is not its own neighbour.
    """
    centre_D = from_MD.mean(axis=0, dtype=np.float64)
    to, others = ((side - centre_D).astype(np.float32) for side in (to_ND, from_MD))
    distance_N, index_N = np.zeros(len(to)), np.zeros(len(to), np.int64)
    for start, square_BM in _square_distances(to, others):
        if skip_self:
            rows = np.arange(len(square_BM))
            square_BM[rows, start + rows] = np.inf
        block = slice(start, start + len(square_BM))
        index_N[block] = square_BM.argmin(axis=1)
        distance_N[block] = np.sqrt(square_BM.min(axis=1))
    return distance_N, index_N


def _centred(real_ND: np.ndarray, gen_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both float32, less the mean of the real ones: then single precision is enough for distances, which stay."""
    centre_D = real_ND.mean(axis=0, dtype=np.float64)
    return (real_ND - centre_D).astype(np.float32), (gen_MD - centre_D).astype(np.float32)


def _patient_radii(features_ND: np.ndarray, patient_N: np.ndarray) -> np.ndarray:
    """Squared distance [N] to the K-th nearest image of another patient."""
    radius_N = np.zeros(len(features_ND), np.float32)
    for start, square_BN in _square_distances(features_ND, features_ND):
        block = slice(start, start + len(square_BN))
        square_BN[patient_N[block, None] == patient_N] = np.inf
        radius_N[block] = np.partition(square_BN, _NEIGHBOURS_PRECISION - 1, axis=1)[:, _NEIGHBOURS_PRECISION - 1]
    return radius_N


def _radii(features_ND: np.ndarray, neighbours: tuple[int, ...]) -> list[np.ndarray]:
    """Squared distance [N] to the K-th neighbour, for each K."""
    radii: list[np.ndarray] = [np.zeros(len(features_ND), np.float32) for _ in neighbours]
    for start, square_BN in _square_distances(features_ND, features_ND):
        rows = np.arange(len(square_BN))
        # Rounding may put another image before the image itself. By definition it is its own nearest.
        square_BN[rows, start + rows] = -1.0
        ordered = np.partition(square_BN, neighbours, axis=1)
        for radius_N, k in zip(radii, neighbours, strict=True):
            radius_N[start : start + len(ordered)] = ordered[:, k]
    return radii


def _square_distances(first_ND: np.ndarray, second_MD: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Squared Euclidean distances in blocks of rows: the first row's number and [B, M]."""
    second_square_M = np.einsum("md,md->m", second_MD, second_MD)
    for start in range(0, len(first_ND), _BLOCK):
        block_BD = first_ND[start : start + _BLOCK]
        square_BM = np.einsum("bd,bd->b", block_BD, block_BD)[:, None] + second_square_M
        square_BM -= 2 * (block_BD @ second_MD.T)
        yield start, np.maximum(square_BM, 0.0, out=square_BM)


def _kernel_mean(first_ND: np.ndarray, second_MD: np.ndarray, *, same: bool) -> float:
    """Mean of the kernel over pairs, without those of an image and itself where both sets are the same."""
    second_MD, total = np.asarray(second_MD, np.float64), 0.0
    for start in range(0, len(first_ND), _BLOCK):
        block_BD = np.asarray(first_ND[start : start + _BLOCK], np.float64)
        # Within one set only pairs from here on are computed: each counts twice, for itself and its mirror image.
        others_MD = second_MD[start:] if same else second_MD
        kernel_BM = (block_BD / block_BD.shape[1]) @ others_MD.T
        # In place: a fresh array of this size costs as much as the arithmetic.
        kernel_BM += 1.0
        np.power(kernel_BM, 3, out=kernel_BM)
        total += float(kernel_BM.sum())
        if same:
            num = len(block_BD)
            total += float(kernel_BM[:, num:].sum()) - float(np.trace(kernel_BM[:, :num]))
    return total / (len(first_ND) * (len(second_MD) - same))
