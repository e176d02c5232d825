"""Files and folders that appear complete or not at all, a lock on a file, and an error in one line.

An unfinished file has a hidden name in the same folder, with the suffix `.unfinished`, and is renamed when it is
complete. A block that fails removes it. Readers ignore unfinished files of killed processes.

    write_atomic(path, content)    .NAME.PID.unfinished    several processes may write the same name at once
    new_file(path)                 .NAME.unfinished        for libraries that write to a path; the next one replaces it
    new_folder(path)               .NAME.unfinished/       the same for a folder

Durability. A rename protects a file from a killed process. Only `durable=True` protects it from a power cut: it waits
until the file, its name and its folder are on the disk. It is used if lost work could not be restored, or if a file
confirms others: a checkpoint's files and marker, `exported.json`, and a shard set's table and index. All other files
are written again by the same command, or have checksums that show damage (shards, weights, regions of a sample store),
so their writers do not wait for the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_shards.problems import removed_on_failure

SUFFIX = ".unfinished"
# Suffixes of earlier versions, whose unfinished files are also ignored and removed.
_OLD_SUFFIXES = (".tmp", ".partial")


def write_atomic(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write `content` (text as UTF-8) to `path`, completely or not at all. Makes missing folders. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with removed_on_failure(path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        _rename(unfinished, path, durable)


@contextmanager
def new_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the hidden name to write a file under; it becomes `path`, readable as open() would make it. For a single
    writer: hold a lock if there may be others. Raises OSError."""
    with removed_on_failure(unfinished_name(path)) as unfinished:
        unfinished.unlink(missing_ok=True)
        yield unfinished
        _with_usual_mode(unfinished)
        _rename(unfinished, path, durable)


@contextmanager
def new_folder(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Yield an empty hidden folder to fill; it becomes `path`, which may exist if it is empty, or with `replaces`. For
    a single writer. Raises OSError."""
    former = path.absolute().with_name(f".{path.name}.former{SUFFIX}")
    with hidden_folder(path) as unfinished:
        yield unfinished
        if replaces and path.is_dir():
            shutil.rmtree(former, ignore_errors=True)
            path.rename(former)
        elif path.is_dir():
            path.rmdir()
        unfinished.rename(path.absolute())
    if replaces:
        shutil.rmtree(former, ignore_errors=True)


@contextmanager
def updated_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder; its files are then moved to `path` one by one. Meanwhile a reader sees complete
    files, and other files of `path` stay. For a single writer. Raises OSError."""
    with hidden_folder(path) as unfinished:
        yield unfinished
        path.mkdir(exist_ok=True)
        for file in sorted(unfinished.iterdir()):
            _with_usual_mode(file)
            file.replace(path / file.name)


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder with the hidden name of `path`. It is removed at the end unless it was renamed."""
    unfinished = unfinished_name(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unfinished_name(path: Path) -> Path:
    """The hidden name that new_file and new_folder write under, as an absolute path."""
    path = path.absolute()
    return path.with_name(f".{path.name}{SUFFIX}")


def is_leftover(path: Path) -> bool:
    """Whether a name is that of an unfinished file of a killed writer, of this version or an earlier one."""
    return path.name.startswith(".") and path.suffix in (SUFFIX, *_OLD_SUFFIXES)


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of killed writers from `folder`. The caller holds its lock."""
    for leftover in list(folder.iterdir()):
        if is_leftover(leftover) or leftover.suffix in (SUFFIX, ".partial"):  # earlier versions did not hide all
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network filesystems can sync only files
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Wait for the lock file at `path` and hold it against every other process and thread. The kernel releases it when
    its holder dies. For short times; `data_shards.locks` has the lock of a whole command. Raises OSError."""
    # Opened each time: a descriptor shared with a fork would hold the lock for both.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def first_line(error: BaseException, most: int = 300) -> str:
    """Type and first line of an error's message, of at most `most` characters, for a message of one line."""
    lines = str(error).strip().splitlines()
    return (f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__)[:most]


def _rename(unfinished: Path, path: Path, durable: bool) -> None:
    if durable:
        with unfinished.open("rb") as stream:
            os.fsync(stream.fileno())
    unfinished.replace(path)
    if durable:
        sync_folder(path.parent)


def _with_usual_mode(path: Path) -> None:
    """Give a file the permissions that open() gives a new one: safetensors makes files readable only by their owner,
    but others must be able to read the weights of a shared run."""
    status = Path("/proc/self/status").read_text()
    umask = next((line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), "0022")
    path.chmod(0o666 & ~int(umask, 8))
