"""Dropout in the residual blocks (Ho et al. 2020, appendix B), as a function of (seed, position).

So the losses do not depend on ranks and micro-batches, a training resumes exactly, and activation checkpointing drops
the same again. Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from segdiff_kernels import philox


class Draws:
    """What the dropout of all blocks of a net draws from. Without positions nothing is dropped."""

    seed: int = 0
    position_B: Tensor | None = None

    def at(self, seed: int, position_B: Tensor) -> None:
        """Those of the next passes, a position for each sample."""
        self.seed, self.position_B = seed, position_B


class KeyedDropout(nn.Dropout):
    """nn.Dropout whose mask is drawn by (seed, position, layer)."""

    def __init__(self, p: float, layer: int, draws: Draws) -> None:
        super().__init__(p)
        self.layer, self.draws = layer, draws

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x / (1 - p), or 0 with probability p; in evaluation mode x."""
        if not self.training or self.draws.position_B is None:
            return x_BCHW
        stream = philox.STREAM_LAYERS + self.layer
        u_BN = philox.uniform(self.draws.seed, stream, self.draws.position_B, x_BCHW[0].numel())
        kept_BCHW = (u_BN >= self.p).view(x_BCHW.shape).to(x_BCHW.dtype)
        return x_BCHW * kept_BCHW / (1.0 - self.p)


def use_dropout(net: nn.Module, p: float) -> Draws:
    """Give the residual blocks of a net this dropout, in front of their second convolution."""
    from segdiff_dist.diffusers_parts import ResnetBlock2D

    draws = Draws()
    blocks = [module for module in net.modules() if isinstance(module, ResnetBlock2D)]
    for layer, block in enumerate(blocks):
        block.dropout = KeyedDropout(p, layer, draws)
    return draws
