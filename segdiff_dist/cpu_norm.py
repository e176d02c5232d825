"""GroupNorm of the networks where a CPU trains them channels-last.

torch's own backward pass over that layout goes from pixel to pixel in steps of a group's few channels, and in bf16 it
is five times as slow as in fp32. Ours goes through whole rows of channels, some hundred thousand values at a time, in
fp32. It is used where it is faster; elsewhere torch's runs in fp32: docs/kernels.md, section 7.
N batch, B samples of a block, C channels, H rows, W columns, P pixels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Two blocks of this many fp32 values fit into a core's second-level cache (2 MiB on the measured machine).
BLOCK = 1 << 17
# From this number of values on, casting all of them to fp32 first takes longer than casting a block at a time.
_MANY = 1 << 20


def use_cpu_norms(net: nn.Module) -> None:
    """Give a network's norms the forward function below; parameters, state dict and hooks stay as they are."""
    for module in net.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = _GroupNorm


class _GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(x_NCHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """torch's group_norm, with the gradients of a channels-last x on a CPU as described above. Wu and He 2018, eq. 1.

    bf16 or fp32; sums and statistics are fp32 in either. The result and x's gradient have x's layout and dtype.
    """
    is_last = x_NCHW.dim() == 4 and x_NCHW.is_contiguous(memory_format=torch.channels_last)
    is_ours = is_last and x_NCHW.device.type == "cpu" and torch.is_grad_enabled()
    if not is_ours or torch.compiler.is_compiling():  # which would write out every block
        return F.group_norm(x_NCHW, groups, weight_C, bias_C, eps)
    normed: Tensor = _ChannelsLastNorm.apply(x_NCHW, groups, weight_C, bias_C, eps)
    return normed


class _ChannelsLastNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        n, c, h, w = x_NCHW.shape
        # With weights in fp32 torch computes, and returns, the statistics in fp32 too.
        y_NCHW, mean_NG, rstd_NG = torch.native_group_norm(
            x_NCHW, weight_C.float(), bias_C.float(), n, c, h * w, groups, eps
        )
        ctx.save_for_backward(x_NCHW, weight_C, mean_NG, rstd_NG)
        return y_NCHW

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, weight_C, mean_NG, rstd_NG = ctx.saved_tensors
        backward = group_norm_backward if is_slow(x_NCHW, mean_NG.shape[1]) else _torchs_backward
        dx_NCHW, dweight_C, dbias_C = backward(gradients[0], x_NCHW, weight_C.float(), mean_NG, rstd_NG)
        return dx_NCHW, None, dweight_C.to(weight_C.dtype), dbias_C.to(weight_C.dtype), None


def is_slow(x_NCHW: Tensor, groups: int) -> bool:
    """Whether torch's own code takes longer, with one thread and with two: docs/kernels.md, section 7."""
    channels_a_group = x_NCHW.shape[1] // groups
    if x_NCHW.dtype == torch.float32:
        return channels_a_group == 1
    return channels_a_group <= 2 or x_NCHW.numel() >= _MANY


def _torchs_backward(
    dy_NCHW: Tensor, x_NCHW: Tensor, weight_C: Tensor, mean_NG: Tensor, rstd_NG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As group_norm_backward, by torch in fp32, which is far faster than torch in bf16."""
    n, c, h, w = x_NCHW.shape
    dx_NCHW, dweight_C, dbias_C = torch.ops.aten.native_group_norm_backward(
        dy_NCHW.to(torch.float32, memory_format=torch.channels_last), x_NCHW.float(), mean_NG, rstd_NG, weight_C,
        n, c, h * w, mean_NG.shape[1], [True, True, True],
    )  # fmt: skip
    return dx_NCHW.to(x_NCHW.dtype), dweight_C, dbias_C


def group_norm_backward(
    dy_NCHW: Tensor, x_NCHW: Tensor, weight_C: Tensor, mean_NG: Tensor, rstd_NG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (its layout, channels-last, and dtype), weight and bias (fp32).

    With x^ = (x - mean) rstd and means over a group's channels and pixels,
    dx = rstd (w dy - mean(w dy) - x^ mean(w dy x^)): Ioffe and Szegedy 2015, section 3, over groups. As a function of x
    and dy that is dx = a dy + b x + c with a, b, c constant over the pixels of a channel.
    """
    n, c, h, w = x_NCHW.shape
    groups, pixels = mean_NG.shape[1], h * w
    x_NPC = x_NCHW.permute(0, 2, 3, 1).view(n, pixels, c)
    dy_NPC = dy_NCHW.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(n, pixels, c)
    dx_NPC = torch.empty_like(x_NPC)
    blocks = list(_blocks(n, pixels, c))
    x_of, dy_of = (torch.empty(max(x_NPC[block].numel() for block in blocks)) for _ in range(2))

    def read(block: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
        x_BPC, dy_BPC = x_NPC[block], dy_NPC[block]
        num, shape = x_BPC.numel(), x_BPC.shape
        return x_of[:num].view(shape).copy_(x_BPC), dy_of[:num].view(shape).copy_(dy_BPC)

    def per_channel(of_NG: Tensor) -> Tensor:
        return of_NG.repeat_interleave(c // groups, dim=1)[:, None]

    # x minus its mean: if the mean is large, the sum of dy x is far larger than the result and loses digits.
    sum_dy_NC, sum_dy_x_NC, mean_N1C = torch.zeros(n, c), torch.zeros(n, c), per_channel(mean_NG)
    for block in blocks:
        x_BPC, dy_BPC = read(block)
        some = block[0]
        sum_dy_NC[some] += dy_BPC.sum(1)
        sum_dy_x_NC[some] += dy_BPC.mul_(x_BPC.sub_(mean_N1C[some])).sum(1)

    def over_group(of_NC: Tensor) -> Tensor:
        return (of_NC * weight_C).view(n, groups, -1).sum(2) / (c // groups * pixels)

    mean_w_dy_NG, mean_w_dy_x_NG = over_group(sum_dy_NC), over_group(sum_dy_x_NC)
    rstd_N1C, b_N1C = per_channel(rstd_NG), per_channel(-mean_w_dy_x_NG * rstd_NG**3)
    a_N1C, c_N1C = rstd_N1C * weight_C, -b_N1C * mean_N1C - per_channel(mean_w_dy_NG * rstd_NG)
    for block in blocks:
        x_BPC, dy_BPC = read(block)
        some = block[0]
        dx_NPC[block] = x_BPC.mul_(b_N1C[some]).addcmul_(dy_BPC, a_N1C[some]).add_(c_N1C[some])
    dx_NCHW = dx_NPC.view(n, h, w, c).permute(0, 3, 1, 2)
    return dx_NCHW, (sum_dy_x_NC * rstd_N1C[:, 0]).sum(0), sum_dy_NC.sum(0)


def _blocks(n: int, pixels: int, c: int) -> Iterator[tuple[slice, slice]]:
    """Samples and pixels of each block: several samples, or a part of one. Each thread's share of a block fits into its
    cache.

    Blocks are few and large, since all threads synchronise after every operation on a block.
    """
    most = BLOCK * torch.get_num_threads()
    samples, step = max(1, most // (pixels * c)), max(1, most // c)
    for i in range(0, n, samples):
        for p in range(0, pixels, step):
            yield slice(i, min(i + samples, n)), slice(p, min(p + step, pixels))
