"""Metrics of the denoiser on held-out slices during training: a loss on fixed noise, and the sharpness of images that
are generated from fixed masks.

Slices, noise and noise levels depend on the validation's seed alone. So the same weights give the same numbers at any
time and on any number of ranks. Dimensions: N slices, P pictures, B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Shuffled
from data_shards.records import AXES, Batch, SliceRecord
from segdiff_dist.denoising.cascade import LowerStage, NetSpace
from segdiff_dist.denoising.conditioning import Conditions, class_ids, guided
from segdiff_dist.denoising.config import DiffusionConfig, ValidationConfig
from segdiff_dist.denoising.process import make_process
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.samplers import sample
from segdiff_dist.pixels import to_model_range, to_uint8
from segdiff_dist.ranks.distributed import is_main, rank, sum_over_ranks, world_size
from segdiff_dist.spectra import BAND_NAMES, band_powers, mean_texture, power_ratios, ratio, sharpness, texture_std
from segdiff_kernels import philox

if TYPE_CHECKING:
    from data_shards.labels import LabelTable
    from data_shards.store.shards import ShardSet

Forward = Callable[..., Tensor]
DrawGrid = Callable[[list[SliceRecord], np.ndarray, str, int], None]
"""Called with slices, the image generated from the mask of each (uint8 [P, H, W]), a title, and images_seen."""

# From the golden ratio: the fractional parts of its multiples cover [0, 1) evenly, for any number of them.
_GOLDEN_FRACTION = 0.6180339887498949


@dataclass(frozen=True)
class HeldOutSlices:
    """The slices to validate on, and how they are read."""

    shards: ShardSet
    rows: np.ndarray
    """Those of the validation split."""
    loader: LoaderConfig
    """Its crop size, threads and on_corrupt are used, not its augmentation."""
    soft_masks: bool = False
    """Whether the network is given soft edges."""
    space: NetSpace | None = None
    """The space of a network that works on latents or on shrunk slices."""
    lower: LowerStage | None = None
    """The stage below a cascade's super-resolution. The slices, shrunk and augmented, are in place of its images."""


class DenoiserValidation:
    """Called with (forward, images_seen) on all ranks, it returns the metrics.

    val_loss is the squared error that training logs by noise level, without its weights and with every condition;
    val_loss_t_FROM_TO (val_loss_sigma_FROM_TO without timesteps) are its parts; a student has none of these.
    val_sharpness, val_sharpness_BAND and val_texture compare generated images with their slices, those of a student in
    its own steps. Without slices it warns once and measures nothing. Slices
    are read once, when it is made, and stay on the device: 2 bytes a pixel.
    """

    def __init__(
        self,
        slices: HeldOutSlices,
        diffusion: DiffusionConfig,
        sampler: SamplerConfig,
        config: ValidationConfig,
        device: torch.device,
        draw: DrawGrid | None = None,
    ) -> None:
        """`draw` is called on rank 0 with the generated images (see DrawGrid)."""
        shards, rows, loader = slices.shards, slices.rows, slices.loader
        self.shards, self.diffusion, self.config, self.device = shards, diffusion, config, device
        self.soft_masks, self.draw, self._space, self._lower = slices.soft_masks, draw, slices.space, slices.lower
        if diffusion.distilled_levels is None:
            sampler = _of_pictures(sampler if slices.space is None else slices.space.bounds(sampler), config.num_steps)
        self.sampler = sampler.resolved(diffusion.objective)
        self._process = make_process(diffusion, device)
        self._level_N = self._process.spread_levels(_spread_shares(config.seed, config.num_images)).to(device)
        self._batches: list[Batch] = []
        if len(rows) == 0:
            if is_main():
                warnings.warn(f"{shards.root} has no validation slice: no val_loss, no sample grids", stacklevel=2)
            return
        self._batches = list(self._read(rows, loader))
        self._records = list(self._read_pictures(rows, loader))

    @torch.no_grad()
    def __call__(self, forward: Forward, images_seen: int) -> dict[str, float]:
        """Measure the weights that `forward` runs. Every rank calls it, and calls `forward`, equally often."""
        if not self._batches:
            return {}
        # The net of a student predicts what follows from its teacher, not from the slice.
        metrics = self._losses(forward) if self.diffusion.distilled_levels is None else {}
        if self._records:
            generated_PHW = self._generate(forward)
            metrics |= picture_sharpness(self._records, generated_PHW, self.shards.label_table)
            if is_main() and self.draw is not None:
                self.draw(self._records, generated_PHW, self._title(images_seen), images_seen)
        return metrics

    def _losses(self, forward: Forward) -> dict[str, float]:
        """Each rank fills in the errors of its slices. So the errors are summed in the same order on any number of
        ranks."""
        num = self.config.num_images
        errors_N2 = torch.zeros(num, 2, dtype=torch.float64, device=self.device)
        for batch in self._batches:
            error_B = self._errors(forward, batch)
            mine_B = batch.position_B < num
            errors_N2[batch.position_B[mine_B], 0] = error_B[mine_B].double()
            errors_N2[batch.position_B[mine_B], 1] = 1.0
        sum_over_ranks(errors_N2)
        seen_N = errors_N2[:, 1] > 0  # unless loader.on_corrupt left some out
        error_N = errors_N2[seen_N, 0]
        parts = self._process.sums(error_N, self._level_N[seen_N])
        metrics = {"val_loss": float(error_N.mean())}
        return metrics | {f"val_{name}": float(total / count) for name, (total, count) in parts.items() if count > 0}

    def _errors(self, forward: Forward, batch: Batch) -> Tensor:
        """float32 [B]: the squared error of each slice's noised image, its mean over pixels."""
        x_0_BCHW = to_model_range(batch.image_BHW) if self._space is None else self._space.x_0(batch)
        noise_BCHW = philox.normal(self.config.seed, philox.STREAM_NOISE, batch.position_B, x_0_BCHW.shape[1:])
        # Positions from num_images on only fill up the batches of the last ranks.
        level_B = self._level_N[batch.position_B.clamp(max=self.config.num_images - 1)]
        x_BCHW, target_BCHW, _ = self._process.with_noise(x_0_BCHW, noise_BCHW, level_B)
        edge_B2HW = batch.edge_B2HW if self.soft_masks else None
        conditions = Conditions(batch.mask_BHW, class_ids(batch.modality_B, batch.axis_B), edge_B2HW)
        conditions = self._with_lower(conditions, batch.image_BHW, batch.position_B)
        prediction_BCHW = forward(x_BCHW, self._process.time(level_B), *conditions)
        return (prediction_BCHW.float() - target_BCHW).square().flatten(1).mean(1)

    def _with_lower(
        self, conditions: Conditions, image_BHW: Tensor, position_B: Tensor, level: float | None = None
    ) -> Conditions:
        """The conditions with shrunk slices in place of the lower stage's images, if the network reads these."""
        if self._lower is None:
            return conditions
        low_B1hw, level_B = self._lower.drawn_condition(image_BHW, self.config.seed, position_B, level)
        return conditions._replace(low_B1hw=low_B1hw, level_B=level_B)

    def _read(self, rows: np.ndarray, loader: LoaderConfig) -> Iterator[Batch]:
        """This rank's batches, without augmentation: every world_size-th block of positions, equally many a rank."""
        size, num = self.config.batch_size, self.config.num_images
        rounds = -(-num // (size * world_size()))
        blocks = (i * world_size() + rank() for i in range(rounds))
        plain = LoaderConfig(
            crop_size=loader.crop_size,
            num_threads=loader.num_threads,
            on_corrupt=loader.on_corrupt,
            prefetch_batches=0,
        )
        yield from Loader(
            self.shards,
            Shuffled(rows, self.config.seed),
            (np.arange(block * size, (block + 1) * size, dtype=np.int64) for block in blocks),
            plain,
            batch_size=size,
            seed=self.config.seed,
            device=self.device,
        )

    def _read_pictures(self, rows: np.ndarray, loader: LoaderConfig) -> Iterator[SliceRecord]:
        """The slices of the sample grid, cropped. A damaged one is left out with a warning, or stops the run."""
        for row in choose_pictures(self.shards, rows, self.config.num_pictures):
            try:
                record = self.shards.read(row)
            except ValueError as error:
                if loader.on_corrupt == "raise":
                    raise
                warnings.warn(f"no sample grid of it: {error}", RuntimeWarning, stacklevel=2)
                continue
            yield record.cropped(loader.crop_size or self.shards.size)

    def _generate(self, forward: Forward) -> np.ndarray:
        """uint8 [P, H, W]: an image from each mask. Each rank generates a share; noise is keyed by the picture."""
        num = len(self._records)
        share = -(-num // world_size())
        mine = range(rank() * share, (rank() + 1) * share)
        image_PHW = torch.zeros(num, *self._records[0].mask_HW.shape, dtype=torch.int32, device=self.device)
        for start in range(0, share, self.config.batch_size):
            pictures = [min(p, num - 1) for p in mine[start : start + self.config.batch_size]]
            generated_BHW = self._sample(forward, pictures)
            for p, picture in zip(mine[start:], generated_BHW, strict=False):
                if p < num:  # the last ranks may generate some that other ranks generate too
                    image_PHW[p] = picture
        return sum_over_ranks(image_PHW).to(torch.uint8).cpu().numpy()

    def _sample(self, forward: Forward, pictures: list[int]) -> Tensor:
        records = [self._records[p] for p in pictures]
        picture_B = torch.tensor(pictures, device=self.device)
        side = len(records[0].mask_HW)
        shape = (1, side, side) if self._space is None else self._space.shape(side)
        noise_BCHW = philox.normal(self.config.seed, philox.STREAM_SAMPLE, picture_B, shape)
        image_BHW = torch.from_numpy(np.stack([record.image_HW for record in records])).to(self.device)
        conditions = self._with_lower(self._conditions(records), image_BHW, picture_B, self.sampler.augmentation)
        predict = guided(forward, conditions, self.sampler.guidance, self.sampler.guidance_removes)
        x_0_BCHW = sample(predict, self.diffusion, self.sampler, noise_BCHW)
        return to_uint8(x_0_BCHW if self._space is None else self._space.decode(x_0_BCHW))

    def _conditions(self, records: list[SliceRecord]) -> Conditions:
        modality_B = torch.tensor([self.shards.modalities.index(r.meta.modality) for r in records], device=self.device)
        axis_B = torch.tensor([AXES.index(r.meta.axis) for r in records], device=self.device)
        mask_BHW = torch.from_numpy(np.stack([r.mask_HW for r in records])).to(self.device)
        edges = [r.edge_2HW for r in records if r.edge_2HW is not None] if self.soft_masks else []
        edge_B2HW = torch.from_numpy(np.stack(edges)).to(self.device) if edges else None
        return Conditions(mask_BHW, class_ids(modality_B, axis_B), edge_B2HW)

    def _title(self, images_seen: int) -> str:
        guidance = f", guidance {self.sampler.guidance:g}" if self.sampler.guidance != 1.0 else ""
        return f"after {images_seen:,} images: {self.sampler.num_steps} DDIM steps{guidance}, seed {self.config.seed}"


def _of_pictures(sampler: SamplerConfig, num_steps: int) -> SamplerConfig:
    """DDIM with trailing timesteps, or the objective's own spacing, without noise."""
    return replace(
        sampler,
        preset="fast",
        solver="ddim",
        num_steps=num_steps,
        timestep_spacing=None,
        eta=0.0,
        churn=0.0,
        guidance_interval=None,
        segmenter_guidance=0.0,
    )


def choose_pictures(shards: ShardSet, rows: np.ndarray, num: int) -> list[int]:
    """At most `num` of the rows: modalities, axes and patients in turn, the slices with the most organs first."""
    columns = shards.samples.take(rows).select(["case_id", "modality", "axis", "labels_present"]).to_pylist()
    organs = set(shards.label_table.organ_ids)
    fullness = [len(organs & set(sample["labels_present"])) for sample in columns]
    fullest_first = sorted(range(len(rows)), key=lambda i: -fullness[i])
    taken_of_case: dict[tuple[str, ...], int] = {}
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {(m, a): [] for a in AXES for m in shards.modalities}
    for i in fullest_first:
        modality, axis, case = (columns[i][name] for name in ("modality", "axis", "case_id"))
        before = taken_of_case.get((modality, axis, case), 0)
        taken_of_case[modality, axis, case] = before + 1
        groups[modality, axis].append((before, i))  # sorts a patient's second slice behind all first ones
    queues = [[i for _, i in sorted(group, key=lambda entry: entry[0])] for group in groups.values()]
    in_turn = (queue[k] for k in range(max(map(len, queues))) for queue in queues if k < len(queue))
    return [int(rows[i]) for _, i in zip(range(num), in_turn, strict=False)]


def picture_sharpness(records: list[SliceRecord], generated_PHW: np.ndarray, table: LabelTable) -> dict[str, float]:
    """Sharpness of generated images relative to their slices' real ones, defined as in the evaluation.

    `val_sharpness`, a power ratio a band (`val_sharpness_75_100` is the finest) and `val_texture`. Values that are not
    finite are left out.
    """
    real_PHW = np.stack([record.image_uint8() for record in records])
    ratio_F = power_ratios(*band_powers(real_PHW, generated_PHW))
    mask_PHW = np.stack([record.mask_HW for record in records])
    std_real, std_generated = (
        np.nansum(mean_texture(texture_std(mask_PHW, images_PHW, table.num_classes), table.organ_ids))
        for images_PHW in (real_PHW, generated_PHW)
    )
    metrics = {"val_sharpness": sharpness(ratio_F)}
    metrics |= {f"val_sharpness_{name}": ratio_F[f] for f, name in enumerate(BAND_NAMES)}
    metrics |= {"val_texture": ratio(std_generated, std_real)}
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


def _spread_shares(seed: int, num: int) -> np.ndarray:
    """float64 [N], evenly spread over [0, 1): a mean over noise levels is then less noisy than with random ones.

    An additive recurrence (Kronecker sequence) with the golden ratio, from a start that the seed draws.
    """
    start = float(philox.uniform(seed, philox.STREAM_TIMESTEP, torch.zeros(1, dtype=torch.int64), 1))
    shares_N: np.ndarray = (start + np.arange(num, dtype=np.float64) * _GOLDEN_FRACTION) % 1.0
    return shares_N
