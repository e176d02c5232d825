"""The region-specific contrastive loss of MAISI-v2 (Zhao et al., AAAI 2026, arXiv:2508.05772).

f predicts from one noised image x twice: with the mask m, and with m_0, from which organs are erased.

    inside  = mean |f(x, m) - f(x, m_0)|    where m_0 differs from m        the net must use the organ's label
    outside = mean |f(x, m_0) - target|     elsewhere, but for a border of one pixel
    loss    = outside - min(inside, delta)

This is the authors' code (NVIDIA-Medtech/NV-Generate-CTMR, scripts/train_controlnet.py: delta 2, weight 0.01), whose
text writes the last term as relu(delta - inside) - delta. Both predictions get gradients. Ours differs in two points:
means are those of each sample, not of the micro-batch, so that the loss does not depend on how a batch is divided; and
the organs are drawn for each sample, where the authors erase tumours.
Dimensions: B batch, C channels, K classes, H image rows, W columns; h, w those of the prediction (latents: smaller).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.labels import LabelTable
from segdiff_dist.denoising.conditioning import Conditions, joined
from segdiff_dist.denoising.organ_dropout import organ_flags, relabelled
from segdiff_kernels import philox

# Besides the organ that is always erased, each of a mask's organs is erased with this probability.
_ERASED = 0.5


class Contrast(NamedTuple):
    """The loss of each sample, the difference of its two predictions inside, and 1 if its mask lost an organ.

    float32 [B] each. All are 0 for other samples.
    """

    loss_B: Tensor
    difference_B: Tensor
    counts_B: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """Sum and count, float32 [2], of each."""
        number, named = self.counts_B.sum(), {"loss": self.loss_B, "difference": self.difference_B}
        return {f"contrastive_{name}": torch.stack((of_B.sum(), number)).detach() for name, of_B in named.items()}


class ContrastiveTerm:
    """The loss for one label table. What is erased is a function of (seed, position)."""

    def __init__(self, table: LabelTable, delta: float, seed: int, device: torch.device) -> None:
        self.table, self.delta, self.seed = table, delta, seed
        self._is_organ_K = organ_flags(table, device)

    def erased(self, conditions: Conditions, position_B: Tensor) -> Conditions:
        """The conditions without at least one of each mask's organs, which become body, or background in a table
        without that class. A mask without organs stays as it is. No mask may be the null mask."""
        u_BK = philox.uniform(self.seed, philox.STREAM_CONTRAST, position_B, self.table.num_classes)
        is_there_BK = torch.zeros_like(u_BK).scatter_(1, conditions.mask_BHW.flatten(1).long(), 1.0).bool()
        u_BK = u_BK.masked_fill(~(is_there_BK & self._is_organ_K), 2.0)
        # u is in (0, 1), so an organ that is not there is never below 1.
        lost_BK = (u_BK < _ERASED) | ((u_BK == u_BK.amin(dim=1, keepdim=True)) & (u_BK < 1.0))
        return relabelled(conditions, lost_BK, self.table)

    def __call__(
        self, prediction_BChw: Tensor, without_BChw: Tensor, target_BChw: Tensor, shown: Conditions, erased: Conditions
    ) -> Contrast:
        """`without_BChw`: the prediction from the conditions `erased`."""
        inside_B1hw, outside_B1hw = regions(shown, erased, prediction_BChw.shape[-1])
        difference_B = _mean_where(inside_B1hw, (prediction_BChw - without_BChw).abs())
        error_B = _mean_where(outside_B1hw, (without_BChw - target_BChw).abs())
        counts_B = inside_B1hw.flatten(1).amax(dim=1)
        loss_B = counts_B * (error_B - difference_B.clamp(max=self.delta))
        return Contrast(loss_B, difference_B, counts_B)


def regions(shown: Conditions, erased: Conditions, side: int) -> tuple[Tensor, Tensor]:
    """float32 [B, 1, h, w] of `side`, 0 or 1: where organs were erased, and where nothing changed within one pixel.

    A latent position is inside if half of its pixels are, and outside if all are.
    """
    changed_B1HW = (shown.mask_BHW != erased.mask_BHW)[:, None].float()
    touched_B1HW = changed_B1HW
    if shown.edge_B2HW is not None and erased.edge_B2HW is not None:  # an organ that is a pixel's second class
        second_B1HW = shown.edge_B2HW[:, :1] != erased.edge_B2HW[:, :1]
        touched_B1HW = torch.maximum(changed_B1HW, second_B1HW.float())
    factor = changed_B1HW.shape[-1] // side
    near_B1HW = F.max_pool2d(touched_B1HW, kernel_size=3, stride=1, padding=1)
    inside_B1hw = (F.avg_pool2d(changed_B1HW, factor) >= 0.5).float()
    return inside_B1hw, 1.0 - F.max_pool2d(near_B1HW, factor)


def predict_pair(
    forward: Callable[..., Any], x_BChw: Tensor, time_B: Tensor, shown: Conditions, erased: Conditions
) -> tuple[Tensor, Tensor]:
    """The predictions from both conditions, in one pass of twice the batch."""
    both_BChw = forward(torch.cat((x_BChw, x_BChw)), time_B.repeat(2), *joined(shown, erased))
    prediction_BChw, without_BChw = both_BChw.chunk(2)
    return prediction_BChw, without_BChw


def _mean_where(where_B1hw: Tensor, values_BChw: Tensor) -> Tensor:
    """[B] mean over channels and the positions that are 1; 0 if there are none."""
    sum_B = (values_BChw.mean(dim=1, keepdim=True) * where_B1hw).sum(dim=(1, 2, 3))
    return sum_B / where_B1hw.sum(dim=(1, 2, 3)).clamp(min=1.0)
