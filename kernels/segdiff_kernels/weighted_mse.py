"""The denoiser's loss: squared errors weighted by sample; the gradient is written in the same pass.

    error_b = mean over C, H, W of (prediction - target)^2          loss = mean over b of weight_b error_b

With weight = loss_weights[timestep] this is the weighted objective of Hang et al. 2023 (min-SNR), eq. 6, and with ones
that of Ho et al. 2020, eq. 14. Forward reads prediction and target once and keeps w (p - t) in the prediction's dtype;
backward multiplies it by 2 / (B C H W) and the incoming gradient, so it reads neither again. The factor is applied only
then, because in float16 it would round small differences to 0 before the loss scale is applied.

Dimensions: B batch, C channels, H rows, W columns, S slices of a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segdiff_kernels.checks import FLOATS, check_dtype, check_same_device, check_shape, refuse
from segdiff_kernels.dense import check_can_run, check_same_dense

_NAME = "weighted_mse"
# A program's elements: 16 a thread, so two 16-byte loads of bfloat16.
BLOCK = 2048


def weighted_mse_reference(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch, in float32 (float64 where given), with autograd's own gradient."""
    wide = torch.promote_types(prediction_BCHW.dtype, torch.float32)
    error_B = (prediction_BCHW.to(wide) - target_BCHW.to(wide)).square().flatten(1).mean(1)
    return (weight_B * error_B).mean(), error_B.detach()


def weighted_mse(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, float32 scalar, and the samples' unweighted errors, float32 [B], without gradient.

    prediction and target are float32, bfloat16 or float16, each its own, and have one memory order (contiguous or
    channels-last); weight float32. Only the prediction gets a gradient, in its dtype. Sums are float32 and always in
    the same order. Raises ValueError for anything else, and if Triton cannot run.
    """
    check_same_dense(_NAME, prediction=prediction_BCHW, target=target_BCHW)
    for argument, tensor in {"prediction": prediction_BCHW, "target": target_BCHW}.items():
        check_dtype(_NAME, argument, tensor, FLOATS)
    check_dtype(_NAME, "weight", weight_B, (torch.float32,))
    check_shape(_NAME, "weight", weight_B, prediction_BCHW.shape[:1])
    check_same_device(_NAME, prediction=prediction_BCHW, weight=weight_B)
    check_can_run(_NAME, prediction_BCHW.device)
    if torch.is_grad_enabled():
        for argument, tensor in {"target": target_BCHW, "weight": weight_B}.items():
            if tensor.requires_grad:
                raise refuse(_NAME, argument, "requires a gradient, and only the prediction gets one", "it detached")
    needs_gradient = torch.is_grad_enabled() and prediction_BCHW.requires_grad
    loss, error_B, _ = torch.ops.segdiff.weighted_mse(prediction_BCHW, target_BCHW, weight_B, needs_gradient)
    return loss, error_B.detach()


def num_slices(numel: int) -> int:
    """Number of programs that sum a sample of this many elements."""
    return -(-numel // BLOCK)


@torch.library.custom_op("segdiff::weighted_mse", mutates_args=())
def _weighted_mse(
    prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, error_B and w (p - t); the last of no elements unless needs_gradient."""
    from segdiff_kernels._weighted_mse_triton import launch

    outputs = _outputs(prediction_BCHW, needs_gradient)
    with torch.cuda.device_of(prediction_BCHW):
        launch(prediction_BCHW, target_BCHW, weight_B.contiguous(), *outputs)
    return outputs


@_weighted_mse.register_fake
def _(
    prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(prediction_BCHW, needs_gradient)


def _outputs(prediction_BCHW: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss = prediction_BCHW.new_empty((), dtype=torch.float32)
    error_B = prediction_BCHW.new_empty(prediction_BCHW.shape[:1], dtype=torch.float32)
    return loss, error_B, torch.empty_like(prediction_BCHW) if needs_gradient else prediction_BCHW.new_empty(0)


@torch.library.custom_op("segdiff::weighted_mse_backward", mutates_args=())
def _weighted_mse_backward(difference_BCHW: Tensor, grad_loss: Tensor) -> Tensor:
    """2 grad_loss / (B C H W) times w (p - t)."""
    from segdiff_kernels._weighted_mse_triton import launch_backward

    grad_BCHW = torch.empty_like(difference_BCHW)
    with torch.cuda.device_of(difference_BCHW):
        launch_backward(difference_BCHW, grad_loss, grad_BCHW)
    return grad_BCHW


@_weighted_mse_backward.register_fake
def _(difference_BCHW: Tensor, grad_loss: Tensor) -> Tensor:
    return torch.empty_like(difference_BCHW)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, error_B, difference_BCHW = output
    ctx.mark_non_differentiable(error_B, difference_BCHW)
    ctx.set_materialize_grads(False)  # otherwise backward would fill an image with zeros for the difference
    ctx.save_for_backward(difference_BCHW)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
    (difference_BCHW,) = ctx.saved_tensors
    return torch.ops.segdiff.weighted_mse_backward(difference_BCHW, grad_loss), None, None, None


_weighted_mse.register_autograd(_backward, setup_context=_setup_context)
