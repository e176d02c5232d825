"""Byte ranges of remote files, kept on a local disk and shared by the processes of a node.

    CACHE_DIR/lock                    held while ranges are added
    CACHE_DIR/<digest>/000000.bytes   a sparse mirror of file 0: every range at its own offset
    CACHE_DIR/<digest>/ranges.log     one record of 20 bytes for each range, appended after its bytes were written

A record has the crc32c of its bytes, which is checked at every read. So a crash at any moment costs at most some
ranges: an incomplete record is dropped, and a record whose bytes never reached the disk does not match and is fetched
again. Nothing is ever removed; to empty the cache, remove the folder. Use a disk of the node: locks are not safe on all
network mounts.

fsspec's blockcache and filecache are not used: they keep whole blocks or files, without a limit of disk space and
without checksums, and running processes do not share the bytes that one of them has fetched.
"""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_shards.files import file_lock
from data_shards.problems import problem
from data_shards.store.byte_ranges import OpenFiles, Range, fill

RECORD = np.dtype([("offset", "<u8"), ("file", "<u4"), ("num_bytes", "<u4"), ("crc", "<u4")])
_LOG = "ranges.log"
# The block size of ext4 and XFS, so that the limit holds for the disk space that `du` shows.
_BLOCK = 4096
# A key is file << 44 | offset: a million files of up to 16 TiB.
_OFFSET_BITS = 44
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1
_MIN_MERGE = 16_384


class RangeCache:
    """Ranges of the files (of `sizes` bytes) of the set with `digest`, up to `limit_bytes` for all of `folder`, with
    other sets' ranges included. A range is found by its exact offset and length.

    Any number of threads and processes. Raises InputProblems when the folder cannot be written.
    """

    def __init__(self, folder: Path, digest: str, sizes: Sequence[int], limit_bytes: int) -> None:
        assert len(sizes) < 1 << (63 - _OFFSET_BITS)
        self._folder, self._limit = folder, limit_bytes
        own = digest_folder(folder, digest)
        self._files = OpenFiles([str(own / f"{i:06d}.bytes") for i in range(len(sizes))], os.O_RDWR | os.O_CREAT)
        self._sizes = np.asarray(sizes, dtype=np.uint64)
        self._log = own / _LOG
        self._present = Present()
        self._tails: dict[Path, int] = {}  # position up to which each set's log has been read
        self._used = 0
        self._thread_lock = threading.Lock()
        self._closed = False  # full, or the disk failed
        self._said = False
        with self._thread_lock:
            self._refresh(all_sets=True)
        if self._used > limit_bytes and not len(self._present):
            others = ", ".join(str(log.parent) for log in self._tails if log != self._log)
            warnings.warn(f"{folder} is full of other sets' ranges: nothing is cached; remove {others}", stacklevel=4)

    def read(self, ranges: Sequence[Range]) -> list[int]:
        """Fill the views of the cached ranges; returns the indices of the others."""
        missing = [i for i, wanted in enumerate(ranges) if not self._read_one(wanted)]
        if missing:
            with self._thread_lock:
                grown = self._refresh(all_sets=False)
            if grown:  # another process has added some
                missing = [i for i in missing if not self._read_one(ranges[i])]
        return missing

    def keep(self, found: Sequence[tuple[Range, bytes]]) -> None:
        """Write ranges and their bytes, as far as they fit. A disk that fails or is full is reported once, and no
        longer used."""
        if self._closed:
            return
        try:
            with self._thread_lock, file_lock(self._folder / "lock"):
                self._refresh(all_sets=True)
                self._append(self._write(found))
        except OSError as error:
            self._closed = True
            warnings.warn(f"cache {self._folder}: {error}; it takes no more ranges in this run", stacklevel=3)

    def _read_one(self, wanted: Range) -> bool:
        import google_crc32c

        num_bytes = wanted.num_bytes
        kept_bytes, crc = self._present.find(wanted.file, wanted.offset)
        if kept_bytes != num_bytes:
            return False
        try:
            payload = os.pread(self._files.get(wanted.file).fd, num_bytes, wanted.offset)
        except OSError:
            payload = b""
        if len(payload) != num_bytes or google_crc32c.value(payload) != crc:
            if not self._said:
                self._said = True
                path = self._files.paths[wanted.file]
                warnings.warn(f"{path}: bytes at {wanted.offset} are damaged; fetched again (said once)", stacklevel=4)
            with self._thread_lock:
                self._present.forget(wanted.file, wanted.offset)
            return False
        fill(wanted.views, payload)
        return True

    def _write(self, found: Sequence[tuple[Range, bytes]]) -> np.ndarray:
        import google_crc32c

        records = []
        for wanted, payload in found:
            if self._present.find(wanted.file, wanted.offset)[0]:
                continue  # another process was faster, or a range of another length begins here
            space = int(_space(wanted.offset, len(payload)))
            if self._used + space > self._limit:
                self._closed = True
                break
            if os.pwrite(self._files.get(wanted.file).fd, payload, wanted.offset) != len(payload):
                raise OSError(errno.ENOSPC, "no space left")
            self._used += space
            records.append((wanted.offset, wanted.file, len(payload), google_crc32c.value(payload)))
        return np.array(records, dtype=RECORD)

    def _append(self, record_R: np.ndarray) -> None:
        """Call under both locks and directly after a refresh, when all records of the log have been read."""
        if not len(record_R):
            return
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Written at the end of the last complete record: a crash may have left part of one after it.
            tail = self._tails.get(self._log, 0)
            if os.pwrite(log, record_R.tobytes(), tail) != record_R.nbytes:
                raise OSError(errno.ENOSPC, "no space left")
            self._tails[self._log] = tail + record_R.nbytes
        finally:
            os.close(log)
        self._present.add(record_R)

    def _refresh(self, *, all_sets: bool) -> bool:
        """Read new records of the logs; True if this set has more ranges. The caller holds the thread lock."""
        grown = False
        for log in self._folder.glob(f"*/{_LOG}") if all_sets else [self._log]:
            record_R = self._new_records(log)
            if log == self._log:
                record_R = record_R[self._possible(record_R)]
                self._present.add(record_R)
                grown = len(record_R) > 0
            self._used += int(_space(record_R["offset"], record_R["num_bytes"].astype(np.uint64)).sum())
        return grown

    def _possible(self, record_R: np.ndarray) -> np.ndarray:
        """bool [R]: records whose bytes are inside the files; others are damage."""
        known_R = record_R["file"] < len(self._sizes)
        size_R = self._sizes[np.where(known_R, record_R["file"], 0)]
        begins_R, ends_R = record_R["offset"] <= size_R, record_R["offset"] + record_R["num_bytes"] <= size_R
        return known_R & begins_R & ends_R

    def _new_records(self, log: Path) -> np.ndarray:
        tail = self._tails.get(log, 0)
        try:
            num_new = (log.stat().st_size - tail) // RECORD.itemsize
        except FileNotFoundError:
            num_new = 0
        if num_new <= 0:
            return np.empty(0, dtype=RECORD)
        record_R = np.fromfile(log, dtype=RECORD, count=num_new, offset=tail)
        self._tails[log] = tail + record_R.nbytes
        return record_R


class Present:
    """(file, offset) -> (length, crc): a sorted array, and a dictionary of the newest entries.

    A dictionary alone takes five times the memory, for millions of ranges in each process of a node. Lookups need no
    lock: they see the state before or after a change.
    """

    def __init__(self) -> None:
        self._sorted: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.uint64), np.empty(0, RECORD))
        self._recent: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._sorted[0]) + len(self._recent)

    def find(self, file: int, offset: int) -> tuple[int, int]:
        """Length and crc of the range that begins there; (0, 0) when there is none."""
        key = file << _OFFSET_BITS | offset
        entry = self._recent.get(key)
        if entry is not None:
            return entry
        key_R, record_R = self._sorted
        at = int(np.searchsorted(key_R, np.uint64(key)))
        if at == len(key_R) or int(key_R[at]) != key:
            return 0, 0
        return int(record_R["num_bytes"][at]), int(record_R["crc"][at])

    def forget(self, file: int, offset: int) -> None:
        """Mark the range that begins there as absent."""
        self._recent[file << _OFFSET_BITS | offset] = (0, 0)

    def add(self, record_R: np.ndarray) -> None:
        """A later record replaces an earlier one of the same offset."""
        if len(record_R) + len(self._recent) <= max(_MIN_MERGE, len(self._sorted[0]) // 8):
            entries = zip(record_R["num_bytes"].tolist(), record_R["crc"].tolist(), strict=True)
            self._recent.update(zip(_keys(record_R).tolist(), entries, strict=True))
            return
        recent = [(k & _OFFSET_MASK, k >> _OFFSET_BITS, *entry) for k, entry in self._recent.items()]
        all_R = np.concatenate([self._sorted[1], np.array(recent, RECORD), record_R])
        all_R = all_R[np.argsort(_keys(all_R), kind="stable")]
        key_R = _keys(all_R)
        last_R = np.append(key_R[1:] != key_R[:-1], True)
        self._sorted = key_R[last_R], all_R[last_R]
        self._recent = {}  # after the array has all entries, so that no lookup misses one


def _keys(record_R: np.ndarray) -> np.ndarray:
    return record_R["file"].astype(np.uint64) << np.uint64(_OFFSET_BITS) | record_R["offset"]


def digest_folder(cache_dir: Path, digest: str) -> Path:
    """The part of a cache that belongs to one set, made if necessary. Raises InputProblems if it cannot be written."""
    folder = cache_dir / digest[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (cache_dir, folder):
            if not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(f"{place} cannot be written")
        with file_lock(cache_dir / "lock"):
            pass
    except OSError as error:
        remedy = "give a folder on a local disk that can be written, or none to read without a cache"
        raise problem(cache_dir, "loader.cache_dir", error, remedy) from error
    return folder


def _space(offset: np.ndarray | int, num_bytes: np.ndarray | int) -> np.ndarray:
    """Bytes of the blocks that a range touches."""
    first = np.asarray(offset, np.uint64) // np.uint64(_BLOCK)
    last = (np.asarray(offset, np.uint64) + np.asarray(num_bytes, np.uint64) + np.uint64(_BLOCK - 1)) // np.uint64(
        _BLOCK
    )
    return (last - first) * np.uint64(_BLOCK)
