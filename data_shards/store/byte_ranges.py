"""Ranges of bytes and open files: what readers from disks, from URLs and from the cache share."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

# Half of what the system allows this process, which is 1,024 on many: a large set has thousands of shards.
MAX_OPEN_FILES = max(512, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 16_384))


class Range(NamedTuple):
    """Bytes of file number `file` from `offset` on, to fill `views` (writable, contiguous) one after another."""

    file: int
    offset: int
    views: Sequence[memoryview]

    @property
    def num_bytes(self) -> int:
        """What all views take together."""
        return sum(view.nbytes for view in self.views)


class ShortFile(OSError):
    """A file ends before bytes that should be in it: it was cut short. Other errors may be the store's, and pass."""


class OpenFiles:
    """File descriptors of numbered files, opened when first wanted; the longest unused go beyond `limit`."""

    def __init__(self, paths: Sequence[str], flags: int = os.O_RDONLY, limit: int = MAX_OPEN_FILES) -> None:
        self.paths = list(paths)
        self._flags, self._limit = flags, limit
        self._open: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, number: int) -> OpenFile:
        """The open file; hold on to the object while its descriptor is used. Raises OSError."""
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
                self._limit = max(1, len(self._open))  # the process has others open, and needs them


class OpenFile:
    """A descriptor that closes with its last user: a thread may still read what another has just let go."""

    __slots__ = ("fd",)

    def __init__(self, path: str, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        # Shuffled reads: what the kernel would read ahead is not what comes next.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def fill(views: Sequence[memoryview], payload: bytes) -> None:
    """Copy `payload` into `views` one after another."""
    source, at = memoryview(payload), 0
    for view in views:
        view[:] = source[at : at + view.nbytes]
        at += view.nbytes


def after(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """What of `views` follows their first `done` bytes."""
    left = []
    for view in views:
        left.append(memoryview(view).cast("B")[min(done, view.nbytes) :])
        done -= min(done, view.nbytes)
    return left
