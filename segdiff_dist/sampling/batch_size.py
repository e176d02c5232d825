"""How many images a model generates at once: as many as their activations fit into the memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from segdiff_dist.sampling.config import LEAST_BATCH

if TYPE_CHECKING:
    from segdiff_dist.denoising.config import DenoiserConfig
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.denoising.latent_space import LatentSpace

# The share of a worker's memory that activations may take. The rest is for weights, workspaces and other programs.
_SHARE_FOR_ACTIVATIONS = 0.5


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
