"""The training task of the segmenter.

Dimensions: B batch, K classes, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.feed.config import LoaderConfig
from data_shards.records import Batch
from segdiff_dist.ranks.distributed import sum_over_ranks
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import save_segmenter
from segdiff_dist.training.held_out import held_out_batches

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

# A class absent from both prediction and mask counts nothing in the validation Dice; this keeps 0/0 finite.
_EPSILON = 1e-6


class SegmenterTask:
    """Dice + cross-entropy on the train split; the weights kept are the best on the validation split."""

    name = "segmenter"
    passes = 1

    def __init__(
        self,
        shards: ShardSet,
        config: SegmenterConfig,
        loader: LoaderConfig,
        weights: Path,
        device: torch.device,
    ) -> None:
        from segdiff_dist.segmentation.monai_parts import DiceCELoss

        self.shards, self.config, self.loader, self.weights, self.device = shards, config, loader, weights, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            self.model: nn.Module = SegmenterNet(config, shards.label_table.num_classes, len(shards.modalities))
        self._loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True, include_background=False)
        self._validation_rows = shards.select(split="val", modalities=loader.modalities, axes=loader.axes)
        self.score = "val_dice" if len(self._validation_rows) else None

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """MONAI's DiceCELoss without background, Dice over every `dice_over` slices in their order."""
        scores_BKHW, mask_B1HW = forward(batch.image_BHW, batch.modality_B), batch.mask_BHW[:, None].long()
        groups = (tensor.split(self.config.dice_group) for tensor in (scores_BKHW, mask_B1HW))
        return torch.stack([self._loss(scores, masks) for scores, masks in zip(*groups, strict=True)]).mean(), {}

    def validate(self, forward: Callable[..., Any], images_seen: int) -> dict[str, float]:
        """Mean over organs of the Dice over the whole validation split. The ranks share the work."""
        return {} if self.score is None else {"val_dice": float(np.nanmean(self._validation_dice(forward)))}

    def export(self, average: str, weights: dict[str, Tensor]) -> None:
        """Write the weights. There is one place for them, whichever average they are."""
        save_segmenter(self.weights, weights, self.config, self.shards.label_table, self.shards.modalities)

    def _validation_dice(self, forward: Callable[..., Any]) -> np.ndarray:
        """Dice of every organ over the whole validation split; NaN for organs that are not in it."""
        organs = torch.tensor(self.shards.label_table.organ_ids, device=self.device, dtype=torch.uint8)
        counts_3K = torch.zeros(3, len(organs), dtype=torch.float64, device=self.device)
        size = self.config.validation_batch_size
        for batch, counts in held_out_batches(self.shards, self._validation_rows, self.loader, size, self.device):
            predicted_BHW = forward(batch.image_BHW, batch.modality_B).argmax(dim=1).to(torch.uint8)
            if not counts:
                continue
            for i, organ in enumerate(organs):
                p_BHW, m_BHW = predicted_BHW == organ, batch.mask_BHW == organ
                counts_3K[:, i] += torch.stack(((p_BHW & m_BHW).sum(), p_BHW.sum() + m_BHW.sum(), m_BHW.sum()))
        both_K, sizes_K, in_mask_K = sum_over_ranks(counts_3K).cpu().numpy()
        return np.where(in_mask_K > 0, 2 * both_K / (sizes_K + _EPSILON), np.nan)
