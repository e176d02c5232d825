"""The items of a job (mask, target modality, seed index), and the source of their masks.

Dimensions: H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.feed.order import sample_at
from data_shards.modalities import MODALITIES, in_order, is_modality
from data_shards.problems import Problem
from data_shards.records import AXES, case_id_problems
from segdiff_dist.sampling.config import SampleConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.store.shards import ShardSet

# The source modality of a mask without an image.
NO_MODALITY = "none"
# Column of the mask's path in its folder, for folders whose file names cannot be ids.
MASK_FILE = "mask_file"
_COLUMNS = ("key", "case_id", "modality", "axis", "slice_index")
# The columns of a job's items.
COLUMNS: dict[str, type] = {
    **dict.fromkeys(("item_id", "row", "slice_index", "seed_index"), int),
    **dict.fromkeys(("key", "case_id", "source_modality", "target_modality", "axis"), str),
}


def drawn_rows(items: pa.Table) -> np.ndarray:
    """int64: the rows of the masks that items need, each once, rising."""
    return np.unique(items["row"].to_numpy())


def list_items(shards: ShardSet, rows: np.ndarray, config: SampleConfig, known: Sequence[str] = MODALITIES) -> pa.Table:
    """The items of masks of a shard set: see list_items_of. `rows` are those to draw from."""
    return list_items_of(shards.samples.select(_COLUMNS), rows, config, known)


def list_items_of(
    masks: pa.Table, rows: np.ndarray, config: SampleConfig, known: Sequence[str] = MODALITIES
) -> pa.Table:
    """The job's items in order: item_id, row, key, case_id, source_modality, target_modality, axis, slice_index,
    seed_index, and mask_file where `masks` have it. `masks`: all there are, with key, case_id, modality, axis,
    slice_index. `known`: the model's modalities."""
    import pyarrow as pa

    order = sample_at(np.arange(len(rows)), len(rows), config.seed)
    chosen = rows[order[: config.num]]
    table = masks.take(chosen).to_pylist()
    items: list[dict[str, Any]] = []
    for index, target, seed_index in _planned(table, config, known):
        source = table[index]
        item = {
            "item_id": len(items),
            "row": int(chosen[index]),
            "key": source["key"],
            "case_id": source["case_id"],
            "source_modality": source["modality"],
            "target_modality": target,
            "axis": source["axis"],
            "slice_index": source["slice_index"],
            "seed_index": seed_index,
        }
        items.append(item | ({MASK_FILE: source[MASK_FILE]} if MASK_FILE in source else {}))
    return pa.Table.from_pylist(items)


def _planned(table: list[dict[str, Any]], config: SampleConfig, known: Sequence[str]) -> Iterator[tuple[int, str, int]]:
    """Index of the mask, target modality and seed index of each item, in order: first those of every mask, then those
    in the other modality."""
    diverse = set(_spread(table, len(table) if config.diverse_masks is None else config.diverse_masks))
    for index in range(len(table)):
        target = _target(table[index]["modality"], config.target_modality, index, config, known)
        for seed_index in range(config.samples_per_mask if index in diverse else 1):
            yield index, target, seed_index
    for index in _spread(table, config.cross_modality_masks):
        target = _target(table[index]["modality"], "other", index, config, known)
        for seed_index in range(min(2, config.samples_per_mask)):  # the paper's Figures 6 and 7 show two
            yield index, target, seed_index


def _target(own: str, wanted: str, index: int, config: SampleConfig, known: Sequence[str]) -> str:
    """The modality of the images of a mask of modality `own`: `wanted` may be `same` or `other`, which are of this. The
    others take turns with `index`."""
    if wanted not in ("same", "other"):
        return wanted
    own = config.target_modality if own == NO_MODALITY else own
    others = [modality for modality in known if modality != own]
    return own if wanted == "same" else others[index % len(others)]


def item_problems(file: Path, items: pa.Table) -> list[Problem]:
    """Values of a job's list that other stages must not use in paths: invalid case ids and unknown words."""
    remedy = "sample again into a new folder (--out DIR)"
    problems: list[Problem] = []
    if "case_id" in items.column_names:
        problems += case_id_problems(file, items["case_id"].unique().to_pylist(), remedy)
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "axis": (lambda value: value in AXES, f"not one of {', '.join(AXES)}"),
        "source_modality": (lambda value: value == NO_MODALITY or is_modality(value), "not a modality"),
        "target_modality": (is_modality, "not a modality"),
    }
    for name, (is_known, reason) in rules.items():
        values = items[name].unique().to_pylist() if name in items.column_names else []
        if unknown := [value for value in values if not is_known(value)]:
            problems.append(Problem(str(file), name, repr(unknown[0])[:100], f"{reason}: {remedy}"))
    return problems


def _spread(table: list[dict[str, Any]], num: int) -> list[int]:
    """The first `num` masks, modalities taken in turn."""
    queues = [
        [i for i, row in enumerate(table) if row["modality"] == m] for m in in_order(row["modality"] for row in table)
    ]
    merged = [q[k] for k in range(len(table)) for q in queues if k < len(q)]
    return merged[:num]
