"""Means with 95 % bootstrap intervals over patients from running sums, without keeping the samples.

Dimensions: B batch, C columns, P patients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from segdiff_dist.evaluation.metrics.estimates import Estimate, estimate, estimate_from_sums


class SumKey(NamedTuple):
    """Samples that are always counted together: of one kind, case, source and target modality, and axis. `patient`: if
    it is named otherwise than the case."""

    kind: str
    case_id: str
    source: str
    target: str
    axis: str
    patient: str = ""

    @property
    def unit(self) -> str:
        """The patient, who may have several cases."""
        return self.patient or self.case_id


@dataclass(frozen=True)
class Interval:
    """How intervals are computed: the number of bootstrap samples of the patients, and their seed."""

    resamples: int
    seed: int


class PatientSums:
    """For each key and column the sum and the number of finite values. Memory grows with patients, not with samples."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._column = {name: c for c, name in enumerate(self.names)}
        self._sums: dict[SumKey, np.ndarray] = {}
        self._counts: dict[SumKey, np.ndarray] = {}
        self._num_samples: dict[SumKey, int] = {}

    def add(self, keys: Sequence[SumKey], values_BC: np.ndarray) -> None:
        """Add B samples; NaN and infinities do not count."""
        rows: dict[SumKey, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        finite_BC = np.isfinite(values_BC)
        filled_BC = np.where(finite_BC, values_BC, 0.0)
        for key, chosen in rows.items():
            if key not in self._sums:
                self._sums[key] = np.zeros(len(self.names))
                self._counts[key] = np.zeros(len(self.names), np.int64)
            self._sums[key] += filled_BC[chosen].sum(axis=0)
            self._counts[key] += finite_BC[chosen].sum(axis=0)
            self._num_samples[key] = self._num_samples.get(key, 0) + len(chosen)

    def num_samples(self, which: Callable[[SumKey], bool]) -> int:
        """Samples of the keys that `which` selects."""
        return sum(number for key, number in self._num_samples.items() if which(key))

    def patients(self, which: Callable[[SumKey], bool]) -> set[str]:
        """Patients of the keys that `which` selects."""
        return {key.unit for key in self._sums if which(key)}

    def means(
        self, names: Sequence[str], which: Callable[[SumKey], bool], interval: Interval
    ) -> dict[str, Estimate | None]:
        """Mean of each column over the samples that `which` selects; None if no value is finite."""
        sums_PC, counts_PC = self.by_patient(names, which)
        estimates: dict[str, Estimate | None] = {}
        for c, name in enumerate(names):
            has_P = counts_PC[:, c] > 0
            estimates[name] = (
                estimate_from_sums(
                    sums_PC[has_P, c], counts_PC[has_P, c], resamples=interval.resamples, seed=interval.seed
                )
                if has_P.any()
                else None
            )
        return estimates

    def by_patient(self, names: Sequence[str], which: Callable[[SumKey], bool]) -> tuple[np.ndarray, np.ndarray]:
        """Sums and numbers of finite values [P, C] of these columns, by patient of the keys that `which` selects."""
        keys = sorted(key for key in self._sums if which(key))
        chosen = [self._column[name] for name in names]
        patients, patient_of_key = np.unique([key.unit for key in keys], return_inverse=True)
        sums_PC, counts_PC = np.zeros((len(patients), len(names))), np.zeros((len(patients), len(names)), np.int64)
        for p, key in zip(patient_of_key, keys, strict=True):
            sums_PC[p] += self._sums[key][chosen]
            counts_PC[p] += self._counts[key][chosen]
        return sums_PC, counts_PC

    def volume_error(
        self, reference: str, predicted: str, which: Callable[[SumKey], bool], interval: Interval
    ) -> Estimate | None:
        """Mean of |A - B| / B, A and B the sums of two columns of areas over a key's samples; B > 0.

        A key's samples are slices of one case along one axis, so A and B are proportional to volumes.
        """
        a, b = self._column[predicted], self._column[reference]
        pairs = [(key.unit, s[a], s[b]) for key, s in sorted(self._sums.items()) if which(key) and s[b] > 0]
        errors = np.array([abs(area - true) / true for _, area, true in pairs])
        return estimate(errors, np.array([p for p, *_ in pairs]), resamples=interval.resamples, seed=interval.seed)
