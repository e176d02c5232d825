"""The segmenter's network: MONAI's U-Net, and features from its encoder.

Dimensions: B batch, C channels, K classes, M modalities, H rows, W columns, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data_shards.modalities import MODALITIES
from segdiff_dist.cpu_norm import use_cpu_norms
from segdiff_dist.pixels import to_model_range
from segdiff_dist.planning.network import Classes, Network, on_meta
from segdiff_dist.segmentation.config import NORM_GROUPS, SegmenterConfig


class SegmenterNet(nn.Module):
    """Class scores from an image and its modality, which enters as one constant channel for each modality."""

    def __init__(self, config: SegmenterConfig, num_classes: int, num_modalities: int = len(MODALITIES)) -> None:
        super().__init__()
        from segdiff_dist.segmentation.monai_parts import UNet

        self.unet = UNet(
            spatial_dims=2,
            in_channels=1 + num_modalities,
            out_channels=num_classes,
            channels=config.channels,
            strides=(config.first_stride, *(2,) * (len(config.channels) - 2)),
            kernel_size=config.kernel_size,
            up_kernel_size=config.kernel_size,
            num_res_units=config.num_res_units,
            norm=("group", {"num_groups": NORM_GROUPS}),
        )
        use_cpu_norms(self.unet)
        self.num_modalities = num_modalities

    def forward(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """float32 scores [B, K, H, W] from uint8 or uint16 images and int64 modality ids."""
        return self.scores(to_model_range(image_BHW), modality_B)

    def scores(self, x_B1HW: Tensor, modality_B: Tensor) -> Tensor:
        """The same from float images in [-1, 1]; gradients flow back to them."""
        dtype = next(self.parameters()).dtype
        return self.unet(self._inputs(x_B1HW, modality_B).to(dtype)).float()

    def levels(self, x_B1HW: Tensor, modality_B: Tensor) -> list[Tensor]:
        """The output of each encoder level, fine to coarse, from float images in [-1, 1]; gradients flow back to
        them."""
        dtype = next(self.parameters()).dtype
        return self._encoded(self._inputs(x_B1HW, modality_B).to(dtype))[0]

    def features(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """float32 [B, D]: the mean over pixels of each encoder level's output."""
        return _pooled(self._encoded(self._inputs(to_model_range(image_BHW), modality_B))[0])

    def scores_and_features(self, image_BHW: Tensor, modality_B: Tensor) -> tuple[Tensor, Tensor]:
        """The results of a call and of `features`, from one pass through the encoder."""
        levels, decoders = self._encoded(self._inputs(to_model_range(image_BHW), modality_B))
        x = levels[-1]
        for level, decode in zip(levels[-2::-1], decoders[::-1], strict=True):
            x = decode(torch.cat((level, x), dim=1))
        return x.float(), _pooled(levels)

    def _encoded(self, x: Tensor) -> tuple[list[Tensor], list[nn.Module]]:
        """The output of each encoder level, and the decoder of each but the last, both fine to coarse."""
        levels: list[Tensor] = []
        decoders: list[nn.Module] = []
        block: Any = self.unet.model
        while True:  # MONAI nests: [down, skip connection around the next level, up]
            x = block[0](x)
            levels.append(x)
            decoders.append(block[2])
            inner = block[1].submodule
            if not isinstance(inner, nn.Sequential) or len(inner) < 3:
                return [*levels, inner(x)], decoders
            block = inner

    def _inputs(self, x_B1HW: Tensor, modality_B: Tensor) -> Tensor:
        modality_BM = nn.functional.one_hot(modality_B, self.num_modalities).to(x_B1HW.dtype)
        planes_BMHW = modality_BM[:, :, None, None].expand(-1, -1, *x_B1HW.shape[2:])
        return torch.cat((x_B1HW, planes_BMHW), dim=1).contiguous(memory_format=torch.channels_last)


def segmenter_network(config: SegmenterConfig, shards: Classes, side: int) -> Network:
    """The segmenter for slices of `side` pixels, for estimates of memory and time."""

    def inputs(images: int) -> tuple[Tensor, ...]:
        return on_meta(images, side, side, dtype=torch.uint8), on_meta(images, dtype=torch.int64)

    return Network(lambda: SegmenterNet(config, shards.label_table.num_classes, len(shards.modalities)), inputs)


def _pooled(levels: list[Tensor]) -> Tensor:
    return torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1)
