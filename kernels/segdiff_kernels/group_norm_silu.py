"""SiLU(GroupNorm(x + shift)), channels-last, forward and backward; Wu and He 2018, "Group Normalization".

The norms of a diffusion UNet, with the time embedding folded into the statistics and the activation into the write.
Dimensions: N batch, C channels, H, W, S slices of pixels (partials.py).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from segdiff_kernels.backend import why_not_triton
from segdiff_kernels.checks import FLOATS, check_channels_last, check_dtype, check_same_device, check_shape, refuse
from segdiff_kernels.partials import check_partials, new_partials

_NAME = "group_norm_silu"


def group_norm_silu(
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    shift_NC: Tensor | None = None,
    silu: bool = True,
    partials: Tensor | None = None,
    fork: bool | Literal[2] = False,
    with_partials: bool = False,
    counters: Tensor | None = None,
) -> Any:
    """SiLU(GroupNorm(x + shift)) as y [N, C, H, W], of x's dtype and channels-last as x is.

    Activations float32, bfloat16 or float16; weight, bias and shift each any of these; statistics float32. weight and
    bias may be [N, C], for each sample: adaptive group norm (Dhariwal and Nichol 2021, section 3.1). shift is added to
    every pixel of a sample's channel, and never written; its rows may be slices of longer ones. silu=False: only the
    norm. partials: the result of residual_add for x, which saves reading x for its statistics. fork=True: (y, x); the
    gradient of this second x, for a branch that goes round the norm, is added to dx in the same pass. fork=2: (y, x,
    x), for two branches. with_partials, with a fork: also x's partials, given or computed. counters: int32 zeros, at
    least num_counters(N, C), which the kernels leave as zeros; without them, or too few, a pass makes its own.

    Saved for the backward pass: x, weight, bias and 16 bytes a sample and channel. Differentiable once, in x, weight,
    bias and shift. Raises a ValueError that names the argument for any other input.
    """
    check_channels_last(_NAME, "x_NCHW", x_NCHW)
    check_dtype(_NAME, "x_NCHW", x_NCHW, FLOATS)
    check_affine(_NAME, x_NCHW.shape[1], weight_C, bias_C, num_groups, eps, num_samples=x_NCHW.shape[0])
    shift_NC = checked_shift(_NAME, "shift_NC", shift_NC, x_NCHW)
    if partials is not None:
        check_partials(_NAME, "partials", partials, x_NCHW)
    check_same_device(_NAME, x_NCHW=x_NCHW, weight_C=weight_C, bias_C=bias_C, shift_NC=shift_NC, partials=partials)
    given = (x_NCHW, weight_C, bias_C, shift_NC, partials, counters, num_groups, eps, silu)
    if not fork:
        return forward_op(*given)[0]
    y_NCHW, *again, computed = _Fork.apply(*given)
    of_x = (computed if partials is None else partials,) if with_partials else ()
    return (y_NCHW, *again[: int(fork)], *of_x)


def group_norm_silu_reference(
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    shift_NC: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The same by torch, in x's dtype, on any device and in any layout."""
    if shift_NC is not None:
        x_NCHW = x_NCHW + shift_NC.to(x_NCHW.dtype)[:, :, None, None]
    weight_C, bias_C = weight_C.to(x_NCHW.dtype), bias_C.to(x_NCHW.dtype)
    if weight_C.dim() == 2:
        y_NCHW = torch.group_norm(x_NCHW, num_groups, eps=eps)
        y_NCHW = y_NCHW * weight_C[:, :, None, None] + bias_C[:, :, None, None]
    else:
        y_NCHW = torch.group_norm(x_NCHW, num_groups, weight_C, bias_C, eps)
    return functional.silu(y_NCHW) if silu else y_NCHW


def check_affine(
    kernel: str,
    num_channels: int,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    num_samples: int | None = None,
) -> None:
    """Raises ValueError unless these are the parameters of a GroupNorm over `num_channels`, or with `num_samples`
    those of each sample."""
    shape: tuple[int, ...] = (num_channels,)
    if num_samples is not None and weight_C.dim() == 2:
        shape = (num_samples, num_channels)
    for argument, parameter_C in (("weight_C", weight_C), ("bias_C", bias_C)):
        check_dtype(kernel, argument, parameter_C, FLOATS)
        check_shape(kernel, argument, parameter_C, shape)
        if not parameter_C.is_contiguous():
            raise refuse(kernel, argument, f"strides {parameter_C.stride()}", "a contiguous tensor")
    if num_groups < 1 or num_channels % num_groups:
        raise refuse(kernel, "num_groups", num_groups, f"a number that divides {num_channels} channels")
    if not eps > 0:
        raise refuse(kernel, "eps", eps, "a number above 0")


def checked_shift(kernel: str, argument: str, shift_NC: Tensor | None, x_NCHW: Tensor) -> Tensor | None:
    """The shift with rows of adjacent channels. Raises ValueError unless it can be added to `x_NCHW`."""
    if shift_NC is None:
        return None
    check_dtype(kernel, argument, shift_NC, FLOATS)
    check_shape(kernel, argument, shift_NC, x_NCHW.shape[:2])
    return shift_NC if shift_NC.stride(1) == 1 else shift_NC.contiguous()


def refuse_without_triton(kernel: str, device: torch.device) -> None:
    """Raises ValueError if Triton's kernels cannot run; called by the operators, which tracing does not enter."""
    if reason := why_not_triton(device):
        raise ValueError(f"{kernel}: {reason}")


@torch.library.custom_op("segdiff::group_norm_silu", mutates_args=())
def forward_op(
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    shift_NC: Tensor | None,
    partials_NS2C: Tensor | None,
    counters: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, statistics float32 [N, 4, C], partials, empty if they were given): one launch where that is possible
    (_norm_triton.launch_forward), else two, three without partials."""
    refuse_without_triton(_NAME, x_NCHW.device)
    from segdiff_kernels._norm_triton import launch_forward

    with torch.cuda.device_of(x_NCHW):
        y_NCHW, statistics_N4C, computed = launch_forward(
            x_NCHW, None, weight_C, bias_C, num_groups, eps, shift_NC, None, silu, partials_NS2C, None, counters
        )
    return y_NCHW, statistics_N4C, computed if partials_NS2C is None else statistics_N4C.new_empty(0)


@forward_op.register_fake
def _(
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    shift_NC: Tensor | None,
    partials_NS2C: Tensor | None,
    counters: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, _, _ = x_NCHW.shape
    y_NCHW = torch.empty_like(x_NCHW, memory_format=torch.channels_last)
    statistics_N4C = x_NCHW.new_empty((n, 4, c), dtype=torch.float32)
    computed = new_partials(x_NCHW) if partials_NS2C is None else statistics_N4C.new_empty(0)
    return y_NCHW, statistics_N4C, computed


@torch.library.custom_op("segdiff::group_norm_silu_backward", mutates_args=())
def backward_op(
    dy_NCHW: Tensor,
    residual_NCHW: Tensor | None,
    more_NCHW: Tensor | None,
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_N4C: Tensor,
    counters: Tensor | None,
    shift_dtype: torch.dtype | None,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx + residual + more, dweight, dbias, dshift [N, C], empty without a shift): one launch where x and dy of a
    part fit in the L2 cache (tiles.one_pass_channels), else three."""
    refuse_without_triton(_NAME, x_NCHW.device)
    from segdiff_kernels._norm_backward_triton import launch_backward

    with torch.cuda.device_of(x_NCHW):
        dx_NCHW, _, dweight_C, dbias_C, dshift_NC = launch_backward(
            *(dy_NCHW, x_NCHW, None, weight_C, bias_C, statistics_N4C, num_groups, shift_dtype, silu),
            *(residual_NCHW, more_NCHW, None, counters),
        )
    return dx_NCHW, dweight_C, dbias_C, statistics_N4C.new_empty(0) if dshift_NC is None else dshift_NC


@backward_op.register_fake
def _(
    dy_NCHW: Tensor,
    residual_NCHW: Tensor | None,
    more_NCHW: Tensor | None,
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_N4C: Tensor,
    counters: Tensor | None,
    shift_dtype: torch.dtype | None,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx_NCHW = torch.empty_like(x_NCHW, memory_format=torch.channels_last)
    dshift = statistics_N4C.new_empty(0)
    if shift_dtype is not None:
        dshift = statistics_N4C.new_empty(x_NCHW.shape[:2], dtype=shift_dtype)
    return dx_NCHW, torch.empty_like(weight_C), torch.empty_like(bias_C), dshift


def _save(ctx: Any, inputs: tuple[Any, ...], statistics_N4C: Tensor) -> None:
    # Not saved for the backward pass: where activations are recomputed, a pass makes its own counters.
    x_NCHW, weight_C, bias_C, shift_NC, _, ctx.counters, ctx.num_groups, _, ctx.silu = inputs
    ctx.shift_dtype = None if shift_NC is None else shift_NC.dtype
    ctx.save_for_backward(x_NCHW, weight_C, bias_C, statistics_N4C)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_NCHW: Tensor | None, *residuals: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the nine inputs; the residuals are the gradients of two branches that go round the norm."""
    given = [r.contiguous(memory_format=torch.channels_last) for r in residuals if r is not None]
    if dy_NCHW is None:
        return (sum(given[1:], given[0]) if given else None, *[None] * 8)
    dy_NCHW = dy_NCHW.contiguous(memory_format=torch.channels_last)
    residual_NCHW, more_NCHW, *_ = *given, None, None
    dx_NCHW, dweight_C, dbias_C, dshift_NC = backward_op(
        *(dy_NCHW, residual_NCHW, more_NCHW, *ctx.saved_tensors),
        *(ctx.counters, ctx.shift_dtype, ctx.num_groups, ctx.silu),
    )
    dshift = None if ctx.shift_dtype is None else dshift_NC
    return dx_NCHW, dweight_C, dbias_C, dshift, *[None] * 5


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dy_NCHW: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy_NCHW)


forward_op.register_autograd(_backward, setup_context=_setup)


class _Fork(torch.autograd.Function):
    """y, x twice again, and computed partials: an operator may not return its input, so this function wraps it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y_NCHW, statistics_N4C, partials_NS2C = forward_op(*inputs)
        _save(ctx, inputs, statistics_N4C)
        ctx.mark_non_differentiable(partials_NS2C)
        return y_NCHW, inputs[0].view_as(inputs[0]), inputs[0].view_as(inputs[0]), partials_NS2C

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *gradients[:3])
