"""Byte ranges of a shard set's files, on a disk or behind any URL that fsspec knows.

A loader asks for a whole batch at once. One Range fills several buffers one after another, so the image and the mask
of a sample, neighbours in their tar, are one system call or one request; the headers between them go to a scratch view.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from data_shards.files import file_lock, new_file
from data_shards.store.byte_ranges import MAX_OPEN_FILES, Filled, OpenFiles, Range, ShortFile, after, ignore

if TYPE_CHECKING:
    from data_shards.store.remote_files import Retries


class ByteStore(Protocol):
    """The files of one shard set, numbered as in its index. `num_misses`: ranges so far that were not in memory (of a
    remote set: in its cache on disk)."""

    num_misses: int

    def read(self, ranges: Sequence[Range], then: Filled = ignore) -> list[OSError | None]:
        """Fill the views of every range. For each range: None, or the reason why it could not be read (then its views
        are undefined). `then(i)` is called once range i is filled: from a disk at once, while its bytes are in the
        processor's cache.

        Any number of threads may call it at once, if they do not share views.
        """


class LocalFiles:
    """Files on a mounted filesystem, read with preadv.

    Not through a memory map: a map of a file that is truncated, or whose disk fails, kills the process with SIGBUS
    where preadv returns an error; page faults serialise threads on the process's address space, and the mapped pages
    count as its memory. preadv copies once, straight into the batch, without the GIL.
    """

    def __init__(self, paths: Sequence[str | Path], max_open: int = MAX_OPEN_FILES) -> None:
        self._max_open = max_open
        self._files = OpenFiles([str(path) for path in paths], limit=max_open)
        self.num_misses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFiles, (self._files.paths, self._max_open)  # descriptors mean nothing in another process

    def read(self, ranges: Sequence[Range], then: Filled = ignore) -> list[OSError | None]:
        """See ByteStore. Bytes that are not in the page cache are first requested from the disk all at once, then
        read."""
        reasons: list[OSError | None] = [None] * len(ranges)
        waiting = []
        for i, (file, offset, num_bytes, views) in enumerate(ranges):
            try:
                opened = self._files.get(file)
                is_filled = os.preadv(opened.fd, views, offset, os.RWF_NOWAIT) == num_bytes
            except OSError:  # it is not cached, the filesystem cannot tell, or the file cannot be opened
                is_filled = False
            if is_filled:
                then(i)
            else:
                waiting.append(i)
                self._request(file, offset, num_bytes)
        self.num_misses += len(waiting)
        for i in waiting:
            reasons[i] = self._read_one(ranges[i])
            if reasons[i] is None:
                then(i)
        return reasons

    def _request(self, file: int, offset: int, num_bytes: int) -> None:
        """Let the kernel begin to read bytes into the page cache."""
        with suppress(OSError):
            opened = self._files.get(file)
            os.posix_fadvise(opened.fd, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def _read_one(self, wanted: Range) -> OSError | None:
        num_bytes = wanted.num_bytes
        try:
            file = self._files.get(wanted.file)
            done = os.preadv(file.fd, wanted.views, wanted.offset)
            # A regular file returns fewer bytes than requested only at its end, except beyond 2 GiB or on some network
            # mounts.
            while 0 < done < num_bytes:
                more = os.preadv(file.fd, after(wanted.views, done), wanted.offset + done)
                if more == 0:
                    break
                done += more
        except OSError as error:
            return OSError(error.errno, error.strerror, self._files.paths[wanted.file])
        if done == num_bytes:
            return None
        path = self._files.paths[wanted.file]
        return ShortFile(errno.EIO, f"the file ends after {done} of {num_bytes} bytes at {wanted.offset}", path)


def open_byte_store(
    root: str | Path,
    names: Sequence[str],
    sizes: Sequence[int],
    digest: str,
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: int = 0,
    retries: Retries | None = None,
) -> ByteStore:
    """The store for the files `names` (of `sizes` bytes) below a folder, file:// or any other URL.

    `digest` identifies the set's content: a cache for another set is not used. Raises InputProblems if the URL's kind
    is unknown or the cache cannot be written.
    """
    folder = local_path(root)
    if folder is not None:
        return LocalFiles([folder / name for name in names])
    from data_shards.store.remote_files import RemoteFiles

    return RemoteFiles(str(root), names, sizes, digest, cache_dir=cache_dir, cache_bytes=cache_bytes, retries=retries)


def local_path(root: str | Path) -> Path | None:
    """The folder that `root` names, or None if it is a URL of another machine."""
    text = str(root)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return None if "://" in text else Path(text)


def read_file(root: str | Path, name: str, retries: Retries | None = None) -> bytes:
    """All bytes of a small file below `root`. Raises an OSError that names it, FileNotFoundError if it is missing."""
    folder = local_path(root)
    if folder is not None:
        return (folder / name).read_bytes()
    from data_shards.store.remote_files import Connection, Retries, persist

    connection = Connection(str(root).rstrip("/"))
    return persist(lambda: connection.read_file(name), f"{connection.root}/{name}", retries or Retries())


def local_copy(
    root: str | Path,
    name: str,
    cache_dir: str | Path | None,
    digest: str,
    *,
    num_bytes: int | None = None,
    retries: Retries | None = None,
) -> Path:
    """A local path for a file below `root`: the file itself, or a copy in `cache_dir` (None: in a temporary folder,
    removed when the process ends).

    A copy for the same `digest` is used again; with `num_bytes` its length must match. The processes of a node download
    it once. Raises an OSError that names the URL, InputProblems if cache_dir cannot be written.
    """
    from data_shards.store.range_cache import digest_folder
    from data_shards.store.remote_files import Connection, Retries, persist

    folder = local_path(root)
    if folder is not None:
        return folder / name
    if cache_dir is None:
        cache_dir = tempfile.mkdtemp(prefix="data_shards-")
        atexit.register(shutil.rmtree, cache_dir, ignore_errors=True)
    copy = digest_folder(Path(cache_dir), digest) / Path(name).name
    with file_lock(copy.with_name(f"{copy.name}.lock")):
        if copy.is_file() and num_bytes in (None, copy.stat().st_size):
            return copy
        connection = Connection(str(root).rstrip("/"))

        def download() -> None:
            connection.download(name, unfinished)
            if num_bytes not in (None, unfinished.stat().st_size):
                raise OSError(errno.EIO, f"gave {unfinished.stat().st_size} of {num_bytes} bytes")

        with new_file(copy) as unfinished:
            persist(download, f"{connection.root}/{name}", retries or Retries())
    return copy
