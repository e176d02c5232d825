"""The `loader` section. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_shards.feed.mixing import mix_problems
from data_shards.field_source import FROM_A_PERSON
from data_shards.problems import Problem
from data_shards.records import AXES, MODALITIES
from data_shards.settings import Execution, Result, Resumable
from data_shards.store.config import CacheConfig


@dataclass(frozen=True)
class LoaderConfig:
    """Which slices are used, and what is done to them on the way.

    Augmentations act on image and mask together and are a pure function of (seed, position). They are off by
    default. A left-right flip also turns anatomy around (a right kidney on the left), hence a switch like the rest.
    """

    modalities: Result[tuple[str, ...]] = MODALITIES
    axes: Result[tuple[str, ...]] = AXES
    mix: Result[dict[str, float]] = field(default_factory=dict)
    """Weights of groups, as in {CT: 1, MR/axial: 2}; left empty, every slice comes once an epoch. A key is MODALITY,
    MODALITY/AXIS or, of several sets, 0:MODALITY or 0:*, counted from 0."""
    crop: Result[Literal["centre", "random"]] = "centre"
    crop_size: Result[int | None] = None
    """Side of the crop in pixels; None takes the whole stored slice."""
    flip: Result[bool] = False
    """Mirror left and right in half of the samples."""
    rotate_degrees: Result[float] = 0.0
    """Rotate by up to this angle either way."""
    zoom: Result[float] = 0.0
    """Scale by up to this fraction either way: 0.1 is 0.9 to 1.1."""
    jitter_mr: Result[float] = 0.0
    """Change contrast and gamma of MR images by up to this fraction either way. CT keeps its HU."""
    on_corrupt: Resumable[Literal["raise", "skip"]] = "raise"
    """What to do with a sample whose bytes are not those that were written."""
    num_threads: Execution[int] = 2
    """DALI's decoding threads."""
    prefetch_batches: Execution[int] = 4
    """Batches made ahead, in a thread of their own; 0 makes them when they are asked for."""
    cache_dir: Execution[Path | None] = field(default=None, metadata=FROM_A_PERSON)
    """Where bytes of remote sets are kept on this machine."""
    cache_gib: Execution[float] = 0.0
    """How many of them at most."""

    def problems(self) -> list[Problem]:
        """What is out of range, as shown to the person who wrote it."""
        found = []
        for name, values, known in (("modalities", self.modalities, MODALITIES), ("axes", self.axes, AXES)):
            if not values or set(values) - set(known):
                found.append(Problem("config", f"loader.{name}", str(list(values)), f"choose from {list(known)}"))
        for name, value, low, high in (
            ("rotate_degrees", self.rotate_degrees, 0.0, 180.0),
            ("zoom", self.zoom, 0.0, 0.9),
            ("jitter_mr", self.jitter_mr, 0.0, 0.9),
            ("num_threads", self.num_threads, 1, 256),
            ("prefetch_batches", self.prefetch_batches, 0, 1024),
            ("cache_gib", self.cache_gib, 0.0, 1e6),
        ):
            if not low <= value <= high:
                found.append(Problem("config", f"loader.{name}", str(value), f"give {low} to {high}"))
        if self.crop_size is not None and self.crop_size < 8:
            found.append(Problem("config", "loader.crop_size", str(self.crop_size), "give at least 8, or null"))
        if self.cache_gib > 0 and self.cache_dir is None:
            found.append(
                Problem("config", "loader.cache_dir", "null", "name the cache's folder, or set cache_gib to 0")
            )
        return found + mix_problems(self.mix)

    @property
    def cache(self) -> CacheConfig:
        """Of the shard sets that are opened."""
        return CacheConfig(self.cache_dir, int(self.cache_gib * 1024**3))

    @property
    def turns(self) -> bool:
        """Whether slices are rotated or zoomed, which must come before they are cropped."""
        return self.rotate_degrees > 0 or self.zoom > 0
