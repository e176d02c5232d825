"""Ranges of bytes and open files, which readers from disks, URLs and the cache share."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Half of the system's limit for this process, which is often 1,024: a large set has thousands of shards.
MAX_OPEN_FILES = max(512, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 16_384))


# Called with the index of each range when it is filled.
Filled = Callable[[int], object]


class Range(NamedTuple):
    """Bytes of file number `file` from `offset` on, to fill `views` (writable, contiguous) one after another."""

    file: int
    offset: int
    views: Sequence[memoryview]

    @property
    def num_bytes(self) -> int:
        """Total bytes of the views."""
        return sum(view.nbytes for view in self.views)


class ShortFile(OSError):
    """A file ends before bytes that should be in it: it is truncated. Other errors may come from the store and may be
    temporary."""


class OpenFiles:
    """File descriptors of numbered files, opened at first use; if there are more than `limit`, the least recently used
    are closed."""

    def __init__(self, paths: Sequence[str], flags: int = os.O_RDONLY, limit: int = MAX_OPEN_FILES) -> None:
        self.paths = list(paths)
        self._flags, self._limit = flags, limit
        self._open: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, number: int) -> OpenFile:
        """The open file; keep the object while its descriptor is used. Raises OSError."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = self._opened(number)
                while len(self._open) > self._limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return file

    def _opened(self, number: int) -> OpenFile:
        while True:
            try:
                return OpenFile(self.paths[number], self._flags)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._open:
                    raise
                self._open.popitem(last=False)
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


def fill(views: Sequence[memoryview], payload: bytes) -> None:
    """Copy `payload` into `views` one after another."""
    source, at = memoryview(payload), 0
    for view in views:
        view[:] = source[at : at + view.nbytes]
        at += view.nbytes


def after(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """The part of `views` after their first `done` bytes."""
    left = []
    for view in views:
        left.append(memoryview(view).cast("B")[min(done, view.nbytes) :])
        done -= min(done, view.nbytes)
    return left
