"""group_norm_silu against float64, forward and every gradient; what it must not depend on; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_support import DEVICE, assert_near, fresh_generator, randn
from torch import Tensor

from segdiff_kernels import group_norm_silu as op
from segdiff_kernels import tiles
from segdiff_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from segdiff_kernels.partials import num_slices, slice_pixels
from segdiff_kernels.tiles import (
    channel_tile,
    merge_tiles,
    num_counters,
    one_pass_channels,
    parts_in_flight,
    pixel_tile,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def results(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, dy: Tensor, **options: Any) -> list[Tensor]:
    """y, and the gradients of x, weight, bias and, if there is one, shift."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, shift) if t is not None]
    y = group_norm_silu(*leaves[:3], shift_NC=leaves[3] if shift is not None else None, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def expected(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, dy: Tensor, num_groups: int, silu: bool = True
) -> list[Tensor]:
    """The same by the reference, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias, shift) if t is not None]
    shift = leaves[3] if shift is not None else None
    y = group_norm_silu_reference(*leaves[:3], num_groups, shift_NC=shift, silu=silu)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


# (N, C, H, W), groups, dtype of x, of the parameters, of the shift.
CASES = [
    ((1, 128, 8, 8), 32, FP32, FP32, FP32),  # as in the UNet: no masks
    ((1, 128, 8, 8), 32, BF16, FP32, BF16),
    ((2, 40, 5, 7), 8, FP32, FP32, FP32),  # neither channels nor channels a group a power of two
    ((2, 40, 5, 7), 8, BF16, BF16, FP32),
    ((2, 40, 5, 7), 8, FP16, FP32, FP16),
    ((1, 320, 3, 3), 32, BF16, FP16, BF16),
    ((1, 96, 4, 4), 32, FP32, BF16, FP32),
    ((1, 48, 1, 1), 8, FP32, FP32, FP32),  # one pixel, one sample
    ((3, 24, 9, 9), 1, FP32, FP32, FP32),  # one group
    ((1, 8, 33, 33), 4, FP32, FP32, FP32),  # slices of several tiles, the last one shorter
]


@pytest.mark.parametrize(("shape", "groups", "dtype", "parameters", "shifts"), CASES)
def test_forward_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, parameters: torch.dtype, shifts: torch.dtype
) -> None:
    g = fresh_generator()
    weight, bias = randn(g, shape[1], dtype=parameters), randn(g, shape[1], dtype=parameters)
    shift = randn(g, *shape[:2], dtype=shifts)
    x, dy = randn(g, *shape, dtype=dtype), randn(g, *shape, dtype=dtype)
    found = results(x, weight, bias, shift, dy, num_groups=groups)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for tensor, reference in zip(found, expected(x, weight, bias, shift, dy, groups), strict=True):
        assert_near(tensor, reference)


@pytest.mark.parametrize(("shape", "groups", "dtype", "parameters", "shifts"), CASES[1:8:2])
def test_each_sample_may_have_its_own_weight_and_bias(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, parameters: torch.dtype, shifts: torch.dtype
) -> None:
    g = fresh_generator()
    weight, bias = randn(g, *shape[:2], dtype=parameters), randn(g, *shape[:2], dtype=parameters)
    shift = randn(g, *shape[:2], dtype=shifts)
    x, dy = randn(g, *shape, dtype=dtype), randn(g, *shape, dtype=dtype)
    found = results(x, weight, bias, shift, dy, num_groups=groups)
    for tensor, reference in zip(found, expected(x, weight, bias, shift, dy, groups), strict=True):
        assert_near(tensor, reference)
    shared = [row.expand(shape[0], -1).contiguous() for row in (weight[:1], bias[:1])]
    same = group_norm_silu(x, *shared, groups, shift_NC=shift)
    assert torch.equal(same, group_norm_silu(x, weight[0], bias[0], groups, shift_NC=shift))


def test_the_norm_alone_with_a_gradient_of_another_layout() -> None:
    g = fresh_generator()
    x, weight, bias = randn(g, 2, 24, 6, 5), randn(g, 24), randn(g, 24)
    dy = randn(g, 2, 24, 6, 5).contiguous()
    found = results(x, weight, bias, None, dy, num_groups=4, silu=False)
    for tensor, reference in zip(found, expected(x, weight, bias, None, dy, 4, silu=False), strict=True):
        assert_near(tensor, reference)


def test_a_large_mean_costs_no_digits() -> None:
    """Where float32 holds x to 3e-5 only, E[x^2] - E[x]^2 would have no digit left, and torch's own is 2e-5 off."""
    g = fresh_generator()
    x, weight, bias = randn(g, 1, 16, 9, 9) + 1e3, randn(g, 16), randn(g, 16)
    shift, dy = 100 * randn(g, 1, 16), randn(g, 1, 16, 9, 9)
    x = x.contiguous(memory_format=torch.channels_last)
    found = results(x, weight, bias, shift, dy, num_groups=4)
    for tensor, reference in zip(found, expected(x, weight, bias, shift, dy, 4), strict=True):
        assert_near(tensor, reference)


def test_where_a_group_is_a_channel_the_shift_does_nothing() -> None:
    g = fresh_generator()
    x, dy, weight, bias = randn(g, 2, 8, 5, 5), randn(g, 2, 8, 5, 5), randn(g, 8), randn(g, 8)
    *found, dshift = results(x, weight, bias, randn(g, 2, 8), dy, num_groups=8)
    for tensor, reference in zip(found, expected(x, weight, bias, None, dy, 8), strict=True):
        assert_near(tensor, reference)
    assert float(dshift.abs().max()) < 1e-4  # of sums over 25 pixels of gradients about 1


def test_shifts_may_be_slices_of_the_rows_of_one_tensor() -> None:
    g = fresh_generator()
    x, weight, bias, shifts = randn(g, 2, 8, 3, 3), randn(g, 8), randn(g, 8), randn(g, 2, 24)
    expected = group_norm_silu(x, weight, bias, 4, shift_NC=shifts[:, 8:16].clone())
    assert torch.equal(group_norm_silu(x, weight, bias, 4, shift_NC=shifts[:, 8:16]), expected)
    columns = shifts[:, 8:16].T.contiguous().T
    assert torch.equal(group_norm_silu(x, weight, bias, 4, shift_NC=columns), expected)


def test_fork_adds_the_gradient_of_the_way_round() -> None:
    g = fresh_generator()
    x, weight, bias = randn(g, 2, 16, 4, 4).requires_grad_(), randn(g, 16), randn(g, 16)
    dy, residual = randn(g, 2, 16, 4, 4), randn(g, 2, 16, 4, 4)
    y, x_again = group_norm_silu(x, weight, bias, 4, fork=True)
    assert torch.equal(x_again, x)
    assert torch.equal(y, group_norm_silu(x, weight, bias, 4))
    (both,) = torch.autograd.grad((y, x_again), x, (dy, residual), retain_graph=True)
    (through_norm,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (round_it,) = torch.autograd.grad(x_again, x, residual)
    assert torch.equal(round_it, residual)
    assert_near(both, through_norm.double() + residual.double())


@pytest.mark.parametrize("fork", [False, True])
def test_a_second_derivative_is_an_error_and_not_zero(fork: bool) -> None:
    g = fresh_generator()
    x = randn(g, 1, 8, 2, 2).requires_grad_()
    y = group_norm_silu(x, randn(g, 8), randn(g, 8), 2, fork=fork)
    (dx,) = torch.autograd.grad(y[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_a_sample_does_not_depend_on_its_batch_and_a_repeat_is_bit_identical() -> None:
    g = fresh_generator()
    x, dy, shift = randn(g, 3, 24, 7, 7), randn(g, 3, 24, 7, 7), randn(g, 3, 24)
    weight, bias = randn(g, 24), randn(g, 24)
    whole = results(x, weight, bias, shift, dy, num_groups=6)
    again = results(x, weight, bias, shift, dy, num_groups=6)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    y, dx, _, _, dshift = results(x[1:2], weight, bias, shift[1:2], dy[1:2], num_groups=6)
    assert torch.equal(y, whole[0][1:2])
    assert torch.equal(dx, whole[1][1:2])
    assert torch.equal(dshift, whole[4][1:2])


@pytest.mark.parametrize("channels", [64, 40])  # in one pass and not
def test_the_gradients_of_two_branches_round_the_norm_are_added(channels: int) -> None:
    g = fresh_generator()
    x, weight, bias = randn(g, 1, channels, 3, 5).requires_grad_(), randn(g, channels), randn(g, channels)
    dy, first, second = (randn(g, 1, channels, 3, 5) for _ in range(3))
    y, x_again, x_for_a_skip = group_norm_silu(x, weight, bias, 8, fork=2)
    alone = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    given = ((x_again, x_for_a_skip), x, (first, second))
    assert_near(torch.autograd.grad(*given, retain_graph=True)[0], first + second, 1e-6)
    assert_near(torch.autograd.grad((y, *given[0]), x, (dy, first, second))[0], alone + first + second, 1e-6)


def test_the_order_of_the_one_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples, two tiles of channels and two slices: with as many programs as there are, and with one at a time;
    and against the three launches."""
    g = fresh_generator()
    x, dy = randn(g, 2, 64, 9, 9), randn(g, 2, 64, 9, 9)
    weight, bias, shift = randn(g, 64), randn(g, 64), randn(g, 2, 64)
    monkeypatch.setattr(tiles, "PART_BYTES", 2 * 81 * 32 * 4)
    assert one_pass_channels(81, 64, 0, 16, 4) == 32
    assert parts_in_flight(4, 4) == 4
    counters = torch.zeros(num_counters(2, 64), dtype=torch.int32, device=DEVICE)
    at_once = results(x, weight, bias, shift, dy, num_groups=16, counters=counters)
    assert not counters.any()
    monkeypatch.setattr(tiles, "RESIDENT_PROGRAMS", 1)
    assert parts_in_flight(4, 4) == 1
    for one, other in zip(results(x, weight, bias, shift, dy, num_groups=16), at_once, strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(tiles, "PART_BYTES", 0)
    assert one_pass_channels(81, 64, 0, 16, 4) == 0
    for one, other in zip(results(x, weight, bias, shift, dy, num_groups=16), at_once, strict=True):
        assert_near(one, other, 1e-6)


@pytest.mark.parametrize("resident", [1, 1024])
def test_partials_that_are_given_or_computed_give_the_same(resident: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch with them, in one without, and in three launches."""
    monkeypatch.setattr(tiles, "RESIDENT_PROGRAMS", resident)
    g = fresh_generator()
    x, weight, bias = randn(g, 2, 64, 9, 9), randn(g, 64), randn(g, 64)
    counters = torch.zeros(num_counters(2, 64), dtype=torch.int32, device=DEVICE)
    options: dict[str, Any] = {"shift_NC": randn(g, 2, 64), "fork": True, "with_partials": True, "counters": counters}
    y, _, partials = group_norm_silu(x, weight, bias, 16, **options)
    again, _, same = group_norm_silu(x, weight, bias, 16, partials=partials, **options)
    assert not counters.any()
    assert torch.equal(y, again)
    assert same is partials
    monkeypatch.setattr(tiles, "PART_BYTES", 0)
    three, _, others = group_norm_silu(x, weight, bias, 16, **options)
    assert_near(y, three, 1e-6)
    assert_near(partials, others, 1e-6)


def test_the_operator_is_one_that_torch_can_trace() -> None:
    g = fresh_generator()
    x, weight, bias = (t.requires_grad_() for t in (randn(g, 1, 8, 2, 2), randn(g, 8), randn(g, 8)))
    shift = randn(g, 1, 8).requires_grad_()
    torch.library.opcheck(op.forward_op, (x, weight, bias, shift, None, None, 2, 1e-5, True))
    statistics = randn(g, 1, 4, 8)
    arguments = (x.detach(), None, None, x.detach(), weight.detach(), bias.detach(), statistics, None, None, 2, True)
    torch.library.opcheck(op.backward_op, arguments, test_utils=("test_schema", "test_faketensor"))
    weight, bias = weight.detach()[None].requires_grad_(), bias.detach()[None].requires_grad_()
    torch.library.opcheck(op.forward_op, (x, weight, bias, shift, None, None, 2, 1e-5, True))
    arguments = (x.detach(), None, None, x.detach(), weight.detach(), bias.detach(), statistics, None, None, 2, True)
    torch.library.opcheck(op.backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


def valid() -> dict[str, Any]:
    x = torch.zeros(2, 8, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    parameter = torch.zeros(8, device=DEVICE)
    return {"x_NCHW": x, "weight_C": parameter, "bias_C": parameter, "num_groups": 2}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x_NCHW", torch.zeros(2, 8, 3, 3)),
        ("x_NCHW", torch.zeros(2, 8, 3, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)),
        ("x_NCHW", torch.zeros(2, 8, 9)),
        ("x_NCHW", torch.zeros(0, 8, 3, 3)),
        ("weight_C", torch.zeros(9)),
        ("weight_C", torch.zeros(8, dtype=torch.int32)),
        ("weight_C", torch.zeros(3, 8)),
        ("bias_C", torch.zeros(2, 8)),
        ("bias_C", torch.zeros(16)[::2]),
        ("bias_C", torch.zeros(8, device="meta")),
        ("num_groups", 3),
        ("num_groups", 0),
        ("eps", 0.0),
        ("shift_NC", torch.zeros(2, 9)),
        ("shift_NC", torch.zeros(2, 8, dtype=torch.float64)),
        ("partials", torch.zeros(2, 2, 2, 8)),
        ("partials", torch.zeros(2, 1, 2, 8, dtype=torch.float16)),
    ],
)
def test_what_is_not_supported_is_refused_by_name(argument: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = value.to(DEVICE)
    with pytest.raises(ValueError, match=f"group_norm_silu: {argument}: .*give "):
        group_norm_silu(**(valid() | {argument: value}))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU runs the kernel itself")
def test_without_gpu_and_interpreter_it_stops_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="need a GPU, and this is cpu"):
        group_norm_silu(**valid())


def test_a_batch_of_one_is_cut_into_enough_slices_to_fill_a_gpu() -> None:
    assert [slice_pixels(side * side) for side in (1, 8, 32, 64, 128, 256, 512)] == [64, 64, 64, 64, 128, 256, 256]
    for side, channels in ((32, 512), (64, 256), (128, 128), (256, 128)):
        assert num_slices(side * side) * (channels // channel_tile(channels)) >= 64, side
    assert num_slices(65) == 2


def test_tiles_are_whole_where_the_channels_allow_it() -> None:
    assert [channel_tile(c) for c in (128, 384, 320, 96, 40, 200, 3)] == [128, 128, 64, 32, 64, 128, 8]
    assert channel_tile(512, 256) == 128
    assert channel_tile(24, 40) == 64
    # Two bytes or four: the same 8 KiB a tile.
    assert (pixel_tile(65536, 128, 2), pixel_tile(65536, 128, 4)) == (32, 16)
    # Whole sectors of 32 channels wherever a group is smaller, and never more than 2,048 numbers at once.
    assert merge_tiles(128, 32, 256) == {"BLOCK_S": 64, "BLOCK_G": 8, "BLOCK_K": 4}
    assert merge_tiles(384, 32, 64) == {"BLOCK_S": 64, "BLOCK_G": 2, "BLOCK_K": 16}
    assert merge_tiles(512, 1, 2) == {"BLOCK_S": 2, "BLOCK_G": 1, "BLOCK_K": 512}
