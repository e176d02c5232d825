"""Organs left out of masks, so that masks which lack organs can be sampled: Konz et al. 2024, mask-ablated training.

Dimensions: B batch, K classes, H, W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_shards.labels import BACKGROUND, LabelTable
from segdiff_dist.denoising.conditioning import Conditions
from segdiff_kernels import philox

# Every combination of organs is then equally likely, as in Konz et al. 2024.
_REMOVED = 0.5


def drop_organs(
    conditions: Conditions, table: LabelTable, probability: float, seed: int, position_B: Tensor
) -> Conditions:
    """With this probability a sample loses each of its organs with probability 0.5; drawn by (seed, position).

    A lost organ becomes body, or background in a table without that class. Soft edges follow.
    """
    if probability == 0.0:
        return conditions
    # Word 0 says whether the sample is ablated, word 1 + k whether it then loses class k.
    u_BK = philox.uniform(seed, philox.STREAM_ORGANS, position_B, 1 + table.num_classes)
    lost_BK = (u_BK[:, :1] < probability) & (u_BK[:, 1:] < _REMOVED)
    return relabelled(conditions, lost_BK, table)


def organ_flags(table: LabelTable, device: torch.device) -> Tensor:
    """bool [K]: whether each id is an organ."""
    is_organ_K = torch.zeros(table.num_classes, dtype=torch.bool, device=device)
    is_organ_K[list(table.organ_ids)] = True
    return is_organ_K


def relabelled(conditions: Conditions, lost_BK: Tensor, table: LabelTable) -> Conditions:
    """The conditions without the organs that bool [B, K] names. Ids that are not organs always stay."""
    filling = table.names.index(BACKGROUND) if table.body_id is None else table.body_id
    ids_K = torch.arange(table.num_classes, device=lost_BK.device)
    is_organ_K = (ids_K != table.names.index(BACKGROUND)) & (ids_K != filling)
    new_id_BK = torch.where(lost_BK & is_organ_K, filling, ids_K).to(torch.uint8)

    def new_ids(ids_BHW: Tensor) -> Tensor:
        return new_id_BK.gather(1, ids_BHW.flatten(1).long()).view_as(ids_BHW)

    edge_B2HW = conditions.edge_B2HW
    if edge_B2HW is not None:
        edge_B2HW = torch.stack((new_ids(edge_B2HW[:, 0]), edge_B2HW[:, 1]), dim=1)
    return conditions._replace(mask_BHW=new_ids(conditions.mask_BHW), edge_B2HW=edge_B2HW)
