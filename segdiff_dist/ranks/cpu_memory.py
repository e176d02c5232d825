"""What a process that computes on a CPU does with memory it has freed: it keeps it."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 * 2**20


def keep_freed_memory() -> None:
    """Have this process take its large arrays from the heap and never give any of that back before it ends.

    glibc maps every array above 32 MiB anew, and the kernel clears its pages at first touch: a sixth of a
    training step. What is resident stays at its highest mark, which a training reaches in its first step. Does nothing
    where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, _TOP_PAD)
