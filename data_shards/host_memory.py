"""The host memory that this process may still use: the machine's, or its container's if that is less.

Not psutil: it reads the machine's memory, not the limits of cgroups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# A cgroup's limit, its present use, and the name in memory.stat of the file cache that the kernel can reclaim.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class HostMemory(NamedTuple):
    """In bytes. `total`: all memory; `available`: the memory that can be used now, swap included."""

    total: int
    available: int


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory | None:
    """The minimum over the machine and every cgroup (version 1 or 2) of this process; None if the system does not
    tell."""
    machine = _machine(proc)
    if machine is None:
        return None
    total, available = machine.total, machine.available
    for folder, names in _cgroups(proc, cgroups):
        limit, held = (_number(folder / name) for name in names[:2])
        if limit is not None and limit < machine.total:
            total = min(total, limit)
            available = min(available, max(0, limit - max(0, (held or 0) - _cache(folder, names[2]))))
    return HostMemory(total, available)


def rank_share(memory: HostMemory) -> HostMemory:
    """A rank's part, if a launcher has started several on this machine."""
    # torchrun's name, DeepSpeed's and Slurm's.
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE") if "RANK" in os.environ else ()
    text = next((os.environ[name] for name in names if name in os.environ), "1")
    ranks = max(1, int(text)) if text.isdecimal() else 1
    return HostMemory(memory.total // ranks, memory.available // ranks)


def _machine(proc: Path) -> HostMemory | None:
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if value}
        return HostMemory(1024 * kib["MemTotal"], 1024 * (kib["MemAvailable"] + kib.get("SwapFree", 0)))
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _cgroups(proc: Path, root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """This process' memory cgroups, the innermost first. In a container their path is often that of the host and does
    not exist there; then the root is the container's own."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "0:memory:/"]:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _V1) if controllers else (root, _V2)
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            if ".." not in folder.parts:
                yield top / folder, names


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # missing; `max`: no limit
        return None


def _cache(folder: Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
