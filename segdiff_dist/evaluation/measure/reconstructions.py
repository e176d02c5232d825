"""How good an autoencoder's reconstructions are: what a denoiser that works on its latents can reach at most.

    FOLDER/reconstructions.json     the figures
    FOLDER/reconstructions.png      masks, slices and their reconstructions

Dimensions: N slices, B batch, H rows, W columns, F bands, K label ids.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_shards.feed.config import LoaderConfig
from data_shards.files import write_atomic
from data_shards.records import SliceRecord
from segdiff_dist.autoencoding.autoencoder import Autoencoder
from segdiff_dist.denoising.sample_grid import draw_sample_grid
from segdiff_dist.denoising.validation import choose_pictures
from segdiff_dist.evaluation.metrics.estimates import Estimate, estimate
from segdiff_dist.evaluation.metrics.overlaps import confusion, dice_either, mean_over_organs
from segdiff_dist.evaluation.metrics.similarity import psnr_db
from segdiff_dist.pixels import to_uint8
from segdiff_dist.spectra import BAND_NAMES, band_powers, power_ratios, sharpness

if TYPE_CHECKING:
    from data_shards.labels import LabelTable
    from data_shards.store.shards import ShardSet
    from segdiff_dist.segmentation.segmenter import Segmenter

FIGURES, PICTURE = "reconstructions.json", "reconstructions.png"
_MOST_SLICES = 1_000
_RESAMPLES, _NUM_PICTURES = 1_000, 8


@dataclass(frozen=True)
class Reconstructions:
    """Figures of held-out slices, with 95 % intervals over patients.

    `power`: reconstructed over real power, by band, the finest last. Dice is that of the segmenter's prediction with
    the mask, over the organs in at least one of the two, on slices and on their reconstructions.
    """

    split: str
    num_slices: int
    psnr_db: Estimate
    power: dict[str, float]
    sharpness: float
    dice_real: Estimate | None = None
    dice_reconstructed: Estimate | None = None

    def lines(self) -> tuple[str, ...]:
        """The figures, a few lines for a person."""
        bands = ", ".join(f"{name.replace('_', '-')} %: {value:.2f}" for name, value in self.power.items())
        found = [
            f"reconstructions of {self.num_slices:,} slices ({self.split}): PSNR {_shown(self.psnr_db, 1)} dB, "
            f"sharpness {self.sharpness:.3f}",
            f"  power beside the slices', by share of the highest frequency: {bands}",
        ]
        if self.dice_real is not None and self.dice_reconstructed is not None:
            found.append(
                f"  Dice of the segmenter: {_shown(self.dice_reconstructed, 3)} on reconstructions, "
                f"{_shown(self.dice_real, 3)} on slices; images of a latent denoiser reach about the former at most"
            )
        return tuple(found)

    def metrics(self) -> dict[str, float]:
        """For the tracker."""
        found = {"psnr_db": self.psnr_db.value, "sharpness": self.sharpness}
        found |= {f"power_{name}": value for name, value in self.power.items()}
        for name, one in (("dice_real", self.dice_real), ("dice_reconstructed", self.dice_reconstructed)):
            found |= {} if one is None else {name: one.value}
        return {f"reconstructions/{name}": value for name, value in found.items() if np.isfinite(value)}


def measure_reconstructions(
    shards: ShardSet, loader: LoaderConfig, autoencoder: Autoencoder, segmenter: Segmenter | None, folder: Path
) -> Reconstructions | None:
    """Measure at most 1,000 evenly spaced slices of the validation split, and write figures and pictures to `folder`.

    None if the split has no slice.
    """
    rows = shards.select(split="val", modalities=loader.modalities, axes=loader.axes)
    if len(rows) == 0:
        return None
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MOST_SLICES)).round().astype(np.int64)]
    found = _measured(shards, chosen, autoencoder, segmenter)
    records = [_record(shards, row, autoencoder.size) for row in choose_pictures(shards, rows, _NUM_PICTURES)]
    title = f"reconstructions: PSNR {found.psnr_db.value:.1f} dB, sharpness {found.sharpness:.3f}"
    names = ("mask", "real", "decoded")
    draw_sample_grid(
        records, reconstruct(autoencoder, records), shards.label_table, title, folder / PICTURE, names=names
    )
    # Last, since they say that all is done.
    write_atomic(folder / FIGURES, json.dumps(asdict(found), indent=2) + "\n")
    return found


def reconstruct(autoencoder: Autoencoder, records: list[SliceRecord]) -> np.ndarray:
    """uint8 [B, H, W] of slices."""
    image_BHW = torch.from_numpy(np.stack([record.image_HW for record in records]))
    return to_uint8(autoencoder.decode(autoencoder.encode(image_BHW))).cpu().numpy()


def _measured(
    shards: ShardSet, rows: np.ndarray, autoencoder: Autoencoder, segmenter: Segmenter | None
) -> Reconstructions:
    columns: dict[str, list[np.ndarray]] = {}
    table, size = shards.label_table, 16
    for at in range(0, len(rows), size):
        records = [_record(shards, int(row), autoencoder.size) for row in rows[at : at + size]]
        real_BHW, made_BHW = np.stack([r.image_uint8() for r in records]), reconstruct(autoencoder, records)
        part = {"psnr_db": psnr_db(torch.from_numpy(real_BHW), torch.from_numpy(made_BHW))}
        part |= dict(zip(("real_power", "made_power"), band_powers(real_BHW, made_BHW), strict=True))
        if segmenter is not None:
            codes = [shards.modalities.index(r.meta.modality) for r in records]
            mask_BHW = np.stack([r.mask_HW for r in records])
            for name, image_BHW in (("dice_real", real_BHW), ("dice_reconstructed", made_BHW)):
                part[name] = _dice(segmenter, image_BHW, mask_BHW, codes, table)
        for name, values in part.items():
            columns.setdefault(name, []).append(values)
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    ratio_F = power_ratios(joined["real_power"], joined["made_power"])
    patients = np.array(shards.patients(rows))

    def figure(name: str) -> Estimate | None:
        return estimate(joined[name], patients, resamples=_RESAMPLES, seed=0) if name in joined else None

    psnr = figure("psnr_db")
    return Reconstructions(
        "val",
        len(rows),
        Estimate(float("inf"), None, len(rows), len(set(patients))) if psnr is None else psnr,
        dict(zip(BAND_NAMES, map(float, ratio_F), strict=True)),
        float(sharpness(ratio_F)),
        figure("dice_real"),
        figure("dice_reconstructed"),
    )


def _dice(
    segmenter: Segmenter, image_BHW: np.ndarray, mask_BHW: np.ndarray, codes: list[int], table: LabelTable
) -> np.ndarray:
    predicted_BHW = segmenter.predict(torch.from_numpy(image_BHW), torch.tensor(codes)).cpu().numpy()
    return mean_over_organs(dice_either(confusion(mask_BHW, predicted_BHW, table.num_classes)), table.organ_ids)


def _record(shards: ShardSet, row: int, size: int) -> SliceRecord:
    return shards.read(row).cropped(size)


def _shown(one: Estimate, digits: int) -> str:
    text = f"{one.value:.{digits}f}"
    return text if one.interval is None else f"{text} [{one.interval[0]:.{digits}f}, {one.interval[1]:.{digits}f}]"
