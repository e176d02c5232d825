"""A durable queue on disk between a fast writer and a slow reader: JSON lines, appended at once, and marked as sent in
order.

Each writer has its own file in the spool's folder, and holds a lock on it while it runs. The next process recognises
the file of a killed writer by the missing lock, adopts it, and continues to send where that writer stopped.

Not persist-queue or another queue on SQLite: SQLite's locks are not safe on the network file systems that run folders
are on, and one write of one line is all that a training step may wait for.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.files import write_atomic
from data_shards.problems import explain_full_disk
from segdiff_dist.tracking.path_checks import open_plain

Record = dict[str, Any]

_READ_BYTES = 1 << 20
# A longer line cannot come from this program: a stage's settings, each at MLflow's greatest length, are a tenth of it.
_MOST_LINE_BYTES = 1 << 24


class Spool:
    """One writer's file, locked. Records are appended to it; the file `.sent` beside it holds the number of finished
    bytes.

    One thread may append while another reads. When `append` returns, the operating system has the record: it survives
    the end of the process, but not a power cut within the system's write-back time.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._sent = path.with_suffix(".sent")
        self._offset = self._sent_before()

    @classmethod
    def create(cls, folder: Path) -> Spool:
        """A new, empty file in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns():020d}-{os.getpid()}.jsonl"
        # Locked before it has the name that adopt() looks for.
        hidden = path.with_suffix(".new")
        descriptor = open_plain(hidden, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        hidden.rename(path)
        return cls(path, descriptor)

    @classmethod
    def adopt(cls, path: Path) -> Spool | None:
        """The file of a writer that has ended; None if the writer still runs, or if there is no such file, or only a
        link."""
        try:
            descriptor = open_plain(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            return None
        except OSError as error:
            warnings.warn(f"{path}: skipped: {error}", stacklevel=2)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink == 0:  # sent and removed between the two calls
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    def append(self, record: Record) -> None:
        """Add a record. One write of one line, so that lines of threads do not mix and a kill leaves no half line."""
        with explain_full_disk(self.path.parent):
            os.write(self._descriptor, json.dumps(record).encode() + b"\n")

    def waiting(self) -> Iterator[tuple[Record, int]]:
        """Unfinished records in order, each with the offset to give to `mark_sent`."""
        offset, rest = self._offset, b""
        while chunk := os.pread(self._descriptor, _READ_BYTES, offset + len(rest)):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                record = _record(line)
                if record is None:  # left by a power cut or a full disk
                    warnings.warn(f"{self.path}: a damaged line is skipped", stacklevel=2)
                    continue
                yield record, offset
            if len(rest) > _MOST_LINE_BYTES:
                warnings.warn(f"{self.path}: a line without an end; the records after it are skipped", stacklevel=2)
                return

    def mark_sent(self, offset: int) -> None:
        """Mark everything up to `offset` as finished."""
        write_atomic(self._sent, f"{offset}\n")
        self._offset = offset

    def num_waiting(self) -> int:
        """Number of unfinished records."""
        return sum(1 for _ in self.waiting())

    def _sent_before(self) -> int:
        """The offset in `.sent`, if it is inside the file; otherwise the start, since sending twice does no harm."""
        try:
            with os.fdopen(open_plain(self._sent, os.O_RDONLY), "rb") as file:
                offset = int(file.read(20))
        except (OSError, ValueError):
            return 0
        return offset if 0 <= offset <= os.fstat(self._descriptor).st_size else 0

    def close(self) -> None:
        """Release the file; the next process adopts it."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Delete the file. Call when nothing waits in it."""
        self.path.unlink()
        self._sent.unlink(missing_ok=True)


def spool_files(folder: Path) -> list[Path]:
    """The spool's files, oldest first; none if its folder is a link."""
    return [] if folder.is_symlink() else sorted(folder.glob("*.jsonl"))


def num_waiting(folder: Path) -> int:
    """Unfinished records in a spool's folder, also those of running writers."""
    count = 0
    for path in spool_files(folder):
        try:
            spool = Spool(path, open_plain(path, os.O_RDONLY))
        except OSError:  # sent meanwhile, or not a file
            continue
        count += spool.num_waiting()
        spool.close()
    return count


def _record(line: bytes) -> Record | None:
    """The record in a line; None if it holds no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
