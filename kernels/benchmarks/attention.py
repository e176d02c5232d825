"""Attention's backends at the shapes of the UNet, forward and backward, and attention's small share of the net's work.

The paper's net has 64 heads of 8 channels where feature maps are 16 x 16 (five blocks) and in the middle (one block);
heads of 64 are `denoiser.attention_head_dim: 64`. The share of the FLOPs is counted, on any machine; the backends are
timed where there is a GPU. N batch, L positions, H heads, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import _bench
import torch
from _bench import DEVICE, Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_shards.labels import AMOS
from segdiff_dist.attention import Backend, attend, why_not_xformers
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser

BATCH = 32
# What scaled_dot_product_attention chooses from on a GPU.
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
SDPA |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


def flop_shares(size: int, head_dim: int) -> dict[str, float]:
    """TFLOP of one training image, and the shares of attention in them: of the two products that grow with the square
    of the positions, and of the blocks with their projections."""
    net = DenoiserConfig(attention_head_dim=head_dim, attention_resolutions=(size // 16,), kernels="torch")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        denoiser = Denoiser(net, AMOS, size)
        one = torch.zeros(1, dtype=torch.int64)
        labels_BHW = torch.empty(1, size, size, dtype=torch.uint8)
        denoiser(torch.empty(1, 1, size, size), one, labels_BHW, one).sum().backward()
    total, by_module = counter.get_total_flops(), counter.get_flop_counts()
    products = by_module["Global"][torch.ops.aten.bmm]
    blocks = sum(
        sum(counts.values())
        for name, counts in by_module.items()
        if ".attentions." in name and name.rsplit(".", 2)[1] == "attentions"
    )
    return {"tflop": total / 1e12, "products": products / total, "blocks": blocks / total}


def cases(size: int, batch: int = BATCH) -> list[Case]:
    """Both feature maps that attend at this size, with heads of 8 and of 64; 512 channels."""
    channels = 512 if size >= 256 else 32
    return [
        _case(batch, max(side, 2) ** 2, channels // head_dim, head_dim)
        for side in (size // 16, size // 32)
        for head_dim in (8, 64)
        if head_dim < channels
    ]


def _case(batch: int, positions: int, heads: int, head_dim: int) -> Case:
    """q, k, v and dy are read, y, dq, dk and dv are written: the least number of bytes for any backend."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

    def inputs() -> tuple[Tensor, ...]:
        q, k, v, dy = (torch.randn(batch, positions, heads, head_dim, device=DEVICE, dtype=dtype) for _ in range(4))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy

    name = f"{batch} x {positions} positions, {heads} heads of {head_dim}"
    num_bytes = 8 * batch * positions * heads * head_dim * dtype.itemsize
    return Case(name, num_bytes, inputs, _contenders())


def _contenders() -> dict[str, Callable[..., Any]]:
    if DEVICE.type != "cuda":
        return {"sdpa": partial(_both_ways, "sdpa", None), "written out": partial(_both_ways, None, None)}
    found: dict[str, Callable[..., Any]] = {}
    if why_not_xformers(DEVICE) is None:
        found["xformers"] = partial(_both_ways, "xformers", None)
    return found | {f"sdpa, {name}": partial(_both_ways, "sdpa", backend) for name, backend in SDPA.items()}


def _both_ways(
    backend: Backend | None, kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """Output and gradients."""
    if kernel is not None:
        with sdpa_kernel(kernel):
            y = attend(q, k, v, "sdpa")
    else:
        y = written_out(q, k, v) if backend is None else attend(q, k, v, backend)
    return y, *torch.autograd.grad(y, (q, k, v), dy)


def written_out(q_NLHD: Tensor, k_NLHD: Tensor, v_NLHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, step by step. Vaswani et al. 2017, eq. 1."""
    score_NHLM = torch.einsum("nlhd,nmhd->nhlm", q_NLHD, k_NLHD) / q_NLHD.shape[-1] ** 0.5
    return torch.einsum("nhlm,nmhd->nlhd", score_NHLM.softmax(-1), v_NLHD)


def real() -> list[Case]:
    return cases(256) + cases(512)


def toy() -> list[Case]:
    return cases(64, batch=2)


BENCHMARK = _bench.Benchmark(__doc__, real, toy)

if __name__ == "__main__":
    for side in (256, 512):
        for width in (8, 64):
            share = flop_shares(side, width)
            print(
                f"{side} x {side}, heads of {width}: {share['tflop']:.2f} TFLOP an image, attention's products "
                f"{share['products']:.2%} of them, its blocks {share['blocks']:.2%}"
            )
    BENCHMARK.main()
