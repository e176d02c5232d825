"""skip_group_norm_silu against float64 with the concatenation it does without; groups across the border; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_support import DEVICE, assert_near, fresh_generator, randn
from torch import Tensor

from segdiff_kernels import skip_group_norm_silu as op
from segdiff_kernels.group_norm_silu import group_norm_silu
from segdiff_kernels.residual_add import residual_add
from segdiff_kernels.skip_group_norm_silu import skip_group_norm_silu, skip_group_norm_silu_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# (N, H, W), C1, C2, groups, dtype of x and skip, of the parameters.
CASES = [
    ((1, 8, 8), 128, 128, 32, FP32, FP32),  # as in the UNet
    ((1, 4, 4), 256, 128, 32, BF16, FP32),  # as in the UNet: groups of 12 straddle the border
    ((2, 9, 7), 24, 40, 8, FP32, FP32),
    ((2, 9, 7), 5, 7, 2, BF16, BF16),  # a group straddles, and neither count is a power of two
    ((2, 9, 7), 40, 24, 1, FP16, FP32),
    ((1, 1, 1), 48, 16, 8, FP32, FP32),
    ((1, 33, 33), 8, 4, 3, FP32, FP32),  # slices of several tiles, the last one shorter
]


@pytest.mark.parametrize(("size", "c1", "c2", "groups", "dtype", "parameters"), CASES)
def test_forward_and_gradients_are_those_of_float64(
    size: tuple[int, int, int], c1: int, c2: int, groups: int, dtype: torch.dtype, parameters: torch.dtype
) -> None:
    n, h, w = size
    g = fresh_generator()
    x, skip = randn(g, n, c1, h, w, dtype=dtype), randn(g, n, c2, h, w, dtype=dtype) + 2
    weight, bias = randn(g, c1 + c2, dtype=parameters), randn(g, c1 + c2, dtype=parameters)
    gradients = [randn(g, n, c, h, w, dtype=dtype) for c in (c1 + c2, c1, c2)]
    shift, skip_shift = randn(g, c1, dtype=parameters).expand(n, -1), randn(g, n, c2, dtype=parameters)
    leaves = [t.requires_grad_() for t in (x, skip, weight, bias, shift, skip_shift)]
    outputs = skip_group_norm_silu(*leaves[:4], groups, shift_NC=shift, skip_shift_NC=skip_shift, fork=True)
    assert torch.equal(outputs[1], x)
    assert torch.equal(outputs[2], skip)
    found = [outputs[0].detach(), *torch.autograd.grad(outputs, leaves, gradients)]

    doubles = [t.detach().double().requires_grad_() for t in leaves]
    y = skip_group_norm_silu_reference(*doubles[:4], groups, shift_NC=doubles[4], skip_shift_NC=doubles[5])
    forked = (y, doubles[0].clone(), doubles[1].clone())
    expected = [y.detach(), *torch.autograd.grad(forked, doubles, [t.double() for t in gradients])]
    for tensor, reference in zip(found, expected, strict=True):
        assert_near(tensor, reference)


def test_it_is_group_norm_silu_of_the_concatenation() -> None:
    g = fresh_generator()
    x, skip, weight, bias = randn(g, 2, 32, 6, 6), randn(g, 2, 64, 6, 6), randn(g, 96), randn(g, 96)
    both = torch.cat((x, skip), dim=1).contiguous(memory_format=torch.channels_last)
    expected = group_norm_silu(both, weight, bias, 12, silu=False)
    assert_near(skip_group_norm_silu(x, skip, weight, bias, 12, silu=False), expected, 1e-6)


def test_partials_of_either_or_both_save_a_pass_and_change_nothing() -> None:
    g = fresh_generator()
    weight, bias = randn(g, 96), randn(g, 96)
    x, partials = residual_add(randn(g, 2, 64, 5, 9), randn(g, 2, 64, 5, 9), with_partials=True)
    skip, skip_partials = residual_add(randn(g, 2, 32, 5, 9), randn(g, 2, 32, 5, 9), with_partials=True)
    expected = skip_group_norm_silu(x, skip, weight, bias, 12)
    for given in ({"partials": partials}, {"skip_partials": skip_partials, "partials": partials}):
        assert_near(skip_group_norm_silu(x, skip, weight, bias, 12, **given), expected, 1e-6)


def test_without_fork_and_only_round_the_norm() -> None:
    g = fresh_generator()
    x, skip = randn(g, 1, 8, 3, 3).requires_grad_(), randn(g, 1, 8, 3, 3).requires_grad_()
    weight, bias, dy = randn(g, 16), randn(g, 16), randn(g, 1, 16, 3, 3)
    y, x_again, skip_again = skip_group_norm_silu(x, skip, weight, bias, 4, fork=True)
    plain = torch.autograd.grad(skip_group_norm_silu(x, skip, weight, bias, 4), (x, skip), dy)
    through = torch.autograd.grad(y, (x, skip), dy, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, through, strict=True))
    residuals = randn(g, 1, 8, 3, 3), randn(g, 1, 8, 3, 3)
    round_it = torch.autograd.grad((x_again, skip_again), (x, skip), residuals)
    assert all(torch.equal(a, b) for a, b in zip(round_it, residuals, strict=True))


def test_the_operator_is_one_that_torch_can_trace() -> None:
    g = fresh_generator()
    x, skip = randn(g, 1, 8, 2, 2).requires_grad_(), randn(g, 1, 4, 2, 2).requires_grad_()
    weight, bias = randn(g, 12).requires_grad_(), randn(g, 12).requires_grad_()
    skip_shift = randn(g, 1, 4).requires_grad_()
    torch.library.opcheck(op.forward_op, (x, skip, weight, bias, None, skip_shift, None, None, None, 2, 1e-5, True))


def valid() -> dict[str, Any]:
    x, skip = (torch.zeros(2, c, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last) for c in (8, 4))
    parameter = torch.zeros(12, device=DEVICE)
    return {"x_NCHW": x, "skip_NCHW": skip, "weight_C": parameter, "bias_C": parameter, "num_groups": 2}


def channels_last(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x_NCHW", torch.zeros(2, 8, 3, 3, device=DEVICE)),
        ("skip_NCHW", torch.zeros(2, 4, 3, 3, device=DEVICE)),
        ("skip_NCHW", channels_last(2, 4, 3, 4)),
        ("skip_NCHW", channels_last(1, 4, 3, 3)),
        ("skip_NCHW", channels_last(2, 4, 3, 3, dtype=BF16)),
        ("weight_C", torch.zeros(8, device=DEVICE)),
        ("num_groups", 5),
        ("shift_NC", torch.zeros(2, 4, device=DEVICE)),
        ("skip_shift_NC", torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)),
        ("partials", torch.zeros(2, 1, 2, 4, device=DEVICE)),
        ("skip_partials", torch.zeros(2, 1, 2, 8, device=DEVICE)),
    ],
)
def test_what_is_not_supported_is_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"skip_group_norm_silu: {argument}: .*give "):
        skip_group_norm_silu(**(valid() | {argument: value}))
