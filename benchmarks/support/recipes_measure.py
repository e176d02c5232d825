"""The quality of a denoiser's images: a fixed set of held-out masks is sampled with fixed noise and scored.

    measured/SPLIT-IMAGES-AVERAGE-SAMPLER.json    Dice, distance, PSNR and sharpness, with intervals over patients
                                         .npz     the images, for the gallery

Dimensions: N masks, B batch, H rows, W columns, K label ids, D features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.files import write_atomic
from segdiff_dist.evaluation.metrics.sharpness import SHARPNESS_METRICS
from support.recipes_runs import Run, Scale, samplers

METRICS = ("dice", "distance", "psnr_db", *SHARPNESS_METRICS)
_BATCH = 16
# The seed of the masks, of their noise and of the bootstrap over patients. The same for every run.
_SEED, _RESAMPLES = 0, 1000


@dataclass(frozen=True)
class Scored:
    """The weights of a run that are scored, and how."""

    run: Run
    images: int
    weights: str
    sampler: str
    split: str

    @property
    def file(self) -> Path:
        return self.run.folder / "measured" / f"{self.split}-{self.images}-{self.weights}-{self.sampler}.json"

    @property
    def is_done(self) -> bool:
        # A folder of an earlier version lacks some; then it is measured again.
        return self.file.is_file() and set(METRICS) <= set(self.result())

    def result(self) -> dict[str, Any]:
        """METRICS, each {"value", "ci95"}; beside them `real_dice` of the masks' own images, and
        `real_distance` from those to as many of the training split."""
        return json.loads(self.file.read_text())

    def images_NHW(self) -> dict[str, np.ndarray]:
        """uint8 [N, H, W]: `mask`, `real` and `generated`."""
        with np.load(self.file.with_suffix(".npz")) as arrays:
            return dict(arrays)


def measure(scored: Scored, scale: Scale) -> None:
    """Sample and score, unless that is done already."""
    if scored.is_done:
        return
    import torch

    from data_shards.store.shards import ShardSet
    from segdiff_dist.evaluation.metrics import frechet, overlaps, similarity
    from segdiff_dist.segmentation.segmenter import Segmenter

    torch.set_num_threads(1)
    # Masks may be those without a body; the expected labels are the same for all.
    asked, shards = (ShardSet.open([str(p)]) for p in (scored.run.shards, scored.run.data / "shards"))
    items = _items(shards, scored.split, scale)
    records = [shards.read(item["row"]) for item in items]
    mask_NHW = np.stack([record.mask_HW for record in records])
    real_NHW, modality_N = _images(shards, items)
    gen_NHW = torch.from_numpy(_sample(scored, scale, asked, items))

    segmenter = Segmenter.load(scored.run.data / "segmenter" / "segmenter" / "weights")
    table, patients_N = shards.label_table, np.array([item["case_id"] for item in items])

    def dice(image_NHW: Any) -> dict[str, Any]:
        counts = overlaps.confusion(mask_NHW, segmenter.predict(image_NHW, modality_N).numpy(), table.num_classes)
        return _mean(overlaps.mean_dice(overlaps.dice_per_class(counts), table.organ_ids), patients_N)

    def statistics(image_NHW: Any, modality_N: Any) -> frechet.FeatureStatistics:
        return frechet.FeatureStatistics.of(segmenter.features(image_NHW, modality_N).numpy())

    real = statistics(real_NHW, modality_N)
    others = statistics(*_images(shards, _items(shards, "train", scale)))
    found = {
        "dice": dice(gen_NHW),
        "real_dice": dice(real_NHW),
        "distance": {"value": frechet.frechet_distance(real, statistics(gen_NHW, modality_N)), "ci95": None},
        "real_distance": {"value": frechet.frechet_distance(real, others), "ci95": None},
        "psnr_db": _mean(similarity.psnr_db(real_NHW, gen_NHW), patients_N),
        **sharpness_of(real_NHW.numpy(), gen_NHW.numpy(), mask_NHW, table, patients_N),
        "num_masks": len(items),
        "num_patients": len(set(patients_N)),
    }
    scored.file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        scored.file.with_suffix(".npz"), mask=mask_NHW, real=real_NHW.numpy(), generated=gen_NHW.numpy()
    )
    write_atomic(scored.file, json.dumps(found, indent=1) + "\n")


def _items(shards: Any, split: str, scale: Scale) -> list[dict[str, Any]]:
    """The masks that are used of a split, modalities and patients mixed."""
    from segdiff_dist.sampling.config import SampleConfig
    from segdiff_dist.sampling.items import list_items

    return list_items(shards, shards.select(split=split), SampleConfig(num=scale.num_masks, seed=_SEED)).to_pylist()


def _images(shards: Any, items: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The items' own images, uint8 [N, H, W], and modalities, int64 [N]."""
    import torch

    from data_shards.records import MODALITIES

    image_NHW = np.stack([shards.read(item["row"]).image_uint8() for item in items])
    modality_N = torch.tensor([MODALITIES.index(item["source_modality"]) for item in items])
    return torch.from_numpy(image_NHW), modality_N


def _sample(scored: Scored, scale: Scale, shards: Any, items: list[dict[str, Any]]) -> np.ndarray:
    """uint8 [N, H, W] images of the items."""
    import torch

    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.denoising.sampler_config import SamplerConfig
    from segdiff_dist.experiment import load_experiment
    from segdiff_dist.sampling.generation import generate
    from segdiff_dist.sampling.worker import item_conditions

    model = Denoiser.load(scored.run.folder / "weights" / str(scored.images) / scored.weights)
    diffusion = load_experiment(scored.run.folder / "config.yaml", None).diffusion
    sampler, device = SamplerConfig(**samplers(scale)[scored.sampler]), torch.device("cpu")
    made = []
    for start in range(0, len(items), _BATCH):
        some = items[start : start + _BATCH]
        with torch.no_grad():
            conditions = item_conditions(model, shards, some, (), device)
            made.append(generate(model, some, conditions, diffusion, sampler, _SEED))
    return np.concatenate(made)


def sharpness_of(real_NHW: Any, gen_NHW: Any, mask_NHW: Any, table: Any, patients_N: np.ndarray) -> dict[str, Any]:
    """SHARPNESS_METRICS as the evaluation has them; NaN where the masks hold no organ that is large enough."""
    from segdiff_dist.evaluation.metrics.sharpness import measure as columns_of
    from segdiff_dist.evaluation.metrics.sharpness import sharpness_entries
    from segdiff_dist.evaluation.metrics.sums import Interval, PatientSums, SumKey

    columns = columns_of(real_NHW, gen_NHW, mask_NHW, table)
    sums = PatientSums(list(columns))
    sums.add([SumKey("", str(p), "", "", "") for p in patients_N], np.stack(list(columns.values()), axis=1))
    entries = sharpness_entries(sums, lambda _: True, Interval(_RESAMPLES, _SEED))
    nothing = {"value": float("nan"), "ci95": None}
    return {m: {k: entries.get(m, nothing)[k] for k in nothing} for m in SHARPNESS_METRICS}


def _mean(values_N: np.ndarray, patients_N: np.ndarray) -> dict[str, Any]:
    from segdiff_dist.evaluation.metrics.estimates import estimate

    found = estimate(values_N, patients_N, resamples=_RESAMPLES, seed=_SEED)
    assert found is not None, "no mask holds an organ"
    return {"value": found.value, "ci95": found.interval}
