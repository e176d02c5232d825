"""The perceptual loss: how far two images are from each other in the features of a segmenter's encoder.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.labels import LabelTable
from data_shards.problems import refuse
from segdiff_dist.segmentation.segmenter import Segmenter


class PerceptualLoss:
    """Zhang et al. 2018, eq. 1, without learned weights: features of unit length at each position, their squared
    difference, its mean over positions and over the encoder's levels.

    The features are those of our segmenter, which knows the organs of CT and MR; the paper's are of photographs. Raises
    InputProblems if the weights are missing or have other labels or modalities.
    """

    def __init__(self, weights: Path, table: LabelTable, modalities: tuple[str, ...], device: torch.device) -> None:
        segmenter = Segmenter.load(weights, device)
        refuse(list(segmenter.problems(table, modalities, None)))
        self._net, self.weights_sha256 = segmenter.net.requires_grad_(False), segmenter.weights_sha256

    def __call__(self, y_B1HW: Tensor, x_B1HW: Tensor, modality_B: Tensor) -> Tensor:
        """float32 [B]; both images in [-1, 1]. Gradients go to y."""
        with torch.no_grad():
            wanted = [F.normalize(level, dim=1) for level in self._net.levels(x_B1HW, modality_B)]
        found = (F.normalize(level, dim=1) for level in self._net.levels(y_B1HW, modality_B))
        distances = [(a - b).square().sum(dim=1).flatten(1).mean(1) for a, b in zip(found, wanted, strict=True)]
        return torch.stack(distances).mean(0)
