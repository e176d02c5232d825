"""Philox against its published vectors, the torch reference against the Triton kernel, and the draws' statistics."""

from __future__ import annotations

import pytest
import torch

from segdiff_kernels import philox

# Random123's known-answer file kat_vectors, philox4x32 with 10 rounds: counter words, key words, result words.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    index, stream, low, high = counter
    position = torch.tensor([low | (high << 32)])
    # `index` counts blocks of four words; only a small one can be reached through the public function.
    words = philox.rounds(torch.tensor([[index]]), torch.tensor([[stream]]), position[:, None], key[0] | (key[1] << 32))
    assert [int(w) for w in words.flatten()] == expected


@pytest.mark.parametrize("num_words", [1, 3, 4, 1021])
def test_the_kernel_gives_the_same_bits(num_words: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU Triton's interpreter runs the kernel
    position = torch.tensor([0, 1, 12345, 2**31, 2**33 + 7], device=device)
    for seed, stream in ((0, 0), (0x123456789ABCDEF, 3)):
        reference = philox.bits(seed, stream, position, num_words)
        assert reference.shape == (5, num_words)
        assert torch.equal(philox.bits_triton(seed, stream, position, num_words), reference)


def test_a_draw_depends_on_seed_stream_and_position_alone() -> None:
    whole = philox.normal(7, philox.STREAM_NOISE, torch.arange(64), (1, 8, 8))
    alone = philox.normal(7, philox.STREAM_NOISE, torch.tensor([41]), (1, 8, 8))
    assert torch.equal(whole[41], alone[0])
    for seed, stream in ((8, philox.STREAM_NOISE), (7, philox.STREAM_SAMPLE)):
        assert not torch.equal(philox.normal(seed, stream, torch.tensor([41]), (1, 8, 8)), alone)


def test_normal_draws_are_normal() -> None:
    x = philox.normal(1, 0, torch.arange(200), (33, 33)).double()
    num = x.numel()
    assert abs(x.mean()) < 5 / num**0.5
    assert abs(x.var() - 1) < 5 * (2 / num) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / num) ** 0.5
    neighbours = (x.flatten()[:-1] * x.flatten()[1:]).mean()
    assert abs(neighbours) < 5 / num**0.5


def test_timesteps_are_uniform() -> None:
    t = philox.timesteps(3, torch.arange(100_000), 1000)
    assert int(t.min()) == 0
    assert int(t.max()) == 999
    counts = torch.bincount(t, minlength=1000).double()
    assert ((counts - 100) ** 2 / 100).sum() < 1200  # chi-squared of 999 degrees: mean 999, standard deviation 45


def test_positions_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="position_B"):
        philox.bits_triton(0, 0, torch.zeros(3), 4)
