"""The images of each training: pure functions of the shard set, the share of real patients and the seed.

Dimensions: N samples of the real and the generated set opened as one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_shards.feed.order import sample_at
from segdiff_dist.downstream.config import DownstreamConfig, share_name

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet


@dataclass(frozen=True)
class Arm:
    """One kind of training set. `real_fraction`: the share of the real patients, 0 for none."""

    real_fraction: float
    generated: bool

    @property
    def name(self) -> str:
        """Stable, for folders and trackers: real_25, real_25_and_generated, generated."""
        parts = [f"real_{share_name(self.real_fraction)}"] if self.real_fraction else []
        return "_and_".join(parts + ["generated"] * self.generated)

    @property
    def label(self) -> str:
        """For a person: `25 % of the real + generated`."""
        share = f"{share_name(self.real_fraction)} % of the real" if self.real_fraction < 1 else "all real"
        return " + ".join([share] * bool(self.real_fraction) + ["generated"] * self.generated)


@dataclass(frozen=True)
class Training:
    """A training: an arm with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.arm.name}-seed_{self.seed}"


def arms_of(config: DownstreamConfig) -> list[Arm]:
    """Every arm: each share of the real images without and with the generated ones, then the generated ones alone."""
    shares = sorted(config.real_fractions)
    return [Arm(share, generated) for share in shares for generated in (False, True)] + [Arm(0.0, True)]


def trainings_of(config: DownstreamConfig) -> list[Training]:
    """All arms with the first seed, then all with the next: a job that is stopped early has complete tables."""
    return [Training(arm, seed) for seed in config.seeds for arm in arms_of(config)]


def patients_of(shards: ShardSet, rows: np.ndarray, fraction: float, seed: int) -> list[str]:
    """The names of a share of the patients of `rows`: ceil(fraction * n) of each modality's n, the first of a
    shuffle by `seed`, so that larger shares contain smaller ones. 0 gives none."""
    case_ids = np.array(shards.patients(rows))
    chosen: list[str] = []
    for modality in range(len(shards.modalities)):
        known = np.unique(case_ids[shards.modality_N[rows] == modality])
        if len(known):
            shuffled = known[sample_at(np.arange(len(known)), len(known), seed)]
            chosen += shuffled[: math.ceil(fraction * len(known) - 1e-9)].tolist()
    return list(dict.fromkeys(chosen))  # of both modalities, a patient is one


def rows_of(training: Training, shards: ShardSet, real_rows: np.ndarray) -> np.ndarray:
    """The rows of a training. `shards`: the real set followed by the generated one; `real_rows`: the rows of the real
    set that may be trained on."""
    chosen = patients_of(shards, real_rows, training.arm.real_fraction, training.seed)
    case_ids = np.array(shards.patients(real_rows))
    rows = real_rows[np.isin(case_ids, chosen)]
    if training.arm.generated:
        rows = np.concatenate((rows, np.flatnonzero(shards.member_N == 1)))
    return rows
