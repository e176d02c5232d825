"""What a plan has to know of a data set: from its headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from data_shards.ingest.counts import count_slices
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.labels import LabelTable
from data_shards.modalities import in_order, modalities_of
from data_shards.problems import Problem

if TYPE_CHECKING:
    from data_shards.ingest.cases import Case
    from data_shards.ingest.prepare import Preparation

NNUNET, NIFTI, PNG = "nnunet", "nifti", "png"


@dataclass(frozen=True)
class DataSet:
    """The cases of a folder. `described`: its layout with its reason, the classes and the splits, in one line."""

    cases: tuple[Case, ...]
    layout: str
    label_table: LabelTable
    described: str

    @classmethod
    def of(cls, preparation: Preparation) -> DataSet:
        """That of a checked preparation."""
        found = preparation.survey
        return cls(found.cases, found.layout, found.labelling.table, found.described)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the set that `prepare` makes, in the order of their codes."""
        return modalities_of(case.modality for case in self.cases)

    @cached_property
    def present(self) -> tuple[str, ...]:
        """The modalities that cases have."""
        return in_order({case.modality for case in self.cases})

    @property
    def sampled_split(self) -> str:
        """The split whose masks are sampled: test, if its cases have labels."""
        labelled = Counter(case.split for case in self.cases if case.is_labelled)
        return "test" if labelled["test"] else "val"

    def split_problems(self, sampled: str | None = None) -> list[Problem]:
        """A whole run trains on one split, and samples the masks of another. `sampled`: the latter, if it is given."""
        labelled = {case.split for case in self.cases if case.is_labelled}
        missing = [split for split in ("train", sampled or self.sampled_split) if split not in labelled]
        value = f"no labelled case is in split {' or '.join(missing)}"
        remedy = "let --prepare.split 0.7 0.1 0.2 draw the splits by patient"
        remedy += "" if sampled is None else ", or leave out sample.split in the configuration"
        return [Problem("splits", "data", value, remedy)] if missing and labelled else []

    @property
    def export_format(self) -> str:
        """The format of `export` that is nearest to this layout. An nnU-Net data set has one modality."""
        if self.layout == NNUNET and len(self.present) == 1:
            return NNUNET
        counted = count_slices(self.cases, PrepareConfig())
        return PNG if 0 < counted.flat == counted.volumes else NIFTI

    def num_slices(self, config: PrepareConfig, split: str) -> int:
        """Slices of the labelled cases of a split, empty ones included."""
        cases = [case for case in self.cases if case.split == split and case.is_labelled]
        return count_slices(cases, config).slices

    def cost(self, config: PrepareConfig) -> tuple[int, int]:
        """Volumes and slices of all splits."""
        counted = count_slices(self.cases, config)
        return counted.volumes, counted.slices
