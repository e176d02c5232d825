"""Whether a worker's process does any work: the processor time that it and its child processes have used.

A process that is stopped, or waits for ever for a lock or a file server, uses none. A process that computes on a GPU,
decodes, downloads or trains in a child process uses more than the share of a core below, however long it takes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from data_shards.problems import problem

# Ray's own threads in an idle worker were measured to use 0.002 of a core.
_LEAST_CORES = 0.01
# Number of checks of a worker within the time after which it is ended; it is first reported after a sixth of that time.
_LOOKS, _REPORTED_AFTER = 12, 1 / 6
# Seconds by which the creation time of a process may differ between two readings if the clock was set meanwhile.
_CLOCK_S = 2.0
# Seconds that a check may take if machines answer late.
_LOOK_S = 120.0
# Changes the bound: minutes after which a worker that does nothing is ended; 0 never ends one.
BOUND = "SEGDIFF_STUCK_MINUTES"
_BOUND_MINUTES = 60.0


@dataclass(frozen=True)
class WorkerProcess:
    """A process: of which machine, which Ray node, which id, and created when (ids are used again)."""

    host: str
    node: str
    pid: int
    created: float

    @classmethod
    def of_this_process(cls, node: str) -> WorkerProcess:
        """The identity of the calling process."""
        return cls(socket.gethostname(), node, os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"{self.pid} on {self.host}"


def cpu_seconds(worker: WorkerProcess) -> float | None:
    """Processor time of the process and of its children. Call on its machine. None if the process has ended."""
    try:
        process = _process(worker)
        return _used(process) + sum(map(_used, process.children(recursive=True)))
    except psutil.Error:
        return None


def end(worker: WorkerProcess) -> None:
    """Kill the process and those that it started. Call on its machine."""
    with contextlib.suppress(psutil.Error):
        process = _process(worker)
        kill([process, *process.children(recursive=True)])


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all processes that still run."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def bound_s() -> float | None:
    """Seconds without work after which a worker is ended; None: never. InputProblems if it is not a number."""
    text = os.environ.get(BOUND) or str(_BOUND_MINUTES)
    try:
        minutes = float(text)
    except ValueError:
        raise problem("environment", BOUND, text, "give minutes, or 0 to end no worker") from None
    return 60 * minutes if minutes > 0 else None


@dataclass
class IdleWatch:
    """How long workers have done nothing, measured by checks from time to time."""

    bound_s: float
    _seen: dict[WorkerProcess, tuple[float, float]] = field(default_factory=dict)
    """Processor time and moment of the last check at which the time had grown."""
    _reported: set[WorkerProcess] = field(default_factory=set)
    _looked_at: float | None = None

    @property
    def look_every_s(self) -> float:
        """Seconds between checks."""
        return self.bound_s / _LOOKS

    @property
    def report_s(self) -> float:
        """Seconds after which a worker is reported."""
        return self.bound_s * _REPORTED_AFTER

    def is_due(self, now: float) -> bool:
        """Whether it is time for the next check."""
        return self._looked_at is None or now - self._looked_at >= self.look_every_s

    def look(
        self, used: dict[WorkerProcess, float | None], now: float
    ) -> tuple[list[WorkerProcess], list[WorkerProcess]]:
        """Workers to report, each once while it does nothing, and workers to end. `used`: processor time of all workers
        with a task; None if it is not known, which counts as work."""
        if self._looked_at is not None and now - self._looked_at > 3 * self.look_every_s + _LOOK_S:
            self._seen.clear()  # this process was stopped itself
        self._looked_at = now
        report, over = [], []
        self._seen = {worker: seen for worker, seen in self._seen.items() if worker in used}
        for worker, seconds in used.items():
            before, since = self._seen.get(worker, (0.0, now))
            # Less than before: a process that it started has ended.
            if worker not in self._seen or seconds is None or abs(seconds - before) > _LEAST_CORES * (now - since):
                self._seen[worker] = (before if seconds is None else seconds, now)
                self._reported.discard(worker)
            elif now - since >= self.bound_s:
                over.append(worker)
            elif now - since >= self.report_s and worker not in self._reported:
                self._reported.add(worker)
                report.append(worker)
        return report, over

    def end_the_stuck(
        self,
        workers: list[WorkerProcess],
        now: float,
        on_machines: Callable[[Callable[[WorkerProcess], Any], list[WorkerProcess]], list[Any]],
        say: Callable[[str], None],
    ) -> list[WorkerProcess]:
        """Report workers whose task uses no processor time, and end those that have used none for too long, so that
        their tasks go to others: returns these. `on_machines(do, workers)`: do(worker) on each worker's machine."""
        report, over = self.look(dict(zip(workers, on_machines(cpu_seconds, workers), strict=True)), now)
        bound = f"{self.bound_s / 60:.3g} minutes"
        for worker in report:
            say(
                f"worker {worker} has done nothing for {self.report_s / 60:.2g} minutes: it uses no processor "
                f"time. After {bound} it is ended, and its task goes to another (set {BOUND} to change that)"
            )
        for worker in over:
            say(f"worker {worker} has done nothing for {bound} ({BOUND}); it is ended")
        on_machines(end, over)
        return over


def _process(worker: WorkerProcess) -> psutil.Process:
    process = psutil.Process(worker.pid)
    if abs(process.create_time() - worker.created) > _CLOCK_S:
        raise psutil.NoSuchProcess(worker.pid)
    return process


def _used(process: psutil.Process) -> float:
    """Processor time, with that of children that have ended."""
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.Error:
        return 0.0
