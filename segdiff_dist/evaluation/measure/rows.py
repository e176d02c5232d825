"""samples.parquet, written while samples are measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segdiff_dist.evaluation.measure.headline import is_headline

if TYPE_CHECKING:
    import pyarrow as pa

# Rows of a Parquet row group: this many are held in memory.
_ROWS_A_GROUP = 4096


# The column of the patients; there only where one is named otherwise than the case.
PATIENT = "patient"


def with_patients(items: pa.Table, patient_of: Mapping[str, str]) -> pa.Table:
    """The items with their patients. `patient_of`: as ShardSet.patient_of; empty: as they are."""
    if not patient_of:
        return items
    return items.append_column(PATIENT, [[patient_of.get(case, case) for case in items["case_id"].to_pylist()]])


class RowWriter:
    """A context that appends chunks of rows to a Parquet file, in order; its columns are those of the first chunk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()

    def write(self, items: pa.Table, columns: dict[str, np.ndarray]) -> None:
        """The rows of consecutive items; `columns` float64 [B] by name."""
        table, plain = items, items.to_pydict()
        added = {"headline": np.array([is_headline(plain, i) for i in range(items.num_rows)])}
        for name, values in (added | columns).items():
            table = table.append_column(name, [values])
        self._waiting.append(table)
        if sum(waiting.num_rows for waiting in self._waiting) >= _ROWS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting).combine_chunks()
        if self._file is None:
            self._file = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._file.write_table(table)
        self._waiting = []
