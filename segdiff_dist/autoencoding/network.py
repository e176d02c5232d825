"""The networks that train together: diffusers' AutoencoderKL, and MONAI's patch discriminator.

Dimensions: B batch, C latent channels, H, W image rows and columns, h, w those of a latent, P patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from segdiff_dist.autoencoding.config import AutoencoderConfig
from segdiff_dist.cpu_norm import use_cpu_norms
from segdiff_dist.pixels import to_model_range
from segdiff_dist.planning.network import Network, on_meta


def make_autoencoder(config: AutoencoderConfig) -> Any:
    """diffusers' AutoencoderKL for slices of one channel."""
    import segdiff_dist.diffusers_parts  # noqa: F401, I001  # checks the version, and imports diffusers leanly
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    autoencoder = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.attention,
        scaling_factor=1.0,
    )
    use_cpu_norms(autoencoder)
    return autoencoder


class AutoencoderNet(nn.Module):
    """The autoencoder and, where the training has one, the discriminator."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.autoencoder = make_autoencoder(config)
        self.discriminator: nn.Module | None = None
        if config.has_discriminator:
            from segdiff_dist.segmentation.monai_parts import PatchDiscriminator

            # Instance norm, not Isola et al.'s batch norm: a loss must not depend on the micro-batch.
            self.discriminator = PatchDiscriminator(
                spatial_dims=2,
                in_channels=1,
                channels=config.discriminator_channels,
                num_layers_d=config.discriminator_layers,
                norm="INSTANCE",
            )

    def forward(self, image_BHW: Tensor, noise_BChw: Tensor | None = None) -> Any:
        """float32 reconstruction [B, 1, H, W] in about [-1, 1], decoded from the mean of the posterior.

        With noise it is decoded from a sample of the posterior, and the result is a tuple: reconstruction; mean and log
        variance of the posterior [B, C, h, w]; and, with a discriminator, its scores [B, P] of the reconstruction for
        the autoencoder to learn from, of the slice, and of the reconstruction for itself to learn from.
        """
        x_B1HW = to_model_range(image_BHW).contiguous(memory_format=torch.channels_last)
        dtype = self.autoencoder.encoder.conv_in.weight.dtype
        posterior = self.autoencoder.encode(x_B1HW.to(dtype)).latent_dist
        if noise_BChw is None:
            return self.autoencoder.decode(posterior.mean).sample.float()
        mean_BChw, log_variance_BChw = posterior.mean.float(), posterior.logvar.float()
        z_BChw = mean_BChw + (0.5 * log_variance_BChw).exp() * noise_BChw
        y_B1HW = self.autoencoder.decode(z_BChw.to(dtype)).sample.float()
        made = (y_B1HW, mean_BChw, log_variance_BChw)
        if self.discriminator is None:
            return made
        with _frozen(self.discriminator):
            judged_BP = self._scores(y_B1HW.to(dtype))
        both = self._scores(torch.cat((x_B1HW, y_B1HW.detach())).to(dtype))
        return (*made, judged_BP, *both.chunk(2))

    def _scores(self, x_B1HW: Tensor) -> Tensor:
        assert self.discriminator is not None
        scores_BP: Tensor = self.discriminator(x_B1HW)[-1].float().flatten(1)
        return scores_BP


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Passes through the net give no gradient to its weights."""
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def autoencoder_network(config: AutoencoderConfig, side: int) -> Network:
    """The networks for slices of `side` pixels, for estimates of memory and time."""

    def inputs(images: int) -> tuple[Tensor, ...]:
        small = side // config.factor
        return (
            on_meta(images, side, side, dtype=torch.uint8),
            on_meta(images, config.latent_channels, small, small),
        )

    return Network(lambda: AutoencoderNet(config), inputs)


def latent_shape(config: AutoencoderConfig, size: int) -> tuple[int, int, int]:
    """[C, h, w] of slices of `size` pixels."""
    return config.latent_channels, size // config.factor, size // config.factor
