"""Self-attention of the networks, and the switch for what computes it: xformers on CUDA, torch elsewhere.

This file owns xformers. N batch, L positions, H heads, D their width, C = H * D channels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.files import first_line
from data_shards.problems import problem

if TYPE_CHECKING:
    from segdiff_dist.diffusers_parts import Attention

AttentionBackend = Literal["auto", "sdpa", "xformers"]
Backend = Literal["sdpa", "xformers"]


def choose_attention(requested: AttentionBackend, device: torch.device, head_dim: int = 8) -> Backend:
    """The backend for heads of this width on `device`. A backend that is given by name but not possible is refused;
    `auto` takes one that works there."""
    if requested == "sdpa" or (reason := why_not_xformers(device, head_dim)) is None:
        return "sdpa" if requested == "sdpa" else "xformers"
    if requested == "xformers":
        raise problem("config", "denoiser.attention", "xformers", f"xformers {reason}; use auto or sdpa")
    return "sdpa"


@cache
def why_not_xformers(device: torch.device, head_dim: int = 8) -> str | None:
    """Why xformers cannot compute attention on `device`; None if it can, forward and backward, in bf16 and fp32.

    It is tried, because its wheel can be imported beside a torch or CUDA that it was not built for, and then refuses
    every call.
    """
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if importlib.util.find_spec("xformers") is None:
        return "is not installed: it comes with the `cuda` extra"
    try:
        for dtype in (torch.bfloat16, torch.float32):
            x_NLHD = torch.ones(1, 16, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
            attend(x_NLHD, x_NLHD, x_NLHD, "xformers").sum().backward()
    except Exception as error:  # a build for another torch may raise anything
        return f"fails here: {first_line(error)}"
    return None


def attend(q_NLHD: Tensor, k_NLHD: Tensor, v_NLHD: Tensor, backend: Backend) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head, [N, L, H, D]. Vaswani et al. 2017, eq. 1."""
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

        return memory_efficient_attention(q_NLHD, k_NLHD, v_NLHD)
    if q_NLHD.device.type != "cpu":
        return _sdpa(q_NLHD, k_NLHD, v_NLHD)
    # On a CPU the backward pass in bf16 takes up to six times what it takes in fp32: a sixth of a small net's step.
    with torch.autocast("cpu", enabled=False):
        return _sdpa(q_NLHD.float(), k_NLHD.float(), v_NLHD.float()).to(q_NLHD.dtype)


def _sdpa(q_NLHD: Tensor, k_NLHD: Tensor, v_NLHD: Tensor) -> Tensor:
    q_NHLD, k_NHLD, v_NHLD = (x.transpose(1, 2) for x in (q_NLHD, k_NLHD, v_NLHD))
    return F.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD).transpose(1, 2)


def set_attention(unet: Any, backend: Backend) -> None:
    """Make every attention block of a diffusers model compute with `backend`, fused or not."""
    from segdiff_dist.diffusers_parts import Attention

    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(SelfAttention(backend))


class SelfAttention:
    """What a diffusers Attention block over an image's pixels does, between its norm and its residual sum."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(
        self,
        block: Attention,
        x_NCHW: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention.forward of a block with a group norm and a residual connection, as in UNet2DModel. It ignores the
        time, which the middle block passes."""
        assert encoder_hidden_states is None
        assert attention_mask is None
        N, C, H, W = x_NCHW.shape
        y_NCL = block.group_norm(x_NCHW.flatten(2))
        y_NLC = self.of_pixels(block, y_NCL.transpose(1, 2))
        # x first: a sum has the memory layout of its first term.
        return x_NCHW + y_NLC.transpose(1, 2).reshape(N, C, H, W)

    def of_pixels(self, block: Attention, x_NLC: Tensor, joined: Joined | None = None) -> Tensor:
        """From normalised pixels to the term that is added to them; `joined`: the block's of joined_projections."""
        N, L, _ = x_NLC.shape
        if joined is None:
            q_NLHD, k_NLHD, v_NLHD = (to(x_NLC).view(N, L, block.heads, -1) for to in _projections(block))
        else:
            q_NLHD, k_NLHD, v_NLHD = F.linear(x_NLC, *joined).view(N, L, 3, block.heads, -1).unbind(2)
        return block.to_out[0](attend(q_NLHD, k_NLHD, v_NLHD, self.backend).flatten(2))


# Weight [3 C, C] and bias [3 C] of a block's queries, keys and values.
Joined = tuple[Tensor, Tensor]


def joined_projections(blocks: Sequence[Attention]) -> list[Joined | None]:
    """What makes a block's queries, keys and values one product, of blocks of one width; None for the others.

    The weights of all blocks are joined at once, so that it takes two launches, and as many in the backward pass.
    """
    linears = [to for block in blocks for to in _projections(block)]
    # ZeRO 3 brings weights together where their module is called.
    alike = {(to.weight.shape, to.bias is None, hasattr(to.weight, "ds_id")) for to in linears}
    if len(alike) != 1 or next(iter(alike))[1:] != (False, False):
        return [None] * len(blocks)
    weight_TC = torch.cat([to.weight for to in linears])
    bias_T = torch.cat([to.bias for to in linears])
    return list(zip(weight_TC.chunk(len(blocks)), bias_T.chunk(len(blocks)), strict=True))


def _projections(block: Attention) -> tuple[Any, Any, Any]:
    return block.to_q, block.to_k, block.to_v
