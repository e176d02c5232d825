"""Turns of programs that wait for each other, for kernels that read a part of a sample twice: the second time from the
L2 cache.

Programs draw numbers, and a number says what a program does; a part takes A programs that sum it up, then S that write:

    sums of parts 0 to L - 1;  sums of part L, writes of part 0;  sums of part L + 1, writes of part 1;  ...;  the rest

The program that ends a part's sums last merges them, then declares the part ready; programs that write wait for that. A
program waits only for programs with smaller numbers, which have begun before it, so nothing can wait for ever.

All counters are 0 at first, and 0 again at the end, so one tensor serves all kernels of a stream. They are: numbers
drawn; for each tile of channels, its samples that are merged; for each part, its programs that have summed up; and for
each part, if it is ready, those that have not yet begun to write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels.tiles import num_counters


@triton.jit
def draw(counters_ptr, num_parts, A, S, lag):  # type: ignore[no-untyped-def]
    """(part, which of its programs of this kind, whether it sums up) of a program: see above, with L = lag."""
    total = num_parts * (A + S)
    number = tl.atomic_add(counters_ptr, 1)
    if number == total - 1:
        tl.atomic_xchg(counters_ptr, 0)
    later = number - lag * A
    steady = (num_parts - lag) * (A + S)
    step, rest = later // (A + S), later % (A + S)
    is_head, is_tail = later < 0, later >= steady
    is_sum = is_head | ((later < steady) & (rest < A))
    part = tl.where(rest < A, lag + step, step)
    part = tl.where(is_tail, num_parts - lag + (later - steady) // S, part)
    part = tl.where(is_head, number // A, part)
    s = tl.where(rest < A, rest, rest - A)
    s = tl.where(is_tail, (later - steady) % S, s)
    return part, tl.where(is_head, number % A, s), is_sum


@triton.jit
def is_last(counter_ptr, number):  # type: ignore[no-untyped-def]
    """Whether this program is the last of `number` to come here; what the others wrote before is then visible."""
    tl.debug_barrier()  # all threads have written before one of them says so
    last = tl.atomic_add(counter_ptr, 1) == number - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0)
    return last


@triton.jit
def declare_ready(ready_ptr, S):  # type: ignore[no-untyped-def]
    """Let the S programs that write a part begin."""
    tl.debug_barrier()
    tl.atomic_xchg(ready_ptr, S)


@triton.jit
def wait_until_ready(ready_ptr):  # type: ignore[no-untyped-def]
    """Wait for declare_ready."""
    while tl.atomic_add(ready_ptr, 0) == 0:
        pass
    tl.atomic_add(ready_ptr, -1)


def counters_for(num_samples: int, num_channels: int, zeros: Tensor | None, device: torch.device) -> Tensor:
    """`zeros`, if they suffice; else new ones, which take a launch."""
    number = num_counters(num_samples, num_channels)
    if zeros is not None and zeros.numel() >= number:
        return zeros
    return torch.zeros(number, dtype=torch.int32, device=device)
