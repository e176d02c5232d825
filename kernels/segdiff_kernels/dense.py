"""Checks for kernels that go through memory element by element: the tensors must be dense and have one memory order."""

from __future__ import annotations

import torch
from torch import Tensor

from segdiff_kernels.backend import why_not_triton
from segdiff_kernels.checks import check_same_device, check_shape, refuse

_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def check_same_dense(kernel: str, **tensors_BCHW: Tensor | None) -> None:
    """Raises ValueError unless all are non-empty [B, C, H, W], of one shape, device and memory order.

    That is contiguous or channels-last; with one channel the two are the same.
    """
    given = {argument: tensor for argument, tensor in tensors_BCHW.items() if tensor is not None}
    argument, first = next(iter(given.items()))
    if first.dim() != 4 or first.numel() == 0:
        raise refuse(kernel, argument, f"shape {tuple(first.shape)}", "a non-empty tensor [B, C, H, W]")
    check_same_device(kernel, **given)
    formats = {name: layout for name, layout in _FORMATS.items() if first.is_contiguous(memory_format=layout)}
    if not formats:
        raise refuse(kernel, argument, f"strides {first.stride()}", "a contiguous or a channels-last tensor")
    for argument, tensor in given.items():
        check_shape(kernel, argument, tensor, first.shape)
        if not any(tensor.is_contiguous(memory_format=layout) for layout in formats.values()):
            raise refuse(
                kernel, argument, f"strides {tensor.stride()}", f"a {' or '.join(formats)} tensor, as the first"
            )


def check_can_run(kernel: str, device: torch.device) -> None:
    """Raises ValueError if Triton's kernels cannot run; meta tensors pass, since nothing runs for them."""
    if device.type != "meta" and (reason := why_not_triton(device)):
        raise refuse(kernel, "device", reason, f"tensors on a GPU, or call {kernel}_reference")
