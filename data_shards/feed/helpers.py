"""Threads that share the work on a batch.

ThreadPoolExecutor does the same, but its futures and locks are written in Python: they took 1.6 microseconds for each
pair of a batch of 32. These threads wait at queues that are written in C.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any


class Helpers:
    """`num` threads beside the caller's own, started when they are needed. Not to be shared by threads."""

    def __init__(self, num: int) -> None:
        self._calls: SimpleQueue[tuple[Callable[[Any], object], Any] | None] = SimpleQueue()
        self._ends: SimpleQueue[BaseException | None] = SimpleQueue()
        self._num = num
        self._threads: list[threading.Thread] = []

    def share(self, call: Callable[[Any], object], items: Sequence[Any]) -> None:
        """`call` of at most num + 1 items, of the first in the caller's thread. Returns when all have ended; raises the
        first error."""
        assert len(items) <= self._num + 1
        while len(self._threads) < len(items) - 1:
            self._threads.append(threading.Thread(target=self._work, name="loader helper", daemon=True))
            self._threads[-1].start()
        for item in items[1:]:
            self._calls.put((call, item))
        errors = [_error_of(call, item) for item in items[:1]]
        errors += [self._ends.get() for _ in items[1:]]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while (asked := self._calls.get()) is not None:
            self._ends.put(_error_of(*asked))
            del asked  # a batch's memory can be used again only when nobody refers to it


def _error_of(call: Callable[[Any], object], item: Any) -> BaseException | None:
    try:
        call(item)
    except BaseException as error:
        return error
    return None
