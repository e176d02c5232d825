"""The work of a Ray worker: load the model once, then make region after region of a job.

Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.fan_out import num_cores
from data_shards.labels import LabelTable
from data_shards.problems import problem
from data_shards.records import AXES
from segdiff_dist.ranks.cpu_memory import keep_freed_memory
from segdiff_dist.sampling.batch_size import batch_size_of, memory_bytes
from segdiff_dist.sampling.config import LEAST_BATCH
from segdiff_dist.sampling.generation import PassOptions, generate
from segdiff_dist.sampling.mask_source import MaskArray, MaskSource
from segdiff_dist.sampling.store import MASKS, SampleStore
from segdiff_dist.sampling.weights import changed, load_denoiser

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from segdiff_dist.denoising.conditioning import Conditions
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.denoising.replayed import Net


@dataclass(frozen=True)
class WorkerFactory:
    """Runs in the worker: loads the model once, returns the function that makes a region and measures its seconds.

    `num_beside`: workers that may share its memory: those of its GPU, or all of the job; this machine has at most as
    many as fit. `cuda_graph`: replay the network's passes where the device can.
    """

    store: Path
    device: str
    batch_size: int | None = None
    num_beside: int = 1
    cuda_graph: bool = True

    def __call__(self) -> Callable[[int], float]:
        import torch

        if not self.store.is_dir():
            remedy = "the machines of a Ray cluster must all see the run folder: put it on a shared file system"
            raise problem(socket.gethostname(), str(self.store), "not found", remedy)
        store = SampleStore.open(self.store)
        settings = store.job["sample"]
        torch.set_num_threads(settings["threads_per_worker"])
        if self.device == "cpu":
            keep_freed_memory()
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
        most = math.inf if self.device == "cuda" else max(1, num_cores() // settings["threads_per_worker"])
        beside = int(min(self.num_beside, most))
        made = _RegionMaker(store, torch.device(self.device), self.cuda_graph)
        made.batch_size = self.batch_size or batch_size_of(
            made.model, made.passes, memory_bytes(self.device) // beside, store.region_size
        )
        return made


class _RegionMaker:
    """The model and everything else that is used for all regions. Another model than at the job's start is refused:
    otherwise a later command, or a worker that replaces another, would mix images of two models."""

    def __init__(self, store: SampleStore, device: torch.device, cuda_graph: bool) -> None:

        from segdiff_dist.denoising.config import DiffusionConfig
        from segdiff_dist.denoising.sampler_config import SamplerConfig
        from segdiff_dist.denoising.task import DiceTerm

        settings = store.job["sample"]
        self.store, self.device, self.seed = store, device, settings["seed"]
        self.without_organs: list[str] = settings["without_organs"]
        weights, how = Path(store.job["weights"]), (device, settings["precision"], cuda_graph)
        self.model, self.net = _ready_net(weights, store.job["weights_digest"], *how)
        self.masks = open_masks(store, self.model.label_table)
        self.diffusion, self.sampler = DiffusionConfig(**store.job["diffusion"]), SamplerConfig(**settings["sampler"])
        self.passes = 1 if self.sampler.guidance == 1.0 or self.sampler.guidance_weights else 2
        self.weaker = None
        if self.sampler.guidance_weights is not None:
            beside = weights.parent / self.sampler.guidance_weights
            _, self.weaker = _ready_net(beside, store.job["guidance_weights_digest"], *how)
        self.dice_term = None
        if self.sampler.segmenter_guidance > 0:
            segmenter = Path(str(self.sampler.guidance_segmenter))
            self.dice_term = DiceTerm(segmenter, self.model.label_table, device, self.model.modalities)
            if self.dice_term.weights_sha256 != store.job["guidance_segmenter_sha256"]:
                raise changed(segmenter, "weights")
        self.batch_size = LEAST_BATCH

    def __call__(self, index: int) -> float:
        began = time.perf_counter()
        ids = self.store.region(index)
        parts = [self._batch(range(at, min(at + self.batch_size, ids.stop))) for at in ids[:: self.batch_size]]
        image_BHW, mask_BHW = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        seconds = time.perf_counter() - began
        self.store.write_region(index, image_BHW, mask_BHW, seconds)
        return seconds

    def _batch(self, ids: range) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, H, W] images and masks of consecutive items."""
        import torch

        from segdiff_dist.denoising.samplers import segmenter_guide

        items = self.store.items.slice(ids.start, len(ids)).to_pylist()
        items += [items[0]] * (LEAST_BATCH - len(items))
        with torch.inference_mode():
            conditions = item_conditions(self.model, self.masks, items, self.without_organs, self.device)
            guide = None
            if self.dice_term is not None:
                guide = segmenter_guide(self.dice_term, conditions, self.sampler.segmenter_guidance)
            settings = self.diffusion, self.sampler, self.seed
            image_BHW = generate(self.net, items, conditions, *settings, PassOptions(guide, self.weaker))
        return image_BHW[: len(ids)], conditions.mask_BHW.cpu().numpy()[: len(ids)]


def _ready_net(
    folder: Path, digest: str, device: torch.device, precision: str, cuda_graph: bool
) -> tuple[Denoiser, Net]:
    """The model in a folder, where it is to compute, and what calls it."""
    import torch

    from segdiff_dist.denoising.replayed import ReplayedNet

    model = load_denoiser(folder, digest)[0].prepare_for(device)
    model = model.to(torch.bfloat16) if precision == "bf16" else model
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the activations are
    return model, ReplayedNet(model, device) if cuda_graph else model


def open_masks(store: SampleStore, label_table: LabelTable) -> MaskSource:
    """The source of the masks of a job's items. A shard set that has changed since the job began is refused."""
    from data_shards.store.shards import ShardSet

    if "shards" in store.job:
        shards = ShardSet.open(store.job["shards"])
        if shards.digest != store.job["shards_digest"]:
            raise changed(shards.root, "digest")
        return shards
    return MaskArray.open(store.path / MASKS, label_table, store.items)


def item_conditions(
    model: Denoiser, masks: MaskSource, items: list[dict[str, Any]], without_organs: Sequence[str], device: torch.device
) -> Conditions:
    """The model's conditions for the items: masks without the organs left out; soft edges, if the model was trained on
    them and the source has them; target modality and axis."""
    import torch

    from segdiff_dist.denoising.conditioning import Conditions, class_ids
    from segdiff_dist.denoising.organ_dropout import relabelled

    def stacked(read: Callable[[int], np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([_centre(read(item["row"]), model.size) for item in items])).to(device)

    has_edges = model.config.soft_masks and "edge" in masks.parts
    modality_B = torch.tensor([model.modalities.index(item["target_modality"]) for item in items], device=device)
    axis_B = torch.tensor([AXES.index(item["axis"]) for item in items], device=device)
    conditions = Conditions(
        stacked(masks.read_mask),
        class_ids(modality_B, axis_B),
        stacked(lambda row: masks.read_part(row, "edge")) if has_edges else None,
    )
    if not without_organs:
        return conditions
    lost_K = torch.tensor([name in without_organs for name in masks.label_table.names], device=device)
    return relabelled(conditions, lost_K.expand(len(items), -1), masks.label_table)


def _centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """The central size x size pixels of [..., H, W], as the loader's centre crop gives them."""
    top, left = ((side - size) // 2 for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]
