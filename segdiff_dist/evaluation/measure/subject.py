"""The subject of an evaluation: generated images with their masks, and the real images for comparison.

Paired: the masks are of slices of a shard set, whose images are the real counterparts. Unpaired: the masks are files of
a folder; the real images, if a set is given (evaluate.real), are of other patients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_shards.feed.order import sample_at
from data_shards.labels import LabelTable
from data_shards.modalities import is_in_hu, window_of
from data_shards.problems import problem
from segdiff_dist.evaluation.metrics.similarity import GREY_RANGE
from segdiff_dist.sampling.items import NO_MODALITY
from segdiff_dist.sampling.mask_patients import MaskPatients
from segdiff_dist.sampling.store_files import LABELS

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.store.shards import ShardSet
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.segmentation.any_segmenter import AnySegmenter

# Columns of the items of images made elsewhere: the distances between rows and between columns; NaN where not known.
SPACING = ("row_spacing_mm", "column_spacing_mm")
NO_COUNTERPART = "the masks are of no real image that could be compared with the generated one"
NO_REAL_IMAGES = "there are no real images: name a shard set of them (--real SHARDS)"
NO_SPACING = "no file says how wide a pixel is: give --evaluate.spacing-mm"


@dataclass(frozen=True)
class Subject:
    """`shards`: None without real images. `real_rows`: slices of an unpaired set that are compared."""

    store: SampleStore
    shards: ShardSet | None
    real_rows: tuple[int, ...] = ()
    patients: MaskPatients = field(default_factory=MaskPatients)
    """Those of a folder's masks, as far as they are named."""

    @property
    def is_paired(self) -> bool:
        """Whether each mask is of a slice of `shards`."""
        return is_paired(self.store)

    @property
    def patient_of(self) -> dict[str, str]:
        """The masks' patients by case, where they are named otherwise than the case."""
        return ({} if self.shards is None else self.shards.patient_of) | dict(self.patients.by_case)

    @property
    def label_table(self) -> LabelTable:
        """The label table of the masks."""
        return label_table_of(self.store, self.shards)


def open_samples(path: Path) -> SampleStore:
    """The store at `path`. A mask without an image counts in the modality of the image made from it."""
    from segdiff_dist.sampling.store import SampleStore

    store = SampleStore.open(path)
    store.items = with_modalities(store.items)
    return store


def with_modalities(items: pa.Table) -> pa.Table:
    """The items, each with a source modality."""
    import pyarrow.compute as pc

    is_open = pc.equal(items["source_modality"], NO_MODALITY)
    source = pc.if_else(is_open, items["target_modality"], items["source_modality"])
    return items.set_column(items.column_names.index("source_modality"), "source_modality", source)


def is_paired(store: SampleStore) -> bool:
    """Whether the store's masks are of slices of a shard set."""
    return "shards" in store.job


def label_table_of(store: SampleStore, shards: ShardSet | None) -> LabelTable:
    """The label table of the store's masks. Raises InputProblems if an earlier version did not record it."""
    if is_paired(store) and shards is not None:
        return shards.label_table
    if LABELS not in store.job:
        remedy = "start the same `segdiff sample` again: it writes the table down"
        raise problem(store.path, LABELS, "not there", remedy)
    return LabelTable.of(store.job[LABELS])


def segmenter_of(path: Path, store: SampleStore, shards: ShardSet | None, device: str = "cpu") -> AnySegmenter:
    """The segmenter at `path`, for the images of the store."""
    from segdiff_dist.segmentation.any_segmenter import open_any_segmenter

    segmenter = open_any_segmenter(path, device)
    return segmenter.suited(label_table_of(store, shards), hu_window(store, shards))


def hu_window(store: SampleStore, shards: ShardSet | None) -> tuple[float, float] | None:
    """The HU that are black and white in CT images of the store; None if they are not known, or not the same in all."""
    if "images_as" in store.job:
        window = store.job["images_as"].get("window")
        return None if window is None else (float(window[0]), float(window[1]))
    named = shards.index["preprocessing"] if shards is not None else store.job.get("masks_cut_like", {})
    if "hu_window" not in named or named.get("intensity", "window") != "window":
        return None
    return window_of("CT", named, named["hu_window"]) if is_in_hu("CT", named) else None


def hu_scales(store: SampleStore, shards: ShardSet | None) -> np.ndarray:
    """float64 [N, 2] of unpaired items: HU of black, and HU a grey value.

    NaN for MR, where the window is not known, and for PNG files, whose range says nothing of HU.
    """
    window, num = hu_window(store, shards), store.items.num_rows
    if window is None:
        return np.full((num, 2), np.nan)
    known_N = np.array(store.items["target_modality"].to_pylist()) == "CT"
    if "images_as" in store.job:
        known_N &= np.isfinite(pixel_spacing(store.items, None)).all(axis=1)
    return np.where(known_N[:, None], (window[0], (window[1] - window[0]) / GREY_RANGE), np.nan)


def real_rows(items: pa.Table, shards: ShardSet, split: str, most: int, seed: int) -> tuple[int, ...]:
    """Labelled slices of a split with the images' modalities and axes, up to a given number, drawn by `seed`; in
    order."""
    modalities, axes = (items[name].unique().to_pylist() for name in ("target_modality", "axis"))
    rows = shards.select(split=split, modalities=modalities, axes=axes)
    if not len(rows):
        value = f"no labelled slice of {', '.join(modalities)} and {', '.join(axes)}"
        remedy = "choose another split (--evaluate.real-split), or give another set"
        raise problem(shards.root, f"split {split!r}", value, remedy)
    priority = sample_at(np.arange(len(rows)), len(rows), seed)
    return tuple(np.sort(rows[np.argsort(priority)][:most]).tolist())


def pixel_spacing(items: pa.Table, given: float | None) -> np.ndarray:
    """float64 [N, 2] in mm of unpaired items; `given` if the files do not state it, else NaN."""
    names = [name for name in SPACING if name in items.column_names]
    known = [items[name].to_numpy() for name in names] or [np.full(items.num_rows, np.nan)] * 2
    spacing_N2 = np.stack(known, axis=1).astype(np.float64)
    return np.where(np.isfinite(spacing_N2), spacing_N2, np.nan if given is None else given)
