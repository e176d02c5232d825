"""residual_add against float64, its partials against torch's statistics, and a residual block of all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_support import DEVICE, assert_near, fresh_generator, randn
from torch import Tensor

from segdiff_kernels import residual_add as op
from segdiff_kernels.group_norm_silu import group_norm_silu
from segdiff_kernels.partials import slice_pixels
from segdiff_kernels.residual_add import residual_add, residual_add_reference
from segdiff_kernels.tiles import chunk_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (N, C, H, W), dtype, of the bias.
CASES = [
    ((1, 128, 8, 8), BF16, FP32),
    ((2, 40, 9, 7), FP32, BF16),
    ((2, 12, 9, 7), FP16, FP16),
    ((1, 3, 1, 1), FP32, FP32),
    ((1, 8, 33, 33), FP32, FP32),
]


@pytest.mark.parametrize(("shape", "dtype", "bias_dtype"), CASES)
def test_the_sum_its_statistics_and_its_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    g = fresh_generator()
    branch, shortcut, gradient = (randn(g, *shape, dtype=dtype) for _ in range(3))
    leaves = [branch.requires_grad_(), shortcut.requires_grad_(), randn(g, shape[1], dtype=bias_dtype).requires_grad_()]
    found, partials = residual_add(*leaves, with_partials=True)
    assert_near(found.detach(), residual_add_reference(*(t.detach().double() for t in leaves)))
    assert torch.equal(found, residual_add(*leaves))

    assert not partials.requires_grad
    pixels = found.detach().double().flatten(2).split(slice_pixels(shape[2] * shape[3]), dim=2)
    assert_near(partials[:, :, 0], torch.stack([p.mean(2) for p in pixels], dim=1))
    assert_near(partials[:, :, 1], torch.stack([p.var(2, correction=0) * p.shape[2] for p in pixels], dim=1), 2e-5)

    to_branch, to_shortcut, to_bias = torch.autograd.grad(found, leaves, gradient)
    assert to_branch.data_ptr() == to_shortcut.data_ptr() == gradient.data_ptr()
    assert_near(to_bias, gradient.double().sum(dim=(0, 2, 3)))


def test_without_bias_nothing_is_launched_in_the_backward_pass() -> None:
    g = fresh_generator()
    branch, shortcut = randn(g, 1, 8, 2, 2).requires_grad_(), randn(g, 1, 8, 2, 2).requires_grad_()
    total = residual_add(branch, shortcut)
    assert torch.equal(total, branch + shortcut)
    gradient = torch.ones_like(total).contiguous()  # of any layout
    assert all(t.data_ptr() == gradient.data_ptr() for t in torch.autograd.grad(total, (branch, shortcut), gradient))


def test_the_partials_keep_their_digits_where_the_mean_is_large() -> None:
    g = fresh_generator()
    branch = (randn(g, 1, 8, 16, 8) + 1e3).contiguous(memory_format=torch.channels_last)
    found, partials = residual_add(branch, randn(g, 1, 8, 16, 8), with_partials=True)
    expected = torch.stack([p.var(2, correction=0) * 64 for p in found.double().flatten(2).split(64, dim=2)], dim=1)
    assert_near(partials[:, :, 1], expected, 2e-5)


@pytest.mark.parametrize("with_shift", [False, True])
def test_the_norm_that_follows_may_use_them_instead_of_reading(with_shift: bool) -> None:
    g = fresh_generator()
    weight, bias, shift = randn(g, 24), randn(g, 24), randn(g, 2, 24) if with_shift else None
    x, partials = residual_add(randn(g, 2, 24, 5, 9), randn(g, 2, 24, 5, 9), with_partials=True)
    expected = group_norm_silu(x, weight, bias, 6, shift_NC=shift)
    assert_near(group_norm_silu(x, weight, bias, 6, shift_NC=shift, partials=partials), expected, 1e-6)


def block(x: Tensor, parameters: list[Tensor], shift: Tensor) -> Tensor:
    """A residual block of 1x1 convolutions, its shortcut round the norm, and a norm behind it."""
    first, second, *affine, bias = parameters
    y, x_again = group_norm_silu(x, affine[0], affine[1], 4, fork=True)
    y = group_norm_silu(torch.conv2d(y, first), affine[2], affine[3], 4, shift_NC=shift)
    total, partials = residual_add(torch.conv2d(y, second), x_again, bias, with_partials=True)
    return group_norm_silu(total, affine[4], affine[5], 4, partials=partials)


def test_a_residual_block_compiles_whole_and_gives_the_same_gradients() -> None:
    g = fresh_generator()
    leaves = [randn(g, 1, 8, 4, 4), *(randn(g, 8, 8, 1, 1) for _ in range(2)), *(randn(g, 8) for _ in range(7))]
    leaves = [t.requires_grad_() for t in leaves]
    shift, gradient = randn(g, 1, 8), randn(g, 1, 8, 4, 4)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found, expected = compiled(leaves[0], leaves[1:], shift), block(leaves[0], leaves[1:], shift)
    assert_near(found.detach(), expected.detach(), 1e-6)
    gradients = (torch.autograd.grad(y, leaves, gradient) for y in (found, expected))
    for a, b in zip(*gradients, strict=True):
        assert_near(a, b, 1e-6)


def test_the_operator_is_one_that_torch_can_trace() -> None:
    g = fresh_generator()
    inputs = [
        randn(g, 1, 8, 2, 2).requires_grad_(),
        randn(g, 1, 8, 2, 2).requires_grad_(),
        randn(g, 8).requires_grad_(),
    ]
    torch.library.opcheck(op.forward_op, (*inputs, True))
    torch.library.opcheck(
        op.bias_gradient_op, (inputs[0].detach(), BF16), test_utils=("test_schema", "test_faketensor")
    )


def test_the_rows_of_a_batch_are_shared_among_at_most_512_programs() -> None:
    for rows in (1, 31, 32, 64 * 64 * 32, 256 * 256 * 32 + 5):
        chunk = chunk_rows(rows, 32)
        assert chunk % 32 == 0
        assert -(-rows // chunk) <= 512


def channels_last(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("branch_NCHW", torch.zeros(2, 8, 3, 3, device=DEVICE)),
        ("branch_NCHW", channels_last(2, 8, 3, 3, dtype=torch.float64)),
        ("shortcut_NCHW", torch.zeros(2, 8, 3, 3, device=DEVICE)),
        ("shortcut_NCHW", channels_last(2, 8, 3, 4)),
        ("shortcut_NCHW", channels_last(2, 8, 3, 3, dtype=FP16)),
        ("bias_C", torch.zeros(4, device=DEVICE)),
        ("bias_C", torch.zeros(8, dtype=torch.int64, device=DEVICE)),
        ("bias_C", torch.zeros(16, device=DEVICE)[::2]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(argument: str, value: Any) -> None:
    valid = {"branch_NCHW": channels_last(2, 8, 3, 3), "shortcut_NCHW": channels_last(2, 8, 3, 3), "bias_C": None}
    with pytest.raises(ValueError, match=f"residual_add: {argument}: .*give "):
        residual_add(**(valid | {argument: value}))
