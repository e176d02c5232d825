"""A trained autoencoder: its weights on disk, latents of slices, and slices of latents.

    FOLDER/config.json, diffusion_pytorch_model.safetensors     what diffusers' AutoencoderKL.from_pretrained reads
    FOLDER/segdiff.json                                         the size and the modalities of its training

Dimensions: B batch, C latent channels, H, W image rows and columns, h, w those of a latent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.documents import read_json, reading
from data_shards.files import updated_folder
from data_shards.modalities import MODALITIES, modalities_of
from data_shards.problems import Problem, problem, refuse
from data_shards.store.set_index import MODALITIES_KEY
from segdiff_dist.autoencoding.config import AutoencoderConfig
from segdiff_dist.autoencoding.network import make_autoencoder
from segdiff_dist.config import how_to_make, validate
from segdiff_dist.pixels import to_model_range
from segdiff_dist.weight_files import DESCRIPTION, read_weights, refuse_damaged, write_digests

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# The settings of a trained autoencoder; the others are those of its training.
_SHAPE = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "attention")
# Larger networks cannot be built in reasonable time. The description may come from anybody.
_MOST_LEVELS, _MOST_LAYERS, _MOST_LATENT_CHANNELS = 8, 16, 256


class Autoencoder:
    """A trained autoencoder, ready to use: fp32, no gradients."""

    def __init__(
        self, net: Any, config: AutoencoderConfig, size: int, modalities: tuple[str, ...], sha256: str
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.config, self.size, self.modalities, self.weights_sha256 = config, size, modalities, sha256

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Autoencoder:
        """The autoencoder that training wrote to `folder`. Raises InputProblems if it is missing or damaged."""
        where, what = folder / DESCRIPTION, "the description of an autoencoder"
        again = how_to_make("train-autoencoder", folder)
        if not where.is_file():
            raise problem(folder, "autoencoder", "not found", f"train it first: {again}")
        remedy = f"remove {folder}; training again exports it from its checkpoint: {again}"
        refuse_damaged(folder, "autoencoder", remedy)
        description = read_json(where, remedy, what)
        with reading(where, what, remedy):
            config = validate(AutoencoderConfig, {name: description["autoencoder"][name] for name in _SHAPE}, where)
            size, modalities = int(description["size"]), tuple(map(str, description.get(MODALITIES_KEY, MODALITIES)))
            refuse([*config.problems(), *_shape_problems(config, modalities, where)])
        files = [("", folder / _WEIGHTS)]
        net = read_weights(files, lambda: make_autoencoder(config), "autoencoder", remedy)
        digest = hashlib.sha256((folder / _WEIGHTS).read_bytes()).hexdigest()
        return cls(net.to(torch.device(device)), config, size, modalities, digest)

    def problems(self, size: int, modalities: Sequence[str]) -> Iterator[Problem]:
        """What keeps it from slices of this size and these modalities."""
        if size != self.size:
            value, remedy = f"trained on {self.size} pixels, the slices have {size}", "train one on slices of this size"
            yield Problem("autoencoder", "size", value, f"{remedy} with `segdiff train-autoencoder`")
        if tuple(modalities) != self.modalities:
            value = f"trained on {', '.join(self.modalities)}, the set has {', '.join(modalities)}"
            yield Problem("autoencoder", "modalities", value, "train one on a set with these modalities")

    @torch.no_grad()
    def encode(self, image_BHW: Tensor) -> Tensor:
        """float32 latents [B, C, h, w], the means of the posteriors, of uint8 or uint16 slices."""
        x_B1HW = to_model_range(image_BHW.to(self.device)).contiguous(memory_format=torch.channels_last)
        latents: Tensor = self.net.encode(x_B1HW).latent_dist.mean.float()
        return latents

    @torch.no_grad()
    def decode(self, latent_BChw: Tensor) -> Tensor:
        """float32 images [B, 1, H, W] in about [-1, 1]."""
        images: Tensor = self.net.decode(latent_BChw.to(self.device)).sample.float()
        return images

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.net.parameters()).device


def save_autoencoder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: AutoencoderConfig,
    size: int,
    modalities: tuple[str, ...],
    training: Mapping[str, Any],
) -> None:
    """Write weights (keys as of AutoencoderKL) and the description, to which `training` is added."""
    from safetensors.torch import save_file

    with torch.device("meta"):
        net = make_autoencoder(config)
    with updated_folder(folder) as unfinished:
        save_file(
            {name: value.contiguous() for name, value in weights.items()},
            unfinished / _WEIGHTS,
            metadata={"format": "pt"},
        )
        net.save_config(unfinished)
        description: dict[str, Any] = {"autoencoder": asdict(config), "size": size, **training}
        if modalities != MODALITIES:
            description[MODALITIES_KEY] = list(modalities)
        (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        write_digests(unfinished, sorted(file.name for file in unfinished.iterdir()))


def _shape_problems(config: AutoencoderConfig, modalities: tuple[str, ...], where: Path) -> Iterator[Problem]:
    levels, layers, channels = len(config.block_out_channels), config.layers_per_block, config.latent_channels
    restore = "restore the file that training wrote"
    if levels > _MOST_LEVELS or layers > _MOST_LAYERS or channels > _MOST_LATENT_CHANNELS:
        value = f"{levels} levels of {layers} layers, {channels} latent channels"
        yield Problem(str(where), "autoencoder", value, restore)
    if modalities != modalities_of(modalities):
        yield Problem(str(where), MODALITIES_KEY, repr(modalities)[:80], restore)
