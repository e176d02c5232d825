"""The inputs that the kernels accept. Everything else is refused by name, since a kernel that guesses gives wrong
numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Dtypes of activations; statistics and sums are always float32.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def refuse(kernel: str, argument: str, found: object, supported: str) -> ValueError:
    """The error to raise: kernel, argument, value, remedy."""
    return ValueError(f"{kernel}: {argument}: {found}; give {supported}")


def check_dtype(kernel: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raises ValueError if `tensor` has none of these dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise refuse(kernel, argument, str(tensor.dtype).removeprefix("torch."), names)


def check_shape(kernel: str, argument: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError if `tensor` has another shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise refuse(kernel, argument, tuple(tensor.shape), f"shape {tuple(shape)}")


def check_same_device(kernel: str, **tensors: Tensor | None) -> None:
    """Raises ValueError if a tensor is not on the device of the first."""
    first = next(tensor for tensor in tensors.values() if tensor is not None)
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise refuse(kernel, argument, tensor.device, f"a tensor on {first.device}")


def check_channels_last(kernel: str, argument: str, tensor_NCHW: Tensor) -> None:
    """Raises ValueError unless `tensor_NCHW` has four dimensions, elements, and the memory order N, H, W, C."""
    if tensor_NCHW.dim() != 4 or tensor_NCHW.numel() == 0:
        raise refuse(kernel, argument, f"shape {tuple(tensor_NCHW.shape)}", "a non-empty tensor [N, C, H, W]")
    # On the meta device the result of a convolution is NCHW, whatever its input is.
    is_last = tensor_NCHW.device.type == "meta" or tensor_NCHW.is_contiguous(memory_format=torch.channels_last)
    if not is_last:
        found = f"strides {tensor_NCHW.stride()}"
        raise refuse(kernel, argument, found, "it channels-last: .contiguous(memory_format=torch.channels_last)")
