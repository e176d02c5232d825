"""SiLU(GroupNorm(cat(x, skip))), channels-last, forward and backward, without the concatenation.

The first norm of a UNet's up blocks: it reads both tensors in place. The kernels are those of group_norm_silu.
Dimensions: N batch, C1 channels of x, C2 of skip, C = C1 + C2, H, W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segdiff_kernels.checks import FLOATS, check_channels_last, check_dtype, check_same_device, check_shape
from segdiff_kernels.group_norm_silu import (
    check_affine,
    checked_shift,
    group_norm_silu_reference,
    refuse_without_triton,
)
from segdiff_kernels.partials import check_partials

_NAME = "skip_group_norm_silu"


def skip_group_norm_silu(
    x_NCHW: Tensor,
    skip_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    shift_NC: Tensor | None = None,
    skip_shift_NC: Tensor | None = None,
    partials: Tensor | None = None,
    skip_partials: Tensor | None = None,
    fork: bool = False,
    counters: Tensor | None = None,
) -> Any:
    """SiLU(GroupNorm(cat(x, skip))) as y [N, C, H, W] of x's dtype, channels-last; groups may straddle the border.

    x and skip of one dtype, float32, bfloat16 or float16; weight and bias any of these. silu, shift and partials
    (of x and of skip), counters and fork as in group_norm_silu; fork=True: (y, x, skip); the gradients of both are
    added to dx and dskip in the same pass. Raises a ValueError that names the argument for any other input.
    """
    for argument, tensor in (("x_NCHW", x_NCHW), ("skip_NCHW", skip_NCHW)):
        check_channels_last(_NAME, argument, tensor)
        check_dtype(_NAME, argument, tensor, FLOATS)
    n, c1, h, w = x_NCHW.shape
    c2 = skip_NCHW.shape[1]
    check_shape(_NAME, "skip_NCHW", skip_NCHW, (n, c2, h, w))
    check_dtype(_NAME, "skip_NCHW", skip_NCHW, (x_NCHW.dtype,))
    check_affine(_NAME, c1 + c2, weight_C, bias_C, num_groups, eps)
    shift_NC = checked_shift(_NAME, "shift_NC", shift_NC, x_NCHW)
    skip_shift_NC = checked_shift(_NAME, "skip_shift_NC", skip_shift_NC, skip_NCHW)
    if partials is not None:
        check_partials(_NAME, "partials", partials, x_NCHW)
    if skip_partials is not None:
        check_partials(_NAME, "skip_partials", skip_partials, skip_NCHW)
    check_same_device(
        _NAME,
        x_NCHW=x_NCHW,
        skip_NCHW=skip_NCHW,
        weight_C=weight_C,
        bias_C=bias_C,
        shift_NC=shift_NC,
        skip_shift_NC=skip_shift_NC,
        partials=partials,
        skip_partials=skip_partials,
    )
    given = (x_NCHW, skip_NCHW, weight_C, bias_C, shift_NC, skip_shift_NC, partials, skip_partials, counters)
    arguments = (*given, num_groups, eps, silu)
    return _Fork.apply(*arguments) if fork else forward_op(*arguments)[0]


def skip_group_norm_silu_reference(
    x_NCHW: Tensor,
    skip_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    shift_NC: Tensor | None = None,
    skip_shift_NC: Tensor | None = None,
) -> Tensor:
    """The same by torch, with the concatenation, in x's dtype, on any device and in any layout."""
    if shift_NC is not None:
        x_NCHW = x_NCHW + shift_NC.to(x_NCHW.dtype)[:, :, None, None]
    if skip_shift_NC is not None:
        skip_NCHW = skip_NCHW + skip_shift_NC.to(x_NCHW.dtype)[:, :, None, None]
    both_NCHW = torch.cat((x_NCHW, skip_NCHW), dim=1)
    return group_norm_silu_reference(both_NCHW, weight_C, bias_C, num_groups, eps, silu=silu)


@torch.library.custom_op("segdiff::skip_group_norm_silu", mutates_args=())
def forward_op(
    x_NCHW: Tensor,
    skip_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    shift_NC: Tensor | None,
    skip_shift_NC: Tensor | None,
    partials_NS2C: Tensor | None,
    skip_partials_NS2C: Tensor | None,
    counters: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """(y, statistics float32 [N, 4, C]); launches as in _norm_triton.launch_forward."""
    refuse_without_triton(_NAME, x_NCHW.device)
    from segdiff_kernels._norm_triton import launch_forward

    with torch.cuda.device_of(x_NCHW):
        y_NCHW, statistics_N4C, _ = launch_forward(
            *(x_NCHW, skip_NCHW, weight_C, bias_C, num_groups, eps, shift_NC, skip_shift_NC),
            *(silu, partials_NS2C, skip_partials_NS2C, counters),
        )
    return y_NCHW, statistics_N4C


@forward_op.register_fake
def _(
    x_NCHW: Tensor,
    skip_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    shift_NC: Tensor | None,
    skip_shift_NC: Tensor | None,
    partials_NS2C: Tensor | None,
    skip_partials_NS2C: Tensor | None,
    counters: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    n, c1, h, w = x_NCHW.shape
    c = c1 + skip_NCHW.shape[1]
    y_NCHW = torch.empty((n, c, h, w), dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=torch.channels_last)
    return y_NCHW, x_NCHW.new_empty((n, 4, c), dtype=torch.float32)


@torch.library.custom_op("segdiff::skip_group_norm_silu_backward", mutates_args=())
def backward_op(
    dy_NCHW: Tensor,
    residual_NCHW: Tensor | None,
    skip_residual_NCHW: Tensor | None,
    x_NCHW: Tensor,
    skip_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_N4C: Tensor,
    counters: Tensor | None,
    shift_dtype: torch.dtype | None,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx + residual, dskip + skip_residual, dweight, dbias, dshift of both [N, C1 + C2], empty without a shift):
    one launch where x and dy of a part fit in the L2 cache (tiles.one_pass_channels), else three."""
    refuse_without_triton(_NAME, x_NCHW.device)
    from segdiff_kernels._norm_backward_triton import launch_backward

    residuals = (residual_NCHW, None, skip_residual_NCHW, counters)
    with torch.cuda.device_of(x_NCHW):
        dx_NCHW, dskip_NCHW, dweight_C, dbias_C, dshift_NC = launch_backward(
            dy_NCHW, x_NCHW, skip_NCHW, weight_C, bias_C, statistics_N4C, num_groups, shift_dtype, silu, *residuals
        )
    assert dskip_NCHW is not None
    empty = statistics_N4C.new_empty(0)
    return dx_NCHW, dskip_NCHW, dweight_C, dbias_C, empty if dshift_NC is None else dshift_NC


@backward_op.register_fake
def _(
    dy_NCHW: Tensor,
    residual_NCHW: Tensor | None,
    skip_residual_NCHW: Tensor | None,
    x_NCHW: Tensor,
    skip_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_N4C: Tensor,
    counters: Tensor | None,
    shift_dtype: torch.dtype | None,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx_NCHW = torch.empty_like(x_NCHW, memory_format=torch.channels_last)
    dskip_NCHW = torch.empty_like(skip_NCHW, memory_format=torch.channels_last)
    dshift_NC = statistics_N4C.new_empty(0)
    if shift_dtype is not None:
        dshift_NC = statistics_N4C.new_empty((len(x_NCHW), len(weight_C)), dtype=shift_dtype)
    return dx_NCHW, dskip_NCHW, torch.empty_like(weight_C), torch.empty_like(bias_C), dshift_NC


def _save(ctx: Any, inputs: tuple[Any, ...], statistics_N4C: Tensor) -> None:
    *tensors, shift_NC, skip_shift_NC, _, _, ctx.counters, ctx.num_groups, _, ctx.silu = inputs
    ctx.shift_dtypes = [None if shift is None else shift.dtype for shift in (shift_NC, skip_shift_NC)]
    ctx.save_for_backward(*tensors, statistics_N4C)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_NCHW: Tensor | None, *residuals: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the twelve inputs; the residuals are the gradients that go round the norm, to x and to skip."""
    if dy_NCHW is None:
        return (*residuals, *[None] * 10)
    dy_NCHW = dy_NCHW.contiguous(memory_format=torch.channels_last)
    whole = [r if r is None else r.contiguous(memory_format=torch.channels_last) for r in residuals]
    saved, dtypes = ctx.saved_tensors, ctx.shift_dtypes
    shift_dtype = next((dtype for dtype in dtypes if dtype is not None), None)
    *found, dshift_NC = backward_op(dy_NCHW, *whole, *saved, ctx.counters, shift_dtype, ctx.num_groups, ctx.silu)
    dshifts: list[Tensor | None] = [None, None]
    if shift_dtype is not None:
        of_both = dshift_NC.split([saved[0].shape[1], saved[1].shape[1]], dim=1)
        dshifts = [None if dtype is None else part.to(dtype) for part, dtype in zip(of_both, dtypes, strict=True)]
    return (*found, *dshifts, *[None] * 6)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy_NCHW: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy_NCHW, None, None)


forward_op.register_autograd(_backward, setup_context=_setup)


class _Fork(torch.autograd.Function):
    """y, and x and skip again: an operator may not return its inputs, so this function wraps it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        y_NCHW, statistics_N4C = forward_op(*inputs)
        _save(ctx, inputs, statistics_N4C)
        return y_NCHW, inputs[0].view_as(inputs[0]), inputs[1].view_as(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *gradients)
