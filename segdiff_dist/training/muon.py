"""Muon: an update whose matrices are orthogonal, for the weights of hidden layers; AdamW for everything else.

    m <- momentum m + (1 - momentum) g          g' = momentum m + (1 - momentum) g   (Nesterov)
    w <- (1 - lr weight_decay) w - lr scale NewtonSchulz(g'),  scale = 0.2 sqrt(max(rows, columns))

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale, which lets it share AdamW's
learning rate, is that of Liu et al. 2025, "Muon is scalable for LLM training", section 2.2. A convolution's weight
[out, in, h, w] is the matrix [out, in h w].

torch.optim.Muon and DeepSpeed's Muon need whole matrices. Here weights are pieces of flat tensors, as ZeRO divides
them: every rank gathers g' and orthogonalises the matrices of which it holds a piece. The state is Adam's first moment,
so a checkpoint can be read with any number of ranks. A veto is read on the device, and the host does not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segdiff_dist.training.sharded_state import Extent

# Jordan et al. 2024.
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Five iterations, in the form of Dao et al. 2026, "Gram Newton-Schulz", which DeepSpeed also uses.
_BETWEEN_RESTARTS = (2, 3)
# Root mean square of an AdamW update: Liu et al. 2025, section 2.2.
_UPDATE_RMS = 0.2
# A matrix narrower than this has too few directions for Muon to help.
_LEAST_SIDE = 16


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates this weight: a matrix or convolution between hidden layers.

    AdamW updates first and last layers, embeddings, and the projections of the time embedding, as Jordan et al. advise.
    """
    if parameter.dim() < 2 or min(len(parameter), parameter[0].numel()) < _LEAST_SIDE:
        return False
    return not any(part in name for part in ("conv_in.", "conv_out.", "embedding", "time_emb"))


def orthogonalised(matrix_MN: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Float32 [M, N]: U V^T of the singular value decomposition U S V^T, with singular values from about 0.7 to 1.2.

    A quintic Newton-Schulz iteration, computed in `dtype`: Jordan et al. 2024.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    wide = matrix_MN.T if tall else matrix_MN
    x = (wide / (wide.norm() + 1e-7)).to(dtype)
    # x <- (a + b R + c R^2) x with R = x x^T, five times: the factors are multiplied first, since R is the smaller
    # matrix. Its rounding errors grow meanwhile, so x is computed once in between.
    for num_iterations in _BETWEEN_RESTARTS:
        gram = x @ x.T
        factor = torch.eye(len(x), dtype=dtype, device=x.device)
        for iteration in range(num_iterations):
            next_factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            factor = torch.addmm(factor, next_factor, factor, beta=a)
            if iteration + 1 < num_iterations:
                half = torch.addmm(gram, next_factor, gram, beta=a)
                gram = torch.addmm(half, half, next_factor, beta=a)
        x = factor @ x
    return (x.T if tall else x).float().contiguous()


@dataclass(frozen=True)
class _Piece:
    """Elements start..stop of a flattened matrix, at `offset` of a flat tensor of `rank`."""

    rank: int
    shard: int
    start: int
    stop: int
    offset: int


class MuonAdamW(torch.optim.Optimizer):
    """AdamW whose groups with `muon: True` get Muon's update instead.

    `lay_out` must be called before the first step; it gives the positions of the matrices in the flat tensors of those
    groups. `found_inf`, if set, is a number on the device: if it is not 0, the step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype = torch.bfloat16, **adamw: Any
    ) -> None:
        """`dtype`: for orthogonalising. `adamw`: arguments of AdamW; lr and weight_decay are Muon's too."""
        named = list(named_parameters)
        hidden = [p for name, p in named if is_hidden_matrix(name, p)]
        others = [p for name, p in named if not is_hidden_matrix(name, p)]
        self._adamw = torch.optim.AdamW(others, **adamw)
        groups = [{"params": others, "muon": False, **self._adamw.defaults}]
        groups += [{"params": hidden, "muon": True}] if hidden else []
        super().__init__(groups, {"lr": adamw["lr"], "weight_decay": adamw["weight_decay"]})
        self._adamw.state = self.state
        self._matrices: list[tuple[tuple[int, int], list[_Piece]]] = []
        self._shards: list[Tensor] = []
        self._rank, self._dtype = 0, dtype

    def lay_out(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        shards: list[Tensor],
        extents_of_ranks: Sequence[Sequence[Extent]],
        rank: int,
    ) -> None:
        """shards: this rank's flat weights, as in `extents_of_ranks[rank]`. extents_of_ranks: the extents of every
        rank; all ranks have flat tensors of equal number and length. A single entry: every rank holds everything."""
        mine = {id(p) for g in self.param_groups if g["muon"] for p in g["params"]}
        held = {i for i, shard in enumerate(shards) if id(shard) in mine}
        self._shards, self._rank = shards, rank
        pieces: dict[str, list[_Piece]] = {}
        for owner, extents in enumerate(extents_of_ranks):
            for e in extents:
                if e.shard in held:
                    pieces.setdefault(e.parameter, []).append(_Piece(owner, e.shard, e.start, e.stop, e.offset))
        self._gathers = sorted(held) if len(extents_of_ranks) > 1 else []
        self._matrices = [
            ((shapes[name][0], math.prod(shapes[name][1:])), of_matrix)
            for name, of_matrix in pieces.items()
            if any(piece.rank == rank for piece in of_matrix)
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of the groups that are now in `param_groups`: ZeRO puts one group there at a time."""
        for group in self.param_groups:
            (self._step_muon if group["muon"] else self._step_adamw)(group)

    def _step_adamw(self, group: dict[str, Any]) -> None:
        self._adamw.param_groups = [group]
        if self.found_inf is not None:
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()

    def _step_muon(self, group: dict[str, Any]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        # 1 or 0, without waiting for the device. A vetoed gradient may hold NaN, and NaN times 0 is NaN.
        allowed = 1.0 if self.found_inf is None else (self.found_inf == 0).float()
        looking_ahead: dict[int, Tensor] = {}
        for shard in group["params"]:
            moment = self._moment(shard)
            grad = shard.grad if self.found_inf is None else torch.where(self.found_inf == 0, shard.grad, moment)
            moment.lerp_(grad, 1.0 - _MOMENTUM)
            looking_ahead[id(shard)] = grad.lerp(moment, _MOMENTUM)
            shard.mul_(1.0 - lr * decay * allowed)
        gathered = self._gathered(looking_ahead)
        for (rows, columns), pieces in self._matrices:
            flats = [gathered[p.rank][p.shard].view(-1)[p.offset : p.offset + p.stop - p.start] for p in pieces]
            update = orthogonalised(torch.cat(flats).view(rows, columns), self._dtype).view(-1)
            step = -lr * _UPDATE_RMS * math.sqrt(max(rows, columns)) * allowed
            for p in pieces:
                if p.rank == self._rank:
                    weight = self._shards[p.shard].view(-1)[p.offset : p.offset + p.stop - p.start]
                    weight.add_(update[p.start : p.stop] * step)

    def _moment(self, shard: Tensor) -> Tensor:
        state = self.state[shard]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(shard)
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.device)
        state["step"] += 1 if self.found_inf is None else (self.found_inf == 0).float()
        moment: Tensor = state["exp_avg"]
        return moment

    def _gathered(self, looking_ahead: dict[int, Tensor]) -> dict[int, dict[int, Tensor]]:
        """rank -> shard -> its flat tensor: for every rank if matrices are divided between ranks."""
        own = {i: looking_ahead[id(s)] for i, s in enumerate(self._shards) if id(s) in looking_ahead}
        if not self._gathers:
            return {self._rank: own}
        ranks = torch.distributed.get_world_size()
        gathered: dict[int, dict[int, Tensor]] = {r: {} for r in range(ranks)}
        for shard in self._gathers:
            flats = [torch.empty_like(own[shard]).view(-1) for _ in range(ranks)]
            torch.distributed.all_gather(flats, own[shard].reshape(-1).contiguous())
            for r, flat in enumerate(flats):
                gathered[r][shard] = flat
        return gathered
