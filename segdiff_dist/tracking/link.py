"""RUN/mlflow.json: the MLflow run that a folder's stages add to, and whether this user began it on this machine.

The file is signed with a key that never leaves the user's own state folder. A folder without this signature is foreign:
it was begun by somebody else or on another machine, or its mlflow.json was changed. Records in a foreign folder are not
sent, and the store that it names is not used, before `segdiff track RUN --adopt` takes it over. The signature holds no
path, so that a folder may be moved.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import math
import os
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_shards.files import write_atomic
from data_shards.problems import InputProblems, Problem, problem, refuse
from segdiff_dist.tracking.inside import odd_entry, open_plain

LINK, SPOOL, REFUSED = "mlflow.json", "mlflow_spool", "mlflow_refused.jsonl"
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
# Files that tracking leaves in a folder; sqlite opens its own files beside its database.
_TRACES = (LINK, SPOOL, REFUSED, DATABASE, ARTIFACTS, *(f"{DATABASE}-{name}" for name in ("journal", "wal", "shm")))
_MOST_BYTES, _KEY_BYTES = 1 << 16, 32
_RUN_ID, _TOKEN = re.compile(r"[\w-]{1,64}"), re.compile(r"[0-9a-f]{32}")
# How long to wait for a key that another process is writing.
_KEY_TRIES, _KEY_PAUSE_S = 40, 0.05
_REPAIR = "remove the file to track anew, or restore it"


def read_link(folder: Path) -> dict[str, Any]:
    """The contents of mlflow.json; empty without the file. Raises InputProblems if it was changed or damaged."""
    path = folder / LINK
    if not os.path.lexists(path):
        return {}
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            text = file.read(_MOST_BYTES + 1)
        link = json.loads(text) if len(text) <= _MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise problem(path, "mlflow.json", f"cannot be read: {type(error).__name__}", _REPAIR) from error
    if not isinstance(link, dict):
        raise problem(path, "mlflow.json", "not the contents that a run writes", _REPAIR)
    wrong = [name for name, is_right in _FIELDS.items() if link.get(name) is not None and not is_right(link[name])]
    refuse(Problem(str(path), name, f"{link[name]!r:.80}", _REPAIR) for name in wrong)
    return link


def write_link(folder: Path, link: Mapping[str, Any]) -> None:
    """Write mlflow.json, signed."""
    write_atomic(folder / LINK, json.dumps({**link, "signature": _signature(link)}) + "\n")


def is_foreign(folder: Path) -> bool:
    """Whether the folder holds traces of a tracking that this user did not begin on this machine."""
    try:
        link = read_link(folder)
    except InputProblems:
        return True
    if not link:
        return any(os.path.lexists(folder / name) for name in _TRACES)
    return not hmac.compare_digest(str(link.get("signature")), _signature(link))


def adopt(folder: Path) -> str | None:
    """Make a foreign folder's tracking this user's own: its waiting records are sent from now on.

    Tracking continues in the folder's sqlite, or in the store of MLFLOW_TRACKING_URI. Returns the other store that the
    folder names, which is not used; None if it names none. Raises InputProblems if mlflow.json is damaged, or if a file
    of the tracking is a link, a device or a pipe.
    """
    link = read_link(folder)
    remedy = "such a folder was not left by segdiff; remove it"
    problems = [odd for name in _TRACES if (odd := odd_entry(folder / name)) is not None]
    problems += [folder / name for name in (SPOOL, ARTIFACTS) if (folder / name).is_file()]
    problems += [folder / name for name in _TRACES if name not in (SPOOL, ARTIFACTS) and (folder / name).is_dir()]
    refuse(Problem(str(odd), "tracking", "a link, a device or a pipe", remedy) for odd in problems)
    other = link.get("tracking_uri")
    if other is not None and other != os.environ.get("MLFLOW_TRACKING_URI"):
        link |= {"tracking_uri": None, "run_id": None, "token": None}
    else:
        other = None
    write_link(folder, {"experiment": "segdiff", "run_id": None} | link | {"token": link.get("token") or new_token()})
    return other


def new_token() -> str:
    """A token that distinguishes a run from the others of its store."""
    return uuid.uuid4().hex


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


def _is_text(most: int) -> Any:
    return lambda value: isinstance(value, str) and 0 < len(value) <= most and value.isprintable()


_FIELDS = {
    "tracking_uri": _is_text(4096),
    "experiment": lambda value: isinstance(value, str) and len(value) <= 500,
    "run_id": lambda value: isinstance(value, str) and _RUN_ID.fullmatch(value) is not None,
    "token": lambda value: isinstance(value, str) and _TOKEN.fullmatch(value) is not None,
    "began_s": lambda value: type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1e11,
    "signature": _is_text(64),
}


def _signature(link: Mapping[str, Any]) -> str:
    signed = {name: value for name, value in link.items() if name != "signature"}
    return hmac.new(_key(), json.dumps(signed, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _key() -> bytes:
    """This user's key on this machine, made when it is first needed."""
    for folder in _state_folders():
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return _key_in(folder)
    return _process_key()


def _state_folders() -> list[Path]:
    """Folders for the key, best first: the user's state folder (XDG Base Directory Specification), or without a home
    folder, a private folder among the temporary files."""
    given = os.environ.get("XDG_STATE_HOME", "")
    found = [Path(given) / "segdiff"] if given.startswith("/") else []
    home = os.path.expanduser("~")
    if home.startswith("/"):
        found.append(Path(home) / ".local" / "state" / "segdiff")
    return [*found, Path(tempfile.gettempdir()) / f"segdiff-{os.geteuid()}"]


def _key_in(folder: Path) -> bytes:
    """The key in a folder that nobody else can change. Raises OSError if it cannot be kept there."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's own")
    path = folder / "tracking.key"
    with suppress(FileExistsError):
        descriptor = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(_KEY_BYTES))
    for _ in range(_KEY_TRIES):
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            key = file.read(_KEY_BYTES + 1)
        if len(key) == _KEY_BYTES:
            return key
        time.sleep(_KEY_PAUSE_S)
    raise OSError(f"{path} is no key")


@functools.cache
def _process_key() -> bytes:
    """The key if none can be kept on disk: a folder is then recognised only within this process."""
    return os.urandom(_KEY_BYTES)
