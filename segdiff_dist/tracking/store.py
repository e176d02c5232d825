"""The place of MLflow's database for a run folder: beside the folder, for all runs of a project, or in the folder.

    runs/mlflow.db, mlartifacts/     of runs/a, runs/b, ...: one `mlflow ui` shows and compares all of them
    RUN/mlflow.db, mlartifacts/      of RUN alone: `tracking.shared_store: false`, or nothing can be put beside it

The place is decided when a folder is tracked for the first time. A database beside it is used if this user began it
on this machine, which its signed mark shows: with an archive from somebody else a database might come too.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from pathlib import Path

from data_shards.files import write_atomic
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.path_checks import odd_entry, open_plain
from segdiff_dist.tracking.signing import is_signed, signed

DATABASE, ARTIFACTS, MARK = "mlflow.db", "mlartifacts", ".mlflow_store.json"
# Sqlite opens its own files with its database.
STORE_FILES = (DATABASE, ARTIFACTS, *(f"{DATABASE}-{name}" for name in ("journal", "wal", "shm")))
_MOST_BYTES = 1 << 12
# A new database of MLflow 3, measured: 0.95 MB; the records of a stage on top.
_NEW_BYTES = 1_100_000


def store_of(folder: Path, is_beside: bool) -> Path:
    """The folder with the database."""
    return folder.resolve().parent if is_beside else folder.resolve()


def bytes_of_record(folder: Path, config: TrackingConfig) -> int:
    """Bytes on the disk that the record of a stage takes at least: of a database, where it makes one."""
    is_elsewhere = not config.enabled or "MLFLOW_TRACKING_URI" in os.environ
    is_there = any((place / DATABASE).exists() for place in (folder, folder.absolute().parent))
    return 0 if is_elsewhere or is_there else _NEW_BYTES


def why_not_beside(folder: Path) -> str | None:
    """Why the database of a run folder cannot be beside it; None if it can."""
    beside = folder.resolve().parent
    try:
        is_open = beside.stat().st_mode & stat.S_IWOTH
    except OSError as error:
        return f"{beside}: {error.strerror}"
    if is_open:
        return f"anybody may write to {beside}"
    if not os.access(beside, os.W_OK | os.X_OK):
        return f"{beside} cannot be written"
    return None if is_own(beside) else f"{beside / DATABASE} is not of this user's segdiff on this machine"


def is_own(store: Path) -> bool:
    """Whether the database in a folder was begun by this user on this machine, or there is none yet."""
    if not any(os.path.lexists(store / name) for name in (*STORE_FILES, MARK)):
        return True
    try:
        with os.fdopen(open_plain(store / MARK, os.O_RDONLY), "rb") as file:
            mark = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(mark, dict) and is_signed(mark)


def make_own(store: Path) -> None:
    """Mark a folder's database as this user's."""
    write_atomic(store / MARK, json.dumps(signed({"store": DATABASE})) + "\n")


def odd_files(store: Path) -> list[Path]:
    """A part of a store that is a link, a device or a pipe, or a file in place of a folder."""
    odd = [found for name in STORE_FILES if (found := odd_entry(store / name)) is not None]
    odd += [store / ARTIFACTS] if (store / ARTIFACTS).is_file() else []
    return odd + [store / name for name in STORE_FILES if name != ARTIFACTS and (store / name).is_dir()]


def local_uri(folder: Path) -> str:
    """The URL of sqlite in the folder, for MLflow in this process.

    SQLAlchemy reads '?' as the end of a path, and from version 2.1 on '%' as an escape. Such a folder is named by a
    file descriptor of this process instead, which needs neither.
    """
    root = folder.resolve()
    if is_plain_for_sqlite(root):
        return f"sqlite:///{root / DATABASE}"
    root.mkdir(parents=True, exist_ok=True)
    status = root.stat()
    return f"sqlite:////proc/self/fd/{_folder_descriptor(status.st_dev, status.st_ino, str(root))}/{DATABASE}"


def is_plain_for_sqlite(path: Path) -> bool:
    """Whether an SQLAlchemy URL may hold the path as it is."""
    return re.fullmatch(r"[\w/. -]*", str(path)) is not None


@functools.lru_cache(maxsize=64)
def _folder_descriptor(device: int, inode: int, root: str) -> int:
    """The descriptor stays open until the process ends. A folder is identified by device and inode, not by its name."""
    return os.open(root, os.O_RDONLY | os.O_DIRECTORY)
