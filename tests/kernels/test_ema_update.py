"""ema_update against torch._foreach_lerp_ and float64, on lists of every kind; what it refuses."""

from __future__ import annotations

import pytest
import torch
from kernels_support import DEVICE, assert_near, fresh_generator
from torch import Tensor

from segdiff_kernels.ema_update import BLOCK, MAX_AVERAGES, EmaUpdate, chunks, ema_update, ema_update_reference

DECAYS = (0.999, 0.3, 1.0, 0.0)


def tensors(num_averages: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Weights of odd sizes, one of no elements, one across chunks, one channels-last, and averages of them."""
    generator = fresh_generator()
    shapes = [(1,), (7,), (0,), (2 * BLOCK + 3,), (), (5, 3), (BLOCK,)]
    weights = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    weights.append(torch.randn(6, 3, 3, 3, generator=generator).to(DEVICE, memory_format=torch.channels_last))
    averages = [[w + 0.1 * torch.randn(w.shape, generator=generator).to(DEVICE) for w in weights] for _ in range(3)]
    averages.append([w.clone() for w in weights])
    return averages[:num_averages], weights


def in_one_row(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("num_averages", [1, 3, MAX_AVERAGES])
def test_it_is_foreach_lerp(num_averages: int) -> None:
    averages, weights = tensors(num_averages)
    expected = [[a.clone() for a in average] for average in averages]
    exact = [[a.double() for a in average] for average in averages]
    weights_before = [w.clone() for w in weights]
    update, decays = EmaUpdate(averages, weights), DECAYS[:num_averages]
    for _ in range(2):
        update(decays)
        ema_update_reference(expected, weights, decays)
        ema_update_reference(exact, [w.double() for w in weights], decays)
    for average, theirs, precise in zip(averages, expected, exact, strict=True):
        assert_near(in_one_row(average), in_one_row(precise), 3e-7)
        # The interpreter rounds the product, where the hardware's fused operation, and torch's, do not.
        torch.testing.assert_close(in_one_row(average), in_one_row(theirs), rtol=2.5e-7, atol=2.5e-7)
    for weight, before in zip(weights, weights_before, strict=True):
        assert torch.equal(weight, before)
    if num_averages == MAX_AVERAGES:  # a decay of 1 keeps an average, and one of 0 is the weight
        assert all(torch.equal(a, w) for a, w in zip(averages[3], weights, strict=True))


def test_a_decay_of_one_keeps_an_average_to_the_bit() -> None:
    averages, weights = tensors(1)
    before = [a.clone() for a in averages[0]]
    ema_update(averages, weights, [1.0])
    assert all(torch.equal(a, b) for a, b in zip(averages[0], before, strict=True))


def test_tensors_off_the_16_byte_grid_and_their_neighbours() -> None:
    """Views into one buffer: nothing outside them is written."""
    buffer, weights = torch.zeros(64, device=DEVICE), [torch.ones(5, device=DEVICE), torch.ones(9, device=DEVICE)]
    ema_update([[buffer[1:6], buffer[7:16]]], weights, [0.5])
    written = [*range(1, 6), *range(7, 16)]
    expected = torch.zeros(64, device=DEVICE)
    expected[written] = 0.5
    assert torch.equal(buffer, expected)


def test_memory_that_was_replaced_is_followed() -> None:
    weight, average = torch.nn.Parameter(torch.ones(5, device=DEVICE)), torch.zeros(5, device=DEVICE)
    update = EmaUpdate([[average]], [weight])
    update([0.5])
    weight.data = torch.full((5,), 3.0, device=DEVICE)  # as DeepSpeed does it
    update([0.5])
    assert average.tolist() == [1.75] * 5


def test_weights_that_are_trained_may_be_given() -> None:
    weight = torch.ones(3, device=DEVICE, requires_grad=True)
    average = torch.zeros(3, device=DEVICE)
    ema_update([[average]], [weight], [0.75])
    assert average.tolist() == [0.25] * 3
    assert not average.requires_grad


def test_torch_library_finds_nothing_wrong() -> None:
    averages, weights = tensors(2)
    flat = [a for average in averages for a in average]
    torch.library.opcheck(torch.ops.segdiff.ema_update.default, (flat, weights, [0.5, 0.1]))


def test_chunks_cover_every_element_once() -> None:
    assert chunks([1, 0, BLOCK, BLOCK + 1]) == [(0, 0), (2, 0), (3, 0), (3, 1)]
    assert chunks([0]) == []


def test_what_it_refuses() -> None:
    w, a = torch.zeros(4, 4, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    bad = {
        r"weights: no tensors": ([[]], []),
        r"averages: 0 of them": ([], [w]),
        r"averages: 5 of them": ([[a]] * 5, [w]),
        r"averages\[1\]: 2 tensors": ([[a], [a, a]], [w]),
        r"averages\[0\]\[0\]: bfloat16": ([[a.bfloat16()]], [w]),
        r"averages\[0\]\[0\]: \(4, 3\)": ([[a[:, :3]]], [w]),
        r"averages\[0\]\[0\]: strides": ([[a.T]], [w]),
        r"weights\[0\]: strides": ([[a.T]], [w.T]),
        r"weights\[1\]: float64": ([[a, a]], [w, w.double()]),
        r"averages\[0\]\[0\]: meta": ([[a.to("meta")]], [w]),
    }
    for message, lists in bad.items():
        with pytest.raises(ValueError, match=f"ema_update: {message}"):
            EmaUpdate(*lists)
    for decays in ([0.5, 0.5], [], [1.5], [float("nan")]):
        with pytest.raises(ValueError, match="ema_update: decays: "):
            EmaUpdate([[a]], [w])(decays)


def test_without_gpu_or_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="ema_update: device: Triton's kernels need a GPU, and this is cpu"):
        EmaUpdate([[torch.zeros(2)]], [torch.zeros(2)])
