"""The denoiser for planning: how to build it, and the shapes of its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from segdiff_dist.attention import set_attention
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import BaseNet, Denoiser
from segdiff_dist.planning.network import Classes, Network, on_meta

if TYPE_CHECKING:
    from segdiff_dist.denoising.latent_space import LatentSpace


def denoiser_network(
    config: DenoiserConfig,
    shards: Classes,
    side: int,
    device: torch.device,
    base: BaseNet | None = None,
    latent: LatentSpace | None = None,
    passes: int = 1,
) -> Network:
    """The denoiser for slices of `side` pixels, with what computes it on `device`. `base`: of a ControlNet; `latent`:
    where it works on latents; `passes`: of the training, DiffusionConfig.passes."""

    def make() -> nn.Module:
        model = Denoiser(config, shards.label_table, side, shards.modalities, base, latent=latent)
        model.choose_operators(device)
        set_attention(model, "sdpa")  # keeps no more memory than the others
        return model

    def inputs(images: int) -> tuple[torch.Tensor, ...]:
        numbers = on_meta(images, dtype=torch.int64)
        edge = (on_meta(images, 2, side, side, dtype=torch.uint8),) if config.soft_masks else ()
        mask = on_meta(images, side, side, dtype=torch.uint8)
        x_shape = (1, side, side) if latent is None else latent.shape(side)
        return (on_meta(images, *x_shape), numbers, mask, numbers, *edge)

    return Network(make, inputs, passes)
