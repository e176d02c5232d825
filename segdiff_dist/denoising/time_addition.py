"""What is added to the embedding of the time: the level of a cascade's augmentation, and labels of the loader's.

Dimensions: B batch, A entries of a label, E entries of the time's embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_shards.feed.augment import NUM_LABELS


class TimeAddition(nn.Module):
    """An embedding that a hook adds to that of the time, once for each time that it is given one."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._added_BE: Tensor | None = None
        unet.time_embedding.register_forward_hook(_Addition(self))

    def add(self, added_BE: Tensor) -> None:
        """For the next pass through the UNet."""
        self._added_BE = added_BE

    def added(self, time_BE: Tensor) -> Tensor:
        """The sum of both embeddings."""
        added_BE, self._added_BE = self._added_BE, None
        assert added_BE is not None
        return time_BE + added_BE


@dataclass(frozen=True)
class _Addition:
    """A forward hook. An object, not a closure: a copy of the net then uses the copied embedding."""

    of: TimeAddition

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], time_BE: Tensor) -> Tensor:
        return self.of.added(time_BE)


class AugmentationLabels(TimeAddition):
    """What augmentation did to a slice, through a linear layer that begins as 0 (Karras et al. 2022, appendix F.2).

    It has no bias: the label of a slice as it is stored, which sampling uses, is 0 and adds nothing.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.linear = nn.Linear(NUM_LABELS, unet.time_embedding.linear_2.out_features, bias=False)
        nn.init.zeros_(self.linear.weight)

    def read(self, label_BA: Tensor | None, images: int) -> None:
        """The labels of the next pass, 0 for all of its `images` if there are none."""
        weight = self.linear.weight
        if label_BA is None:
            label_BA = torch.zeros(images, NUM_LABELS, device=weight.device)
        self.add(self.linear(label_BA.to(weight.dtype)))
