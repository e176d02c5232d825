"""branch + bias + shortcut in one pass, with the partial statistics for the next norm.

The end of a residual block (He et al. 2016). The bias is that of the convolution; adding it there would be a separate
pass. There is no division by an output_scale_factor of 1. Dimensions: N batch, C channels, H, W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segdiff_kernels.checks import FLOATS, check_channels_last, check_dtype, check_same_device, check_shape, refuse
from segdiff_kernels.group_norm_silu import refuse_without_triton
from segdiff_kernels.partials import new_partials

_NAME = "residual_add"


def residual_add(
    branch_NCHW: Tensor, shortcut_NCHW: Tensor, bias_C: Tensor | None = None, *, with_partials: bool = False
) -> Any:
    """branch + bias + shortcut, added in float32 and rounded once, channels-last; with_partials: (sum, partials).

    branch and shortcut of one dtype, float32, bfloat16 or float16; bias any of these. The partials (partials.py) are
    those of the rounded sum, without gradient. Nothing is saved for the backward pass: both inputs get the gradient
    itself, not a copy, and the bias gets its sum. Raises a ValueError that names the argument for any other input.
    """
    for argument, tensor in (("branch_NCHW", branch_NCHW), ("shortcut_NCHW", shortcut_NCHW)):
        check_channels_last(_NAME, argument, tensor)
        check_dtype(_NAME, argument, tensor, FLOATS)
    check_shape(_NAME, "shortcut_NCHW", shortcut_NCHW, branch_NCHW.shape)
    check_dtype(_NAME, "shortcut_NCHW", shortcut_NCHW, (branch_NCHW.dtype,))
    if bias_C is not None:
        check_dtype(_NAME, "bias_C", bias_C, FLOATS)
        check_shape(_NAME, "bias_C", bias_C, branch_NCHW.shape[1:2])
        if not bias_C.is_contiguous():
            raise refuse(_NAME, "bias_C", f"strides {bias_C.stride()}", "a contiguous tensor")
    check_same_device(_NAME, branch_NCHW=branch_NCHW, shortcut_NCHW=shortcut_NCHW, bias_C=bias_C)
    sum_NCHW, partials_NS2C = forward_op(branch_NCHW, shortcut_NCHW, bias_C, with_partials)
    return (sum_NCHW, partials_NS2C) if with_partials else sum_NCHW


def residual_add_reference(branch_NCHW: Tensor, shortcut_NCHW: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """The sum by torch, in the dtype of branch, on any device and in any layout."""
    if bias_C is not None:
        branch_NCHW = branch_NCHW + bias_C.to(branch_NCHW.dtype)[:, None, None]
    return branch_NCHW + shortcut_NCHW


@torch.library.custom_op("segdiff::residual_add", mutates_args=())
def forward_op(
    branch_NCHW: Tensor, shortcut_NCHW: Tensor, bias_C: Tensor | None, with_partials: bool
) -> tuple[Tensor, Tensor]:
    """(sum, partials [N, S, 2, C] float32, or empty): one launch."""
    refuse_without_triton(_NAME, branch_NCHW.device)
    from segdiff_kernels._residual_add_triton import launch_residual_add

    with torch.cuda.device_of(branch_NCHW):
        sum_NCHW, partials_NS2C = launch_residual_add(branch_NCHW, shortcut_NCHW, bias_C, with_partials)
    return sum_NCHW, branch_NCHW.new_empty(0, dtype=torch.float32) if partials_NS2C is None else partials_NS2C


@forward_op.register_fake
def _(branch_NCHW: Tensor, shortcut_NCHW: Tensor, bias_C: Tensor | None, with_partials: bool) -> tuple[Tensor, Tensor]:
    sum_NCHW = torch.empty_like(branch_NCHW, memory_format=torch.channels_last)
    empty = branch_NCHW.new_empty(0, dtype=torch.float32)
    return sum_NCHW, new_partials(branch_NCHW) if with_partials else empty


@torch.library.custom_op("segdiff::residual_add_backward", mutates_args=())
def bias_gradient_op(gradient_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias's gradient [C], the sum over N, H, W: two launches, one where N * H * W is at most 512."""
    refuse_without_triton(_NAME, gradient_NCHW.device)
    from segdiff_kernels._residual_add_triton import launch_channel_sums

    with torch.cuda.device_of(gradient_NCHW):
        return launch_channel_sums(gradient_NCHW, dtype)


@bias_gradient_op.register_fake
def _(gradient_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient_NCHW.new_empty(gradient_NCHW.shape[1], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient_NCHW: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient_NCHW is None or ctx.bias_dtype is None or not ctx.needs_input_grad[2]:
        return gradient_NCHW, gradient_NCHW, None, None
    whole_NCHW = gradient_NCHW.contiguous(memory_format=torch.channels_last)
    return gradient_NCHW, gradient_NCHW, bias_gradient_op(whole_NCHW, ctx.bias_dtype), None


forward_op.register_autograd(_backward, setup_context=_setup)
