"""The `loader` section. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Interval, MinLen

from data_shards.choices import Axis, Modality
from data_shards.feed.mixing import mix_problems
from data_shards.field_source import FROM_A_PERSON
from data_shards.problems import Problem
from data_shards.ranges import range_problems
from data_shards.records import AXES
from data_shards.settings import Execution, Result, Resumable
from data_shards.store.config import CacheConfig

# Limits of augmentations: the largest angle, and the largest change of scale or contrast.
Degrees = Annotated[float, Interval(ge=0, le=180)]
Fraction = Annotated[float, Interval(ge=0, le=0.9)]


@dataclass(frozen=True)
class LoaderConfig:
    """The slices that are used, and how they are read and augmented.

    Augmentations act on image and mask together and are a pure function of (seed, position). They are off by default.
    """

    modalities: Result[Annotated[tuple[Modality, ...], MinLen(1)] | None] = None
    """Modalities of the slices that are used. null: all of the set's."""
    axes: Result[Annotated[tuple[Axis, ...], MinLen(1)]] = AXES
    """Axes of the slices that are used."""
    mix: Result[dict[str, float]] = field(default_factory=dict)
    """Weights of groups, as in {CT: 1, MR/axial: 2}. Without groups every slice comes once in an epoch. A key is
    MODALITY or MODALITY/AXIS. With several sets it is also 0:MODALITY or 0:*, counted from 0."""
    crop: Result[Literal["centre", "random"]] = "centre"
    """The position of the crop."""
    crop_size: Result[Annotated[int, Ge(8)] | None] = None
    """Side of the crop in pixels. null takes the whole stored slice."""
    flip: Result[bool] = False
    """Mirror left and right in half of the samples. This also mirrors anatomy: a right kidney is then on the left."""
    rotate_degrees: Result[Degrees] = 0.0
    """Rotate by up to this angle either way."""
    zoom: Result[Fraction] = 0.0
    """Scale by up to this fraction either way. 0.1 is 0.9 to 1.1."""
    jitter_mr: Result[Fraction] = 0.0
    """Change contrast and gamma of MR images by up to this fraction either way, and of all others that are not in HU.
    CT keeps its HU."""
    on_corrupt: Resumable[Literal["raise", "skip"]] = "raise"
    """What happens if a sample's bytes are not those that were written: the run stops, or another sample is taken."""
    num_threads: Execution[Annotated[int, Interval(ge=1, le=256)]] = 2
    """Threads that read and check, and DALI's decoding threads. Raw slices in memory are read by one."""
    prefetch_batches: Execution[Annotated[int, Interval(ge=0, le=1024)]] = 4
    """Batches made ahead, in a separate thread. 0 makes each batch when it is needed."""
    cache_dir: Execution[Path | None] = field(default=None, metadata=FROM_A_PERSON)
    """The folder on this machine for bytes of remote sets."""
    cache_gib: Execution[Annotated[float, Interval(ge=0, le=1e6)]] = 0.0
    """Largest size of that cache, in GiB. 0 is no cache."""

    def problems(self) -> list[Problem]:
        """Values out of range, for the user."""
        problems = range_problems(self, "config", "loader.")
        if self.cache_gib > 0 and self.cache_dir is None:
            problems.append(
                Problem("config", "loader.cache_dir", "null", "name the cache's folder, or set cache_gib to 0")
            )
        return problems + mix_problems(self.mix)

    def resolved(self, modalities: tuple[str, ...]) -> LoaderConfig:
        """With the names of the modalities, if the settings do not choose among those of the set."""
        return replace(self, modalities=modalities) if self.modalities is None else self

    @property
    def cache(self) -> CacheConfig:
        """The cache of the shard sets that are opened."""
        return CacheConfig(self.cache_dir, int(self.cache_gib * 1024**3))

    @property
    def augments(self) -> bool:
        """Whether a slice can have other pixels at every visit."""
        crops = self.crop == "random" and self.crop_size is not None
        return self.flip or self.rotates_or_zooms or self.jitter_mr > 0 or crops

    @property
    def rotates_or_zooms(self) -> bool:
        """Whether slices are rotated or zoomed, which must come before they are cropped."""
        return self.rotate_degrees > 0 or self.zoom > 0
