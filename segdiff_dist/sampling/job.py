"""Sampling on Ray: the list of items is written first, then workers make what is missing of it, region by region.

An item's noise depends on its id alone, and regions and threads are fixed by the job, so any number of workers makes
the same images. Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from data_shards.fan_out import TaskFailure, fan_out
from data_shards.feed.order import sample_at
from data_shards.problems import Problem, problem, refuse
from data_shards.records import AXES, MODALITIES
from segdiff_dist.denoising.diffusion import DiffusionConfig, SamplerConfig
from segdiff_dist.sampling.store import SampleStore

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import Tensor

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.conditioning import Conditions
    from segdiff_dist.denoising.denoiser import Denoiser


@dataclass(frozen=True)
class SampleConfig:
    """What to make, and how."""

    split: Annotated[Literal["train", "val", "test"], tyro.conf.arg(aliases=["--split"])] = "test"
    """Whose masks are used."""
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num"])] = 1024
    """Masks drawn from the split, patients and places mixed; null takes all of them."""
    samples_per_mask: int = 1
    """Images made for each of `diverse_masks` masks (Figure 4); 1 for the others."""
    diverse_masks: int | None = None
    """null: every mask gets samples_per_mask images. Otherwise the modalities' first masks in turn."""
    target_modality: Literal["same", "other", "CT", "MR"] = "same"
    """The modality to make. Another than the mask's own is the paper's Figure 5."""
    without_organs: tuple[str, ...] = ()
    """Organs to leave out of every mask, by name. A model trained with diffusion.organ_dropout knows such masks."""
    cross_modality_masks: int = 0
    """This many masks, the modalities' first in turn, also get images in the other modality."""
    seed: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    weights: str = "ema"
    """The folder under RUN/weights that is used: ema_LENGTH, or online, the weights as they are without an average. ema
    is the first of train.ema_lengths."""
    region_size: int = 16
    """Images made together and written as one Zarr region."""
    precision: Literal["bf16", "fp32"] = "bf16"
    num_workers: int | None = None
    """Ray workers; null: one a GPU, or one a core."""
    threads_per_worker: int = 1
    ray_address: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def problems(self) -> list[Problem]:
        """What is out of range."""
        found = []
        for name in ("num", "samples_per_mask", "diverse_masks", "region_size", "num_workers", "threads_per_worker"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "diverse_masks" else 1):
                found.append(Problem("config", f"sample.{name}", str(value), "give at least 1"))
        if self.cross_modality_masks < 0:
            found.append(
                Problem("config", "sample.cross_modality_masks", str(self.cross_modality_masks), "give at least 0")
            )
        if self.sampler.num_steps < 1:
            found.append(Problem("config", "sample.sampler.num_steps", str(self.sampler.num_steps), "give at least 1"))
        if not 0 <= self.sampler.eta <= 1:
            found.append(Problem("config", "sample.sampler.eta", str(self.sampler.eta), "give 0 to 1"))
        if self.sampler.guidance < 0:
            found.append(Problem("config", "sample.sampler.guidance", str(self.sampler.guidance), "give at least 0"))
        return found


class SamplingFailed(RuntimeError):
    """Some regions could not be made. The others are kept, and the same call tries these again."""


def list_items(shards: ShardSet, rows: np.ndarray, config: SampleConfig) -> pa.Table:
    """The job's items in order: row, key, case_id, source_modality, target_modality, axis, slice_index, seed_index."""
    import pyarrow as pa

    order = sample_at(np.arange(len(rows)), len(rows), config.seed)
    chosen = rows[order[: config.num]]
    table = shards.samples.select(["key", "case_id", "modality", "axis", "slice_index"]).take(chosen).to_pylist()
    diverse = set(_spread(table, len(table) if config.diverse_masks is None else config.diverse_masks))
    items: list[dict[str, Any]] = []

    def add(index: int, target: str, seed_index: int) -> None:
        source = table[index]
        items.append(
            {
                "item_id": len(items),
                "row": int(chosen[index]),
                "key": source["key"],
                "case_id": source["case_id"],
                "source_modality": source["modality"],
                "target_modality": target,
                "axis": source["axis"],
                "slice_index": source["slice_index"],
                "seed_index": seed_index,
            }
        )

    for index, source in enumerate(table):
        for seed_index in range(config.samples_per_mask if index in diverse else 1):
            add(index, _target(config.target_modality, source["modality"]), seed_index)
    for index in _spread(table, config.cross_modality_masks):
        for seed_index in range(min(2, config.samples_per_mask)):  # the paper's Figures 6 and 7 show two
            add(index, _target("other", table[index]["modality"]), seed_index)
    return pa.Table.from_pylist(items)


def sample(
    run: Path, shards: ShardSet, rows: np.ndarray, diffusion: DiffusionConfig, config: SampleConfig
) -> SampleStore:
    """Make every missing image of the job into RUN/samples. Killed and started again, it makes only what is missing."""
    from tqdm import tqdm

    if len(rows) == 0:
        raise problem(
            shards.root,
            f"split {config.split!r}",
            "no labelled slice",
            "use a split that has masks (AMOS publishes none for its test cases: --split val)",
        )
    weights = run / "weights" / config.weights
    job: dict[str, Any] = {
        "shards": shards.resolved,
        "shards_digest": shards.digest,
        "weights": str(weights.resolve()),
        "weights_digest": weights_digest(weights),
        "region_size": config.region_size,
        "diffusion": diffusion.process,
        "sample": {
            k: v
            for k, v in asdict(config).items()
            if k not in ("num_workers", "ray_address", "device", "region_size")  # none of these changes an image
        },
    }
    job = json.loads(json.dumps(job))  # as it is read back: tuples are lists
    items = list_items(shards, rows, config)
    about = json.loads((weights / "segdiff.json").read_text())
    refuse(_unlike_training(weights, about, shards, diffusion, config))
    if about["denoiser"].get("soft_masks") and "edge" not in shards.parts:
        warnings.warn(
            f"{shards.root} keeps no soft edges: the model, trained on soft masks, gets hard ones", stacklevel=2
        )
    store = SampleStore.create(run / "samples", job, items, about["size"])
    missing = store.missing_regions()
    gpus = _num_gpus(config)
    num_workers = config.num_workers or max(gpus, 1 if gpus else _num_cores() // config.threads_per_worker)
    make_worker = _WorkerFactory(store.path, "cuda" if gpus else "cpu")
    failures = []
    with tqdm(total=len(store), initial=len(store) - len(store.missing()), desc="sample", unit="img") as bar:
        for done in fan_out(
            make_worker,
            missing,
            num_workers=num_workers,
            threads_per_worker=config.threads_per_worker,
            gpus_per_worker=1.0 if gpus else 0.0,
            address=config.ray_address,
        ):
            if isinstance(done.result, TaskFailure):
                failures.append(f"region {done.task}: {done.result.error}")
            else:
                bar.update(len(store.region(done.task)))
    if failures:
        raise SamplingFailed(f"{len(failures)} of {len(missing)} regions failed, the first: {failures[0]}")
    return store


def _unlike_training(
    weights: Path, about: dict[str, Any], shards: ShardSet, diffusion: DiffusionConfig, config: SampleConfig
) -> list[Problem]:
    """What the weights, whose segdiff.json is `about`, were not trained for. Old ones do not say all of it."""
    found, sampler = [], config.sampler
    if about["label_table"]["name"] != shards.label_table.name or about["size"] > shards.size:
        trained = f"{about['label_table']['name']!r} at {about['size']} pixels"
        value = f"{shards.label_table.name!r} at {shards.size} pixels"
        remedy = f"the model was trained on {trained}: prepare the masks so"
        found.append(Problem(str(shards.root), "label set, size", value, remedy))
    organs = [shards.label_table.names[i] for i in shards.label_table.organ_ids]
    if unknown := sorted(set(config.without_organs) - set(organs)):
        found.append(Problem("config", "sample.without_organs", str(unknown), f"choose from {', '.join(organs)}"))
    trained_with = about.get("diffusion", {})
    for name, value in diffusion.process.items():
        if trained_with.get(name, value) != value:
            remedy = f"{weights} was trained with {trained_with[name]!r}: give that"
            found.append(Problem("config", f"diffusion.{name}", repr(value), remedy))
    needed = {"mask": "mask_dropout", "class": "class_dropout", "both": "joint_dropout"}[sampler.guidance_removes]
    if sampler.guidance != 1.0 and not trained_with.get(needed):
        remedy = f"{weights} was trained without diffusion.{needed}: give 1, or train with it"
        found.append(Problem("config", "sample.sampler.guidance", str(sampler.guidance), remedy))
    return found


@dataclass(frozen=True)
class _WorkerFactory:
    """Runs in the worker: loads the model once, returns the function that makes a region."""

    store: Path
    device: str

    def __call__(self) -> Callable[[int], None]:
        import torch

        from data_shards.store.shards import ShardSet
        from segdiff_dist.denoising.denoiser import Denoiser

        store = SampleStore.open(self.store)
        shards = ShardSet.open(store.job["shards"])
        settings = store.job["sample"]
        torch.set_num_threads(settings["threads_per_worker"])
        device = torch.device(self.device)
        model = Denoiser.load(Path(store.job["weights"])).prepare_for(device)
        if settings["precision"] == "bf16":
            model = model.to(torch.bfloat16)
        diffusion, sampler = DiffusionConfig(**store.job["diffusion"]), SamplerConfig(**settings["sampler"])

        def make_region(index: int) -> None:
            items = store.items.slice(store.region(index).start, len(store.region(index))).to_pylist()
            conditions = item_conditions(model, shards, items, settings["without_organs"], device)
            image_BHW = generate(model, items, conditions, diffusion, sampler, settings["seed"])
            store.write_region(index, image_BHW, conditions.mask_BHW.cpu().numpy())

        return make_region


def item_conditions(
    model: Denoiser, shards: ShardSet, items: list[dict[str, Any]], without_organs: Sequence[str], device: torch.device
) -> Conditions:
    """What the model is told of the items: masks less the organs left out, with soft edges where it was trained on
    them and the set has them; target modality and axis."""
    import torch

    from segdiff_dist.denoising.conditioning import Conditions, class_ids
    from segdiff_dist.denoising.organ_dropout import relabelled

    records = [shards.read(item["row"]).cropped(model.size) for item in items]
    edges = [r.edge_2HW for r in records if r.edge_2HW is not None] if model.config.soft_masks else []
    modality_B = torch.tensor([MODALITIES.index(item["target_modality"]) for item in items], device=device)
    axis_B = torch.tensor([AXES.index(item["axis"]) for item in items], device=device)
    conditions = Conditions(
        torch.from_numpy(np.stack([record.mask_HW for record in records])).to(device),
        class_ids(modality_B, axis_B),
        torch.from_numpy(np.stack(edges)).to(device) if edges else None,
    )
    if not without_organs:
        return conditions
    lost_K = torch.tensor([name in without_organs for name in shards.label_table.names], device=device)
    return relabelled(conditions, lost_K.expand(len(items), -1), shards.label_table)


def generate(
    model: Callable[..., Tensor],
    items: list[dict[str, Any]],
    conditions: Conditions,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    seed: int,
) -> np.ndarray:
    """uint8 [B, H, W] images of the items under their conditions; noise is keyed by (seed, item_id)."""
    import torch

    from segdiff_dist.denoising.conditioning import guided
    from segdiff_dist.denoising.diffusion import ddim_sample, make_scheduler
    from segdiff_dist.pixels import to_uint8
    from segdiff_kernels import philox

    item_B = torch.tensor([item["item_id"] for item in items], device=conditions.mask_BHW.device)
    shape = (1, *conditions.mask_BHW.shape[1:])

    def noise(step: int) -> Tensor:
        """Step -1 is the start; each step of each item has its own counters."""
        return philox.normal(seed, philox.STREAM_SAMPLE + 1 + step, item_B, shape)

    x_0_BCHW = ddim_sample(
        guided(model, conditions, sampler.guidance, sampler.guidance_removes),
        make_scheduler(diffusion, sampler),
        noise(-1),
        sampler,
        noise,
    )
    return to_uint8(x_0_BCHW).cpu().numpy()


def weights_digest(folder: Path) -> str:
    """sha256 over a weights folder's files; says which model made an image."""
    if not (folder / "segdiff.json").is_file():
        raise problem(folder, "weights", "not found", "train first: `segdiff train --config F`")
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _target(wanted: str, source: str) -> str:
    if wanted == "same":
        return source
    return next(m for m in MODALITIES if m != source) if wanted == "other" else wanted


def _spread(table: list[dict[str, Any]], num: int) -> list[int]:
    """The first `num` masks, modalities taken in turn."""
    queues = [[i for i, row in enumerate(table) if row["modality"] == m] for m in MODALITIES]
    merged = [q[k] for k in range(len(table)) for q in queues if k < len(q)]
    return merged[:num]


def _num_gpus(config: SampleConfig) -> int:
    import torch

    from segdiff_dist.ranks.distributed import pick_device

    return torch.cuda.device_count() if pick_device(config.device).type == "cuda" else 0


def _num_cores() -> int:
    import os

    return os.cpu_count() or 1
