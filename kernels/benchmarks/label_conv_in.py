"""The first convolution from a label map: ours, and torch's over the one-hot channels made for it.

17 classes to 128 channels at 256x256, bf16. The backward is that of training: for weight and bias, not for x_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _bench
import torch
from _bench import DEVICE, Case
from torch import Tensor

from segdiff_kernels.label_conv_in import label_conv_in, label_conv_in_reference

NUM_CLASSES, OUT_CHANNELS = 17, 128


def cases(batch: int, size: int, out_channels: int) -> list[Case]:
    """Forward alone and with backward; masks of 32-pixel squares, masks without two equal neighbours, soft masks."""
    sides = {"squares": max(size // 8, 1), "noise": 1, "soft": max(size // 8, 1)}
    return [
        _case(batch, size, out_channels, masks, side, backward)
        for masks, side in sides.items()
        for backward in (False, True)
    ]


def _case(batch: int, size: int, out_channels: int, masks: str, side: int, backward: bool) -> Case:
    def inputs() -> tuple[Any, ...]:
        coarse_BHW = torch.randint(0, NUM_CLASSES, (batch, size // side, size // side), device=DEVICE)
        mask_BHW = coarse_BHW.repeat_interleave(side, 1).repeat_interleave(side, 2).to(torch.uint8)
        edge_B2HW = None
        if masks == "soft":  # one pixel in sixteen is of two classes
            second_BHW = torch.randint(0, NUM_CLASSES, mask_BHW.shape, device=DEVICE)
            share_BHW = torch.where(torch.rand(mask_BHW.shape, device=DEVICE) < 1 / 16, 128, 255)
            edge_B2HW = torch.stack((second_BHW, share_BHW), dim=1).to(torch.uint8)
        x_B1HW = torch.randn(batch, 1, size, size, device=DEVICE, dtype=torch.bfloat16)
        weight_OC33 = 0.1 * torch.randn(out_channels, 1 + NUM_CLASSES, 3, 3, device=DEVICE)
        dout_BOHW = torch.randn(batch, out_channels, size, size, device=DEVICE, dtype=torch.bfloat16)
        dout_BOHW = dout_BOHW.contiguous(memory_format=torch.channels_last)
        parameters = [t.to(torch.bfloat16).requires_grad_() for t in (weight_OC33, weight_OC33[:, 0, 0, 0])]
        return x_B1HW, mask_BHW, *parameters, edge_B2HW, dout_BOHW

    def contender(convolution: Callable[..., Tensor]) -> Callable[..., Any]:
        def run(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, edge: Tensor | None, dout: Tensor) -> Any:
            out_BOHW = convolution(x, mask, weight, bias, edge_B2HW=edge)
            return torch.autograd.grad(out_BOHW, (weight, bias), dout) if backward else out_BOHW

        return run

    name = f"B={batch} {size}x{size} O={out_channels} {masks} {'forward + backward' if backward else 'forward'}"
    pixels = batch * size**2
    num_bytes = pixels * (3 + 2 * (masks == "soft") + 2 * out_channels) * (1 + backward)
    contenders = {"ours": contender(label_conv_in), "torch": contender(label_conv_in_reference)}
    return Case(name, num_bytes, inputs, contenders)


BENCHMARK = _bench.Benchmark(__doc__, real=lambda: cases(32, 256, OUT_CHANNELS), toy=lambda: cases(1, 8, 16))

if __name__ == "__main__":
    BENCHMARK.main()
