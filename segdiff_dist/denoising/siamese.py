"""Siamese-Diffusion's noise consistency (Qiu et al., CVPR 2025, arXiv:2505.06068): against blur from few slices.

One net predicts twice from one noised image x at noise level t: from the mask m as in sampling (Mask-Diffusion), and
from the mask and the slice x_0 itself (Image-Diffusion), which knows the texture that a mask lacks.

    f_m = f(x, t, m)        f_i = f(x, t, m, w x_0)        w: from 0 to 1 over the training
    loss = error(f_m, target) + error(f_i, target) + weight * error(f_m, f_i)        no gradient to f_i in the last term

The authors' weights are 1. All errors are squared ones, weighted by noise level as the first is; with epsilon and no
weights these are the paper's. Two points differ. x_0 enters by a convolution beside the net's first one, which begins
as 0; the authors' ControlNet on Stable Diffusion has an extractor of features. And all weights learn from both
predictions, where the authors stop the gradients of the second at the decoder and at the mask's features. Their online
augmentation (noising Image-Diffusion's images again) is left out.
Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdiff_dist.denoising.conditioning import Conditions
from segdiff_dist.denoising.contrast import predict_pair
from segdiff_kernels.weighted_mse import weighted_mse_reference


class ImagePrior(nn.Module):
    """A 3x3 convolution of the slice, added to the output of an encoder's first one. It begins as 0 and has no bias, so
    that a sample without a slice gets the ordinary prediction."""

    def __init__(self, encoder: Any, channels: int, stem: int) -> None:
        """`encoder`: the UNet, or a ControlNet's copy of its encoder."""
        super().__init__()
        self._stem = stem
        first: nn.Conv2d = encoder.conv_in
        self.convolution = nn.Conv2d(channels * stem**2, first.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.zeros_(self.convolution.weight)
        self._x_0_BCHW: Tensor | None = None
        first.register_forward_hook(_Addition(self))

    def read(self, x_0_BCHW: Tensor) -> None:
        """The slices of the next pass, times their weights."""
        self._x_0_BCHW = x_0_BCHW

    def added(self, features_BCHW: Tensor) -> Tensor:
        """The features with those of the slices, if there are any."""
        x_0_BCHW, self._x_0_BCHW = self._x_0_BCHW, None
        if x_0_BCHW is None:
            return features_BCHW
        x_0_BCHW = F.pixel_unshuffle(x_0_BCHW, self._stem) if self._stem > 1 else x_0_BCHW
        return features_BCHW + self.convolution(x_0_BCHW.to(self.convolution.weight.dtype))


@dataclass(frozen=True)
class _Addition:
    """A forward hook. An object, not a closure: a copy of the net then uses the copied convolution."""

    prior: ImagePrior

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], features_BCHW: Tensor) -> Tensor:
        return self.prior.added(features_BCHW)


@dataclass(frozen=True)
class NoiseConsistency:
    """Both predictions and their losses. The slice's weight grows with the position in the order, up to 1."""

    prior: ImagePrior
    weight: float
    ramp_images: int

    def predict_pair(
        self, forward: Callable[..., Any], x_BCHW: Tensor, time_B: Tensor, shown: Conditions, x_0_BCHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """f_m and f_i, in one pass of twice the batch. `x_0_BCHW`: from `weighted`."""
        self.prior.read(torch.cat((torch.zeros_like(x_0_BCHW), x_0_BCHW)))
        return predict_pair(forward, x_BCHW, time_B, shown, shown)

    def weighted(self, x_0_BCHW: Tensor, position_B: Tensor) -> Tensor:
        """w x_0 of slices at these positions."""
        return x_0_BCHW * (position_B / self.ramp_images).clamp(max=1.0)[:, None, None, None]

    def further_terms(
        self, from_mask_BCHW: Tensor, from_both_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss without its first term; and sum and count, float32 [2], of both unweighted errors."""
        image_loss, image_B = weighted_mse_reference(from_both_BCHW, target_BCHW, weight_B)
        consistency, difference_B = weighted_mse_reference(from_mask_BCHW, from_both_BCHW.detach(), weight_B)
        named = {"image_loss": image_B, "consistency_loss": difference_B}
        metrics = {name: torch.stack((of_B.sum(), torch.ones_like(of_B).sum())) for name, of_B in named.items()}
        return image_loss + self.weight * consistency, metrics
