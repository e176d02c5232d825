"""What a model's user must know of the set that it was trained on: how slices were cut, and how much they show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.problems import InputProblems

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet


@dataclass(frozen=True)
class ModelSet:
    """`field_mm`: the median side of the squares that the slices show."""

    preprocessing: Mapping[str, Any]
    field_mm: float
    shards: ShardSet

    @classmethod
    def of(cls, data: str | None) -> ModelSet | None:
        """The description of the set in a folder or at a URL; None if it cannot be opened."""
        from data_shards.store.shards import ShardSet

        try:
            shards = None if data is None else ShardSet.open(data, check_files=False)
        except (InputProblems, OSError):
            return None
        if shards is None:
            return None
        spacing_N2 = np.array(shards.samples["spacing_mm"].to_pylist(), np.float64)
        field_mm = float(np.median(spacing_N2.max(axis=-1))) * shards.size if spacing_N2.size else 0.0
        return cls(shards.index["preprocessing"], field_mm, shards)
