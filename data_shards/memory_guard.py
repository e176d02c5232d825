"""Stops a command by itself before memory runs out: the kernel would kill a process without a message, and perhaps one
that has nothing to do with it.

earlyoom and systemd-oomd do this for a machine. They know neither a container's limit nor what a command can lower.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil

from data_shards.end_signals import stop_this_command
from data_shards.host_memory import LIMIT, HostMemory, container_memory, held_bytes, own_limit, ranks_here

_LOOK_S = 0.2
# What stays free for the other processes of the machine: 1/32 of its memory, within these bounds.
_SHARE, _LEAST_BYTES, _MOST_BYTES = 32, 64 * 2**20, 512 * 2**20
# How long a command may take to stop as at Ctrl-C (a training ends its step and saves); it is ended at once if more
# than half of what was kept free is used up meanwhile.
_STOPPING_S = 20.0


@dataclass
class Guard:
    """Of one command. `reason`: why it was stopped, for the user; empty as long as it was not."""

    name: str
    lower: str
    reason: str = ""
    _ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Look at the memory until the command ends; stop it if there is too little."""
        while not self._ended.wait(_LOOK_S):
            if lack := _lack(factor=1.0):
                self.reason = f"{self.name}: stopped before memory runs out: {lack}; {remedy(self.lower)}"
                stop_this_command()
                self._see_that_it_ends()
                return

    def _see_that_it_ends(self) -> None:
        end = time.monotonic() + _STOPPING_S
        while not self._ended.wait(_LOOK_S):
            if time.monotonic() > end or _lack(factor=0.5):
                with suppress(OSError):
                    os.write(2, f"error: {self.reason}\n".encode())
                for child in psutil.Process().children(recursive=True):
                    with suppress(psutil.Error):
                        child.kill()
                os._exit(1)

    def end(self) -> None:
        """The command has ended."""
        self._ended.set()


@contextmanager
def guarded(name: str, lower: str = "") -> Iterator[Guard]:
    """A context in which a command stops as at Ctrl-C before memory runs out; `reason` is then set. `lower`: the flags
    that make it need less.

    It stops only where it holds at least half of what is in use: other processes' memory is not its fault. Of the ranks
    of one machine the first looks, for all.
    """
    guard = Guard(name, lower)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first or threading.current_thread() is not threading.main_thread() or container_memory() is None:
        yield guard
        return
    thread = threading.Thread(target=guard.watch, name="memory", daemon=True)
    thread.start()
    try:
        yield guard
    finally:
        guard.end()
        thread.join(1.0)


def remedy(lower: str) -> str:
    """What to do where memory is too little."""
    less = f"lower {lower}" if lower else "end other programs, or use a machine with more memory"
    return f"{less}; then start the same command again"


def is_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory could not be allocated, of the machine or of a GPU, by any library."""
    while error is not None:
        # torch.OutOfMemoryError, without importing torch; its allocator on CPUs raises a RuntimeError.
        is_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_torch):
            return True
        error = error.__cause__
    return False


def _lack(factor: float) -> str:
    """What is lacking, in words; nothing if there is enough. `factor`: of the bytes that stay free."""
    limit = own_limit()
    if limit is not None and (held := held_bytes(_top())) > limit * (1 - factor / _SHARE):
        return f"this command and its workers hold {_gib(held)}, {LIMIT} allows {_gib(limit)}"
    memory = container_memory(all_cache=True)
    if memory is None or memory.available > factor * _kept_free(memory):
        return ""
    held = held_bytes(_top())
    if held < (memory.total - memory.available) / 2:
        return ""
    free = f"{memory.available / 2**20:.0f} MiB of {_gib(memory.total)} are free (of the machine, or of its container)"
    return f"{free}, and this command and its workers hold {_gib(held)}"


def _kept_free(memory: HostMemory) -> float:
    return min(max(memory.total / _SHARE, _LEAST_BYTES), _MOST_BYTES)


def _top() -> int:
    """The process whose tree is this command: the launcher of several ranks, else this one."""
    return os.getppid() if ranks_here() > 1 else os.getpid()


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def out_of_memory(name: str, lower: str, error: BaseException) -> str:
    """One line for the user about an error of `is_of_memory`."""
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{name}: out of memory ({why}); {remedy(lower)}"
