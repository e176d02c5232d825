"""Ranges of bytes and open files, which readers from disks, URLs and the cache share."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Half of the system's limit for this process, which is often 1,024: a large set has thousands of shards.
MAX_OPEN_FILES = max(512, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 16_384))


# Called with the index of each range when it is filled.
Filled = Callable[[int], object]


class Range(NamedTuple):
    """`num_bytes` bytes of file number `file` from `offset` on, to fill `views` one after another: memoryviews or
    arrays of bytes, writable, contiguous, of that length together."""

    file: int
    offset: int
    num_bytes: int
    views: Sequence[Any]


class ShortFile(OSError):
    """A file ends before bytes that should be in it: it is truncated. Other errors may come from the store and may be
    temporary."""


class OpenFiles:
    """File descriptors of numbered files, opened at first use; if there are more than `limit`, those that were opened
    first are closed. Reads are shuffled, so the least recently used are no better choice, and to note each use takes
    a lock."""

    def __init__(self, paths: Sequence[str], flags: int = os.O_RDONLY, limit: int = MAX_OPEN_FILES) -> None:
        self.paths = list(paths)
        self._flags, self._limit = flags, limit
        self._open: dict[int, OpenFile] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, number: int) -> OpenFile:
        """The open file; keep the object while its descriptor is used. Raises OSError."""
        return self._open.get(number) or self._add(number)

    def _add(self, number: int) -> OpenFile:
        with self._lock:
            file = self._open.get(number)  # another thread may have been faster
            if file is None:
                file = self._open[number] = self._opened(number)
                while len(self._open) > self._limit:
                    self._close_first()
            return file

    def _close_first(self) -> None:
        del self._open[next(iter(self._open))]

    def _opened(self, number: int) -> OpenFile:
        while True:
            try:
                return OpenFile(self.paths[number], self._flags)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._open:
                    raise
                self._close_first()
                self._limit = max(1, len(self._open))  # the process needs its other open files


class OpenFile:
    """A descriptor that closes with its last user: a thread may still read a file that another has just released."""

    __slots__ = ("fd",)

    def __init__(self, path: str, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        # Reads are shuffled, so bytes that the kernel would read ahead are not needed next.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def ignore(index: int) -> None:
    """A Filled that does nothing."""


def fill(views: Sequence[Any], payload: bytes) -> None:
    """Copy `payload` into `views` one after another."""
    source, at = memoryview(payload), 0
    for view in views:
        view[:] = source[at : at + view.nbytes]
        at += view.nbytes


def after(views: Sequence[Any], done: int) -> list[memoryview]:
    """The part of `views` after their first `done` bytes."""
    left = []
    for view in views:
        left.append(memoryview(view).cast("B")[min(done, view.nbytes) :])
        done -= min(done, view.nbytes)
    return left
