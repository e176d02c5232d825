"""SPADE: the mask scales and shifts what the norms give, at each pixel (Park et al. 2019, section 3.1).

    f = ReLU(conv(m))                              once for each level, of the encoded mask m
    h = norm(x) (1 + gamma(f)) + beta(f)           gamma and beta: a convolution for each norm

The convolutions are 3x3. As in Wang et al. 2022, the mask enters the decoder alone, or all blocks, and not the input.
Where a time embedding scales and shifts too, it does so after the mask. Gamma and beta begin as 0.
B batch, C channels, K mask channels, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdiff_dist.denoising.config import DenoiserConfig


class Spade(nn.Module):
    """The convolutions that give gamma and beta for the norms of a UNet2DModel, and the hooks that apply them."""

    def __init__(self, config: DenoiserConfig, unet: Any, num_mask_channels: int) -> None:
        super().__init__()
        self._stem = config.stem
        norms = [(level, norm) for level, block in _blocks(unet, config.spade_norms) for norm in _norms(block)]
        levels = sorted({level for level, _ in norms})
        hidden = config.spade_channels
        self.embedding = nn.ModuleDict(
            {str(level): _conv3x3(num_mask_channels * config.stem**2, hidden) for level in levels}
        )
        self.scale_shift = nn.ModuleList(_conv3x3(hidden, 2 * norm.num_channels) for _, norm in norms)
        for convolution in self.scale_shift:
            for parameter in convolution.parameters():
                nn.init.zeros_(parameter)
        self._features: dict[int, Tensor] = {}
        for index, (level, norm) in enumerate(norms):
            norm.register_forward_hook(_Modulation(self, level, index))

    def read(self, mask_BKHW: Tensor) -> None:
        """Embed the encoded mask for each level. The next pass through the UNet uses it.

        A position of a coarser level gets the mean of its pixels' channels, so that small organs do not vanish.
        """
        m_BCHW = F.pixel_unshuffle(mask_BKHW, self._stem) if self._stem > 1 else mask_BKHW
        for name, convolution in self.embedding.items():
            level_BCHW = F.avg_pool2d(m_BCHW, 2 ** int(name)) if int(name) else m_BCHW
            channels_last_BCHW = level_BCHW.contiguous(memory_format=torch.channels_last)
            self._features[int(name)] = F.relu(convolution(channels_last_BCHW))

    def forget(self) -> None:
        """Free what `read` computed."""
        self._features.clear()

    def modulated(self, normed_BCHW: Tensor, level: int, index: int) -> Tensor:
        """normed (1 + gamma) + beta of norm `index`."""
        gamma_BCHW, beta_BCHW = self.scale_shift[index](self._features[level]).chunk(2, dim=1)
        return torch.addcmul(normed_BCHW + beta_BCHW, normed_BCHW, gamma_BCHW)


@dataclass(frozen=True)
class _Modulation:
    """A norm's forward hook. An object, not a closure: a copy of the net then uses the copied convolutions."""

    spade: Spade
    level: int
    index: int

    def __call__(self, norm: nn.Module, inputs: tuple[Any, ...], normed_BCHW: Tensor) -> Tensor:
        return self.spade.modulated(normed_BCHW, self.level, self.index)


def _blocks(unet: Any, which: str) -> list[tuple[int, nn.Module]]:
    """The blocks whose norms read the mask, with their level; 0 is the finest."""
    num = len(unet.up_blocks)
    decoder = [(num - 1 - i, block) for i, block in enumerate(unet.up_blocks)]
    if which == "decoder":
        return decoder
    return [*enumerate(unet.down_blocks), (num - 1, unet.mid_block), *decoder]


def _norms(block: Any) -> list[nn.GroupNorm]:
    return [norm for resnet in block.resnets for norm in (resnet.norm1, resnet.norm2)]


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
