"""The items of the headline numbers: the first sample of each mask, in the modality of its slice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.feed.order import sample_at

if TYPE_CHECKING:
    import pyarrow as pa


def is_headline(items: dict[str, list[Any]], i: int) -> bool:
    """Whether an item counts in the headline numbers: the first sample of its mask, in the slice's own modality."""
    return bool(items["seed_index"][i] == 0 and items["source_modality"][i] == items["target_modality"][i])


def headline_items(items: pa.Table, most: int, seed: int) -> list[int]:
    """At most this many headline items, in order, drawn at random; the same list and seed give the same items."""
    seed_index, source, target = (
        items[name].to_numpy() for name in ("seed_index", "source_modality", "target_modality")
    )
    headline = np.flatnonzero((seed_index == 0) & (source == target))
    priority = sample_at(headline, max(items.num_rows, 1), seed)
    return sorted(headline[np.argsort(priority)][:most].tolist())
