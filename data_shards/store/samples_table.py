"""samples.arrow: one row a sample, in the order of the shards.

It is an uncompressed Arrow IPC file of one record batch: memory-mapped, its columns are NumPy arrays without a copy,
and the processes of a machine share one page cache.

Four columns say where each part of a sample is stored (image, mask and, if soft edges are kept, edge): PART_file
(position in index.json's `shards`; -1 for a missing part), PART_offset, PART_bytes and PART_crc32c.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards import lean_imports
from data_shards.modalities import is_modality, modalities_of
from data_shards.records import (
    AXES,
    CASE_ID_RULE,
    MASK_SOURCES,
    SPLITS,
    SliceMeta,
    case_id_problems,
)

if TYPE_CHECKING:
    import pyarrow as pa

PARTS = ("image", "mask", "edge")
WHERE = ("file", "offset", "bytes", "crc32c")
MODALITY = "modality"
# Columns of few values, stored as codes into these; those of `modality` depend on the set (modalities_of).
VOCABULARY = {"axis": AXES, "split": SPLITS, "mask_source": MASK_SOURCES}


def schema() -> pa.Schema:
    """Columns and their types."""
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int32(), pa.float64()
    repeated, code = pa.dictionary(pa.int32(), text), pa.dictionary(pa.uint8(), text)
    columns: list[tuple[str, pa.DataType]] = [
        ("key", text),
        ("case_id", repeated),
        ("modality", code),
        ("axis", code),
        ("slice_index", whole),
        ("split", code),
        ("spacing_mm", pa.list_(real, 2)),
        ("affine", pa.list_(real, 16)),
        ("intensity_scale", real),
        ("intensity_offset", real),
        ("label_set", repeated),
        ("labels_present", pa.list_(pa.uint8())),
        ("labelled", pa.bool_()),
        ("source_sha256", repeated),
        ("mask_source", code),
        ("bits", pa.uint8()),
    ]
    for part in PARTS:
        columns += [
            (f"{part}_file", whole),
            (f"{part}_offset", pa.int64()),
            (f"{part}_bytes", whole),
            (f"{part}_crc32c", pa.uint32()),
        ]
    return pa.schema(columns)


def to_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows (SliceMeta.to_json and the columns of PARTS) as a table of `schema`."""
    import pyarrow as pa

    absent = {f"{part}_{name}": -1 if name == "file" else 0 for part in PARTS for name in WHERE}
    columns = []
    vocabulary = VOCABULARY | {MODALITY: modalities_of(row[MODALITY] for row in rows)}
    for field in schema():
        values = [row.get(field.name, absent.get(field.name)) for row in rows]
        if field.name in vocabulary:
            words = vocabulary[field.name]
            codes = pa.array([words.index(value) for value in values], pa.uint8())
            columns.append(pa.DictionaryArray.from_arrays(codes, pa.array(words, pa.string())))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema())


def joined(tables: Iterable[pa.Table], first_files: Sequence[int]) -> pa.Table:
    """One table, in one chunk, from tables that each count files from 0; first_files: the numbers to add."""
    import pyarrow as pa
    import pyarrow.compute as pc

    shifted = []
    tables = list(tables)
    words = modalities_of(name for table in tables for name in _used_modalities(table))
    for table, first in zip(tables, first_files, strict=True):
        table = _with_modalities(table, words)
        for part in PARTS if first else ():
            name = f"{part}_file"
            file = table[name]
            moved = pc.if_else(pc.less(file, 0), file, pc.add(file, pa.scalar(first, pa.int32())))
            table = table.set_column(table.schema.get_field_index(name), name, moved)
        shifted.append(table)
    return pa.concat_tables(shifted).unify_dictionaries().combine_chunks()


def modalities_in(table: pa.Table) -> tuple[str, ...]:
    """The modalities that the codes of the column are of."""
    chunks = table[MODALITY].chunks
    return tuple(chunks[0].dictionary.to_pylist()) if chunks else modalities_of(())


def _used_modalities(table: pa.Table) -> list[str]:
    """Those of the rows."""
    own = modalities_in(table)
    return [own[code] for code in np.unique(numbers(table, MODALITY)).tolist()]


def _with_modalities(table: pa.Table, words: Sequence[str]) -> pa.Table:
    """The same with codes of `words`."""
    import pyarrow as pa

    own = modalities_in(table)
    if own == words:
        return table
    # Names that no row has need no code.
    code_of = np.array([words.index(name) if name in words else 0 for name in own], np.uint8)
    codes = pa.array(code_of[numbers(table, MODALITY)], pa.uint8())
    column = pa.DictionaryArray.from_arrays(codes, pa.array(words, pa.string()))
    return table.set_column(table.schema.get_field_index(MODALITY), schema().field(MODALITY), column)


def write(table: pa.Table, path: Path) -> None:
    """Write as an uncompressed Arrow IPC file of one batch."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read(path: Path) -> pa.Table:
    """The table, memory-mapped. Raises ValueError if it is not such a file, or if its values cannot be read safely."""
    import pyarrow as pa

    lean_imports.keep_pyarrow_from_pandas()
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()
        # Offsets and codes outside of their buffers would crash the process.
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"not an Arrow file ({' '.join(str(error).split())[:120]})") from error
    missing = set(schema().names) - set(table.column_names)
    if missing:
        raise ValueError(f"columns missing: {', '.join(sorted(missing))}")
    for field in schema():
        _refuse_column(table.schema.field(field.name), field, table[field.name].null_count)
    for name, words in VOCABULARY.items():
        for chunk in table[name].chunks:
            if chunk.dictionary.to_pylist() != list(words):
                raise ValueError(f"column {name}: its dictionary is not {', '.join(words)}")
    for chunk in table[MODALITY].chunks:
        own = tuple(chunk.dictionary.to_pylist())
        if own != modalities_of(own) or own != modalities_in(table) or not all(map(is_modality, own)):
            raise ValueError(f"column {MODALITY}: its dictionary is not that of a set's modalities")
    for name in ("intensity_scale", "intensity_offset", "spacing_mm", "affine"):
        if not all(np.isfinite(_flat(chunk)).all() for chunk in table[name].chunks):
            raise ValueError(f"column {name}: not all finite")
    for chunk in table["case_id"].chunks:
        if found := case_id_problems(path, chunk.dictionary.to_pylist()):
            raise ValueError(f"{found[0].field} {found[0].value}; an id has {CASE_ID_RULE}")
    return table


def _flat(chunk: pa.Array) -> np.ndarray:
    return np.asarray((chunk.flatten() if hasattr(chunk, "flatten") else chunk).to_numpy(zero_copy_only=False))


def _refuse_column(found: pa.Field, expected: pa.Field, num_nulls: int) -> None:
    if found.type != expected.type:
        raise ValueError(f"column {found.name}: {found.type}, not {expected.type}")
    if num_nulls:
        raise ValueError(f"column {found.name}: {num_nulls} values are missing")


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A numeric column as NumPy, or the codes of a dictionary column; without a copy if the table is one chunk."""
    import pyarrow as pa

    column = table[name]
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(chunk, pa.ChunkedArray):
        chunk = chunk.chunk(0) if chunk.num_chunks else pa.array([], chunk.type)
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.indices
    return np.asarray(chunk.to_numpy(zero_copy_only=pa.types.is_primitive(chunk.type) and chunk.type != pa.bool_()))


def largest_label(table: pa.Table) -> int:
    """The highest id in `labels_present`; 0 if there is none."""
    ids = [chunk.flatten().to_numpy() for chunk in table["labels_present"].chunks]
    return max((int(one.max()) for one in ids if len(one)), default=0)


def meta_of(table: pa.Table, row: int) -> SliceMeta:
    """The meta of one row."""
    values = table.slice(int(row), 1).to_pylist()[0]
    return SliceMeta.from_json({name: values[name] for name in SliceMeta.__dataclass_fields__})
