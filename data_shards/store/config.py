"""The `convert` section, and the cache of remote sets. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_shards.choices import Codec, Store
from data_shards.field_source import FROM_A_PERSON
from data_shards.problems import Problem
from data_shards.ranges import Count, range_problems
from data_shards.settings import Execution, Result
from data_shards.workers import WorkersConfig


@dataclass(frozen=True)
class CacheConfig:
    """The folder for bytes of remote sets on this machine, and its largest size."""

    folder: Path | None = None
    num_bytes: int = 0


@dataclass(frozen=True)
class ConvertConfig:
    """The form of the new set, and the workers."""

    store: Result[Store] = "zarr"
    """webdataset: tars. zarr: sharded arrays."""
    codec: Result[Codec] = "raw"
    """How tars store images. Zarr is always zstd."""
    samples_per_shard: Result[Count] = 1024
    """Slices of each shard."""
    num_workers: Execution[Count | None] = None
    """Worker processes. null: one for each core."""
    ray_address: Execution[str | None] = field(default=None, metadata=FROM_A_PERSON)
    """A Ray cluster to join. local: Ray on this machine. null: the same, but for small jobs plain processes."""

    @property
    def workers(self) -> WorkersConfig:
        """How many workers there are, and where they run."""
        return WorkersConfig("convert", self.num_workers, ray_address=self.ray_address)

    def problems(self, where: str = "convert") -> list[Problem]:
        """Everything out of range, each with a remedy."""
        return range_problems(self, where)
