"""What a stage reads as MLflow's data sets: their digests, where they are, how much is in them."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.tracking.tracker import Tracker


def log_shards(tracker: Tracker, shards: ShardSet, context: str) -> None:
    """Record that a stage reads the set, or each of several; `context`: what for."""
    for member in shards.members:
        profile = {"num_slices": member.index["num_samples"], "size": shards.size, "labels": shards.label_table.name}
        source = _without_user(str(member.root))
        tracker.log_dataset(Path(source).name or "shards", member.digest, source, context, profile)


def log_samples(tracker: Tracker, store: SampleStore, context: str) -> None:
    """Record that a stage reads generated images. Their digest is that of all that decides them."""
    digest = sha256(json.dumps(store.job, sort_keys=True).encode()).hexdigest()
    tracker.log_dataset("samples", digest, str(store.path), context, {"num_images": store.items.num_rows})


def describe_shards(shards: ShardSet) -> str:
    """For the description of a run: `phantom (1,200 slices, digest 1a2b3c4d)`."""
    names = ", ".join(Path(_without_user(str(member.root))).name for member in shards.members)
    return f"{names} ({len(shards):,} slices, digest {shards.digest[:8]})"


def _without_user(source: str) -> str:
    """An address without name, password and what is asked for: MLflow shows it to others."""
    if "://" not in source:
        return source
    parts = urlsplit(source)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
