"""Whether the work fits into this machine, by its estimated cost: the line before it starts, refusals, and --force."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data_shards.problems import Problem, refuse
from segdiff_dist.stages.cost import Cost, duration, size

FORCE = "SEGDIFF_FORCE"
"""Set by --force, for this process and the ranks that it starts."""
# Work below all of these begins without a line.
_LONG_S, _LARGE_BYTES, _LARGE_MEMORY = 120.0, 10**9, 2 * 10**9
_DAY_S = 86_400.0


def unless_forced(problems: Sequence[Problem]) -> list[Problem]:
    """Problems that come from estimates; with --force none, and each is a warning instead."""
    if os.environ.get(FORCE) != "1":
        return [Problem(p.where, p.field, p.value, f"{p.remedy}; or start it all the same: --force") for p in problems]
    for found in problems:
        _say(f"warning: {found.where}: {found.field}: {found.value} (--force)")
    return []


def disk_problems(cost: Cost, folder: Path) -> list[Problem]:
    """A problem if the disk of `folder` has not the room that the work needs in any case."""
    if cost.num_bytes is None:
        return []
    free, sure = free_bytes(folder), cost.sure_share * cost.num_bytes
    if sure <= free:
        return []
    remedy = f"make room, or choose a folder on another disk{cost.smaller and f', or {cost.smaller}'}"
    return [Problem(str(folder), "disk", f"needs about {size(sure)}, and {size(free)} are free", remedy)]


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, which need not exist yet."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
    return shutil.disk_usage(there).free


def bytes_in(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in a folder, which need not exist. Another command may remove some meanwhile."""
    total = 0
    for file in folder.rglob(pattern):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def announce(name: str, cost: Cost, folder: Path) -> None:
    """Refuse work that does not fit, print one line about work that is long or large, warn of more than a day."""
    refuse(unless_forced(disk_problems(cost, folder)))
    line = plan_line(cost, folder)
    if line is not None:
        _say(f"{name}: {line}")
    if cost.seconds is not None and cost.seconds > _DAY_S and cost.shorter:
        _say(f"warning: {name}: about {duration(cost.seconds)} on this machine; {cost.shorter}")


def plan_line(cost: Cost, folder: Path) -> str | None:
    """What the work will take; None for work that is neither long nor large."""
    limits = ((cost.seconds, _LONG_S), (cost.num_bytes, _LARGE_BYTES), (cost.memory_bytes, _LARGE_MEMORY))
    if not any(value is not None and value > limit for value, limit in limits):
        return None
    parts = [cost.what] if cost.what else []
    if cost.images is not None:
        parts.append(f"{cost.images:,} images")
    if cost.seconds is not None:
        parts.append(f"about {duration(cost.seconds)}")
    if cost.memory_bytes is not None:
        parts.append(f"about {size(cost.memory_bytes)} of memory")
    if cost.num_bytes is not None:
        parts.append(f"at most {size(cost.num_bytes)} of the {size(free_bytes(folder))} free on the disk")
    return ", ".join(parts)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
