"""How well the denoiser does on held-out slices during training: a loss on fixed noise, and pictures from fixed masks
with their sharpness.

Slices, noise and noise levels depend on the validation's seed alone, so the same weights give the same numbers at any
time and on any number of ranks. Dimensions: N slices, P pictures, B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Shuffled
from data_shards.records import AXES, MODALITIES, Batch, SliceRecord
from data_shards.store.contact_sheet import class_colours
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
    from segdiff_dist.tracking.tracker import Tracker

Forward = Callable[..., Tensor]

# The fractional parts of multiples of this cover [0, 1) evenly, however many are taken: the golden ratio's.
_GOLDEN_FRACTION = 0.6180339887498949
# The side of a picture's cells: small slices are enlarged by a whole factor to about this many pixels.
_CELL = 160
_GAP, _TOP, _CAPTION, _SIDE = 6, 34, 34, 92
_INK, _FAINT, _PAPER = (235, 235, 235), (150, 150, 155), (18, 18, 20)
# Room for the title over a single picture.
_LEAST_WIDTH = 460


class DenoiserValidation:
    """Called with (forward, images_seen) on all ranks: val_loss, val_loss_t_FROM_TO (val_loss_sigma_FROM_TO without
    timesteps), pictures/samples_*.png, and of these val_sharpness, val_sharpness_BAND and val_texture.

    `rows` are the validation split's; where there are none, this is said once and nothing is measured. The loss is the
    squared error that training logs by noise level, without its weights and with every condition shown. The slices are
    read once, when this is made, and stay on the device: 2 bytes a pixel.
    """

    def __init__(
        self,
        shards: ShardSet,
        rows: np.ndarray,
        loader: LoaderConfig,
        diffusion: DiffusionConfig,
        sampler: SamplerConfig,
        config: ValidationConfig,
        folder: Path,
        device: torch.device,
        *,
        soft_masks: bool = False,
        tracker: Tracker | None = None,
    ) -> None:
        self.shards, self.diffusion, self.config, self.device = shards, diffusion, config, device
        self.folder, self.soft_masks, self.tracker = folder, soft_masks, tracker
        self.sampler = replace(
            sampler,
            preset="fast",
            solver="ddim",
            num_steps=config.num_steps,
            timestep_spacing=None,  # trailing, or what the objective has in its place
            eta=0.0,
            churn=0.0,
            guidance_interval=None,
            segmenter_guidance=0.0,
        ).resolved(diffusion.objective)
        self._process = make_process(diffusion, device)
        self._level_N = self._process.spread_levels(_spread_shares(config.seed, config.num_images)).to(device)
        self._batches: list[Batch] = []
        self._picture_rows: list[int] = []
        if len(rows) == 0:
            if is_main():
                warnings.warn(f"{shards.root} has no validation slice: no val_loss, no sample grids", stacklevel=2)
            return
        self._batches = list(self._read(rows, loader))
        self._records = []
        for row in choose_pictures(shards, rows, config.num_pictures):
            try:
                record = shards.read(row)
            except ValueError as error:
                if loader.on_corrupt == "raise":
                    raise
                warnings.warn(f"no sample grid of it: {error}", RuntimeWarning, stacklevel=2)
                continue
            self._picture_rows.append(row)
            self._records.append(record.cropped(loader.crop_size or shards.size))

    @torch.no_grad()
    def __call__(self, forward: Forward, images_seen: int) -> dict[str, float]:
        """Measure and draw with the weights that `forward` runs. Every rank calls it equally often."""
        if not self._batches:
            return {}
        metrics = self._losses(forward)
        if self._records:
            generated_PHW = self._generate(forward)
            metrics |= picture_sharpness(self._records, generated_PHW, self.shards.label_table)
            if is_main():
                self._draw(generated_PHW, images_seen)
        return metrics

    def _losses(self, forward: Forward) -> dict[str, float]:
        """Each rank fills in its slices' errors, so that they are added up in one order on any number of ranks."""
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
        x_0_BCHW = to_model_range(batch.image_BHW)
        noise_BCHW = philox.normal(self.config.seed, philox.STREAM_NOISE, batch.position_B, x_0_BCHW.shape[1:])
        # Positions from num_images on only make the last ranks' batches as large as the others'.
        level_B = self._level_N[batch.position_B.clamp(max=self.config.num_images - 1)]
        x_BCHW, target_BCHW, _ = self._process.with_noise(x_0_BCHW, noise_BCHW, level_B)
        edge_B2HW = batch.edge_B2HW if self.soft_masks else None
        conditions = Conditions(batch.mask_BHW, class_ids(batch.modality_B, batch.axis_B), edge_B2HW)
        prediction_BCHW = forward(x_BCHW, self._process.time(level_B), *conditions)
        return (prediction_BCHW.float() - target_BCHW).square().flatten(1).mean(1)

    def _read(self, rows: np.ndarray, loader: LoaderConfig) -> Iterator[Batch]:
        """This rank's batches: every world_size-th block of positions, as many on each rank, without augmentation."""
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

    def _generate(self, forward: Forward) -> np.ndarray:
        """uint8 [P, H, W]: an image of each mask. Noise is keyed by the picture, which each rank makes its share of."""
        num = len(self._records)
        share = -(-num // world_size())
        mine = range(rank() * share, (rank() + 1) * share)
        image_PHW = torch.zeros(num, *self._records[0].mask_HW.shape, dtype=torch.int32, device=self.device)
        for start in range(0, share, self.config.batch_size):
            pictures = [min(p, num - 1) for p in mine[start : start + self.config.batch_size]]
            generated_BHW = self._sample(forward, pictures)
            for p, picture in zip(mine[start:], generated_BHW, strict=False):
                if p < num:  # the last ranks make some again that others have made
                    image_PHW[p] = picture
        return sum_over_ranks(image_PHW).to(torch.uint8).cpu().numpy()

    def _sample(self, forward: Forward, pictures: list[int]) -> Tensor:
        records = [self._records[p] for p in pictures]
        picture_B = torch.tensor(pictures, device=self.device)
        noise_BCHW = philox.normal(self.config.seed, philox.STREAM_SAMPLE, picture_B, (1, *records[0].mask_HW.shape))
        predict = guided(forward, self._conditions(records), self.sampler.guidance, self.sampler.guidance_removes)
        return to_uint8(sample(predict, self.diffusion, self.sampler, noise_BCHW))

    def _conditions(self, records: list[SliceRecord]) -> Conditions:
        modality_B = torch.tensor([MODALITIES.index(r.meta.modality) for r in records], device=self.device)
        axis_B = torch.tensor([AXES.index(r.meta.axis) for r in records], device=self.device)
        mask_BHW = torch.from_numpy(np.stack([r.mask_HW for r in records])).to(self.device)
        edges = [r.edge_2HW for r in records if r.edge_2HW is not None] if self.soft_masks else []
        edge_B2HW = torch.from_numpy(np.stack(edges)).to(self.device) if edges else None
        return Conditions(mask_BHW, class_ids(modality_B, axis_B), edge_B2HW)

    def _draw(self, generated_PHW: np.ndarray, images_seen: int) -> None:
        path = self.folder / "pictures" / f"samples_{images_seen:012d}.png"
        guidance = f", guidance {self.sampler.guidance:g}" if self.sampler.guidance != 1.0 else ""
        title = f"after {images_seen:,} images: {self.sampler.num_steps} DDIM steps{guidance}, seed {self.config.seed}"
        draw_sample_grid(self._records, generated_PHW, self.shards.label_table, title, path)
        if self.tracker is not None:
            self.tracker.log_artifact(path, "pictures")


def choose_pictures(shards: ShardSet, rows: np.ndarray, num: int) -> list[int]:
    """At most `num` of the rows: modalities and axes in turn, of each the slices with most organs, patients in turn."""
    columns = shards.samples.take(rows).select(["case_id", "modality", "axis", "labels_present"]).to_pylist()
    organs = set(shards.label_table.organ_ids)
    fullness = [len(organs & set(sample["labels_present"])) for sample in columns]
    fullest_first = sorted(range(len(rows)), key=lambda i: -fullness[i])
    taken_of_case: dict[tuple[str, ...], int] = {}
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {(m, a): [] for a in AXES for m in MODALITIES}
    for i in fullest_first:
        modality, axis, case = (columns[i][name] for name in ("modality", "axis", "case_id"))
        before = taken_of_case.get((modality, axis, case), 0)
        taken_of_case[modality, axis, case] = before + 1
        groups[modality, axis].append((before, i))  # sorts a patient's second slice behind all first ones
    queues = [[i for _, i in sorted(group, key=lambda entry: entry[0])] for group in groups.values()]
    in_turn = (queue[k] for k in range(max(map(len, queues))) for queue in queues if k < len(queue))
    return [int(rows[i]) for _, i in zip(range(num), in_turn, strict=False)]


def picture_sharpness(records: list[SliceRecord], generated_PHW: np.ndarray, table: LabelTable) -> dict[str, float]:
    """Sharpness of the pictures against their slices' own images, as the evaluation has it: `val_sharpness`, a power
    ratio a band (`val_sharpness_75_100` is the finest) and `val_texture`. What cannot be measured is left out."""
    real_PHW = np.stack([record.image_uint8() for record in records])
    ratio_F = power_ratios(*band_powers(real_PHW, generated_PHW))
    mask_PHW = np.stack([record.mask_HW for record in records])
    std_real, std_generated = (
        np.nansum(mean_texture(texture_std(mask_PHW, images_PHW, table.num_classes), table.organ_ids))
        for images_PHW in (real_PHW, generated_PHW)
    )
    found = {"val_sharpness": sharpness(ratio_F)}
    found |= {f"val_sharpness_{name}": ratio_F[f] for f, name in enumerate(BAND_NAMES)}
    found |= {"val_texture": ratio(std_generated, std_real)}
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def draw_sample_grid(
    records: list[SliceRecord], generated_PHW: np.ndarray, table: LabelTable, title: str, path: Path
) -> None:
    """Write a PNG to `path`: a column a slice, below each other its mask, the real image and the generated one."""
    from PIL import Image, ImageDraw

    side = generated_PHW.shape[-1]
    cell = side * max(1, round(_CELL / side))
    width = max(_SIDE + len(records) * (cell + _GAP) + _GAP, _LEAST_WIDTH)
    sheet = Image.new("RGB", (width, _TOP + _CAPTION + 3 * (cell + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (2 * _GAP, 9), title, _INK, 15)
    for line, name in enumerate(("mask", "real", "generated")):
        _write(draw, (2 * _GAP, _TOP + _CAPTION + line * (cell + _GAP) + cell // 2 - 8), name, _INK, 14)
    for column, (record, generated_HW) in enumerate(zip(records, generated_PHW, strict=True)):
        left = _SIDE + column * (cell + _GAP)
        meta = record.meta
        _write(draw, (left, _TOP), f"{meta.modality} {meta.axis}", _INK, 12)
        _write(draw, (left, _TOP + 15), f"{meta.case_id} / {meta.slice_index}", _FAINT, 11)
        lines = (class_colours(table)[record.mask_HW], record.image_uint8(), generated_HW)
        for line, pixels in enumerate(lines):
            shown = Image.fromarray(pixels).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(shown, (left, _TOP + _CAPTION + line * (cell + _GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _spread_shares(seed: int, num: int) -> np.ndarray:
    """float64 [N] in [0, 1), evenly spread, which makes a mean over noise levels less noisy than drawing.

    An additive recurrence (Kronecker sequence) with the golden ratio, from a start that the seed draws.
    """
    start = float(philox.uniform(seed, philox.STREAM_TIMESTEP, torch.zeros(1, dtype=torch.int64), 1))
    shares_N: np.ndarray = (start + np.arange(num, dtype=np.float64) * _GOLDEN_FRACTION) % 1.0
    return shares_N


def _write(draw: Any, at: tuple[int, int], text: str, colour: tuple[int, int, int], size: int) -> None:
    from PIL import ImageFont

    draw.text(at, text, fill=colour, font=ImageFont.load_default(size))
