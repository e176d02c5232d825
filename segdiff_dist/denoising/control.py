"""ControlNet: a trained denoiser is frozen, and a trainable copy of its encoder reads the mask (Zhang et al. 2023).

    c = E(m)                                          the encoded mask m as features; E ends in a zero convolution
    r_i = Z_i(F_i(conv_in(x) + c))                    F: the copy of the encoder, Z: zero convolutions
    y = decoder(mid + r_mid, skip_i + r_i)            mid, skip_i, decoder: those of the frozen base

Section 3 and eq. 2 to 4. Z and E begin as 0, so at step 0 the output is the base's. diffusers' ControlNetModel copies a
UNet with cross-attention, which ours does not have; its embedding of the condition and its zero convolutions are used.
The base reads no mask or, if it was trained with masks, the null mask. So it may have another label table.
B batch, C channels, K mask channels, H rows, W columns.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.labels import LabelTable
from segdiff_dist.denoising.conditioning import MaskEncoder
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.diffusers_parts import ControlNetConditioningEmbedding, ModelMixin, run_down_and_mid, zero_module

_ENCODER = ("conv_in", "time_proj", "time_embedding", "class_embedding", "down_blocks", "mid_block")


class ControlNet(ModelMixin):
    """The copy of a UNet's encoder, the mask's features that it adds, and the zero convolutions behind it."""

    _supports_gradient_checkpointing = True

    def __init__(self, config: DenoiserConfig, unet: Any, label_table: LabelTable) -> None:
        super().__init__()
        self._stem = config.stem
        self.mask_encoder = MaskEncoder(config.mask_encoding, label_table.num_classes, config.mask_embedding_dim)
        channels, of_mask = unet.conv_in.out_channels, self.mask_encoder.num_channels * config.stem**2
        # The mask has the resolution of the first level, so its embedding has no convolution with a stride.
        self.hint = ControlNetConditioningEmbedding(channels, of_mask, (channels,))
        for name in _ENCODER:
            setattr(self, name, copy.deepcopy(getattr(unet, name)))
        of_skips = _skip_channels(unet)
        self.zeros = nn.ModuleList(zero_module(nn.Conv2d(c, c, kernel_size=1)) for c in of_skips)
        self.zero_mid = zero_module(nn.Conv2d(of_skips[-1], of_skips[-1], kernel_size=1))

    def copy_encoder(self, unet: Any) -> None:
        """Take the weights of the base's encoder."""
        for name in _ENCODER:
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(getattr(unet, name).state_dict())

    def forward(
        self, x_BCHW: Tensor, timestep_B: Tensor, labels_B: Tensor | None, mask_BHW: Tensor, edge_B2HW: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """What the base's skips and its middle get added: r_i and r_mid. x_BCHW: the base's input."""
        m_BCHW = self.mask_encoder(mask_BHW, x_BCHW.dtype, edge_B2HW)
        m_BCHW = F.pixel_unshuffle(m_BCHW, self._stem) if self._stem > 1 else m_BCHW
        features_BCHW = self.hint(m_BCHW.contiguous(memory_format=torch.channels_last))
        mid_BCHW, _, skips = run_down_and_mid(self, x_BCHW, timestep_B, labels_B, features_BCHW)
        return [zero(skip) for zero, skip in zip(self.zeros, skips, strict=True)], self.zero_mid(mid_BCHW)


def _skip_channels(unet: Any) -> list[int]:
    """Channels of what the encoder passes to the decoder: of its first convolution, residual blocks, downsampling."""
    channels = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        channels += [downsampler.out_channels for downsampler in block.downsamplers or ()]
    return channels
