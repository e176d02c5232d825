"""The UNet of a denoiser, at the image's side or behind a stem that makes a square of pixels one position.

Dimensions: B batch, C channels, H, W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdiff_dist.denoising.conditioning import num_classes
from segdiff_dist.denoising.config import DenoiserConfig

if TYPE_CHECKING:
    from segdiff_dist.diffusers_parts import UNet2DModel

# Features of a pixel, between the stem's inverse and the prediction.
_HEAD_CHANNELS = 8
# h = norm(h) (1 + scale) + shift of the time's embedding: Dhariwal and Nichol 2021, section 3.1 (adaptive group norm).
_ADAPTIVE: dict[str, Any] = {"resnet_time_scale_shift": "scale_shift"}


class PixelHead(nn.Module):
    """The last part of the nets with a stem: a correction at the image's own side, which begins as 0.

    The channels that become the pixels of a square do not depend on each other, which shows in flat areas as a
    chequer. Two small convolutions read all of them, and the noised image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(_HEAD_CHANNELS + 1, 2 * _HEAD_CHANNELS, kernel_size=3, padding=1)
        self.conv_out = nn.Conv2d(2 * _HEAD_CHANNELS, 1, kernel_size=3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features_BCHW: Tensor, x_t_B1HW: Tensor) -> Tensor:
        """[B, 1, H, W] from [B, 1 + 8, H, W], the prediction and the features of its correction, and from the noised
        image."""
        joined_BCHW = torch.cat((features_BCHW[:, 1:], x_t_B1HW), dim=1).contiguous(memory_format=torch.channels_last)
        return features_BCHW[:, :1] + self.conv_out(F.silu(self.conv_in(joined_BCHW)))


def make_unet(
    config: DenoiserConfig, side: int, in_channels: int, out_channels: int, num_modalities: int
) -> UNet2DModel:
    """The UNet for inputs of `side` pixels. Behind a stem it has the channels of a square of pixels at each position,
    and gives features to PixelHead in place of `out_channels`."""
    from segdiff_dist.diffusers_parts import UNet2DModel

    attends = [level in config.attention_resolutions for level in config.sides(side)]
    return UNet2DModel(
        sample_size=side // config.stem,
        in_channels=in_channels * config.stem**2,
        out_channels=(1 + _HEAD_CHANNELS) * config.stem**2 if config.stem > 1 else out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        num_class_embeds=num_classes(num_modalities) if config.class_conditioning else None,
        **(_ADAPTIVE | {"attn_norm_num_groups": config.norm_num_groups} if config.stem > 1 else {}),
    )


def zero_init_residuals(unet: nn.Module) -> None:
    """Set the last convolution of every residual block to zero, so that the block begins as its shortcut.

    The net then learns a little faster: Goyal et al. 2017, section 5.1; Dhariwal and Nichol 2021.
    """
    from segdiff_dist.diffusers_parts import ResnetBlock2D

    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            for parameter in module.conv2.parameters():
                nn.init.zeros_(parameter)
