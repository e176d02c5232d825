"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

The draw for global position p of a run is a pure function of (seed, stream, p, index), so it does not depend on batch
size, ranks or restarts. Counter words: (index, stream, low and high half of p); key words: the halves of the seed.
`bits` is the torch reference and runs anywhere; `bits_triton` gives the same bits from a kernel. torch.Generator is not
used: its draws depend on the device and on earlier draws, not on a position.

Dimensions: B batch (positions), N words a position.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

# Streams keep draws for different purposes independent under one seed.
STREAM_NOISE = 0
STREAM_TIMESTEP = 1
STREAM_DROPOUT = 2
STREAM_SAMPLE = 3  # and one for each sampling step above it, so further streams begin far above
STREAM_ORGANS = 1 << 16
STREAM_LATENT = STREAM_ORGANS + 1
STREAM_CONTRAST = STREAM_ORGANS + 2
STREAM_AUGMENTATION = STREAM_ORGANS + 16  # its level; its noise, one for each stage of a cascade, above it
STREAM_LAYERS = 1 << 18  # dropout: one for each residual block above it
STREAM_STAGE = 1 << 20  # sampling: added to the streams of each stage of a cascade below the top

# Multipliers and key increments of Philox4x32, Salmon et al. 2011, table 2.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_U32 = 0xFFFFFFFF


def bits(seed: int | Tensor, stream: int, position_B: Tensor, num_words: int) -> Tensor:
    """Random 32-bit words as int64 [B, num_words] in [0, 2^32); position_B int64, any device. `seed`: a number, or
    int64 [B, 1]: one for each position."""
    num_blocks = (num_words + 3) // 4
    index_BI = torch.arange(num_blocks, device=position_B.device).expand(position_B.shape[0], -1)
    words_BI4 = rounds(index_BI, torch.full_like(index_BI, stream), position_B[:, None].expand_as(index_BI), seed)
    return words_BI4.flatten(1)[:, :num_words]


def rounds(index: Tensor, stream: Tensor, position: Tensor, seed: int | Tensor) -> Tensor:
    """Four words [..., 4] for each counter (index, stream, low and high half of position), all int64."""
    c0, c1, c2, c3 = index & _U32, stream & _U32, position & _U32, (position >> 32) & _U32
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(_ROUNDS):
        # The products wrap as signed 64-bit integers; the masks make both halves right again.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _U32) ^ c1 ^ k0, p1 & _U32, ((p0 >> 32) & _U32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(seed: int, stream: int, position_B: Tensor, num: int) -> Tensor:
    """float32 [B, num] in (0, 1): the upper 24 bits of each word, centred in their cell."""
    return _to_unit(bits(seed, stream, position_B, num))


def normal(seed: int | Tensor, stream: int, position_B: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [B, *shape] by Box and Muller (1958), two draws from each pair of words. `seed`: as for
    `bits`."""
    num = math.prod(shape)
    unit_BN2 = _to_unit(bits(seed, stream, position_B, 2 * ((num + 1) // 2))).unflatten(1, (-1, 2))
    radius, angle = torch.sqrt(-2.0 * torch.log(unit_BN2[..., 0])), (2.0 * math.pi) * unit_BN2[..., 1]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :num].unflatten(1, tuple(shape))


def timesteps(seed: int, position_B: Tensor, num_train_timesteps: int) -> Tensor:
    """int64 [B], uniform over 0 .. num_train_timesteps - 1."""
    word_B = bits(seed, STREAM_TIMESTEP, position_B, 1)[:, 0]
    return (word_B * num_train_timesteps) >> 32


def _to_unit(word: Tensor) -> Tensor:
    return (word >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25


def bits_triton(seed: int, stream: int, position_B: Tensor, num_words: int) -> Tensor:
    """The same words as `bits`, from one Triton kernel; position_B on a GPU (or anywhere under the interpreter)."""
    from segdiff_kernels._philox_triton import launch_bits

    with torch.cuda.device_of(position_B):
        return launch_bits(seed, stream, position_B, num_words)
