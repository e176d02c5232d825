"""Keeps freed memory in the process, for computing on a CPU.

jemalloc and tcmalloc do the same, but they must be preloaded before Python starts; glibc's mallopt works at any time.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 * 2**20


def keep_freed_memory() -> None:
    """Make this process take large arrays from the heap, and return none of it to the system before it ends.

    Otherwise glibc maps every array above 32 MiB anew, and the kernel clears its pages at first touch: a sixth of a
    training step. Resident memory stays at its peak, which a training reaches in its first step. With another C library
    this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, _TOP_PAD)
