"""diffusers' UNet2DModel as a CPU trains it fastest: channels-last from end to end.

A CPU's convolutions in bf16 need that layout (NHWC): on a CPU with matrix tiles (AMX), NCHW takes six times as long. In
training diffusers' resnet turns the input of its shortcut, and so all later tensors, into NCHW; ours does not.
N batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from segdiff_dist.cpu_norm import use_cpu_norms
from segdiff_dist.diffusers_parts import ResnetBlock2D


def adapt_to_cpu(unet: nn.Module) -> None:
    """Give a UNet2DModel's norms and resnets other forward functions; parameters, state dict and hooks stay."""
    use_cpu_norms(unet)
    for module in unet.modules():
        if type(module) is ResnetBlock2D and _is_plain(module):
            module.__class__ = _Resnet


class _Resnet(ResnetBlock2D):
    """diffusers' forward of a block without resampling, without the layout copy."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        hidden_NCHW = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if temb is None:
            hidden_NCHW = self.norm2(hidden_NCHW)
        else:
            time_NC11 = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
            if self.time_embedding_norm == "default":
                hidden_NCHW = self.norm2(hidden_NCHW + time_NC11)
            else:  # Dhariwal and Nichol 2021, section 3.1: adaptive group norm
                scale_NC11, shift_NC11 = time_NC11.chunk(2, dim=1)
                hidden_NCHW = self.norm2(hidden_NCHW) * (1 + scale_NC11) + shift_NC11
        hidden_NCHW = self.nonlinearity(hidden_NCHW)
        if self.dropout.p > 0:
            hidden_NCHW = self.dropout(hidden_NCHW)
        hidden_NCHW = self.conv2(hidden_NCHW)
        shortcut_NCHW = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return shortcut_NCHW + hidden_NCHW


def _is_plain(resnet: ResnetBlock2D) -> bool:
    takes_time = resnet.time_embedding_norm in ("default", "scale_shift") and not resnet.skip_time_act
    is_plain = resnet.upsample is resnet.downsample is None and resnet.output_scale_factor == 1.0
    return takes_time and is_plain
