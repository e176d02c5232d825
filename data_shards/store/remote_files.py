"""Byte ranges of files behind a URL: fsspec, repeated attempts, and a cache on a local disk.

fsspec makes the requests, for any kind of URL for which it has a package. The repeated attempts are our own code:
fsspec has none for all of its file systems, and its cat_ranges waits for the slowest request of a batch. obstore
retries only for S3, GCS, Azure and HTTP, and its get_ranges gives all ranges of a file or one error; a batch here must
know which of its samples are missing.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data_shards.problems import problem
from data_shards.store.byte_ranges import Filled, Range, ShortFile, fill, ignore
from data_shards.store.range_cache import RangeCache

# Requests at a time: enough for 1,000 samples a second at a store's latency of 50 ms. Filesystems that are not
# asynchronous take a thread for each.
_NUM_REQUESTS = 64
_NUM_THREADS = 8
_MAX_DELAY_S = 30.0
# A batch that takes longer than this delays any training step; reported once.
_SLOW_S = 30.0
# Answers that further attempts do not change.
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
_PERMANENT_HTTP = (401, 403, 404, 410)

T = TypeVar("T")


@dataclass(frozen=True)
class Retries:
    """Attempts on a store: `attempts` of them, with waits of base_delay_s * 2^k (at most 30 s, half of it random) in
    between. A request of an asynchronous filesystem (http, s3, gs, ...) takes at most `timeout_s`; others have their
    own limits. The defaults survive about a minute of failure."""

    attempts: int = 8
    base_delay_s: float = 0.5
    timeout_s: float = 60.0

    def delays_s(self) -> Iterator[float]:
        """How long to wait before each attempt; 0 before the first."""
        chance = random.Random()  # not the global generator: a run's own draws must not depend on its store
        yield 0.0
        for k in range(self.attempts - 1):
            # Equal jitter (Brooker 2015, "Exponential backoff and jitter"), so that ranks do not come back together.
            yield min(_MAX_DELAY_S, self.base_delay_s * 2**k) * (0.5 + 0.5 * chance.random())


class RemoteFiles:
    """Files below a URL, read by range through fsspec, with a bounded cache on a local disk.

    All ranges of a batch that are not cached are requested at once. A failed request is tried again (`retries`), then
    reported; a range beyond the `sizes` of the index is reported without a request.

    The cache (range_cache.py) adds ranges until it holds `cache_bytes`, and then does not change. Each epoch visits
    every sample once, in a new order, so the least recently used ranges are needed next, and LRU would drop most of
    them just before. A fixed part of the set has a hit rate equal to its share, every epoch: 30 %, where LRU with 30 %
    would have 5 %. No cache: cache_dir None or cache_bytes 0.
    """

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        sizes: Sequence[int],
        digest: str,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 0,
        retries: Retries | None = None,
    ) -> None:
        assert len(names) == len(sizes)
        self.root, self._names, self._sizes, self._digest = root.rstrip("/"), list(names), list(sizes), digest
        self._cache_dir, self._cache_bytes, self._retries = cache_dir, cache_bytes, retries or Retries()
        self._connection = Connection(self.root)
        self._cache = RangeCache(Path(cache_dir), digest, sizes, cache_bytes) if cache_dir and cache_bytes else None
        self._said: set[str] = set()
        self.num_hits = 0
        self.num_misses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        again = partial(RemoteFiles, cache_dir=self._cache_dir, cache_bytes=self._cache_bytes, retries=self._retries)
        return again, (self.root, self._names, self._sizes, self._digest)

    def read(self, ranges: Sequence[Range], then: Filled = ignore) -> list[OSError | None]:
        """See ByteStore."""
        missing = self._cache.read(ranges) if self._cache else list(range(len(ranges)))
        self.num_hits += len(ranges) - len(missing)
        self.num_misses += len(missing)
        reasons: list[OSError | None] = [None] * len(ranges)
        found: list[tuple[Range, bytes]] = []
        for index, payload in zip(missing, self._fetch([ranges[i] for i in missing]), strict=True):
            if isinstance(payload, bytes):
                fill(ranges[index].views, payload)
                found.append((ranges[index], payload))
            else:
                reasons[index] = payload
        if self._cache and found:
            self._cache.keep(found)
        for index, reason in enumerate(reasons):
            if reason is None:
                then(index)
        return reasons

    def _fetch(self, ranges: Sequence[Range]) -> list[bytes | OSError]:
        found: list[bytes | OSError] = [OSError(errno.EIO, "not tried")] * len(ranges)
        left = []
        for index, wanted in enumerate(ranges):
            if wanted.offset + wanted.num_bytes > self._sizes[wanted.file]:
                reason = f"ends at {self._sizes[wanted.file]}, before the {wanted.num_bytes} bytes at {wanted.offset}"
                found[index] = ShortFile(errno.EIO, reason, self._url(wanted))
            else:
                left.append(index)
        for attempt, delay_s in enumerate(self._retries.delays_s() if left else (), start=1):
            time.sleep(delay_s)
            started = time.monotonic()
            answers = self._connection.fetch([self._request(ranges[i]) for i in left], self._retries.timeout_s)
            if time.monotonic() - started > _SLOW_S:
                self._warn_once("slow", f"took {time.monotonic() - started:.0f} s for {len(left)} requests")
            again = []
            for index, answer in zip(left, answers, strict=True):
                wanted = ranges[index]
                if isinstance(answer, bytes) and len(answer) == wanted.num_bytes:
                    found[index] = answer
                    continue
                error = answer if not isinstance(answer, bytes) else OSError(errno.EIO, f"it gave {len(answer)}")
                reason = f"{wanted.num_bytes} bytes at {wanted.offset}: {attempt} attempts, the last: {error!r}"
                found[index] = last = OSError(_errno(error), reason, self._url(wanted))
                if not _is_permanent(error):
                    again.append(index)
            left = again
            if not left:
                break
            self._warn_once("failing", f"failed {len(left)} requests, for example {last}; trying again")
        return found

    def _request(self, wanted: Range) -> tuple[str, int, int]:
        return self._names[wanted.file], wanted.offset, wanted.offset + wanted.num_bytes

    def _url(self, wanted: Range) -> str:
        return f"{self.root}/{self._names[wanted.file]}"

    def _warn_once(self, kind: str, what: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"{self.root} {what} (said once)", stacklevel=4)


class Connection:
    """An fsspec filesystem, opened in the process that uses it: its event loop does not survive a fork."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._pid, self._fs, self._base = -1, None, ""
        self._opening = threading.Lock()
        self._filesystem()  # an unknown kind of URL is refused here

    def fetch(self, requests: Sequence[tuple[str, int, int]], timeout_s: float) -> list[bytes | BaseException]:
        """One attempt at each (name, start, end), all at once: the bytes, or the error."""
        fs = self._filesystem()
        whole = [(f"{self._base}/{name}", start, end) for name, start, end in requests]
        if fs.async_impl:
            from fsspec.asyn import sync

            # Not cat_ranges: one request that hangs must not fail the others of the batch.
            async def gather() -> list[bytes | BaseException]:
                gate = asyncio.Semaphore(_NUM_REQUESTS)

                async def one(path: str, start: int, end: int) -> bytes:
                    async with gate:
                        return bytes(await asyncio.wait_for(fs._cat_file(path, start=start, end=end), timeout_s))

                return await asyncio.gather(*(one(*request) for request in whole), return_exceptions=True)

            answers: list[bytes | BaseException] = sync(fs.loop, gather)
            return answers

        def one(request: tuple[str, int, int]) -> bytes | BaseException:
            try:
                return bytes(fs.cat_file(request[0], start=request[1], end=request[2]))
            except Exception as error:
                return error

        with ThreadPoolExecutor(min(_NUM_THREADS, len(requests))) as pool:
            return list(pool.map(one, whole))

    def read_file(self, name: str) -> bytes:
        """A whole file of the set, by its name in it."""
        return bytes(self._filesystem().cat_file(f"{self._base}/{name}"))

    def download(self, name: str, to: Path) -> None:
        """The same, written to `to`."""
        self._filesystem().get_file(f"{self._base}/{name}", str(to))

    def _filesystem(self) -> Any:
        with self._opening:
            if self._pid != os.getpid():
                from fsspec.core import url_to_fs

                try:
                    self._fs, base = url_to_fs(self.root)
                except (ImportError, ValueError) as error:
                    remedy = "give a folder, or a URL of a kind whose fsspec package is installed (s3:// needs s3fs)"
                    raise problem(self.root, "URL", error, remedy) from error
                self._base, self._pid = base.rstrip("/"), os.getpid()
            return self._fs


def persist(call: Callable[[], T], url: str, retries: Retries) -> T:
    """The result of `call`, after repeated attempts if necessary. Raises an OSError that names the URL."""
    last: Exception | None = None
    for delay_s in retries.delays_s():
        time.sleep(delay_s)
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "not found", url) from error
        except Exception as error:
            last = error
            if _is_permanent(error):
                break
    assert last is not None
    raise OSError(_errno(last), f"cannot be read: {last!r}", url) from last


def _is_permanent(error: BaseException) -> bool:
    return isinstance(error, _PERMANENT) or getattr(error, "status", None) in _PERMANENT_HTTP


def _errno(error: BaseException) -> int:
    # Filesystems of fsspec raise FileNotFoundError without its number, which decides the class of an OSError.
    return getattr(error, "errno", None) or (errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO)
