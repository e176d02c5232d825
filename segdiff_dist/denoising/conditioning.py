"""The denoiser's conditions: the mask, encoded and joined to the noised image, and the slice's class.

Also the null conditions, which training uses for some samples and classifier-free guidance needs.
Dimensions: B batch, C channels, K mask channels, H, W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_shards.records import AXES, MODALITIES
from segdiff_dist.denoising.config import Conditioning, GuidanceRemoves, MaskEncoding
from segdiff_kernels import philox

# One class for each (modality, axis), and one for neither (NULL_CLASS). That has the same id in every set, behind the
# classes of two modalities: those of a third and further ones follow it.
NUM_CLASSES = len(MODALITIES) * len(AXES) + 1
NULL_CLASS = NUM_CLASSES - 1
# The null mask has this id at every pixel. No table has it, so it differs from a mask of background: one-hot channels
# and embeddings are then 0, scalars 1.
NULL_MASK = 255


class Conditions(NamedTuple):
    """The network's arguments after x_t and timestep: mask_BHW uint8 ids, class_B int64, edge_B2HW uint8 or None.

    edge_B2HW is as in data_shards.records.SliceRecord: the second class of each pixel, and the first one's share. Of
    super-resolution in a cascade: low_B1hw float32, the augmented images of the lower stage, and their level_B.
    augmentation_BA: labels of the loader's augmentation, if the net reads them; None for slices as they are stored.
    """

    mask_BHW: Tensor
    class_B: Tensor
    edge_B2HW: Tensor | None = None
    low_B1hw: Tensor | None = None
    level_B: Tensor | None = None
    augmentation_BA: Tensor | None = None


class MaskEncoder(nn.Module):
    """uint8 label map [B, H, W] to float channels [B, K, H, W]."""

    def __init__(self, encoding: MaskEncoding, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.encoding, self.num_classes = encoding, num_classes
        self.embedding = nn.Embedding(num_classes, embedding_dim) if encoding == "embedding" else None
        self.num_channels = {"onehot": num_classes, "embedding": embedding_dim}.get(encoding, 1)

    def forward(self, mask_BHW: Tensor, dtype: torch.dtype, edge_B2HW: Tensor | None = None) -> Tensor:
        """If edges are given (not for scalars), a pixel's channels are the mean of those of its two classes, weighted
        by their shares. The shares of a pixel's further classes count for its second class.
        """
        if self.encoding.startswith("scalar"):
            value_B1HW = mask_BHW[:, None].to(dtype) / 255.0
            return value_B1HW if self.encoding == "scalar_255" else 2.0 * value_B1HW - 1.0
        first_BKHW = self._of_one_class(mask_BHW, dtype)
        if edge_B2HW is None:
            return first_BKHW
        share_B1HW = edge_B2HW[:, 1:].float() / 255.0
        second_BKHW = self._of_one_class(edge_B2HW[:, 0], dtype)
        return first_BKHW * share_B1HW.to(dtype) + second_BKHW * (1.0 - share_B1HW).to(dtype)

    def _of_one_class(self, ids_BHW: Tensor, dtype: torch.dtype) -> Tensor:
        if self.embedding is None:
            ids_K11 = torch.arange(self.num_classes, device=ids_BHW.device, dtype=torch.uint8)[:, None, None]
            return (ids_BHW[:, None] == ids_K11).to(dtype)
        known_B1HW = (ids_BHW < self.num_classes)[:, None]  # all but NULL_MASK
        embedded_BHWK = self.embedding(ids_BHW.long().clamp(max=self.num_classes - 1))
        return embedded_BHWK.permute(0, 3, 1, 2).to(dtype) * known_B1HW


class MaskJoin(nn.Module):
    """The network's input from the noised image and the encoded mask, section 3.2 of the paper.

    concat    [x; m]                               the best of the three in the paper
    add       x + m, or x + P m of several channels
    multiply  x * m, or x * (1 + P m) of several channels
    spade     x: the mask enters at the norms (spade.py)
    none      x: no mask

    P is a learned 1x1 convolution to the channels of x without bias, so that the null mask, m = 0, leaves x as it is.
    """

    def __init__(self, conditioning: Conditioning, num_mask_channels: int, num_image_channels: int = 1) -> None:
        super().__init__()
        self.conditioning = conditioning
        self.num_channels = num_image_channels + (num_mask_channels if conditioning == "concat" else 0)
        learned = conditioning in ("add", "multiply") and num_mask_channels > 1
        widths = (num_mask_channels, num_image_channels)
        self.projection = nn.Conv2d(*widths, kernel_size=1, bias=False) if learned else None

    def forward(self, x_t_B1HW: Tensor, mask_BKHW: Tensor) -> Tensor:
        """[B, num_channels, H, W]; both inputs in the weights' dtype."""
        if self.conditioning == "concat":
            return torch.cat((x_t_B1HW, mask_BKHW), dim=1)
        if self.conditioning in ("spade", "none"):
            return x_t_B1HW
        if self.projection is None:
            return x_t_B1HW + mask_BKHW if self.conditioning == "add" else x_t_B1HW * mask_BKHW
        projected_B1HW = self.projection(mask_BKHW)
        return x_t_B1HW + projected_B1HW if self.conditioning == "add" else x_t_B1HW * (1.0 + projected_B1HW)


def num_classes(num_modalities: int) -> int:
    """Classes of a net for this many modalities."""
    return max(num_modalities, len(MODALITIES)) * len(AXES) + 1


def class_ids(modality_B: Tensor, axis_B: Tensor) -> Tensor:
    """int64 [B] class of each (modality, axis); NULL_CLASS names neither."""
    return modality_B * len(AXES) + axis_B + (modality_B >= len(MODALITIES))


def modality_of(class_B: Tensor) -> Tensor:
    """int64 [B] modality of each class but NULL_CLASS: the inverse of class_ids."""
    return (class_B - (class_B > NULL_CLASS).long()) // len(AXES)


def without(conditions: Conditions, no_mask_B: Tensor, no_class_B: Tensor) -> Conditions:
    """The conditions, with masks and classes replaced by the null mask and NULL_CLASS where the bool [B] are true."""
    mask_BHW = conditions.mask_BHW.masked_fill(no_mask_B[:, None, None], NULL_MASK)
    class_B = conditions.class_B.masked_fill(no_class_B, NULL_CLASS)
    edge_B2HW = conditions.edge_B2HW
    if edge_B2HW is not None:  # 255: the (null) class of the mask has all of each pixel
        edge_B2HW = edge_B2HW.masked_fill(no_mask_B[:, None, None, None], 255)
    return conditions._replace(mask_BHW=mask_BHW, class_B=class_B, edge_B2HW=edge_B2HW)


def joined(one: Conditions, other: Conditions) -> list[Tensor | None]:
    """The network's arguments for both, in one batch."""
    pairs = zip(one, other, strict=True)
    return [None if a is None or b is None else torch.cat((a, b)) for a, b in pairs]


def drop_conditions(
    conditions: Conditions, seed: int, position_B: Tensor, *, mask_only: float, class_only: float, both: float
) -> Conditions:
    """Training for classifier-free guidance: each sample loses the mask, the class or both with these probabilities.

    The three exclude each other and are drawn by (seed, position). Ho and Salimans 2022, algorithm 1; of two conditions
    as Brooks et al. 2023, section 3.2.1.
    """
    if mask_only + class_only + both == 0.0:
        return conditions
    u_B = philox.uniform(seed, philox.STREAM_DROPOUT, position_B, 1)[:, 0]
    both_B = u_B < both
    no_mask_B = u_B < both + mask_only
    no_class_B = both_B | ((u_B >= both + mask_only) & (u_B < both + mask_only + class_only))
    return without(conditions, no_mask_B, no_class_B)


def guided(
    predict: Callable[..., Tensor],
    conditions: Conditions,
    guidance: float,
    removes: GuidanceRemoves,
    weaker: Callable[..., Tensor] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """predict(x_t, timestep_B) with the conditions bound and classifier-free guidance: p0 + guidance * (p1 - p0).

    p1 is predicted from all conditions, p0 from all but the removed ones. 1 is no guidance and costs one forward pass;
    other values cost one of twice the batch. With autoguidance p0 is the prediction of the `weaker` net from all
    conditions (Karras et al. 2024). At a given x_t, eps, v and x_0 are affine in each other, so guidance can be applied
    to any of them. Ho and Salimans 2022, eq. 6, with guidance = 1 + w.
    """
    if guidance == 1.0:
        return lambda x_t_BCHW, timestep_B: predict(x_t_BCHW, timestep_B, *conditions)
    if weaker is not None:

        def predict_away(x_t_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
            p0_BCHW = weaker(x_t_BCHW, timestep_B, *conditions)
            return p0_BCHW + guidance * (predict(x_t_BCHW, timestep_B, *conditions) - p0_BCHW)

        return predict_away
    yes_B = torch.ones_like(conditions.class_B, dtype=torch.bool)
    null_conditions = without(conditions, yes_B & (removes != "class"), yes_B & (removes != "mask"))
    doubled = joined(conditions, null_conditions)

    def predict_guided(x_t_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        p1_BCHW, p0_BCHW = predict(torch.cat((x_t_BCHW, x_t_BCHW)), timestep_B.repeat(2), *doubled).chunk(2)
        return p0_BCHW + guidance * (p1_BCHW - p0_BCHW)

    return predict_guided
