"""The `convert` section, and where bytes of remote sets are kept. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_shards.field_source import FROM_A_PERSON
from data_shards.problems import Problem
from data_shards.settings import Execution, Result
from data_shards.store.codecs import CODECS
from data_shards.store.set_index import STORES
from data_shards.workers import WorkersConfig


@dataclass(frozen=True)
class CacheConfig:
    """Where bytes of remote sets are kept on this machine, and how many at most."""

    folder: Path | None = None
    num_bytes: int = 0


@dataclass(frozen=True)
class ConvertConfig:
    """What to write, and on how many workers."""

    store: Result[str] = "zarr"
    """webdataset: tars. zarr: sharded arrays."""
    codec: Result[str] = "raw"
    """Of the tars: raw, zstd, png or jpeg2000. Zarr is always zstd."""
    samples_per_shard: Result[int] = 1024
    num_workers: Execution[int | None] = None
    ray_address: Execution[str | None] = field(default=None, metadata=FROM_A_PERSON)

    @property
    def workers(self) -> WorkersConfig:
        """Who does the work, and where."""
        return WorkersConfig("convert", self.num_workers, ray_address=self.ray_address)

    def problems(self, where: str = "convert") -> list[Problem]:
        """Everything out of range, each with what to do about it."""
        found = []
        for name, choices in (("store", STORES), ("codec", CODECS)):
            if getattr(self, name) not in choices:
                value, remedy = repr(getattr(self, name)), f"use one of {', '.join(choices)}"
                found.append(Problem(where, name, value, remedy))
        for name in ("samples_per_shard", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(Problem(where, name, str(value), "use 1 or more"))
        return found
