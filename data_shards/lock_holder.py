"""The holder of a lock: the process that a lock file names, and whether it still runs.

The contents of a lock file are only compared and shown, never acted upon, since the folder may come from a stranger.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

# Bytes that are read of a lock file, and characters that are shown of each value.
MOST_BYTES, _MOST_CHARACTERS = 4096, 120


@dataclass(frozen=True)
class Holder:
    """A working process. `machine`: the identity of its process table, or empty; `started`: the process' start in clock
    ticks; `job`: an id that the ranks of one start of a training share."""

    host: str
    machine: str
    pid: int
    started: int
    command: str
    since: str
    job: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            command=_command(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            job=this_job(),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"

    @property
    def shares_kernel(self) -> bool:
        """Whether it is, or was, on this machine, in any container."""
        return bool(self.machine) and self.machine.split(":")[0] == _machine().split(":")[0]

    @property
    def is_alive_here(self) -> bool | None:
        """Whether the process runs; None if this process cannot see it."""
        if not self.machine or self.machine != _machine():
            return None
        return _started(self.pid) == self.started


def read_holder_at(file: Path) -> Holder | None:
    """The holder that a lock file names; None if there is no readable file. Raises OSError."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return read_holder(descriptor)
    finally:
        os.close(descriptor)


def read_holder(descriptor: int) -> Holder | None:
    """The holder that an open lock file names; None if it names none, or is not readable."""
    try:
        values = json.loads(os.pread(descriptor, MOST_BYTES, 0))
        texts = {f.name: shown(str(values[f.name])) for f in fields(Holder) if f.name not in ("pid", "started")}
        return Holder(pid=int(values["pid"]), started=int(values["started"]), **texts)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def shown(text: str) -> str:
    """The text in a form that is safe for a terminal, cut to a limited length: the file may come from a stranger."""
    cut = text[:_MOST_CHARACTERS] + "..." if len(text) > _MOST_CHARACTERS + 3 else text
    return "".join(c if c.isprintable() else "?" for c in cut)


def _machine() -> str:
    """Boot and process table, in which the id of a running process is unique. Empty if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """The start of a process, in clock ticks since the boot (proc(5)); None if no process with that id runs."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None


def this_job() -> str:
    """An id that the ranks of one training share, also when they are started again; empty for a single process."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    address = os.environ.get("MASTER_ADDR", "")
    # An id that every machine has does not identify a job.
    host = socket.gethostname() if address in ("localhost", "127.0.0.1", "::1") else ""
    return f"{host}/{address}:{os.environ.get('MASTER_PORT', '')}"


def _command() -> str:
    if not sys.argv:
        return ""
    file = Path(sys.argv[0])
    words = [*(("python", "-m", file.parent.name) if file.name == "__main__.py" else (file.name,)), *sys.argv[1:]]
    return shown(re.sub(r"://[^/@\s]*@", "://", shlex.join(words)))
