"""Start the ranks of one machine, for elastic.py, which sets MASTER_ADDR, MASTER_PORT and WORLD_SIZE.

    python launch/cluster/host_ranks.py RANKS FIRST_RANK GRACE_S SCRIPT ARGUMENTS...

DeepSpeed's launcher imports DeepSpeed in two processes before the first rank starts: 8 s of processor time. torchrun
ends with code 1, whatever code a rank ends with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence


def main(num_ranks: int, first_rank: int, grace_s: float, training: Sequence[str]) -> int:
    """Start them and wait; returns the exit code of the first rank that fails. The others then get `grace_s` to end."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-u", *training],
            env={**os.environ, "RANK": str(first_rank + n), "LOCAL_RANK": str(n), "LOCAL_WORLD_SIZE": str(num_ranks)},
        )
        for n in range(num_ranks)
    ]
    deadline, code = float("inf"), 0
    while None in [rank.poll() for rank in ranks] and time.monotonic() < deadline:
        if not code and (code := first_failure(ranks)):
            deadline = time.monotonic() + grace_s
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
        rank.wait()
    return code or first_failure(ranks)


def first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of a rank that has failed, as a shell gives it; 0 if none has."""
    failed = [rank.returncode for rank in ranks if rank.returncode]
    return 0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0]


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
