"""Workers that are processes of this machine, for small jobs: Ray needs longer to start than such a job works.

They have the interface of Ray's workers and give the same results. Not concurrent.futures or multiprocessing: they lose
all tasks if one worker dies, and start workers by importing the main module again, which a script may not allow.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Generic

import cloudpickle
import psutil

from data_shards import liveness
from data_shards.liveness import IdleWatch, WorkerProcess
from data_shards.local_worker import FAILED, READY, REFUSED
from data_shards.tasks import MOST_DEATHS, Attempt, Done, Result, Task, TaskFailure, first_event

_START = "import sys; sys.path[:] = {path!r}; from data_shards.local_worker import main; main({handle}, {parent})"


# How long a process that has closed its pipe may take to end.
_DYING_S = 2.0


class LocalWorkers(Generic[Task, Result]):
    """A context in which `run` may be called for one list of tasks after the other. See fan_out.Workers."""

    def __init__(
        self,
        make_worker: Callable[[], Callable[[Task], Result]],
        *,
        num_workers: int,
        threads_per_worker: int = 1,
        watched: bool = True,
    ) -> None:
        self._make_worker = cloudpickle.dumps(make_worker)
        self._num_workers, self._threads, self._watched = num_workers, threads_per_worker, watched
        self._starting: dict[Connection, _Process] = {}
        self._idle: list[_Process] = []
        self._running: dict[Connection, tuple[_Process, Attempt[Task]]] = {}
        self._deaths_at_start = 0
        self._idle_watch: IdleWatch | None = None

    def __enter__(self) -> LocalWorkers[Task, Result]:
        bound_s = liveness.bound_s() if self._watched else None
        self._idle_watch = None if bound_s is None else IdleWatch(bound_s)
        return self

    def __exit__(self, *error: Any) -> None:
        for process in [*self._idle, *self._starting.values(), *(process for process, _ in self._running.values())]:
            process.end()

    def run(self, tasks: Iterable[Task]) -> Iterator[Done[Task, Result]]:
        """Do every task; yield results as they come, in no fixed order. Failures are returned as by Ray's workers."""
        room, why_not = self._num_workers, ""
        waiting = [Attempt(task) for task in list(tasks)[::-1]]
        while waiting or self._running:
            self._ask_for(min(len(waiting), room - len(self._running)) - len(self._idle))
            while waiting and self._idle:
                process, attempt = self._idle.pop(), waiting.pop()
                process.give(attempt.task)
                self._running[process.pipe] = (process, attempt)
            if not self._running and not self._starting:
                yield from (Done(attempt.task, TaskFailure(why_not)) for attempt in waiting)
                return
            pipe = self._next_event()
            if pipe in self._starting:
                if refused := self._greet(self._starting.pop(pipe)):
                    room, why_not = room - 1, refused
                continue
            process, attempt = self._running.pop(pipe)
            answer = process.answer()
            if answer is None:
                lost = process.end()
                if (again := attempt.after_a_death()) is not None:
                    _say(f"a worker was lost ({lost}); its task goes to another")
                    waiting.append(again)
                    continue
                yield Done(attempt.task, TaskFailure(f"its worker process died: {lost}"))
                continue
            self._idle.append(process)
            kind, result = answer
            yield Done(attempt.task, TaskFailure(result) if kind == FAILED else result)

    def _ask_for(self, num: int) -> None:
        """Make sure that `num` workers exist or are starting."""
        for _ in range(num - len(self._starting)):
            process = _Process(self._threads)
            process.send(self._make_worker)
            self._starting[process.pipe] = process

    def _greet(self, process: _Process) -> str | None:
        """Add a worker whose set-up has ended. One that cannot be set up is given up: returns the reason."""
        kind, reason = process.answer() or ("", "")
        if kind == READY:
            self._idle.append(process)
            self._deaths_at_start = 0
            return None
        lost = process.end()
        if kind == REFUSED:
            reason = f"a worker could not set itself up: {reason}"
        else:
            self._deaths_at_start += 1
            if self._deaths_at_start < MOST_DEATHS:
                _say(f"a worker was lost as it started ({lost})")
                return None
            reason = f"workers die as they start: {lost}"
        _say(f"{reason}; going on without it")
        return reason

    def _next_event(self) -> Any:
        """The pipe of a worker that has answered or died."""
        return first_event(
            lambda seconds: wait([*self._running, *self._starting], timeout=seconds),
            self._end_the_stuck,
            None if self._idle_watch is None else self._idle_watch.look_every_s,
            lambda: f"{len(self._running)} tasks at work, {len(self._starting)} workers setting themselves up",
            self._end_starting,
            _say,
        )

    def _end_starting(self) -> None:
        for process in self._starting.values():
            process.end()

    def _end_the_stuck(self) -> None:
        if self._idle_watch is not None and self._idle_watch.is_due(now := time.monotonic()):
            workers = [process.identity for process, _ in self._running.values()]
            self._idle_watch.end_the_stuck(workers, now, lambda do, workers: [do(worker) for worker in workers], _say)


class _Process:
    """A worker process, and this end of the pipe to it."""

    def __init__(self, num_threads: int) -> None:
        self.pipe, theirs = Pipe()
        self._has_hung_up = False
        code = _START.format(path=sys.path, handle=theirs.fileno(), parent=os.getpid())
        # Threads are fixed before torch loads, so that results do not depend on the number of workers.
        threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **threads},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        created = psutil.Process(self._process.pid).create_time()
        self.identity = WorkerProcess(socket.gethostname(), "", self._process.pid, created)

    def give(self, task: Any) -> None:
        self.send(cloudpickle.dumps(task))

    def send(self, content: bytes) -> None:
        with suppress(OSError):  # it has died: the next wait finds the end of the pipe
            self.pipe.send_bytes(content)

    def answer(self) -> tuple[str, Any] | None:
        """Its next message; None if it has died."""
        try:
            kind, content = cloudpickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self._has_hung_up = True
            return None
        return kind, content

    def end(self) -> str:
        """Kill it, with the processes that it started. Returns how it ended if it had already."""
        try:
            code = self._process.wait(timeout=_DYING_S if self._has_hung_up else 0.0)
        except subprocess.TimeoutExpired:
            code = None
        liveness.end(self.identity)
        self._process.wait()
        self.pipe.close()
        if code is None:
            return "killed"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=4)
