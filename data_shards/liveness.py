"""Whether a worker's process does anything: the processor time that it and the processes it started have used.

A process that is stopped, or waits for ever for a lock or for a file server, uses none. One that computes on a GPU,
decodes, downloads or trains in a process of its own uses more than the share of a core below, however long it takes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass, field

import psutil

from data_shards.problems import problem

# Ray's own threads in an idle worker were measured to use 0.002 of a core.
_LEAST_CORES = 0.01
# A worker is looked at so often within the time after which it is ended, and is first reported after a sixth of it.
_LOOKS, _REPORTED_AFTER = 12, 1 / 6
# Processes may differ by so much in when a third was created, where the clock was set meanwhile.
_CLOCK_S = 2.0
# A look may take so long, where machines answer late.
_LOOK_S = 120.0
# Changes the bound: minutes after which a worker that does nothing is ended; 0 never ends one.
BOUND = "SEGDIFF_STUCK_MINUTES"
_BOUND_MINUTES = 60.0


@dataclass(frozen=True)
class Place:
    """A process: of which machine, which Ray node, which id, and created when (ids are used again)."""

    host: str
    node: str
    pid: int
    created: float

    @classmethod
    def of_this_process(cls, node: str) -> Place:
        """Of the process that calls it."""
        return cls(socket.gethostname(), node, os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"{self.pid} on {self.host}"


def cpu_seconds(place: Place) -> float | None:
    """Processor time of the process and of those that it started. Call on its machine. None where it is gone."""
    try:
        process = _process(place)
        return _used(process) + sum(map(_used, process.children(recursive=True)))
    except psutil.Error:
        return None


def end(place: Place) -> None:
    """Kill the process and those that it started. Call on its machine."""
    with contextlib.suppress(psutil.Error):
        process = _process(place)
        kill([process, *process.children(recursive=True)])


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def bound_s() -> float | None:
    """After how many seconds without work a worker is ended; None: never. InputProblems for what is no number."""
    text = os.environ.get(BOUND) or str(_BOUND_MINUTES)
    try:
        minutes = float(text)
    except ValueError:
        raise problem("environment", BOUND, text, "give minutes, or 0 to end no worker") from None
    return 60 * minutes if minutes > 0 else None


@dataclass
class Quiet:
    """For how long workers have done nothing, by looking at them from time to time."""

    bound_s: float
    _seen: dict[Place, tuple[float, float]] = field(default_factory=dict)
    """Processor time and the moment, of the last look at which there was more of it."""
    _reported: set[Place] = field(default_factory=set)
    _looked_at: float | None = None

    @property
    def look_every_s(self) -> float:
        """How long there is between looks."""
        return self.bound_s / _LOOKS

    @property
    def report_s(self) -> float:
        """After how long a worker is reported."""
        return self.bound_s * _REPORTED_AFTER

    def is_due(self, now: float) -> bool:
        """Whether it is time for the next look."""
        return self._looked_at is None or now - self._looked_at >= self.look_every_s

    def look(self, used: dict[Place, float | None], now: float) -> tuple[list[Place], list[Place]]:
        """Workers that are to be reported, each once while it is quiet, and those that are to be ended. `used`:
        processor time of all that have a task; None where it is not known, which counts as work."""
        if self._looked_at is not None and now - self._looked_at > 3 * self.look_every_s + _LOOK_S:
            self._seen.clear()  # this process was stopped itself
        self._looked_at = now
        report, over = [], []
        self._seen = {place: seen for place, seen in self._seen.items() if place in used}
        for place, seconds in used.items():
            before, since = self._seen.get(place, (0.0, now))
            # Less than before: a process that it started has ended.
            if place not in self._seen or seconds is None or abs(seconds - before) > _LEAST_CORES * (now - since):
                self._seen[place] = (before if seconds is None else seconds, now)
                self._reported.discard(place)
            elif now - since >= self.bound_s:
                over.append(place)
            elif now - since >= self.report_s and place not in self._reported:
                self._reported.add(place)
                report.append(place)
        return report, over


def _process(place: Place) -> psutil.Process:
    process = psutil.Process(place.pid)
    if abs(process.create_time() - place.created) > _CLOCK_S:
        raise psutil.NoSuchProcess(place.pid)
    return process


def _used(process: psutil.Process) -> float:
    """With that of children that have ended."""
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.Error:
        return 0.0
