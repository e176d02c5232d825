"""The source of a job's masks, by row: a shard set, or the masks of a folder as the job keeps them.

Dimensions: M masks, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_shards.labels import LabelTable
from segdiff_dist.sampling.items import drawn_rows
from segdiff_dist.sampling.store_files import open_masks

if TYPE_CHECKING:
    import pyarrow as pa


class MaskSource(Protocol):
    """Masks by row: a shard set, or the masks of a folder. `parts` contains "edge" if there are soft edges."""

    @property
    def label_table(self) -> LabelTable:
        """The table of the ids in the masks."""

    @property
    def parts(self) -> Any:
        """Names of the parts of each row."""

    def read_mask(self, row: int) -> np.ndarray:
        """uint8 [H, W] label ids."""

    def read_part(self, row: int, part: str) -> np.ndarray:
        """uint8 [2, H, W] of the part "edge", as in data_shards.records.SliceRecord."""


@dataclass(frozen=True)
class MaskArray:
    """The masks of a folder, as a job keeps them: a Zarr array uint8 [M, H, W] of the chosen ones. `rows` [M]: their
    positions among all masks of the folder."""

    mask_MHW: Any
    label_table: LabelTable
    rows: np.ndarray
    parts: tuple[str, ...] = ("mask",)

    @classmethod
    def open(cls, path: Path, label_table: LabelTable, items: pa.Table) -> MaskArray:
        """The array at `path`, of a job with these items."""
        mask_MHW, rows = open_masks(path), drawn_rows(items)
        if len(rows) != mask_MHW.shape[0]:  # of an older job, which kept every mask of the folder
            rows = np.arange(mask_MHW.shape[0])
        return cls(mask_MHW, label_table, rows)

    def read_mask(self, row: int) -> np.ndarray:
        """uint8 [H, W] label ids of a row of the folder's masks."""
        return np.asarray(self.mask_MHW[int(np.searchsorted(self.rows, row))])

    def read_part(self, row: int, part: str) -> np.ndarray:
        """Never called: a folder's masks have no soft edges."""
        raise AssertionError(f"masks of a folder have no {part}")
