"""The settings of a phantom, its cases, and the checks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

from data_shards.problems import Problem
from data_shards.ranges import NOT_FALLING, Count, Seed, Some, WholeNumber, range_problems
from data_shards.records import MODALITIES, SPLITS
from data_shards.settings import Result, ResultWhereSet, identity

# AMOS numbers its CT up to 500 and its labelled MR from 507 on (Ji et al. 2022, dataset.json).
LAST_CT_NUMBER = 500
FIRST_MR_NUMBER = 507
LAST_NUMBER = 9999

_Side = Annotated[int, Interval(ge=32, le=512)]
_Thickness = Annotated[float, Interval(ge=1, le=12)]


@dataclass(frozen=True)
class PhantomConfig:
    """A phantom archive. Numbers of patients are for each modality and split. The same config gives the same bytes."""

    seed: Result[Seed] = 0
    """Patient k of a split and modality depends on (seed, modality, split, k) only."""
    num_train: Result[Count] = 8
    """Patients of the train split."""
    num_val: Result[WholeNumber] = 2
    """Patients of the validation split."""
    num_test: Result[WholeNumber] = 3
    """Patients of the test split."""
    modalities: Result[Some[Literal["CT", "MR"]]] = MODALITIES
    """Modalities of the archive."""
    matrix: Result[Annotated[tuple[_Side, _Side], NOT_FALLING]] = (128, 160)
    """Fewest and most pixels along an axial side. The field of view is 360 to 420 mm square."""
    slice_thickness_mm: Result[Annotated[tuple[_Thickness, _Thickness], NOT_FALLING]] = (4.5, 6.0)
    """Thinnest and thickest slices. A patient is about 295 mm tall from pelvic floor to heart."""
    missing_rate: Result[Annotated[float, Interval(ge=0, le=0.5)]] = 0.1
    """Chance that a patient lacks the gallbladder, a kidney (half as often) or the pelvis (outside the field of view).
    The first patient of each split and modality is always complete, so each split holds all organs."""
    wholebody: ResultWhereSet[bool] = False
    """Also write OUT/wholebody/: masks of everything in the phantom, as a whole-body tool would make them."""

    def problems(self, where: str = "phantom") -> list[Problem]:
        """Everything out of range, each with a remedy; empty if the config can be used."""
        return [*range_problems(self, where), *_numbering_problems(self, where)]

    def to_json(self) -> dict[str, Any]:
        """A dictionary that json can write and that compares equal after being read back."""
        return identity(self)


@dataclass(frozen=True)
class CaseKey:
    """The key of a patient: `index` counts from 0 within a split and modality, `number` is AMOS' four digits."""

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


def _numbering_problems(config: PhantomConfig, where: str) -> Iterator[Problem]:
    patients = config.num_train + config.num_val + config.num_test
    for modality, most in (("CT", LAST_CT_NUMBER), ("MR", LAST_NUMBER - FIRST_MR_NUMBER + 1)):
        if modality in config.modalities and patients > most:
            text = f"{patients} {modality} patients"
            yield Problem(where, "num_train + num_val + num_test", text, f"AMOS' numbering leaves room for {most}")
