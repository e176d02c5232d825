"""Attention's backends against float64, forward and backward, and how much of the net's work it is."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kernels_support import DEVICE, assert_near, fresh_generator
from torch import Tensor

from segdiff_dist.attention import Backend, attend

on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


def _attend_in_float64(q_NLHD: Tensor, k_NLHD: Tensor, v_NLHD: Tensor) -> Tensor:
    """Vaswani et al. 2017, eq. 1."""
    score_NHLM = torch.einsum("nlhd,nmhd->nhlm", q_NLHD, k_NLHD) / q_NLHD.shape[-1] ** 0.5
    return torch.einsum("nhlm,nmhd->nlhd", score_NHLM.softmax(-1), v_NLHD)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("sdpa", torch.float32),
        ("sdpa", torch.bfloat16),
        pytest.param("xformers", torch.bfloat16, marks=[pytest.mark.gpu, on_gpu]),
    ],
)
@pytest.mark.parametrize(("positions", "heads", "head_dim"), [(64, 8, 8), (64, 2, 64), (9, 3, 8)])
def test_forward_and_gradients(backend: Backend, dtype: torch.dtype, positions: int, heads: int, head_dim: int) -> None:
    if backend == "xformers" and find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    generator = fresh_generator()
    q, k, v, dy = (torch.randn(2, positions, heads, head_dim, generator=generator).to(DEVICE, dtype) for _ in range(4))
    y = attend(*(inputs := [x.clone().requires_grad_() for x in (q, k, v)]), backend)
    expected = _attend_in_float64(*(doubles := [x.double().requires_grad_() for x in (q, k, v)]))
    assert y.dtype == dtype
    assert_near(y.detach(), expected.detach())
    grads = torch.autograd.grad(y, inputs, dy)
    for grad, reference in zip(grads, torch.autograd.grad(expected, doubles, dy.double()), strict=True):
        assert_near(grad, reference)


def test_it_is_a_small_part_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "kernels" / "benchmarks"))
    shares = importlib.import_module("attention").flop_shares(256, 8)
    # Counted by hand: five blocks of 256 positions and one of 64, two products of 512 channels, forward and twice back.
    assert shares["products"] * shares["tflop"] == pytest.approx(3 * 2 * 2 * 512 * (5 * 256**2 + 64**2) / 1e12)
    assert shares["products"] < shares["blocks"] < 0.01
