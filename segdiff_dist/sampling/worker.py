"""The work of a Ray worker: load the model once, then make region after region of a job.

Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
import os
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
from segdiff_dist.sampling.config import LEAST_BATCH
from segdiff_dist.sampling.mask_source import MaskArray, MaskSource
from segdiff_dist.sampling.store import MASKS, SampleStore
from segdiff_dist.sampling.weights import changed, load_denoiser

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from segdiff_dist.denoising.conditioning import Conditions
    from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.denoising.latent_space import LatentSpace
    from segdiff_dist.denoising.replayed import Net
    from segdiff_dist.denoising.sampler_config import SamplerConfig
    from segdiff_dist.denoising.samplers import Guide

# The share of a worker's memory that activations may take. The rest is for weights, workspaces and other programs.
_SHARE_FOR_ACTIVATIONS = 0.5


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


@dataclass(frozen=True)
class PassOptions:
    """What takes part in the passes through the net besides its conditions. `weaker`: the net of autoguidance.
    `on_pass`: called after each evaluation of a noise level; what it raises ends the work."""

    guide: Guide | None = None
    weaker: Net | None = None
    on_pass: Callable[[], None] | None = None


def generate(
    model: Net,
    items: list[dict[str, Any]],
    conditions: Conditions,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    seed: int | Tensor,
    options: PassOptions = PassOptions(),  # frozen
) -> np.ndarray:
    """uint8 [B, H, W] images of the items under their conditions; noise is keyed by (seed, item_id). `seed`: a number,
    or int64 [B, 1], one for each item.

    Raises InputProblems with the items if values of the net or the solver are not finite.
    """
    from segdiff_dist.denoising.samplers import clear_air
    from segdiff_dist.pixels import to_uint8

    conditions = _with_lower_stage(model, items, conditions, sampler, seed, options)
    x_0_BCHW = _sampled(model, items, conditions, diffusion, sampler, seed, options)
    images_BCHW = x_0_BCHW if model.space is None else model.space.decode(x_0_BCHW)
    _refuse_not_finite(items, images_BCHW.flatten(1).isfinite().all(dim=1).tolist())
    body_id = model.label_table.body_id
    if sampler.clear_air and body_id is not None:
        images_BCHW = clear_air(images_BCHW, conditions.mask_BHW, body_id)
    return to_uint8(images_BCHW).cpu().numpy()


def _with_lower_stage(
    model: Net,
    items: list[dict[str, Any]],
    conditions: Conditions,
    sampler: SamplerConfig,
    seed: int | Tensor,
    options: PassOptions,
    stage: int = 0,
) -> Conditions:
    """The conditions with the images of the lower stage of a cascade, augmented; `stage`: of the model, from the top.

    The noise of a stage has streams of its own, so that it does not depend on the noise of another.
    """
    import torch

    from segdiff_dist.denoising.cascade import augmentation_noise, augmented

    if model.lower is None:
        return conditions
    assert model.lower_net is not None
    own, alone = sampler.alone, PassOptions(on_pass=options.on_pass)
    below = _with_lower_stage(model.lower_net, items, conditions, own, seed, alone, stage + 1)
    z_B1hw = _sampled(model.lower_net, items, below, model.lower.diffusion, own, seed, alone, stage + 1)
    item_B = _item_ids(items, z_B1hw.device)
    level_B = torch.full((len(items),), sampler.augmentation, device=z_B1hw.device)
    noise_B1hw = augmentation_noise(seed, item_B, model.lower.side, stage)
    low_B1hw = augmented(z_B1hw.clamp(-1.0, 1.0), level_B, noise_B1hw)
    return conditions._replace(low_B1hw=low_B1hw, level_B=level_B)


def _item_ids(items: list[dict[str, Any]], device: torch.device) -> Tensor:
    import torch

    return torch.tensor([item["item_id"] for item in items], device=device)


def _sampled(
    model: Net,
    items: list[dict[str, Any]],
    conditions: Conditions,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    seed: int | Tensor,
    options: PassOptions,
    stage: int = 0,
) -> Tensor:
    """float32 [B, C, h, w]: x_0 of the net, as it denoises it; as `generate`."""
    import torch

    from segdiff_dist.denoising import samplers
    from segdiff_dist.denoising.conditioning import guided
    from segdiff_kernels import philox

    item_B = _item_ids(items, conditions.mask_BHW.device)
    side, space = conditions.mask_BHW.shape[-1], model.space
    shape = (1, side, side) if space is None else space.shape(side)

    def noise(step: int) -> Tensor:
        """Step -1 is the start; each step of each item has its own counters."""
        return philox.normal(seed, philox.STREAM_SAMPLE + philox.STREAM_STAGE * stage + 1 + step, item_B, shape)

    finite_B = torch.ones(len(items), dtype=torch.bool, device=item_B.device)

    def watched(guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
        predict = guided(model, conditions, guidance, sampler.guidance_removes, options.weaker)
        return _watched(predict, finite_B, options.on_pass)

    x_0_BCHW = samplers.sample(
        watched(sampler.guidance),
        diffusion,
        sampler if space is None else space.bounds(sampler),
        noise(-1),
        noise,
        options.guide,
        unguided=None if sampler.guidance_interval is None else watched(1.0),
        fused=model.uses_kernels,
    )
    finite_B.logical_and_(x_0_BCHW.flatten(1).isfinite().all(dim=1))
    _refuse_not_finite(items, finite_B.tolist())
    return x_0_BCHW


def _watched(
    predict: Callable[[Tensor, Tensor], Tensor], finite_B: Tensor, on_pass: Callable[[], None] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Check the prediction before clipping can hide values that are not finite; on its device, so that nothing
    waits."""

    def predict_and_look(x_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        prediction_BCHW = predict(x_BCHW, timestep_B)
        finite_B.logical_and_(prediction_BCHW.flatten(1).isfinite().all(dim=1))
        if on_pass is not None:
            on_pass()
        return prediction_BCHW

    return predict_and_look


def _refuse_not_finite(items: list[dict[str, Any]], is_finite: list[bool]) -> None:
    ids = sorted({item["item_id"] for item, good in zip(items, is_finite, strict=True) if not good})
    if not ids:
        return
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    value = f"not finite, in items {', '.join(map(str, ids[:8]))}{more}"
    remedy = "sample from other weights (another average, an earlier checkpoint), or in fp32 if it was bf16"
    raise problem("denoiser", "prediction", value, remedy)


def batch_size_of(model: Denoiser, passes: int, available_bytes: int, most: int) -> int:
    """How many images fit at once, as `batch_size_for`; of a cascade, those of the stage that needs the most."""
    fit = batch_size_for(model.config, model.size, passes, available_bytes, most, latent=model.latent)
    return fit if model.lower_net is None else batch_size_of(model.lower_net, passes, available_bytes, fit)


def batch_size_for(
    config: DenoiserConfig,
    size: int,
    passes: int,
    available_bytes: int,
    most: int,
    *,
    latent: LatentSpace | None = None,
) -> int:
    """How many images of `size` pixels fit into `available_bytes` at once, from LEAST_BATCH to `most`.

    Counted are a UNet's skip connections and twelve maps of its widest level, four bytes a value: in, out, norms, the
    concatenated skip, and what convolutions need. The paper's net at 64x64 takes 30 MiB an image on a CPU in fp32 and
    25 in bf16 (measured); this estimate is 32. For `net: efficient` 28 maps are counted: its levels begin at half the
    side, but mask and head are large. (64, 96, 128) at 64x64 takes 5.4 to 7.6 MiB in fp32; this estimate is 8.1.
    `passes`: 2 if guidance runs the net with and without conditions. `latent`: six maps of the autoencoder's second
    level at the images' side are counted, which its decoder has before the last blocks.
    """
    sides = config.sides(size // latent.factor if latent is not None else config.low_resolution or size)
    maps = [channels * side**2 for channels, side in zip(config.block_out_channels, sides, strict=True)]
    values = (config.layers_per_block + 1) * sum(maps) + (12 if config.net == "unet" else 28) * max(maps)
    needed = values * passes
    if latent is not None:
        needed = max(needed, 6 * latent.autoencoder.config.block_out_channels[1] * size**2)
    fit = int(_SHARE_FOR_ACTIVATIONS * available_bytes) // (4 * needed)
    return min(max(LEAST_BATCH, fit), max(LEAST_BATCH, most))


def memory_bytes(device: str) -> int:
    """The memory of this machine or of the GPU: all of it, not the free part, so that other programs change no
    batch."""
    import torch

    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """The central size x size pixels of [..., H, W], as the loader's centre crop gives them."""
    top, left = ((side - size) // 2 for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]
