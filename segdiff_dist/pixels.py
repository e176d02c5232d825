"""Grey values in and out of a network. Dimensions: B batch, H rows, W columns."""

from __future__ import annotations

import torch
from torch import Tensor


def to_model_range(image_BHW: Tensor) -> Tensor:
    """Grey values [B, H, W], uint8 or uint16, to float32 [B, 1, H, W] in [-1, 1]: the depth's whole range."""
    assert image_BHW.dtype in (torch.uint8, torch.uint16), image_BHW.dtype
    return image_BHW[:, None].to(torch.float32) / (torch.iinfo(image_BHW.dtype).max / 2.0) - 1.0


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """The inverse of to_model_range for uint8, clipped and rounded."""
    return ((x_BCHW[:, 0].clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
