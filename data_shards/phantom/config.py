"""What a phantom is made from, which cases that makes, and what is refused. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_shards.problems import Problem
from data_shards.records import MODALITIES, SPLITS
from data_shards.settings import Result, ResultWhereSet, identity

# AMOS numbers its CT up to 500 and its labelled MR from 507 on (Ji et al. 2022, dataset.json).
LAST_CT_NUMBER = 500
FIRST_MR_NUMBER = 507
LAST_NUMBER = 9999


@dataclass(frozen=True)
class PhantomConfig:
    """A phantom archive. Numbers of patients are for each modality and split; the same config gives the same bytes.

    seed: patient k of a split and modality depends on (seed, modality, split, k) alone.
    matrix: fewest and most pixels along an axial side; the field of view is 360 to 420 mm square.
    slice_thickness_mm: thinnest and thickest slices; a patient is about 295 mm tall from pelvic floor to heart.
    missing_rate: chance that a patient lacks the gallbladder, a kidney (half as often) or the pelvis (outside the
        field of view). The first patient of each split and modality is always complete, so each split holds all.
    wholebody: also write OUT/wholebody/, masks of everything that is painted, as a whole-body tool would make them.
    """

    seed: Result[int] = 0
    num_train: Result[int] = 8
    num_val: Result[int] = 2
    num_test: Result[int] = 3
    modalities: Result[tuple[str, ...]] = MODALITIES
    matrix: Result[tuple[int, int]] = (128, 160)
    slice_thickness_mm: Result[tuple[float, float]] = (4.5, 6.0)
    missing_rate: Result[float] = 0.1
    wholebody: ResultWhereSet[bool] = False

    def problems(self, where: str = "phantom") -> list[Problem]:
        """Everything out of range, each with what to do about it; empty when the config can be used."""
        return list(_problems(self, where))

    def to_json(self) -> dict[str, Any]:
        """A dictionary that json can write and that compares equal after being read back."""
        return identity(self)


@dataclass(frozen=True)
class CaseKey:
    """Which patient: `index` counts from 0 within a split and modality, `number` is AMOS' four digits."""

    modality: str
    split: str
    index: int
    number: int

    @property
    def file_name(self) -> str:
        """The name of both image and label file."""
        return f"amos_{self.number:04d}.nii.gz"


def case_keys(config: PhantomConfig) -> list[CaseKey]:
    """All cases: for each modality train, val, test, numbered on; CT from 1, MR from 507, as in AMOS."""
    keys = []
    for modality in config.modalities:
        number = 1 if modality == "CT" else FIRST_MR_NUMBER
        for split, count in zip(SPLITS, (config.num_train, config.num_val, config.num_test), strict=True):
            for index in range(count):
                keys.append(CaseKey(modality, split, index, number))
                number += 1
    return keys


def _problems(config: PhantomConfig, where: str) -> Iterator[Problem]:
    if not 0 <= config.seed < 2**63:
        yield Problem(where, "seed", str(config.seed), "use an integer from 0 to 2**63 - 1")
    for name, least in (("num_train", 1), ("num_val", 0), ("num_test", 0)):
        if getattr(config, name) < least:
            yield Problem(where, name, str(getattr(config, name)), f"use {least} or more")
    unknown = [m for m in config.modalities if m not in MODALITIES]
    if unknown or not config.modalities or len(set(config.modalities)) != len(config.modalities):
        yield Problem(where, "modalities", str(list(config.modalities)), f"name each of {', '.join(MODALITIES)} once")
    patients = config.num_train + config.num_val + config.num_test
    for modality, most in (("CT", LAST_CT_NUMBER), ("MR", LAST_NUMBER - FIRST_MR_NUMBER + 1)):
        if modality in config.modalities and patients > most:
            text = f"{patients} {modality} patients"
            yield Problem(where, "num_train + num_val + num_test", text, f"AMOS' numbering leaves room for {most}")
    for name, least_mm, most_mm in (("matrix", 32, 512), ("slice_thickness_mm", 1.0, 12.0)):
        low, high = getattr(config, name)
        if not least_mm <= low <= high <= most_mm:
            yield Problem(where, name, f"{low} to {high}", f"use an ascending pair within {least_mm} to {most_mm}")
    if not 0.0 <= config.missing_rate <= 0.5:
        yield Problem(where, "missing_rate", str(config.missing_rate), "use a share from 0 to 0.5")
