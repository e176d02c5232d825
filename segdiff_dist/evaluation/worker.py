"""What a Ray worker does: load the segmenter once, then turn chunks of items into rows, features and predictions.

Dimensions: B batch, H rows, W columns, K label ids, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_shards.records import MODALITIES, SliceRecord
from segdiff_dist.evaluation import metrics

if TYPE_CHECKING:
    from data_shards.labels import LabelTable

# The three pairs of label maps; the first of each is the reference whose classes count.
PAIRS = ("mask_real", "real_gen", "mask_gen")
SIDES = ("real", "gen")


@dataclass(frozen=True)
class Inputs:
    """Where a worker finds what it needs. Paths and settings only, so that it travels to any machine."""

    samples: Path
    shards: str
    segmenter: Path
    predictions: Path
    fid_weights: str | None
    batch_size: int
    device: str


@dataclass(frozen=True)
class Chunk:
    """Items start..stop-1 of the sample store. Chunks end where chunks of the Zarr arrays end: one writer a region."""

    start: int
    stop: int


@dataclass
class ChunkResult:
    """What a chunk gives back, all in item order.

    `columns`: float64 [B] by column of samples.parquet, NaN where a metric has no meaning for an item.
    `features`: by (extractor, side), float32 [B, D]; rows of items outside the headline are NaN on the real side.
    `grey_counts`: int64 [B, 2, 256], grey values of the real and the generated image; zero outside the headline.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    grey_counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2, 256), dtype=np.int64))


class Extractor(Protocol):
    """Features [B, D] of uint8 images [B, H, W]; `modality_B` indexes MODALITIES."""

    def __call__(self, image_BHW: Any, modality_B: Any) -> Any: ...


def column_names(table: LabelTable) -> list[str]:
    """Names of the metric columns of samples.parquet, in order."""
    names = ["psnr_db", "ssim"]
    names += [f"{kind}_{pair}" for kind in ("dice", "legacy_dice") for pair in PAIRS]
    return names + [f"dice_{pair}/{name}" for pair in PAIRS for name in table.names[1:]]


def make_worker(inputs: Inputs) -> Callable[[], Callable[[Chunk], ChunkResult]]:
    """A factory for fan_out: set up once in each actor, then evaluate chunk after chunk."""

    def make() -> Callable[[Chunk], ChunkResult]:
        return _Evaluator(inputs).run

    return make


class _Evaluator:
    def __init__(self, inputs: Inputs) -> None:
        import torch
        import zarr

        from data_shards.store.shards import ShardSet
        from segdiff_dist.sampling.store import SampleStore
        from segdiff_dist.segmentation import Segmenter

        # The actor's one thread is fixed by its environment; torch is told too in case it was loaded before that.
        if inputs.device == "cpu":
            torch.set_num_threads(1)
        self.inputs = inputs
        self.store = SampleStore.open(inputs.samples)
        self.shards = ShardSet.open(inputs.shards)
        self.segmenter = Segmenter.load(inputs.segmenter, device=inputs.device)
        self.predictions: Any = zarr.open_group(inputs.predictions, mode="r+")
        self.items = self.store.items.to_pydict()
        self.table = self.shards.label_table
        self.extractors: dict[str, Extractor] = {"segmenter": self.segmenter.features}
        if inputs.fid_weights is not None:
            from segdiff_dist.evaluation.inception import load_inception

            self.extractors["inception"] = load_inception(inputs.fid_weights, inputs.device)

    def run(self, chunk: Chunk) -> ChunkResult:
        parts = [
            self._batch(np.arange(start, min(start + self.inputs.batch_size, chunk.stop)))
            for start in range(chunk.start, chunk.stop, self.inputs.batch_size)
        ]
        label_maps = {side: np.concatenate([maps[side] for _, maps in parts]) for side in SIDES}
        for side in SIDES:
            self.predictions[side][chunk.start : chunk.stop] = label_maps[side]
        results = [result for result, _ in parts]
        return ChunkResult(
            columns={name: np.concatenate([r.columns[name] for r in results]) for name in results[0].columns},
            features={key: np.concatenate([r.features[key] for r in results]) for key in results[0].features},
            grey_counts=np.concatenate([r.grey_counts for r in results]),
        )

    def _batch(self, ids: np.ndarray) -> tuple[ChunkResult, dict[str, np.ndarray]]:
        """One batch of consecutive items: its result, and the label maps predicted on either side (uint8 [B, H, W])."""
        import torch

        size = self.store.image.shape[1]
        records: list[SliceRecord] = [self.shards.read(int(self.items["row"][i])).cropped(size) for i in ids]
        mask_BHW = np.stack([record.mask_HW for record in records])
        generated = torch.from_numpy(np.asarray(self.store.image[int(ids[0]) : int(ids[-1]) + 1])).to(
            self.inputs.device
        )
        target = self._modality_indices("target_modality", ids)
        headline = np.array([is_headline(self.items, int(i)) for i in ids])
        chosen = np.flatnonzero(headline)

        columns = {name: np.full(len(ids), np.nan) for name in column_names(self.table)}
        label_maps = {side: np.zeros(mask_BHW.shape, dtype=np.uint8) for side in SIDES}
        features: dict[tuple[str, str], np.ndarray] = {}
        grey_counts = np.zeros((len(ids), 2, 256), dtype=np.int64)

        label_maps["gen"] = self.segmenter.predict(generated, target).cpu().numpy()
        for name, extract in self.extractors.items():
            features[name, "gen"] = extract(generated, target).float().cpu().numpy()
            features[name, "real"] = np.full_like(features[name, "gen"], np.nan)
        self._dice_columns(columns, "mask_gen", mask_BHW, label_maps["gen"], np.arange(len(ids)))

        if len(chosen):
            # Generated images have 8 bits, so real ones are compared, and judged by the segmenter, at 8 bits too.
            # A real counterpart exists only where the generated image has the modality of the slice it came from.
            real = torch.from_numpy(np.stack([records[i].image_uint8() for i in chosen])).to(self.inputs.device)
            modality = target[torch.from_numpy(chosen).to(target.device)]
            fake = generated[torch.from_numpy(chosen).to(generated.device)]
            label_maps["real"][chosen] = self.segmenter.predict(real, modality).cpu().numpy()
            for name, extract in self.extractors.items():
                features[name, "real"][chosen] = extract(real, modality).float().cpu().numpy()
            columns["psnr_db"][chosen] = metrics.psnr_db(real, fake)
            columns["ssim"][chosen] = metrics.ssim(real, fake)
            self._dice_columns(columns, "mask_real", mask_BHW, label_maps["real"], chosen)
            self._dice_columns(columns, "real_gen", label_maps["real"], label_maps["gen"], chosen)
            for images, side in ((real, 0), (fake, 1)):
                for image_HW, i in zip(images.cpu().numpy(), chosen, strict=True):
                    grey_counts[i, side] = np.bincount(image_HW.ravel(), minlength=256)
        return ChunkResult(columns, features, grey_counts), label_maps

    def _dice_columns(
        self,
        columns: dict[str, np.ndarray],
        pair: str,
        reference: np.ndarray,
        predicted: np.ndarray,
        chosen: np.ndarray,
    ) -> None:
        counts = metrics.confusion(reference[chosen], predicted[chosen], self.table.num_classes)
        dice_BK = metrics.dice_per_class(counts)
        columns[f"dice_{pair}"][chosen] = metrics.mean_dice(dice_BK, self.table.organ_ids)
        columns[f"legacy_dice_{pair}"][chosen] = metrics.legacy_dice(counts)
        for label_id, name in enumerate(self.table.names[1:], start=1):
            columns[f"dice_{pair}/{name}"][chosen] = dice_BK[:, label_id]

    def _modality_indices(self, column: str, ids: np.ndarray) -> Any:
        import torch

        indices = [MODALITIES.index(self.items[column][i]) for i in ids]
        return torch.tensor(indices, dtype=torch.int64, device=self.inputs.device)


def is_headline(items: dict[str, list[Any]], item_id: int) -> bool:
    """Whether an item counts in the headline numbers: the first sample of its mask, in the slice's own modality."""
    return bool(
        items["seed_index"][item_id] == 0 and items["source_modality"][item_id] == items["target_modality"][item_id]
    )
