"""A cascade: a denoiser of small slices, and a super-resolution denoiser that makes them large (Ho et al. 2022).

    z = area mean of x_0                                  the lower stage denoises z (denoiser.low_resolution)
    z_s = cos(pi s / 2) z + sin(pi s / 2) noise           s from 0 to 1: the level of the augmentation
    prediction = net([x_t; mask; up(z_s)], t, class, s)   up: bilinear; s: a further embedding, added to the time's

Ho et al. 2022, "Cascaded Diffusion Models", non-truncated conditioning augmentation: z_s hides what the lower stage
does wrong. In training s is uniform, by (seed, position); in sampling it is one value, `sample.sampler.augmentation`
(Saharia et al. 2022, Imagen, section 2.4). cos and sin: Nichol and Dhariwal 2021, eq. 17, without its offset.
A stage may be the lower stage of another. B batch, K mask channels, H, W; h, w: a lower side.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.documents import read_json, reading
from data_shards.files import updated_folder
from data_shards.problems import Problem, problem
from data_shards.records import Batch
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.latent_space import LatentSpace
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.schedule import as_trained
from segdiff_dist.denoising.time_addition import TimeAddition
from segdiff_dist.diffusers_parts import TimestepEmbedding, Timesteps
from segdiff_dist.pixels import to_model_range
from segdiff_dist.weight_files import DESCRIPTION, folder_digest
from segdiff_kernels import philox

# The lower stage: in a run folder (as it was when the training began), and inside each folder of weights.
LOWER = "low_resolution"
# In segdiff.json.
DESCRIBED = "cascade"
# As the time, which is 0 to 1000.
_LEVEL_SCALE = 1000.0


@dataclass(frozen=True)
class ShrunkSpace:
    """Slices shrunk by area to `side` pixels, as `factor` says; masks keep the images' side up to the net."""

    factor: int

    @classmethod
    def of(cls, config: DenoiserConfig, size: int) -> ShrunkSpace | None:
        """That of denoiser.low_resolution, for slices of `size` pixels."""
        return None if config.low_resolution is None else cls(size // config.low_resolution)

    def shape(self, size: int) -> tuple[int, int, int]:
        """[1, h, w] of slices of `size` pixels."""
        return 1, size // self.factor, size // self.factor

    def move_to(self, device: torch.device) -> None:
        """Nothing is anywhere."""

    def x_0(self, batch: Batch) -> Tensor:
        """float32 [B, 1, h, w] in [-1, 1]."""
        return F.avg_pool2d(to_model_range(batch.image_BHW), self.factor)

    def decode(self, x_0_B1hw: Tensor) -> Tensor:
        """float32 [B, 1, H, W]: enlarged, without what a higher stage would add."""
        return enlarged(x_0_B1hw, x_0_B1hw.shape[-1] * self.factor)

    def pooled(self, mask_BKHW: Tensor) -> Tensor:
        """[B, K, h, w]: the mean of the mask's channels at each pixel of the shrunk slice."""
        return F.avg_pool2d(mask_BKHW, self.factor)

    def bounds(self, sampler: SamplerConfig) -> SamplerConfig:
        """Grey values are bounded at any side."""
        return sampler


# Where a net works that does not work on slices as they are.
NetSpace = LatentSpace | ShrunkSpace


@dataclass(frozen=True)
class LowerStage:
    """The denoiser whose images a super-resolution denoiser reads."""

    folder: Path
    """Of its weights."""
    side: int
    """Of its images."""
    sha256: str
    """Of the folder's files."""
    diffusion: DiffusionConfig
    """The process of its training."""

    @classmethod
    def open(cls, folder: Path) -> LowerStage:
        """That of a folder of weights. Raises InputProblems."""
        remedy = "copy the weights again from where they were trained"
        if not (folder / DESCRIPTION).is_file():
            raise problem(folder, LOWER, "not found", remedy)
        description = read_json(folder / DESCRIPTION, remedy)
        with reading(folder / DESCRIPTION, "the description of a denoiser", remedy):
            side = int(description["denoiser"].get("low_resolution") or description["size"])
            diffusion = as_trained(DiffusionConfig(), description.get("diffusion", {}))[0]
        return cls(folder, side, folder_digest(folder), diffusion)

    @classmethod
    def inside(cls, weights: Path, described: Mapping[str, Any]) -> LowerStage:
        """That of a folder of weights of a super-resolution denoiser. Raises InputProblems if it is another than that
        of the training."""
        stage = cls.open(weights / LOWER)
        if (stage.sha256, stage.side) != (described["sha256"], described["side"]):
            remedy = "copy the whole folder again, with the lower stage in it"
            raise problem(stage.folder, LOWER, "not the one that the denoiser was trained with", remedy)
        return stage

    @property
    def described(self) -> dict[str, Any]:
        """For segdiff.json."""
        return {"side": self.side, "sha256": self.sha256}

    def condition(self, image_BHW: Tensor, level_B: Tensor, noise_B1hw: Tensor) -> Tensor:
        """float32 [B, 1, h, w]: slices (uint8 or uint16) shrunk and augmented, in place of the lower stage's images."""
        x_B1HW = to_model_range(image_BHW)
        return augmented(F.avg_pool2d(x_B1HW, x_B1HW.shape[-1] // self.side), level_B, noise_B1hw)

    def drawn_condition(
        self, image_BHW: Tensor, seed: int, position_B: Tensor, level: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same and its level [B], both drawn by (seed, position); `level`: in place of a drawn one."""
        level_B = philox.uniform(seed, philox.STREAM_AUGMENTATION, position_B, 1)[:, 0]
        if level is not None:
            level_B = torch.full_like(level_B, level)
        return self.condition(image_BHW, level_B, augmentation_noise(seed, position_B, self.side)), level_B

    def copy_to(self, folder: Path) -> None:
        """Write its files, and those of the stages below it, into `folder`."""
        copy_stage(self.folder, folder)


class LevelEmbedding(TimeAddition):
    """The embedding of the augmentation's level."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        channels, width = unet.conv_in.out_channels, unet.time_embedding.linear_2.out_features
        self.sinusoids = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(channels, width)

    def read(self, level_B: Tensor, dtype: torch.dtype) -> None:
        """Embed the levels for the next pass through the UNet."""
        self.add(self.embedding(self.sinusoids(_LEVEL_SCALE * level_B).to(dtype)))


def augmented(z_B1hw: Tensor, level_B: Tensor, noise_B1hw: Tensor) -> Tensor:
    """z_s of the module's second equation: z itself at level 0, noise alone at 1. Images of unit variance keep it."""
    angle_B111 = (0.5 * math.pi * level_B)[:, None, None, None]
    return torch.cos(angle_B111) * z_B1hw + torch.sin(angle_B111) * noise_B1hw


def augmentation_noise(seed: int | Tensor, position_B: Tensor, side: int, stage: int = 0) -> Tensor:
    """Standard normal float32 [B, 1, side, side]; `stage`: of a cascade of several, from the top."""
    return philox.normal(seed, philox.STREAM_AUGMENTATION + 1 + stage, position_B, (1, side, side))


def enlarged(z_B1hw: Tensor, side: int) -> Tensor:
    """[B, 1, side, side], bilinear, the borders of pixels in place."""
    return F.interpolate(z_B1hw, size=(side, side), mode="bilinear", align_corners=False)


def stage_message(config: DenoiserConfig, lower: LowerStage | None) -> str:
    """The end of a message: what the stage reads. Empty without a cascade."""
    shrunk = "" if config.low_resolution is None else f", slices shrunk to {config.low_resolution} pixels"
    return shrunk + ("" if lower is None else f", super-resolution of {lower.side} pixels")


def copies_bytes(lower: LowerStage | None, averages: int) -> int:
    """Bytes of the copies of the lower stage: in the run, and in each of its folders of weights."""
    if lower is None:
        return 0
    return (1 + averages) * sum(file.stat().st_size for file in lower.folder.rglob("*") if file.is_file())


def copy_stage(source: Path, target: Path) -> None:
    """Copy a folder of weights, with the stages below it."""
    target.mkdir(parents=True, exist_ok=True)
    if (source / LOWER).is_dir():
        copy_stage(source / LOWER, target / LOWER)
    with updated_folder(target) as unfinished:
        for file in sorted(one for one in source.iterdir() if one.is_file()):
            shutil.copyfile(file, unfinished / file.name)


def stage_problems(sampler: SamplerConfig, weights: Path, description: Mapping[str, Any]) -> Iterator[Problem]:
    """What of the sampler does not go with the stages below the denoiser in `weights`, or needs a cascade."""
    if description["denoiser"].get("low_resolution") is not None and sampler.segmenter_guidance > 0:
        remedy = "the segmenter reads whole slices, and the model makes small ones: give 0"
        yield Problem("config", "sample.sampler.segmenter_guidance", str(sampler.segmenter_guidance), remedy)
    if DESCRIBED not in description:
        if sampler.augmentation != SamplerConfig().augmentation:
            remedy = "only a cascade's super-resolution has it (denoiser.cascade): leave it out"
            yield Problem("config", "sample.sampler.augmentation", str(sampler.augmentation), remedy)
        return
    stage, own = LowerStage.inside(weights, description[DESCRIBED]), sampler.alone
    of_stage = read_json(stage.folder / DESCRIPTION, "copy the weights again")
    for one in own.problems(stage.diffusion):
        yield replace(one, where=f"lower stage, {stage.side} pixels")
    needed = own.needed_dropout
    if needed is not None and not of_stage.get("diffusion", {}).get(needed):
        remedy = f"the lower stage ({stage.side} pixels) was trained without diffusion.{needed}: give 1, or train it so"
        yield Problem("config", "sample.sampler.guidance", str(own.guidance), remedy)
    yield from stage_problems(replace(own, augmentation=SamplerConfig().augmentation), stage.folder, of_stage)
