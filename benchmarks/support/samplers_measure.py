"""The quality of a sampler's images: held-out masks are sampled with fixed noise, and a run's segmenter labels them.

Dimensions: N images, H rows, W columns, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.files import write_atomic
from data_shards.records import MODALITIES
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.samplers import num_evaluations
from segdiff_dist.denoising.schedule import as_trained
from segdiff_dist.evaluation.metrics import estimates, frechet, overlaps
from segdiff_dist.experiment import load_experiment
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.generation import generate
from segdiff_dist.sampling.items import list_items
from segdiff_dist.sampling.job import weights_digest
from segdiff_dist.sampling.worker import item_conditions
from segdiff_dist.segmentation.segmenter import Segmenter
from segdiff_dist.spectra import band_powers, power_ratios, sharpness

_BATCH, _RESAMPLES = 16, 1000


@dataclass(frozen=True)
class Scored:
    """A sampler's images, scored: Dice(mask, segmenter's prediction) of each, NaN where a mask has no organ, and the
    Frechet distance of the segmenter's features to the real images'; that also for each noise by itself; and by band of
    frequency the power of its images over that of the real ones, of which Dice sees nothing."""

    sampler: SamplerConfig
    evaluations: int
    dice_N: np.ndarray
    distance: float
    distance_by_noise: tuple[float, ...]
    power_ratio_F: np.ndarray

    @property
    def dice(self) -> float:
        return float(np.nanmean(self.dice_N))

    @property
    def sharpness(self) -> float:
        return float(sharpness(self.power_ratio_F))


class Scorer:
    """A run's denoiser and segmenter, and the held-out masks. What was measured is kept in `out`, and not done again.

    Each mask is sampled `num_noises` times; noise depends on mask and repetition alone, so samplers share it.
    """

    def __init__(
        self, run: Path, split: str, num: int | None, num_noises: int, out: Path, data: Path | None = None
    ) -> None:
        """`data`: slices in place of the run's own."""
        experiment = load_experiment(None, run)
        self.own_sampler, precision = experiment.sample.sampler, experiment.sample.precision
        weights = run / "weights" / experiment.train.averages[0]
        # sigma_data is in the weights alone.
        trained = json.loads((weights / "segdiff.json").read_text())["diffusion"]
        self.diffusion, _ = as_trained(experiment.diffusion, trained)
        device = torch.device("cpu")
        model = Denoiser.load(weights).prepare_for(device)
        self.model = model.to(torch.bfloat16) if precision == "bf16" else model
        self.shards = ShardSet.open([str(data or experiment.given("data"))])
        self.segmenter = Segmenter.load(run / "segmenter" / "weights")
        self.num_noises, self.out = num_noises, out
        config = SampleConfig(split=split, num=num)  # type: ignore[arg-type]
        loader = experiment.loader
        rows = self.shards.select(split=split, modalities=loader.modalities, axes=loader.axes)
        self.items = list_items(self.shards, rows, config).to_pylist()
        self.patients_N = np.array([item["case_id"] for item in self.items] * num_noises)
        self.measured_on = {
            "run": str(run),
            "split": split,
            "num_masks": len(self.items),
            "num_patients": len(set(self.patients_N)),
            "num_noises": num_noises,
            "size": model.size,
            "weights": weights_digest(weights),
            "precision": precision,
            "diffusion": self.diffusion.process,
        }
        records = [self.shards.read(item["row"]).cropped(model.size) for item in self.items]
        self._mask_NHW = np.stack([record.mask_HW for record in records])
        self._modality_N = torch.tensor([MODALITIES.index(item["target_modality"]) for item in self.items])
        self._real_NHW = np.stack([record.image_uint8() for record in records])
        self._real = self._statistics(torch.from_numpy(self._real_NHW))

    def score(self, sampler: SamplerConfig) -> Scored:
        """Sample all masks and score them, unless that is done already."""
        sampler = sampler.resolved(self.diffusion.objective)
        key = json.dumps([asdict(sampler), self.measured_on, "power_ratio"], sort_keys=True)
        file = self.out / f"{sampler.solver}-{sampler.num_steps}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"
        if not file.is_file():
            write_atomic(file, json.dumps(self._measure(sampler)) + "\n")
        found = json.loads(file.read_text())
        return Scored(
            sampler,
            num_evaluations(sampler, self.diffusion),
            np.array(found["dice"], dtype=np.float64),
            found["distance"],
            tuple(found["distance_by_noise"]),
            np.array(found["power_ratio"], dtype=np.float64),
        )

    def sample(self, sampler: SamplerConfig, items: Sequence[dict[str, Any]], noise: int) -> np.ndarray:
        """uint8 [N, H, W] images of some items, batch by batch."""
        made = []
        with torch.inference_mode():
            for start in range(0, len(items), _BATCH):
                some = list(items[start : start + _BATCH])
                conditions = item_conditions(self.model, self.shards, some, (), torch.device("cpu"))
                made.append(generate(self.model, some, conditions, self.diffusion, sampler, noise))
        return np.concatenate(made)

    def difference(self, scored: Scored, reference: Scored) -> estimates.Estimate:
        """Dice minus the reference's, image by image with the same noise, with a 95 % interval over patients."""
        differences_N = scored.dice_N - reference.dice_N
        found = estimates.estimate(differences_N, self.patients_N, resamples=_RESAMPLES, seed=0)
        assert found is not None, "no mask holds an organ"
        return found

    def _measure(self, sampler: SamplerConfig) -> dict[str, Any]:
        table, dice, by_noise, powers = self.shards.label_table, [], [], []
        for noise in range(self.num_noises):
            image_NHW = torch.from_numpy(self.sample(sampler, self.items, noise))
            predicted_NHW = self.segmenter.predict(image_NHW, self._modality_N).numpy()
            counts = overlaps.confusion(self._mask_NHW, predicted_NHW, table.num_classes)
            dice += overlaps.mean_dice(overlaps.dice_per_class(counts), table.organ_ids).tolist()
            by_noise.append(self._statistics(image_NHW))
            powers.append(band_powers(self._real_NHW, image_NHW.numpy()))
        together = by_noise[0]
        for more in by_noise[1:]:
            together = together.merge(more)
        return {
            "dice": dice,
            "distance": frechet.frechet_distance(self._real, together),
            "power_ratio": power_ratios(*(np.concatenate(side) for side in zip(*powers, strict=True))).tolist(),
            "distance_by_noise": [frechet.frechet_distance(self._real, one) for one in by_noise],
        }

    def _statistics(self, image_NHW: torch.Tensor) -> frechet.FeatureStatistics:
        return frechet.FeatureStatistics.of(self.segmenter.features(image_NHW, self._modality_N).numpy())
