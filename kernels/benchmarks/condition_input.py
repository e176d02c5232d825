"""A batch's input and target from pixels and labels: ours, torch as training does it without kernels, and compiled.

256x256, 17 classes, bf16: x_t alone, as label_conv_in takes it, and beside the one-hot channels.
"""

from __future__ import annotations

from typing import Any

import _bench
import torch
from _bench import DEVICE, Case

from segdiff_kernels.condition_input import condition_input, condition_input_reference, num_channels

NUM_CLASSES = 17


def cases(batch: int, size: int) -> list[Case]:
    """Each encoding, and x_t from 16 bits."""
    return [
        _case(batch, size, "none", torch.uint8),
        _case(batch, size, "onehot", torch.uint8),
        _case(batch, size, "scalar_255", torch.uint8),
        _case(batch, size, "none", torch.uint16),
    ]


def _case(batch: int, size: int, mask_encoding: Any, grey: torch.dtype) -> Case:
    def inputs() -> tuple[Any, ...]:
        shape = (batch, size, size)
        image_BHW = torch.randint(0, torch.iinfo(grey).max + 1, shape, device=DEVICE).to(grey)
        mask_BHW = torch.randint(0, NUM_CLASSES, shape, device=DEVICE, dtype=torch.uint8)
        position_B = torch.randint(0, 2**40, (batch,), device=DEVICE)
        return image_BHW, mask_BHW, position_B, torch.linspace(0.999, 0.001, 1000, device=DEVICE)

    about: dict[str, Any] = {"seed": 0, "prediction_type": "v", "num_classes": NUM_CLASSES}

    def ours(*tensors: Any) -> Any:
        return condition_input(*tensors, mask_encoding=mask_encoding, **about)[:3]

    def reference(*tensors: Any) -> Any:
        return condition_input_reference(*tensors, mask_encoding=mask_encoding, **about)[:3]

    contenders = {"ours": ours}
    if DEVICE.type == "cuda" and grey == torch.uint8:  # inductor knows little of uint16; a toy is not worth it
        contenders["torch.compile"] = torch.compile(reference)
    contenders["torch"] = reference
    read = grey.itemsize + (mask_encoding != "none")
    written = 2 * num_channels(mask_encoding, NUM_CLASSES) + 4
    name = f"B={batch} {size}x{size} {mask_encoding} from {8 * grey.itemsize} bits"
    return Case(name, batch * size**2 * (read + written), inputs, contenders)


if __name__ == "__main__":
    _bench.main(__doc__, real=lambda: cases(32, 256), toy=lambda: cases(2, 12))
