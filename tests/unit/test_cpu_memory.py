"""What is freed stays with the process, so that the kernel clears no pages twice."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PAGES = """
import resource, sys
import torch
if sys.argv[1] == "kept":
    from segdiff_dist.ranks.cpu_memory import keep_freed_memory
    keep_freed_memory()
def faults(arrays):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(arrays):
        torch.ones(16 * 2**20)  # 64 MiB: above what glibc takes from the heap by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20)  # aligned arrays do not fit into the gap of one of their size, but soon into those of two
print(faults(5))
"""


def faults_of_later_arrays(how: str) -> int:
    ended = subprocess.run([sys.executable, "-c", _PAGES, how], capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_arrays_take_the_pages_of_those_before() -> None:
    # Huge pages, where the kernel hands them out, are one fault for 512 small ones.
    assert faults_of_later_arrays("kept") < 16 < faults_of_later_arrays("given back")
