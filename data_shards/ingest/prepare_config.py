"""How volumes become a shard set: the settings of `segdiff prepare`, and which of them are out of range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_shards.field_source import FROM_A_PERSON
from data_shards.ingest.intensity import INTENSITIES
from data_shards.ingest.slices import FITS, MASK_RESIZES
from data_shards.labels import LABEL_TABLES
from data_shards.problems import Problem
from data_shards.records import AXES, MODALITIES
from data_shards.settings import Execution, Result, ResultWhereSet, identity
from data_shards.store.codecs import CODECS
from data_shards.store.set_index import STORES
from data_shards.store.shard_writer import Format, set_format
from data_shards.workers import WorkersConfig

# Far beyond what any header stores in 16 bits.
_LARGEST_HU = 100_000.0


@dataclass(frozen=True)
class PrepareConfig:
    """How volumes become slices. The defaults are the paper's: 1 mm, 256 x 256, CT to [-256, 256] HU, MR to its 1st to
    99th percentile, three axes. `min_labelled_pixels` leaves out slices of labelled cases with fewer organ pixels."""

    label_set: Result[str] = "amos"
    """amos: the archive's 15 organs. wholebody: masks of a whole-body tool. merged: the first laid over the second."""
    axes: Result[tuple[str, ...]] = AXES
    modalities: Result[tuple[str, ...]] = MODALITIES
    """Which of the archive's cases are taken."""
    modality: ResultWhereSet[str | None] = None
    """CT or MR: what every case of the archive is, where dataset.json does not say it or says it wrongly."""
    size: Result[int] = 256
    spacing_mm: Result[float] = 1.0
    slice_stride: Result[int] = 1
    fit: Result[str] = "auto"
    """crop: the middle square of the short side. pad: all of it, in a square of the long side. auto: crop axial slices,
    pad the others, where cropping would cut the body."""
    mask_resize: Result[str] = "nearest"
    """nearest; soft: the class that has most of a pixel; bilinear_ids: the paper's code, which invents classes."""
    soft_edge: Result[bool] = False
    """With mask_resize soft: keep each pixel's second class and the first one's share."""
    min_labelled_pixels: Result[int] = 0
    intensity: Result[str] = "window"
    """window: CT by hu_window, MR by its percentiles. paper: CT by hu_window and then by its percentiles too."""
    hu_window: Result[tuple[float, float]] = (-256.0, 256.0)
    mr_percentiles: Result[tuple[float, float]] = (1.0, 99.0)
    bits: Result[int] = 8
    """Of a grey value: 8 or 16."""
    store: Result[str] = "webdataset"
    """webdataset: tars, to be streamed. zarr: sharded arrays, for random access by other tools. Training reads both."""
    codec: Result[str] = "raw"
    """Of the tars: raw is fastest, zstd smaller, png and jpeg2000 smallest. Zarr is always zstd."""
    samples_per_shard: Result[int] = 1024
    num_workers: Execution[int | None] = None
    ray_address: Execution[str | None] = field(default=None, metadata=FROM_A_PERSON)

    @property
    def workers(self) -> WorkersConfig:
        """Who does the work, and where."""
        return WorkersConfig("prepare", self.num_workers, ray_address=self.ray_address)

    def problems(self, where: str = "prepare") -> list[Problem]:
        """Everything out of range, each with what to do about it; empty when the config can be used."""
        found = []

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                found.append(Problem(where, name, repr(getattr(self, name)), remedy))

        for name, allowed in (("axes", AXES), ("modalities", MODALITIES)):
            chosen = getattr(self, name)
            good = bool(chosen) and len(set(chosen)) == len(chosen) and set(chosen) <= set(allowed)
            check(name, good, f"choose from {', '.join(allowed)}, each once")
        for name, choices in (
            ("fit", FITS),
            ("label_set", tuple(LABEL_TABLES)),
            ("mask_resize", MASK_RESIZES),
            ("intensity", INTENSITIES),
            ("store", STORES),
        ):
            check(name, getattr(self, name) in choices, f"use one of {', '.join(choices)}")
        check("modality", self.modality in (None, *MODALITIES), f"use one of {', '.join(MODALITIES)}, or leave it out")
        lossless = "is not among the codecs that keep every label id; " if self.codec not in CODECS else ""
        check("codec", self.codec in CODECS, f"{lossless}use one of {', '.join(CODECS)}")
        check("bits", self.bits in (8, 16), "use 8 or 16")
        check("soft_edge", not self.soft_edge or self.mask_resize == "soft", "needs mask_resize soft")
        check("size", 8 <= self.size <= 2048, "use 8 to 2048 pixels")
        check("spacing_mm", 0.1 <= self.spacing_mm <= 20.0, "use 0.1 to 20 mm")
        for name in ("slice_stride", "samples_per_shard"):
            check(name, getattr(self, name) >= 1, "use 1 or more")
        check("min_labelled_pixels", self.min_labelled_pixels >= 0, "use 0 or more")
        check("num_workers", self.num_workers is None or self.num_workers >= 1, "use 1 or more, or leave it out")
        low, high = self.hu_window
        check("hu_window", -_LARGEST_HU <= low < high <= _LARGEST_HU, "give two HU, the lower end first")
        low, high = self.mr_percentiles
        check("mr_percentiles", 0.0 <= low < high <= 100.0, "use two rising values from 0 to 100")
        return found

    def result_settings(self) -> dict[str, Any]:
        """The settings that the set's bytes depend on, as index.json holds them."""
        values = identity(self)
        values["axes"] = [axis for axis in AXES if axis in self.axes]
        values["modalities"] = [modality for modality in MODALITIES if modality in self.modalities]
        if self.store == "zarr":
            values["codec"] = "zstd"
        return values

    @property
    def format(self) -> Format:
        """How the set's samples are stored."""
        return set_format(
            self.store,
            self.codec,
            self.samples_per_shard,
            size=self.size,
            bits=self.bits,
            soft_edge=self.soft_edge,
        )
