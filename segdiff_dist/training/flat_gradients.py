"""Gradients in flat tensors that stay in place, for ZeRO 0 and 1.

The gradients of a micro-batch are added to them in place, so that this can be recorded and replayed (captured.py). The
ranks add them up once a step, and the update reads them without a copy for each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segdiff_dist.ranks.distributed import rank, sum_over_ranks, world_size


class FlatGradients:
    """The gradients of groups of parameters, end to end in one flat tensor for each group.

    `flats`: those tensors, in the dtype of the parameters, zero at first.
    """

    def __init__(self, groups: Sequence[Sequence[tuple[Tensor, int]]], sizes: Sequence[int]) -> None:
        """groups: (parameter, its offset in its group's flat tensor); sizes: elements of each flat tensor."""
        self.flats = [
            torch.zeros(size, dtype=group[0][0].dtype, device=group[0][0].device)
            for group, size in zip(groups, sizes, strict=True)
        ]
        # The optimiser needs a gradient in the layout of its parameter, which may be channels-last.
        self._views = [
            (parameter, flat.as_strided(parameter.shape, parameter.stride(), offset))
            for group, flat in zip(groups, self.flats, strict=True)
            for parameter, offset in group
        ]

    def attach(self) -> None:
        """Let these be the gradients of the parameters."""
        for parameter, view in self._views:
            parameter.grad = view

    def add(self, loss: Tensor) -> None:
        """Add the gradients of a loss.

        All at once, after the backward pass: autograd would launch an addition for each parameter.
        """
        for parameter, _ in self._views:
            parameter.grad = None
        loss.backward()
        reached = [(view, parameter.grad) for parameter, view in self._views if parameter.grad is not None]
        self.attach()
        if reached:
            views, gradients = zip(*reached, strict=True)
            torch._foreach_add_(views, gradients)

    def zero(self) -> None:
        """Begin the next step."""
        torch._foreach_zero_(self.flats)

    def reduce(self, *, in_parts: bool) -> list[Tensor]:
        """Means over the ranks of the accumulated gradients: all of them or, with `in_parts`, the piece of this rank.

        With one rank, or without `in_parts`, these are the flat tensors themselves.
        """
        ranks = world_size()
        if ranks == 1:
            return self.flats
        if not in_parts or self.flats[0].device.type == "cpu":  # gloo cannot scatter
            means = [sum_over_ranks(flat).mul_(1.0 / ranks) for flat in self.flats]
            return [flat.chunk(ranks)[rank()] for flat in means] if in_parts else means
        parts = []
        for flat in self.flats:
            part = torch.empty_like(flat.chunk(ranks)[rank()])
            torch.distributed.reduce_scatter_tensor(part, flat)
            parts.append(part.mul_(1.0 / ranks))
        return parts


def norm_over_ranks(parts: Sequence[Tensor]) -> Tensor:
    """Norm, float32, of tensors that all ranks hold in parts; `parts` are this rank's. The host does not wait for the
    device."""
    norms = []
    for part in parts:
        # In float64, so that the number of ranks changes only the rounding of the float32 result.
        (norm,) = torch._foreach_norm([part], 2, torch.float64)
        norms.append(sum_over_ranks(norm.square().float()).sqrt())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
