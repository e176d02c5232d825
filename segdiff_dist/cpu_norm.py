"""GroupNorm of the networks where a CPU trains them channels-last.

torch's own backward pass over that layout goes from pixel to pixel in steps of a group's few channels, which is two to
ten times as slow as going through whole rows of channels, some hundred thousand values at a time: docs/kernels.md.
N batch, C channels, H rows, W columns, P pixels, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Two blocks of so many fp32 values lie in a core's second cache (2 MiB where this was measured).
_BLOCK = 1 << 17


def suit_norms(net: nn.Module) -> None:
    """Give a network's norms the forward function below; parameters, state dict and hooks stay as they are."""
    for module in net.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = _GroupNorm


class _GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(x_NCHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """torch's group_norm, with the gradients of a channels-last x on a CPU as said above. Wu and He 2018, eq. 1.

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
        dx_NCHW, dweight_C, dbias_C = group_norm_backward(gradients[0], x_NCHW, weight_C.float(), mean_NG, rstd_NG)
        return dx_NCHW, None, dweight_C.to(weight_C.dtype), dbias_C.to(weight_C.dtype), None


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
    step = max(1, _BLOCK // c)
    blocks = [(i, slice(p, min(p + step, pixels))) for i in range(n) for p in range(0, pixels, step)]
    x_of, dy_of = torch.empty(step, c), torch.empty(step, c)

    def read(i: int, where: slice) -> tuple[Tensor, Tensor]:
        num = where.stop - where.start
        return x_of[:num].copy_(x_NPC[i, where]), dy_of[:num].copy_(dy_NPC[i, where])

    def per_channel(of_NG: Tensor) -> Tensor:
        return of_NG.repeat_interleave(c // groups, dim=1)

    # Of x less its mean: the sum of dy x is far larger than what is left of it where the mean is.
    sum_dy_NC, sum_dy_x_NC, mean_NC = torch.zeros(n, c), torch.zeros(n, c), per_channel(mean_NG)
    for i, where in blocks:
        x_PC, dy_PC = read(i, where)
        sum_dy_NC[i] += dy_PC.sum(0)
        sum_dy_x_NC[i] += dy_PC.mul_(x_PC.sub_(mean_NC[i])).sum(0)

    def over_group(of_NC: Tensor) -> Tensor:
        return (of_NC * weight_C).view(n, groups, -1).sum(2) / (c // groups * pixels)

    mean_w_dy_NG, mean_w_dy_x_NG = over_group(sum_dy_NC), over_group(sum_dy_x_NC)
    rstd_NC, b_NC = per_channel(rstd_NG), per_channel(-mean_w_dy_x_NG * rstd_NG**3)
    a_NC, c_NC = rstd_NC * weight_C, -b_NC * mean_NC - per_channel(mean_w_dy_NG * rstd_NG)
    for i, where in blocks:
        x_PC, dy_PC = read(i, where)
        dx_NPC[i, where] = x_PC.mul_(b_NC[i]).addcmul_(dy_PC, a_NC[i]).add_(c_NC[i])
    return dx_NPC.view(n, h, w, c).permute(0, 3, 1, 2), (sum_dy_x_NC * rstd_NC).sum(0), sum_dy_NC.sum(0)
