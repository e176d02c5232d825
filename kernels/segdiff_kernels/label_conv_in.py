"""The network's first 3x3 convolution over [x_t ; one-hot mask], without the one-hot tensor: each label selects its
weights.

out[o, p] = bias[o] + sum over taps t of weight[o, 0, t] x[p + t] + weight[o, 1 + label[p + t], t]

Dimensions: B batch, K classes, C = 1 + K channels, O output channels, H, W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segdiff_kernels.backend import why_not_triton
from segdiff_kernels.checks import FLOATS, check_dtype, check_same_device, check_shape, refuse

_NAME = "label_conv_in"


def label_conv_in(
    x_B1HW: Tensor, mask_BHW: Tensor, weight_OC33: Tensor, bias_O: Tensor, *, edge_B2HW: Tensor | None = None
) -> Tensor:
    """conv2d(cat(x, one_hot(mask)), weight, bias, padding=1): [B, O, H, W], channels-last, of x's dtype.

    mask uint8; an id that is not a class (255: a dropped mask) adds nothing. Soft edges, uint8 as segdiff's
    Batch.edge_B2HW, mix two classes by the first one's share, rounded to x's dtype. Weight and bias of any float dtype:
    weights are rounded to x's, as autocast does, and sums are float32. Gradients for x, weight and bias, the same bits
    each time. Raises ValueError for unsupported input.
    """
    check_same_device(_NAME, x=x_B1HW, mask=mask_BHW, weight=weight_OC33, bias=bias_O, edge=edge_B2HW)
    for argument, tensor in {"x": x_B1HW, "weight": weight_OC33, "bias": bias_O}.items():
        check_dtype(_NAME, argument, tensor, FLOATS)
    if x_B1HW.dim() != 4 or x_B1HW.shape[1] != 1 or x_B1HW.numel() == 0:
        raise refuse(_NAME, "x", f"shape {tuple(x_B1HW.shape)}", "a non-empty tensor [B, 1, H, W]")
    if weight_OC33.dim() != 4 or not 2 <= weight_OC33.shape[1] <= 256 or weight_OC33.shape[2:] != (3, 3):
        raise refuse(_NAME, "weight", f"shape {tuple(weight_OC33.shape)}", "[O, 1 + K, 3, 3] of 1 to 255 classes K")
    check_shape(_NAME, "bias", bias_O, weight_OC33.shape[:1])
    batch, _, height, width = x_B1HW.shape
    check_dtype(_NAME, "mask", mask_BHW, (torch.uint8,))
    check_shape(_NAME, "mask", mask_BHW, (batch, height, width))
    if edge_B2HW is not None:
        check_dtype(_NAME, "edge", edge_B2HW, (torch.uint8,))
        check_shape(_NAME, "edge", edge_B2HW, (batch, 2, height, width))
    pixels: dict[str, Tensor | None] = {"x": x_B1HW, "mask": mask_BHW, "edge": edge_B2HW}
    for argument, pixel in pixels.items():
        if pixel is not None and not pixel.is_contiguous():
            raise refuse(_NAME, argument, f"strides {pixel.stride()}", "a contiguous tensor")
    if x_B1HW.device.type != "meta" and (why := why_not_triton(x_B1HW.device)):
        raise refuse(_NAME, "x", why, "a GPU, or use label_conv_in_reference")
    return _label_conv_in(x_B1HW, mask_BHW, weight_OC33, bias_O, edge_B2HW)


def label_conv_in_reference(
    x_B1HW: Tensor, mask_BHW: Tensor, weight_OC33: Tensor, bias_O: Tensor, *, edge_B2HW: Tensor | None = None
) -> Tensor:
    """The same by torch's convolution, in x's dtype on any device."""
    dtype = x_B1HW.dtype
    ids_K11 = torch.arange(weight_OC33.shape[1] - 1, device=mask_BHW.device)[:, None, None]
    mask_BKHW = (mask_BHW[:, None] == ids_K11).to(dtype)
    if edge_B2HW is not None:
        share_B1HW = edge_B2HW[:, 1:].float() / 255.0
        second_BKHW = (edge_B2HW[:, :1] == ids_K11).to(dtype)
        mask_BKHW = mask_BKHW * share_B1HW.to(dtype) + second_BKHW * (1.0 - share_B1HW).to(dtype)
    x_BCHW = torch.cat((x_B1HW, mask_BKHW), dim=1).contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.conv2d(x_BCHW, weight_OC33.to(dtype), bias_O.to(dtype), padding=1)


def weight_table(weight_OC33: Tensor, dtype: torch.dtype) -> Tensor:
    """[9, C, O] contiguous: a row of output channels for each tap and input channel."""
    out_channels, channels = weight_OC33.shape[:2]
    return weight_OC33.permute(2, 3, 1, 0).to(dtype).reshape(9, channels, out_channels).contiguous()


@torch.library.custom_op("segdiff::label_conv_in", mutates_args=())
def _label_conv_in(
    x_B1HW: Tensor, mask_BHW: Tensor, weight_OC33: Tensor, bias_O: Tensor, edge_B2HW: Tensor | None
) -> Tensor:
    from segdiff_kernels._label_conv_in_triton import launch_forward

    out_BOHW = _channels_last(x_B1HW, weight_OC33.shape[0])
    with torch.cuda.device_of(x_B1HW):
        launch_forward(out_BOHW, x_B1HW, mask_BHW, edge_B2HW, weight_table(weight_OC33, x_B1HW.dtype), bias_O)
    return out_BOHW


@_label_conv_in.register_fake
def _(x_B1HW: Tensor, mask_BHW: Tensor, weight_OC33: Tensor, bias_O: Tensor, edge_B2HW: Tensor | None) -> Tensor:
    return _channels_last(x_B1HW, weight_OC33.shape[0])


@torch.library.custom_op("segdiff::label_conv_in_weight_gradient", mutates_args=())
def _weight_gradient(
    dout_BOHW: Tensor, x_B1HW: Tensor, mask_BHW: Tensor, edge_B2HW: Tensor | None, channels: int
) -> tuple[Tensor, Tensor]:
    """float32 dweight [O, C, 3, 3] and dbias [O]; dout channels-last, of x's dtype."""
    from segdiff_kernels._label_conv_in_triton import launch_weight_gradient

    with torch.cuda.device_of(x_B1HW):
        partial_S9RO = launch_weight_gradient(dout_BOHW, x_B1HW, mask_BHW, edge_B2HW, channels)
    sum_9RO = partial_S9RO.sum(dim=0)
    out_channels = dout_BOHW.shape[1]
    dweight_OC33 = sum_9RO[:, :channels].permute(2, 1, 0).reshape(out_channels, channels, 3, 3)
    # The row after the last channel counts the pixels themselves; at the centre all of them are inside.
    return dweight_OC33.contiguous(), sum_9RO[4, channels].clone()


@_weight_gradient.register_fake
def _(
    dout_BOHW: Tensor, x_B1HW: Tensor, mask_BHW: Tensor, edge_B2HW: Tensor | None, channels: int
) -> tuple[Tensor, Tensor]:
    out_channels = dout_BOHW.shape[1]
    dweight_OC33 = dout_BOHW.new_empty((out_channels, channels, 3, 3), dtype=torch.float32)
    return dweight_OC33, dout_BOHW.new_empty((out_channels,), dtype=torch.float32)


@torch.library.custom_op("segdiff::label_conv_in_input_gradient", mutates_args=())
def _input_gradient(dout_BOHW: Tensor, weight_OC33: Tensor) -> Tensor:
    """dx [B, 1, H, W], of dout's dtype; dout channels-last."""
    from segdiff_kernels._label_conv_in_triton import launch_input_gradient

    dx_B1HW = dout_BOHW.new_empty((dout_BOHW.shape[0], 1, *dout_BOHW.shape[2:]))
    with torch.cuda.device_of(dout_BOHW):
        launch_input_gradient(dx_B1HW, dout_BOHW, weight_table(weight_OC33[:, :1], dout_BOHW.dtype))
    return dx_B1HW


@_input_gradient.register_fake
def _(dout_BOHW: Tensor, weight_OC33: Tensor) -> Tensor:
    return dout_BOHW.new_empty((dout_BOHW.shape[0], 1, *dout_BOHW.shape[2:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_B1HW, mask_BHW, weight_OC33, bias_O, edge_B2HW = inputs
    ctx.save_for_backward(x_B1HW, mask_BHW, weight_OC33, edge_B2HW)
    ctx.bias_dtype = bias_O.dtype


def _backward(ctx: Any, dout_BOHW: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
    x_B1HW, mask_BHW, weight_OC33, edge_B2HW = ctx.saved_tensors
    dout_BOHW = dout_BOHW.contiguous(memory_format=torch.channels_last)
    needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
    dx_B1HW = dweight_OC33 = dbias_O = None
    if needs_x:
        dx_B1HW = _input_gradient(dout_BOHW, weight_OC33)
    if needs_weight or needs_bias:
        dweight_OC33, dbias_O = _weight_gradient(dout_BOHW, x_B1HW, mask_BHW, edge_B2HW, weight_OC33.shape[1])
        dweight_OC33, dbias_O = dweight_OC33.to(weight_OC33.dtype), dbias_O.to(ctx.bias_dtype)
    return dx_B1HW, None, dweight_OC33, dbias_O, None


_label_conv_in.register_autograd(_backward, setup_context=_setup_context)


def _channels_last(x_B1HW: Tensor, out_channels: int) -> Tensor:
    """Unwritten [B, O, H, W], channels-last: [B, H, W, O] in memory."""
    batch, _, height, width = x_B1HW.shape
    return x_B1HW.new_empty((batch, height, width, out_channels)).permute(0, 3, 1, 2)
