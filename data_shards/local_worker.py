"""A worker process of local_workers.py: sets itself up once, then does the tasks that come through a pipe."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from data_shards import lean_imports, plain_warnings
from data_shards.ray_session import one_line

# A message: what came of the set-up or of a task, and the task's result or the error in one line.
READY, REFUSED, DONE, FAILED = "ready", "refused", "done", "failed"
# How soon a worker ends when the process that started it has ended.
_LOOK_S = 1.0


def main(handle: int, parent: int) -> None:
    """Serve the pipe whose end is this file descriptor, for the process `parent`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    lean_imports.begin()
    plain_warnings.begin()
    pipe = Connection(handle)
    try:
        with lean_imports.uncollected():
            do = cloudpickle.loads(pipe.recv_bytes())()
    except Exception as error:
        _send(pipe, REFUSED, one_line(error))
        return
    _send(pipe, READY)
    while True:
        try:
            given = pipe.recv_bytes()
        except (EOFError, ConnectionResetError):  # the parent has ended: killed, with something unread
            return
        _send(pipe, *_outcome(do, given))


def _outcome(do: Callable[[Any], Any], given: bytes) -> tuple[str, Any]:
    try:
        return DONE, do(cloudpickle.loads(given))
    except Exception as error:
        return FAILED, one_line(error)


def _send(pipe: Connection, kind: str, content: Any = None) -> None:
    try:
        pipe.send_bytes(cloudpickle.dumps((kind, content)))
    except (BrokenPipeError, ConnectionResetError):
        sys.exit()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)
