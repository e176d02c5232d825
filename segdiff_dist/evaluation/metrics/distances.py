"""Distances between the real and the generated images of a group, on any extractor's features, in bounded memory.

Dimensions: B batch, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from segdiff_dist.evaluation.metrics.columns import SIDES
from segdiff_dist.evaluation.metrics.feature_sets import (
    FEWEST_FOR_NEIGHBOURS,
    FeatureSample,
    kernel_distance,
    neighbourhoods,
    patient_neighbourhoods,
)
from segdiff_dist.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from segdiff_dist.evaluation.metrics.radiomics import frd

# Names of the Frechet distance by the extractor of the features. Only Inception's is FID.
FRECHET = {
    "segmenter": "segmenter_frechet",
    "imagenet_lite": "imagenet_lite_frechet",
    "network": "network_frechet",
    "inception": "fid",
    "radiomics": "frd",
}
_KERNEL = {
    "segmenter": "segmenter_kernel_distance",
    "imagenet_lite": "imagenet_lite_kernel_distance",
    "network": "network_kernel_distance",
    "inception": "kid",
}
NEIGHBOURHOODS = ("precision", "recall", "density", "coverage", "patient_precision", "patient_recall")
# Every name in the order of a table: distances first, then measures of neighbourhoods.
DISTANCE_METRICS = (
    *FRECHET.values(),
    *_KERNEL.values(),
    *(f"{extractor}_{name}" for extractor in _KERNEL for name in NEIGHBOURHOODS),
)
_LOWER_IS_BETTER = frozenset((*FRECHET.values(), *_KERNEL.values()))

# A distance of fewer images a side is noise: their covariance has almost no rank.
FEWEST_FOR_DISTANCES = 5

# A Frechet distance of fewer images a side than this times its features is mostly bias, and is marked.
ROOM = 2

_ROWS_A_MERGE = 512

Entry = dict[str, Any]
Key = tuple[str, str, str, str, str]
ItemGroup = tuple[str, str, str]


def also_missing(frechet: str) -> list[str]:
    """The other metrics on the features of a Frechet distance."""
    names = [name for name, of in FRECHET.items() if of == frechet and name in _KERNEL]
    return [other for name in names for other in (_KERNEL[name], *(f"{name}_{n}" for n in NEIGHBOURHOODS))]


def fewest_samples(name: str) -> int:
    """How many samples a side one of DISTANCE_METRICS needs."""
    return FEWEST_FOR_DISTANCES if name in _LOWER_IS_BETTER else FEWEST_FOR_NEIGHBOURS


@dataclass(frozen=True)
class Group:
    """Items of these (source, target) modalities, None for all in their slice's own, and, unless it is None, of this
    axis."""

    modalities: frozenset[tuple[str, str]] | None = None
    axis: str | None = None

    @classmethod
    def of(cls, modality: str, axis: str | None = None) -> Group:
        """Images in their slice's own modality."""
        return cls(frozenset({(modality, modality)}), axis)

    def holds(self, source: str, target: str, axis: str) -> bool:
        """Whether an item belongs to it."""
        is_in = source == target if self.modalities is None else (source, target) in self.modalities
        return is_in and self.axis in (None, axis)


class Moments:
    """FeatureStatistics of a stream of features [B, D], taken in many rows at a time.

    A merge costs D x D for any number of rows, and a chunk has only a few rows of a group.
    """

    def __init__(self, num_features: int) -> None:
        self._merged = FeatureStatistics.empty(num_features)
        self._waiting: list[np.ndarray] = []

    def add(self, features_BD: np.ndarray) -> None:
        """Add a batch."""
        self._waiting.append(features_BD)
        if sum(len(features) for features in self._waiting) >= _ROWS_A_MERGE:
            self._merge()

    @property
    def statistics(self) -> FeatureStatistics:
        """Mean and covariance of all features added."""
        self._merge()
        return self._merged

    def _merge(self) -> None:
        if self._waiting:
            self._merged = self._merged.merge(FeatureStatistics.of(np.concatenate(self._waiting)))
            self._waiting = []


@dataclass
class Distributions:
    """Features by (extractor, side, source modality, target modality, axis); first samples of a mask only.

    `failed`: extractors that could not measure all images, and why; these have no entries.

    It keeps the moments of all features. It keeps the features of at most `capacity` images of each key, by priority.
    """

    capacity: int
    moments: dict[Key, Moments] = field(default_factory=dict)
    samples: dict[Key, FeatureSample] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _patients: dict[str, int] = field(default_factory=dict)  # a number for each case
    # Groups often hold the same items (one axis, one modality), and a distance is costly.
    _entries: dict[tuple[tuple[Key, ...], ...], dict[str, Entry]] = field(default_factory=dict)

    def add(
        self,
        features: dict[tuple[str, str], np.ndarray],
        groups: list[ItemGroup],
        cases: Sequence[str],
        first_B: np.ndarray,
        priority_B: np.ndarray,
    ) -> None:
        """Add a chunk's features [B, D] by (extractor, side). Rows that are not finite mean images without features.

        `groups`: source, target and axis of its items; `cases`: their cases; `first_B`: seed_index is 0; `priority_B`:
        see FeatureSample.
        """
        patient_B = np.array([self._patients.setdefault(case, len(self._patients)) for case in cases])
        for group in dict.fromkeys(groups):
            member_B = np.array([g == group for g in groups]) & first_B
            for (extractor, side), features_BD in features.items():
                chosen_B = member_B & np.isfinite(features_BD).all(axis=1)
                if not chosen_B.any():
                    continue
                key = (extractor, side, *group)
                self.moments.setdefault(key, Moments(features_BD.shape[1])).add(features_BD[chosen_B])
                if extractor in _KERNEL:
                    sample = self.samples.setdefault(key, FeatureSample(self.capacity))
                    sample.add(priority_B[chosen_B], features_BD[chosen_B], patient_B[chosen_B])

    def entries(self, real: Group, gen: Group) -> dict[str, Entry]:
        """Every distance between two groups of enough samples, by its stable name."""
        entries: dict[str, Entry] = {}
        for extractor in [name for name in FRECHET if name not in self.failed]:
            members = tuple(
                tuple(k for k in sorted(self.moments) if k[:2] == (extractor, side) and group.holds(*k[2:]))
                for side, group in zip(SIDES, (real, gen), strict=True)
            )
            if all(members):
                if members not in self._entries:
                    self._entries[members] = self._frechet(extractor, *members) | self._sampled(extractor, *members)
                entries |= {name: dict(entry) for name, entry in self._entries[members].items()}
        return entries

    def _frechet(self, extractor: str, real: tuple[Key, ...], gen: tuple[Key, ...]) -> dict[str, Entry]:
        first, second = (
            reduce(FeatureStatistics.merge, (self.moments[k].statistics for k in keys)) for keys in (real, gen)
        )
        if min(first.count, second.count) < FEWEST_FOR_DISTANCES:
            return {}
        value = (frd if extractor == "radiomics" else frechet_distance)(first, second)
        name, num_features = FRECHET[extractor], len(first.mean_D)
        if value is None:
            return {}
        entry = _entry(name, value, first.count, second.count, num_features)
        if min(first.count, second.count) < ROOM * num_features:
            entry["too_few"] = True
        return {name: entry}

    def _sampled(self, extractor: str, real: tuple[Key, ...], gen: tuple[Key, ...]) -> dict[str, Entry]:
        if extractor not in _KERNEL:
            return {}
        sides = [self.samples[keys[0]].merge([self.samples[k] for k in keys[1:]]) for keys in (real, gen)]
        first, second = (side.features_ND for side in sides)
        fewest, values = min(len(first), len(second)), {}
        if fewest >= FEWEST_FOR_DISTANCES:
            values[_KERNEL[extractor]] = kernel_distance(first, second)
        if fewest >= FEWEST_FOR_NEIGHBOURS:
            measured = vars(neighbourhoods(first, second))
            if between := patient_neighbourhoods(first, sides[0].patient_N, second, sides[1].patient_N):
                measured = measured | vars(between)
            values |= {f"{extractor}_{name}": value for name, value in measured.items()}
        sizes = (len(first), len(second), first.shape[1])
        return {name: _entry(name, value, *sizes) for name, value in values.items()}


def _entry(name: str, value: float, num_real: int, num_gen: int, num_features: int) -> Entry:
    return {
        "value": value + 0.0,  # no negative zero
        "ci95": None,
        "n": num_gen,
        "num_real": num_real,
        "num_features": num_features,
        "unit": "1",
        "better": "lower" if name in _LOWER_IS_BETTER else "higher",
    }
