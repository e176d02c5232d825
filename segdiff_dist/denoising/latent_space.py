"""`denoiser.space: latent`: the denoiser works on the latents of an autoencoder (Rombach et al. 2022, section 3.2).

    x_0 = (encode(image) - mean) / std            each latent channel has unit variance over the training slices
    image = decode(mean + std x_0)

So noise schedules keep their meaning, and EDM's sigma_data is 1. The mask enters as the mean of its channels over the
pixels of a latent position (for onehot: the share of each class). The nearest label instead would lose organs that are
smaller than a position, and move borders by up to half of one.
Dimensions: B batch, C latent channels, H, W image rows and columns, h, w those of a latent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.files import updated_folder
from data_shards.problems import Problem, problem, refuse
from data_shards.records import Batch
from segdiff_dist.autoencoding.autoencoder import Autoencoder
from segdiff_dist.autoencoding.network import latent_shape
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.weight_files import DESCRIPTION, DIGESTS, write_digests

# Inside a folder of weights; beside it in a pipeline's folder, under diffusers' name.
BESIDE_WEIGHTS, IN_PIPELINE = "autoencoder", "vae"
DESCRIBED = "latent"


@dataclass(frozen=True)
class LatentSpace:
    """An autoencoder, and the mean and standard deviation of each channel of its latents. Never copied."""

    autoencoder: Autoencoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: Path
    """The folder of the autoencoder."""

    @classmethod
    def open(cls, run_or_folder: str | Path) -> LatentSpace:
        """The space of RUN/autoencoder/weights, or of such a folder itself, without its scale."""
        given = Path(run_or_folder)
        folder = given if (given / DESCRIPTION).is_file() else given / "autoencoder" / "weights"
        autoencoder = Autoencoder.load(folder)
        channels = autoencoder.config.latent_channels
        return cls(autoencoder, (0.0,) * channels, (1.0,) * channels, folder)

    @classmethod
    def beside(cls, weights: Path, described: Mapping[str, Any]) -> LatentSpace:
        """The space of a denoiser's weights. KeyError and the like if `described` is not what it was. Raises
        InputProblems if the autoencoder is not that of the training."""
        folder = next((f for f in (weights / BESIDE_WEIGHTS, weights.parent / IN_PIPELINE) if f.is_dir()), None)
        remedy = "copy the whole folder again, with the autoencoder in it"
        if folder is None:
            raise problem(weights, "autoencoder", "missing", remedy)
        space = cls.open(folder)
        if space.sha256 != described["autoencoder_sha256"]:
            raise problem(folder, "autoencoder", "not the one that the denoiser was trained with", remedy)
        return space.scaled(described["mean"], described["std"])

    def scaled(self, mean: Sequence[float], std: Sequence[float]) -> LatentSpace:
        """The same with this scale."""
        both = tuple(map(float, mean)), tuple(map(float, std))
        if {len(values) for values in both} != {len(self.mean)} or min(both[1]) <= 0:
            raise ValueError(f"mean and std: {both}; {len(self.mean)} numbers each, std above 0")
        return replace(self, mean=both[0], std=both[1])

    @property
    def factor(self) -> int:
        """Pixels of the side of a latent position."""
        return self.autoencoder.config.factor

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.autoencoder.config.latent_channels

    @property
    def sha256(self) -> str:
        """The digest of the autoencoder's weights."""
        return self.autoencoder.weights_sha256

    @property
    def described(self) -> dict[str, Any]:
        """For segdiff.json."""
        description = {"autoencoder_sha256": self.sha256, "mean": list(self.mean), "std": list(self.std)}
        return description | {"channels": self.channels, "factor": self.factor}

    def shape(self, size: int) -> tuple[int, int, int]:
        """[C, h, w] of slices of `size` pixels."""
        return latent_shape(self.autoencoder.config, size)

    def move_to(self, device: torch.device) -> None:
        """Compute there."""
        self.autoencoder.net.to(device)

    def x_0(self, batch: Batch) -> Tensor:
        """float32 [B, C, h, w] of unit variance: from the cached latents in the batch, else encoded."""
        cached = batch.extra_BX
        return self.normed(self.autoencoder.encode(batch.image_BHW) if cached is None else cached)

    def normed(self, latent_BChw: Tensor) -> Tensor:
        """Latents as the denoiser has them."""
        mean_C11, std_C11 = self._scale(latent_BChw)
        return (latent_BChw - mean_C11) / std_C11

    def decode(self, x_0_BChw: Tensor) -> Tensor:
        """float32 images [B, 1, H, W] in about [-1, 1]."""
        mean_C11, std_C11 = self._scale(x_0_BChw)
        return self.autoencoder.decode(mean_C11 + std_C11 * x_0_BChw)

    def pooled(self, mask_BKHW: Tensor) -> Tensor:
        """[B, K, h, w]: the mean of the mask's channels at each latent position."""
        return F.avg_pool2d(mask_BKHW, self.factor)

    def bounds(self, sampler: SamplerConfig) -> SamplerConfig:
        """The sampler without the bound on predicted images, which latents do not have."""
        return replace(sampler, clip_sample=False)

    def copy_to(self, folder: Path) -> None:
        """Write the autoencoder's files, with the scale where diffusers has it."""
        with updated_folder(folder) as unfinished:
            files = [file for file in sorted(self.folder.iterdir()) if file.is_file() and file.name != "exported.json"]
            for file in files:
                shutil.copyfile(file, unfinished / file.name)
            settings = json.loads((unfinished / "config.json").read_text())
            settings |= {"latents_mean": list(self.mean), "latents_std": list(self.std)}
            (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
            write_digests(unfinished, [file.name for file in files if file.name != DIGESTS])

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean_C11, std_C11 = (torch.tensor(v, device=like.device)[:, None, None] for v in (self.mean, self.std))
        return mean_C11, std_C11

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentSpace:
        return self


def find_space(
    denoiser: DenoiserConfig, diffusion: DiffusionConfig, size: int, modalities: Sequence[str]
) -> LatentSpace | None:
    """The space of a training on slices of `size` pixels; None for pixels. Raises InputProblems."""
    refuse(list(_conflicts(denoiser, diffusion)))
    if denoiser.space == "pixel":
        return None
    assert denoiser.autoencoder is not None
    space = LatentSpace.open(denoiser.autoencoder)
    refuse(list(space.autoencoder.problems(size, modalities)))
    return space


def _conflicts(denoiser: DenoiserConfig, diffusion: DiffusionConfig) -> Iterator[Problem]:
    if (denoiser.space == "latent" or denoiser.low_resolution is not None) and diffusion.dice_weight > 0:
        read = "latents" if denoiser.space == "latent" else "shrunk slices"
        remedy = f"the segmenter reads images, not {read}: give 0, or use denoiser.space pixel at the full side"
        yield Problem("config", "diffusion.dice_weight", str(diffusion.dice_weight), remedy)
    yield from denoiser.space_problems()


def copy_to_pipeline(weights: Path, folder: Path) -> dict[str, list[str]]:
    """Copy the autoencoder beside weights, if there is one; returns its entry of model_index.json.

    It stays in fp32, since its digest is part of the denoiser's description.
    """
    if not (weights / BESIDE_WEIGHTS).is_dir():
        return {}
    (folder / IN_PIPELINE).mkdir()
    for file in sorted((weights / BESIDE_WEIGHTS).iterdir()):
        shutil.copyfile(file, folder / IN_PIPELINE / file.name)
    return {IN_PIPELINE: ["diffusers", "AutoencoderKL"]}


def sampler_problems(sampler: SamplerConfig, description: Mapping[str, Any]) -> list[Problem]:
    """Settings that need images where the weights, whose segdiff.json is `description`, work on latents."""
    if DESCRIBED not in description:
        return []
    wrong = {"dynamic_threshold": "it bounds grey values", "segmenter_guidance": "the segmenter reads images"}
    return [
        Problem("config", f"sample.sampler.{name}", str(value), f"the model works on latents, {why}: give 0")
        for name, why in wrong.items()
        if (value := getattr(sampler, name)) > 0
    ]
