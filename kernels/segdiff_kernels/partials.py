"""Partial statistics: mean and M2 (sum of squared differences from that mean) of slices of an activation's pixels.

One float32 tensor [N, S, 2, C], mean first: slice s holds pixels s * P to (s + 1) * P of its sample, P being
`slice_pixels(H * W)` and the last slice shorter where P does not divide H * W. A kernel that writes an activation can
return them too; the norm that reads it then need not read it twice. They are kept by channel, so a shift of a channel
can still be added, and groups may be formed across two tensors. Merging follows Chan et al. 1983, "Algorithms for
computing the sample variance", eq. 2.1; never E[x^2] - E[x]^2, which loses all digits where the mean is large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segdiff_kernels.checks import check_dtype, check_shape, refuse


def slice_pixels(num_pixels: int) -> int:
    """Pixels of a slice: a power of two near the root of H * W, from 64 to 256.

    A function of the image alone, so that a sample's statistics do not depend on its batch; 256 slices at 256x256, so
    that a batch of one fills a GPU of 132 multiprocessors.
    """
    pixels = 64
    while pixels * pixels < num_pixels and pixels < 256:
        pixels *= 2
    return pixels


def num_slices(num_pixels: int) -> int:
    """S: the number of slices of a sample of H * W pixels."""
    return -(-num_pixels // slice_pixels(num_pixels))


def new_partials(x_NCHW: Tensor) -> Tensor:
    """An empty tensor for the partials of `x_NCHW`, on its device."""
    n, c, h, w = x_NCHW.shape
    return torch.empty((n, num_slices(h * w), 2, c), dtype=torch.float32, device=x_NCHW.device)


def check_partials(kernel: str, argument: str, partials_NS2C: Tensor, x_NCHW: Tensor) -> None:
    """Raises ValueError unless these can be the partials of `x_NCHW`."""
    n, c, h, w = x_NCHW.shape
    check_dtype(kernel, argument, partials_NS2C, (torch.float32,))
    check_shape(kernel, argument, partials_NS2C, (n, num_slices(h * w), 2, c))
    if not partials_NS2C.is_contiguous():
        raise refuse(kernel, argument, f"strides {partials_NS2C.stride()}", "what residual_add gave, as it is")
    if partials_NS2C.requires_grad:
        raise refuse(kernel, argument, "a tensor that requires a gradient", "what residual_add gave, as it is")
