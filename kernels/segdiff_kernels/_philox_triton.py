"""The Triton side of segdiff_kernels.philox, in a separate file so that importing the reference needs no Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels.compile_cases import CompileCase

_BLOCK = 256


@triton.jit(do_not_specialize=["seed", "stream"])
def philox_bits_kernel(out_ptr, position_ptr, seed, stream, num_blocks, num_words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes words 4i .. 4i + 3 of one position for a block of i."""
    row = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(position_ptr + row)
    c0 = index.to(tl.uint32)
    c1 = tl.zeros_like(c0) + stream.to(tl.uint32)
    c2 = tl.zeros_like(c0) + (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.zeros_like(c0) + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed.to(tl.uint64), c0, c1, c2, c3, 10)
    base = out_ptr + row.to(tl.int64) * num_words + index * 4
    tl.store(base, r0.to(tl.int64), mask=index * 4 < num_words)
    tl.store(base + 1, r1.to(tl.int64), mask=index * 4 + 1 < num_words)
    tl.store(base + 2, r2.to(tl.int64), mask=index * 4 + 2 < num_words)
    tl.store(base + 3, r3.to(tl.int64), mask=index * 4 + 3 < num_words)


def launch_bits(seed: int, stream: int, position_B: Tensor, num_words: int) -> Tensor:
    """int64 [B, num_words]; see segdiff_kernels.philox.bits."""
    if position_B.dtype != torch.int64 or position_B.dim() != 1:
        raise ValueError(f"position_B: {position_B.dtype} {tuple(position_B.shape)}; give int64 of one dimension")
    num_blocks = (num_words + 3) // 4
    out = torch.empty((position_B.shape[0], num_words), dtype=torch.int64, device=position_B.device)
    grid = (position_B.shape[0], triton.cdiv(num_blocks, _BLOCK))
    philox_bits_kernel[grid](out, position_B.contiguous(), seed, stream, num_blocks, num_words, BLOCK=_BLOCK)
    return out


def compile_cases() -> list[CompileCase]:
    """The noise of one 256x256 image for each program row; limited by arithmetic and by its stores."""
    return [
        CompileCase(
            "philox/bits",
            philox_bits_kernel,
            signature={
                "out_ptr": "*i64",
                "position_ptr": "*i64",
                "seed": "i64",
                "stream": "i32",
                "num_blocks": "i32",
                "num_words": "i32",
            },
            constants={"BLOCK": _BLOCK},
            divisible_by_16=("out_ptr", "position_ptr", "num_blocks", "num_words"),
            streams=False,
        )
    ]
