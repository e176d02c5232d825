"""The convolutions of fused_unet.py. Later operations add their biases, so these leave them out.

N batch, C input channels, O output channels, H rows, W columns, M = N * H * W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdiff_kernels.label_conv_in import label_conv_in

MOST_ELEMENTS = 2**31 - 1


class Conv(nn.Conv2d):
    """A later operation adds its bias."""

    adds_bias = False
    # The weight within joined_layouts().
    laid_out_OCHW: Tensor | None = None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        weight_OCHW = self.weight if self.laid_out_OCHW is None else self.laid_out_OCHW
        if not hasattr(weight_OCHW, "ds_id"):  # of ZeRO 3, which frees it until the backward pass
            # Once; else the convolution copies row-major weights in both passes.
            weight_OCHW = weight_OCHW.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x_NCHW, weight_OCHW, self.bias if self.adds_bias else None, self.stride, self.padding)


class LastConv(Conv):
    """Adds its own bias."""

    adds_bias = True


@contextmanager
def joined_layouts(net: nn.Module) -> Iterator[None]:
    """A context in which row-major weights of the net's convolutions, as DeepSpeed has them, are channels-last.

    One launch for all convolutions with as many input channels, and one for their gradients; each alone would take a
    launch for its weight and one for its gradient.
    """
    convs = [m for m in net.modules() if isinstance(m, Conv | UpsamplingConv) and _is_row_major(m.weight)]
    kept = [isinstance(conv, UpsamplingConv) for conv in convs]
    for conv, laid_out_OCHW in zip(convs, _Layouts.apply(kept, *(conv.weight for conv in convs)), strict=True):
        conv.laid_out_OCHW = laid_out_OCHW
    try:
        yield
    finally:
        for conv in convs:
            conv.laid_out_OCHW = None


def _is_row_major(weight_OCHW: Tensor) -> bool:
    is_gathered_later = hasattr(weight_OCHW, "ds_id")  # by ZeRO 3, where its module is called
    return not is_gathered_later and not weight_OCHW.is_contiguous(memory_format=torch.channels_last)


class _Layouts(torch.autograd.Function):
    """Row-major weights [O, C, H, W] channels-last, but for those that are `kept`; all their gradients row-major.

    torch.cat copies up to 64 tensors of any layout in one launch (aten/src/ATen/native/cuda/Shape.cu).
    """

    @staticmethod
    def forward(ctx: Any, kept: Sequence[bool], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        turned = [w.flatten(2).transpose(1, 2) for w, is_kept in zip(weights, kept, strict=True) if not is_kept]
        copies = iter(_joined(turned))
        return tuple(
            w.view_as(w) if is_kept else next(copies).transpose(1, 2).view_as(w)
            for w, is_kept in zip(weights, kept, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        row_major = iter(_joined([gradient.flatten(2) for gradient in given]))
        return None, *(None if gradient is None else next(row_major).view_as(gradient) for gradient in gradients)


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies, [O, ., .], of which those of one size but for O are joined."""
    groups: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape[1:], []).append(i)
    copies: dict[int, Tensor] = {}
    for members in groups.values():
        parts = [tensors[i] for i in members]
        copies |= dict(zip(members, torch.cat(parts).split([len(part) for part in parts]), strict=True))
    return [copies[i] for i in range(len(tensors))]


class Shortcut(nn.Conv2d):
    """A 1x1 convolution of one tensor, or of two as if they were concatenated."""

    def forward(self, inputs: list[Tensor], biases: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The convolution without its bias, and the bias for residual_add: also the product of the weights and the
        biases that are still to be added to the inputs."""
        x_NCHW, skip_NCHW, *_ = *inputs, None
        bias_C, skip_bias_C, *_ = *biases, None
        y_NOHW, bias_O = _Products.apply(x_NCHW, skip_NCHW, self.weight, self.bias, bias_C, skip_bias_C)
        return y_NOHW, bias_O


class _Products(torch.autograd.Function):
    """Shortcut.forward. Its backward pass writes both halves of the weights' gradient in place; autograd would
    concatenate them, and would add the halves' gradients from the biases in passes of their own."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        x_NCHW, skip_NCHW, weight_OC11, bias_O, bias_C, skip_bias_C = given
        assert x_NCHW is not None
        assert weight_OC11 is not None
        assert bias_O is not None
        ctx.dtype = _computing_dtype(x_NCHW)
        ctx.save_for_backward(x_NCHW, skip_NCHW, weight_OC11, bias_C, skip_bias_C)
        y_MO: Tensor | None = None
        for x, w_OC, bias in _terms(ctx.dtype, weight_OC11, (x_NCHW, skip_NCHW), (bias_C, skip_bias_C)):
            # In place: torch.addmm would copy y first.
            y_MO = rows(x) @ w_OC.T if y_MO is None else y_MO.addmm_(rows(x), w_OC.T)
            bias_O = bias_O if bias is None else torch.addmv(bias_O, w_OC.to(bias.dtype), bias)
        N, _, H, W = x_NCHW.shape
        assert y_MO is not None
        # An output may not be an input.
        return y_MO.view(N, H, W, -1).permute(0, 3, 1, 2), bias_O.view_as(bias_O)

    @staticmethod
    def backward(ctx: Any, dy_NOHW: Tensor, dbias_O: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, skip_NCHW, weight_OC11, bias_C, skip_bias_C = ctx.saved_tensors
        dy_MO = rows(dy_NOHW.to(ctx.dtype).contiguous(memory_format=torch.channels_last))
        dweight_OC = torch.empty_like(weight_OC11.flatten(1), dtype=ctx.dtype)
        dxs: list[Tensor | None] = [None, None]
        dbiases: list[Tensor | None] = [None, None]
        terms = _terms(ctx.dtype, weight_OC11, (x_NCHW, skip_NCHW), (bias_C, skip_bias_C))
        parts = dweight_OC.split([x.shape[1] for x, _, _ in terms], dim=1)
        for i, ((x, w_OC, bias), dw_OC) in enumerate(zip(terms, parts, strict=True)):
            N, C, H, W = x.shape
            if ctx.needs_input_grad[2]:
                dw_OC.addmm_(dy_MO.T, rows(x), beta=0)
            if bias is not None:
                dw_OC.addr_(dbias_O.to(ctx.dtype), bias.to(ctx.dtype))
                dbiases[i] = torch.mv(w_OC.T.to(dbias_O.dtype), dbias_O)
            if ctx.needs_input_grad[i]:
                dxs[i] = (dy_MO @ w_OC).view(N, H, W, C).permute(0, 3, 1, 2)
        dweight_OC11 = dweight_OC.to(weight_OC11.dtype).view_as(weight_OC11) if ctx.needs_input_grad[2] else None
        return *dxs, dweight_OC11, dbias_O, *dbiases


def _terms(
    dtype: torch.dtype, weight_OC11: Tensor, inputs: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(input, its part of the weights, its bias that is still to be added), of the inputs that there are."""
    xs = [x.to(dtype) for x in inputs if x is not None]
    weights = weight_OC11.flatten(1).to(dtype).split([x.shape[1] for x in xs], dim=1)
    return list(zip(xs, weights, biases, strict=False))


class LabelConv(nn.Conv2d):
    """conv_in over the noised image and the mask's one-hot channels, from the label map."""

    def forward(  # type: ignore[override]
        self, x_t_B1HW: Tensor, mask_BHW: Tensor, edge_B2HW: Tensor | None = None
    ) -> Tensor:
        assert self.bias is not None
        x_t_B1HW = x_t_B1HW.to(_computing_dtype(self.weight))
        return label_conv_in(x_t_B1HW, mask_BHW, self.weight, self.bias, edge_B2HW=edge_B2HW)


class UpsamplingConv(nn.Conv2d):
    """The 3x3 convolution of an image of twice the side, whose pixels are those of the small image twice in each
    direction, computed from the small image. A later operation adds its bias.

    Each output pixel sees four pixels of the small image through sums of the nine weights. That is a transposed
    convolution of stride 2 with 4x4 weights: in one dimension (w2, w1 + w2, w0 + w1, w0). It has 4/9 of the arithmetic.
    """

    sums_9T: Tensor
    # The weight, still row-major, within joined_layouts().
    laid_out_OCHW: Tensor | None = None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        weight_OC33 = self.weight if self.laid_out_OCHW is None else self.laid_out_OCHW
        return upsampled_conv(x_NCHW, weight_OC33, self.sums_9T)


def upsampled_conv(x_NCHW: Tensor, weight_OC33: Tensor, sums_9T: Tensor) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1); sums_9T: sums_of_weights()."""
    # Sums of at most four weights, rounded once.
    if _is_row_major(weight_OC33):  # their sums can be written channels-last
        sums_CT9 = sums_9T.T.expand(weight_OC33.shape[1], -1, -1)
        weight_CTO = torch.bmm(sums_CT9, weight_OC33.flatten(2).permute(1, 2, 0))
        weight_CO44 = weight_CTO.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    else:
        weight_CO44 = (weight_OC33.flatten(2) @ sums_9T).unflatten(2, (4, 4)).transpose(0, 1)
    # Once; else the convolution copies it in the forward and in the backward pass.
    weight_CO44 = weight_CO44.contiguous(memory_format=torch.channels_last)
    # So that indices of the output fit in an int32.
    at_once = max(1, MOST_ELEMENTS // (4 * len(weight_OC33) * x_NCHW[0, 0].numel()))
    parts = [F.conv_transpose2d(x, weight_CO44, stride=2, padding=1) for x in x_NCHW.split(at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sums_of_weights() -> Tensor:
    """[9, 16]: which of the 3x3 weights make up each of the 4x4."""
    sums_43 = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    return torch.kron(sums_43, sums_43).T.contiguous()


def rows(x_NCHW: Tensor) -> Tensor:
    """[N * H * W, C], a view of a channels-last tensor."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(0, 2)


def _computing_dtype(tensor: Tensor) -> torch.dtype:
    """The tensor's, or autocast's where that is on."""
    kind = tensor.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
