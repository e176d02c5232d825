"""The work of a Ray worker: load the networks once, then turn chunks of items into rows, features and predictions.

Dimensions: B batch, H rows, W columns, K label ids, D features, O organs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.files import first_line
from data_shards.labels import BODY
from segdiff_dist.evaluation.measure.headline import is_headline
from segdiff_dist.evaluation.measure.networks import load_extractors, lpips_of, radiomics_of
from segdiff_dist.evaluation.measure.real_slices import one_sided_columns
from segdiff_dist.evaluation.measure.subject import (
    hu_scales,
    is_paired,
    label_table_of,
    open_samples,
    pixel_spacing,
    segmenter_of,
)
from segdiff_dist.evaluation.metrics import air, organ_texture, sharpness, surfaces
from segdiff_dist.evaluation.metrics.columns import (
    SIDES,
    column_names,
    hounsfield_columns,
    overlap_columns,
    similarity_columns,
)
from segdiff_dist.ranks.cpu_memory import keep_freed_memory
from segdiff_dist.segmentation.tools import ToolSegmenter

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet


@dataclass(frozen=True)
class Inputs:
    """The inputs of a worker. Paths and settings only, so that any machine can read it.

    `radiomics_items`: the ids of the items whose radiomics features are computed; `radiomics_rows`: the rows of those
    real slices without a counterpart. `shards`: None if no real images are known. `spacing_mm`: of pixels whose width
    nothing else says.
    """

    samples: Path
    shards: str | None
    segmenter: Path
    predictions: Path
    fid_weights: str | None
    lpips_weights: str | None
    radiomics_items: frozenset[int]
    surface_dice: bool
    batch_size: int
    device: str
    spacing_mm: float | None = None
    imagenet: bool = False
    feature_network: str | None = None
    radiomics_rows: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chunk:
    """Items start..stop-1 of the sample store. Chunks end where chunks of the Zarr arrays end, so no two
    workers write one of them."""

    start: int
    stop: int


@dataclass
class ChunkResult:
    """The result of a chunk, all in item order.

    `columns`: float64 [B] by column of samples.parquet, NaN where a metric is not defined for an item.
    `features`: by (extractor, side), float [B, D]; NaN for items without features: on the real side those
    outside the headline.
    `grey_counts`: int64 [B, 2, 256], grey values of the real and the generated image; zero outside the headline.
    `failed`: extractors whose features could not be computed, and why. Only their distances are missing then.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    grey_counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2, 256), dtype=np.int64))
    failed: dict[str, str] = field(default_factory=dict)


def make_worker(inputs: Inputs) -> Callable[[], Callable[[Any], Any]]:
    """A factory for fan_out: called once in each actor; its result does tasks, Chunks and those of trust.py."""

    def make() -> Callable[[Any], Any]:
        evaluator = Evaluator(inputs)
        return lambda task: evaluator.run(task) if isinstance(task, Chunk) else task.run(evaluator)

    return make


class Evaluator:
    """The state of an actor: the samples, their slices and the networks."""

    def __init__(self, inputs: Inputs) -> None:
        import torch
        import zarr

        from data_shards.store.shards import ShardSet

        # The actor's environment asks for one thread; torch may have been loaded before it was set.
        if inputs.device == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
        self.inputs = inputs
        self.store = open_samples(inputs.samples)
        self.is_paired = is_paired(self.store)
        self._shards = None if inputs.shards is None else ShardSet.open(inputs.shards)
        self.hu_scales_N2 = np.empty((0, 2)) if self.is_paired else hu_scales(self.store, self._shards)
        self._spacing_mm_N2 = None if self.is_paired else pixel_spacing(self.store.items, inputs.spacing_mm)
        self.segmenter = segmenter_of(inputs.segmenter, self.store, self._shards, inputs.device)
        self.predictions: Any = zarr.open_group(inputs.predictions, mode="r+")
        self.table = label_table_of(self.store, self._shards)
        tolerance_mm = surfaces.tolerances_mm(self.table)
        self.tolerances_mm = (
            [tolerance_mm[self.table.names[i]] for i in self.table.organ_ids] if inputs.surface_dice else None
        )
        self.extractors, self.lpips, self.radiomics = load_extractors(inputs), lpips_of(inputs), radiomics_of(inputs)
        self.failed: dict[str, str] = {}

    @property
    def shards(self) -> ShardSet:
        """The set of the real images."""
        assert self._shards is not None, "no real images"
        return self._shards

    def spacing_mm(self, items: dict[str, list[Any]]) -> list[tuple[float, float]]:
        """Distances between rows and between columns, of some items; NaN where they are not known."""
        if self._spacing_mm_N2 is None:
            return [self.shards.meta(row).spacing_mm for row in items["row"]]
        return [(float(row), float(column)) for row, column in self._spacing_mm_N2[items["item_id"]]]

    @property
    def has_features(self) -> bool:
        """Whether the segmenter gives features."""
        from segdiff_dist.segmentation.segmenter import Segmenter

        return isinstance(self.segmenter, Segmenter)

    def without_body(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of labels, NaN where they count the class `body` and the segmenter does not know it."""
        if BODY in self.segmenter.label_table.names:
            return columns
        counts_body = [name for name in columns if name.endswith(f"/{BODY}") or name.startswith("legacy_dice_")]
        return columns | {name: np.full_like(columns[name], np.nan) for name in counts_body}

    def on_device(self, values: np.ndarray) -> Any:
        """A tensor on the networks' device."""
        import torch

        return torch.from_numpy(values).to(self.inputs.device)

    def codes(self, modality: Sequence[str]) -> Any:
        """int64 [B]: the segmenter's ids of modalities."""
        import torch

        return torch.tensor([self.segmenter.modalities.index(m) for m in modality], device=self.inputs.device)

    def features(self, image_BHW: Any, ids: Sequence[int]) -> np.ndarray:
        """The segmenter's features, float32 [B, D], of images in the target modalities of these items."""
        return self.features_of(image_BHW, self.store.items["target_modality"].take(list(ids)).to_pylist())

    def features_of(self, image_BHW: Any, modality: Sequence[str]) -> np.ndarray:
        """The same for images in these modalities, a batch at a time."""
        from segdiff_dist.segmentation.segmenter import Segmenter

        assert isinstance(self.segmenter, Segmenter), "it has no features"
        modality_B = self.codes(modality)
        pieces = zip(image_BHW.split(self.inputs.batch_size), modality_B.split(self.inputs.batch_size), strict=True)
        return np.concatenate([self.segmenter.features(x, m).cpu().numpy() for x, m in pieces])

    def label(self, image_BHW: np.ndarray, modality: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Label maps uint8 [B, H, W] and features float32 [B, D] by extractor, a batch at a time."""
        maps, features = [], []
        for start in range(0, len(image_BHW), self.inputs.batch_size):
            part = slice(start, start + self.inputs.batch_size)
            modality_B = self.codes(modality[part])
            label_maps, by_extractor = self.run_networks(self.on_device(image_BHW[part]), modality_B)
            maps.append(label_maps)
            features.append(by_extractor)
        names = [name for name in features[0] if name not in self.failed]
        return np.concatenate(maps), {name: np.concatenate([one[name] for one in features]) for name in names}

    def run_networks(self, image_BHW: Any, modality_B: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Label maps uint8 [B, H, W] of images, and features float32 [B, D] by extractor."""
        import torch

        if isinstance(self.segmenter, ToolSegmenter):  # its label maps were made before, of volumes
            label_maps, features_BD = torch.zeros_like(image_BHW), None
        else:
            label_maps, features_BD = self.segmenter.predict_and_features(image_BHW, modality_B)
        by_extractor = {} if features_BD is None else {"segmenter": _finite(features_BD, "segmenter")}
        for name, extract in self.extractors.items():
            if name not in self.failed:
                try:
                    by_extractor[name] = _finite(extract(image_BHW, modality_B), name)
                except (RuntimeError, ValueError) as error:  # of the network, of its memory; others are not needed
                    self.failed[name] = first_line(error, 200)
        return label_maps.cpu().numpy(), by_extractor

    def run(self, chunk: Chunk) -> ChunkResult:
        """Measure a chunk, and write the label maps of its images."""
        batches = [
            _Batch(self, start, min(start + self.inputs.batch_size, chunk.stop))
            for start in range(chunk.start, chunk.stop, self.inputs.batch_size)
        ]
        for batch in batches:
            batch.measure()
        for side in SIDES:
            self.predictions[side][chunk.start : chunk.stop] = np.concatenate([b.label_maps[side] for b in batches])
        results = [batch.result for batch in batches]
        keys = [key for key in results[0].features if key[0] not in self.failed]
        features = {key: np.concatenate([r.features[key] for r in results]) for key in keys}
        return ChunkResult(
            columns={name: np.concatenate([r.columns[name] for r in results]) for name in results[0].columns},
            features=features | self._radiomics_features(chunk),
            grey_counts=np.concatenate([r.grey_counts for r in results]),
            failed=dict(self.failed),
        )

    def _radiomics_features(self, chunk: Chunk) -> dict[tuple[str, str], np.ndarray]:
        """By (extractor, side); NaN for items that were not chosen, and empty if none of the chunk is."""
        chosen = [i for i in range(chunk.start, chunk.stop) if i in self.inputs.radiomics_items]
        images = {"gen": np.stack([np.asarray(self.store.image[i]) for i in chosen])} if chosen else {}
        if chosen and self.is_paired:
            size, rows = self.store.image.shape[1], self.store.items["row"].take(chosen).to_pylist()
            images["real"] = np.stack([self.shards.read(row).cropped(size).image_uint8() for row in rows])
        return self.radiomics_of(images, [i - chunk.start for i in chosen], chunk.stop - chunk.start)

    def radiomics_of(
        self, images: dict[str, np.ndarray], places: list[int], num: int
    ) -> dict[tuple[str, str], np.ndarray]:
        """Radiomics features [B, D] of `num` items, by (extractor, side), of images by side at some places; NaN at the
        others. Empty without any."""
        features: dict[tuple[str, str], np.ndarray] = {}
        for side, images_BHW in images.items():
            if self.radiomics is not None and places:
                features_BD = self.radiomics(images_BHW)
                features["radiomics", side] = np.full((num, features_BD.shape[1]), np.nan)
                features["radiomics", side][places] = features_BD
        return features


class _Batch:
    """Consecutive items start..stop-1: their pixels, the predictions on them, and the results."""

    def __init__(self, evaluator: Evaluator, start: int, stop: int) -> None:
        self.evaluator, self.start, self.stop = evaluator, start, stop

    def measure(self) -> None:
        """Fill `result` and `label_maps` (uint8 [B, H, W] by side)."""
        store, num = self.evaluator.store, self.stop - self.start
        items = store.items.slice(self.start, num).to_pydict()
        self.spacing_mm = self.evaluator.spacing_mm(items)
        generated = self.evaluator.on_device(np.asarray(store.image[self.start : self.stop]))
        target = self.evaluator.codes(items["target_modality"])
        headline = np.flatnonzero([is_headline(items, i) for i in range(num)])
        # A real counterpart exists only where the generated image has the modality of the slice it came from.
        chosen = headline if self.evaluator.is_paired else headline[:0]

        # The masks that the images were made from may lack organs of the slice.
        self.label_maps = {"mask": np.asarray(store.mask[self.start : self.stop])}
        self.label_maps["real"] = np.zeros_like(self.label_maps["mask"])
        self.label_maps["gen"], features = self.evaluator.run_networks(generated, target)
        if isinstance(self.evaluator.segmenter, ToolSegmenter):
            for side in SIDES:
                self.label_maps[side] = np.asarray(self.evaluator.predictions[side][self.start : self.stop])
        self.result = ChunkResult({name: np.full(num, np.nan) for name in column_names(self.evaluator.table)})
        self.result.grey_counts = np.zeros((num, 2, 256), dtype=np.int64)
        for name, features_BD in features.items():
            self.result.features[name, "gen"] = features_BD
            self.result.features[name, "real"] = np.full_like(features_BD, np.nan)
        if len(chosen):
            self._measure_pairs(items["row"], generated, target, chosen)
        if self.evaluator.is_paired:
            self._sharpness_of_others(items, generated)
        else:
            self._measure_alone(generated, headline)
        self._write_overlaps("mask_gen", np.arange(num))
        if len(chosen):
            self._write_overlaps("mask_real", chosen)
            self._write_overlaps("real_gen", chosen)

    def _measure_pairs(self, rows: Sequence[int], generated: Any, target: Any, chosen: np.ndarray) -> None:
        """Images with a real counterpart, those at places `chosen`. `rows`: of all images, in the shard set."""
        evaluator, size = self.evaluator, generated.shape[1]
        # Generated images have 8 bits, so real ones are compared and segmented at 8 bits too.
        records = [evaluator.shards.read(rows[i]).cropped(size) for i in chosen]
        real = evaluator.on_device(np.stack([record.image_uint8() for record in records]))
        at = evaluator.on_device(chosen)
        self._compare(real, generated[at], target[at], chosen)
        columns = hounsfield_columns(
            [record.meta for record in records],
            self.label_maps["mask"][chosen],
            real.cpu().numpy(),
            generated[at].cpu().numpy(),
            evaluator.table,
            evaluator.shards.in_hu,
        )
        self._write(columns, chosen)

    def _compare(self, real: Any, fake: Any, modality: Any, chosen: np.ndarray) -> None:
        """Pixels and features of images with a real counterpart; all three [B', ...], at places `chosen`."""
        evaluator = self.evaluator
        real_maps, features = evaluator.run_networks(real, modality)
        if not isinstance(evaluator.segmenter, ToolSegmenter):
            self.label_maps["real"][chosen] = real_maps
        for name in [name for name in features if (name, "real") in self.result.features]:
            self.result.features[name, "real"][chosen] = features[name]
        self._write(similarity_columns(real, fake), chosen)
        if evaluator.lpips is not None:
            self._write({"lpips": evaluator.lpips(real, fake)}, chosen)
        for texture in (sharpness, organ_texture, air):
            masks = self.label_maps["mask"][chosen]
            self._write(texture.measure(real.cpu().numpy(), fake.cpu().numpy(), masks, evaluator.table), chosen)
        for images, side in ((real, 0), (fake, 1)):
            for image_HW, i in zip(images.cpu().numpy(), chosen, strict=True):
                self.result.grey_counts[i, side] = np.bincount(image_HW.ravel(), minlength=256)

    def _measure_alone(self, generated: Any, headline: np.ndarray) -> None:
        """Power, texture and grey values of images without real counterparts; those of the headline, at its places."""
        images_BHW, masks_BHW = generated.cpu().numpy()[headline], self.label_maps["mask"][headline]
        hu_B2 = self.evaluator.hu_scales_N2[self.start : self.stop][headline]
        self._write(one_sided_columns(images_BHW, masks_BHW, self.evaluator.table, "gen", hu_B2), headline)
        for image_HW, i in zip(images_BHW, headline, strict=True):
            self.result.grey_counts[i, 1] = np.bincount(image_HW.ravel(), minlength=256)

    def _sharpness_of_others(self, items: dict[str, list[Any]], generated: Any) -> None:
        """Power and texture of images of the other modality. Their own slice is needed only for its constant border."""
        size, sources, targets = generated.shape[1], items["source_modality"], items["target_modality"]
        across = np.array([i for i in range(len(sources)) if sources[i] != targets[i]], dtype=np.int64)
        if not len(across):
            return
        real = np.stack([self.evaluator.shards.read(items["row"][i]).cropped(size).image_uint8() for i in across])
        masks = self.label_maps["mask"][across]
        columns = sharpness.measure(real, generated.cpu().numpy()[across], masks, self.evaluator.table)
        self._write({name: columns[name] for name in sharpness.GENERATED_COLUMNS}, across)

    def _write_overlaps(self, pair: str, chosen: np.ndarray) -> None:
        """The columns of a pair of label maps, at places `chosen`."""
        first, second = pair.split("_")
        evaluator, maps = self.evaluator, self.label_maps
        self._write(
            evaluator.without_body(
                overlap_columns(
                    pair,
                    maps[first][chosen],
                    maps[second][chosen],
                    evaluator.table,
                    [self.spacing_mm[i] for i in chosen],
                    evaluator.tolerances_mm,
                )
            ),
            chosen,
        )

    def _write(self, columns: dict[str, np.ndarray], chosen: np.ndarray) -> None:
        """Put values [B'] by column at places `chosen`."""
        for name, values in columns.items():
            self.result.columns[name][chosen] = values


def _finite(features: Any, extractor: str) -> np.ndarray:
    features_BD: np.ndarray = features.float().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(features_BD).all(axis=1))
    if len(bad):
        raise ValueError(f"the {extractor}'s features are not finite, first of image {int(bad[0])} of a batch")
    return features_BD
