"""The denoiser for planning: how to build it, and the shapes of its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from segdiff_dist.attention import set_attention
from segdiff_dist.denoising.cascade import LowerStage, ShrunkSpace
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
    lower: LowerStage | None = None,
) -> Network:
    """The denoiser for slices of `side` pixels, with what computes it on `device`. `base`: of a ControlNet; `latent`:
    where it works on latents; `passes`: of the training, DiffusionConfig.passes; `lower`: of a cascade's
    super-resolution."""

    def make() -> nn.Module:
        model = Denoiser(config, shards.label_table, side, shards.modalities, base, latent=latent, lower=lower)
        model.choose_operators(device)
        set_attention(model, "sdpa")  # keeps no more memory than the others
        return model

    def inputs(images: int) -> tuple[torch.Tensor | None, ...]:
        numbers = on_meta(images, dtype=torch.int64)
        edge = (on_meta(images, 2, side, side, dtype=torch.uint8),) if config.soft_masks else ()
        mask = on_meta(images, side, side, dtype=torch.uint8)
        space = latent or ShrunkSpace.of(config, side)
        x_shape = (1, side, side) if space is None else space.shape(side)
        given = (on_meta(images, *x_shape), numbers, mask, numbers, *edge)
        if lower is None:
            return given
        low = (on_meta(images, 1, lower.side, lower.side), on_meta(images))
        return (*given, *low) if edge else (*given, None, *low)

    return Network(make, inputs, passes)
