"""The memory and the cores that this process may still use: the machine's, or its container's if that is less.

Not psutil: it reads the machine's numbers, not the limits of cgroups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LIMIT = "SEGDIFF_MEMORY_GIB"
"""Environment variable: the most memory that a command and its workers may hold, as a container's limit."""

# A cgroup's limit, its present use, and the names in memory.stat of the file cache that the kernel can reclaim, that
# which is used least first.
_V2 = ("memory.max", "memory.current", "inactive_file", "active_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")


class HostMemory(NamedTuple):
    """In bytes. `total`: all memory; `available`: the memory that can be used now, swap included."""

    total: int
    available: int


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory | None:
    """The minimum over the machine, every cgroup (version 1 or 2) of this process, and the user's own LIMIT. None if
    the system does not tell."""
    memory = container_memory(proc, cgroups)
    if memory is None or (limit := own_limit()) is None:
        return memory
    left = max(0, limit - held_bytes(os.getpid()))
    return HostMemory(min(memory.total, limit), min(memory.available, left))


def container_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup"), *, all_cache: bool = False
) -> HostMemory | None:
    """The same without LIMIT. `all_cache`: the file cache that is in use counts as available too; the kernel reclaims
    it last."""
    machine = _machine(proc)
    if machine is None:
        return None
    total, available = machine.total, machine.available
    for folder, is_v2 in _folders(proc, cgroups, "memory"):
        names = _V2 if is_v2 else _V1
        limit, held = (_number(folder / name) for name in names[:2])
        if limit is not None and limit < machine.total:
            total = min(total, limit)
            cache = _cache(folder, names[2:] if all_cache else names[2:3])
            available = min(available, max(0, limit - max(0, (held or 0) - cache)))
    return HostMemory(total, available)


def cpu_quota(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of processor time that the cgroups of this process allow it (docker run --cpus); None: no limit."""
    found = []
    for folder, is_v2 in _folders(proc, cgroups, "cpu"):
        try:
            if is_v2:
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period"))
            if int(quota) > 0 and int(period) > 0:
                found.append(int(quota) / int(period))
        except (OSError, ValueError):  # missing; `max`: no limit
            continue
    return min(found, default=None)


def own_limit() -> int | None:
    """Bytes that LIMIT allows; None: no limit, or not a number."""
    with suppress(ValueError):
        limit = float(os.environ.get(LIMIT, ""))
        return int(limit * 2**30) if 0 < limit < 2**20 else None
    return None


def held_bytes(pid: int) -> int:
    """Memory of a process and of all that it started, without files and what it shares."""
    import psutil

    total = 0
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for one in (top, *top.children(recursive=True)):
            with suppress(psutil.Error):
                used = one.memory_info()
                total += max(0, used.rss - getattr(used, "shared", 0))
    return total


def rank_share(memory: HostMemory) -> HostMemory:
    """A rank's part, if a launcher has started several on this machine."""
    ranks = ranks_here()
    return HostMemory(memory.total // ranks, memory.available // ranks)


def ranks_here() -> int:
    """The ranks that a launcher has started on this machine."""
    # torchrun's name, DeepSpeed's and Slurm's.
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE") if "RANK" in os.environ else ()
    text = next((os.environ[name] for name in names if name in os.environ), "1")
    return max(1, int(text)) if text.isdecimal() else 1


def _machine(proc: Path) -> HostMemory | None:
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if value}
        return HostMemory(1024 * kib["MemTotal"], 1024 * (kib["MemAvailable"] + kib.get("SwapFree", 0)))
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _folders(proc: Path, root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process' cgroups for a controller, the innermost first, and whether they are of version 2. In
    a container their path is often that of the host and does not exist there; then the root is the container's own."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", f"0:{controller}:/"]:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            if ".." not in folder.parts:
                yield top / folder, not controllers


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # missing; `max`: no limit
        return None


def _cache(folder: Path, names: tuple[str, ...]) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split(" ")[0] in names)
