"""The signature under what tracking leaves on disk, with a key that never leaves the user's own state folder."""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from segdiff_dist.tracking.path_checks import open_plain

_KEY_BYTES = 32
# A key that another process is just writing.
_KEY_TRIES, _KEY_PAUSE_S = 40, 0.05


def signed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with this user's signature under them."""
    return {**values, "signature": _signature(values)}


def is_signed(values: Mapping[str, Any]) -> bool:
    """Whether the signature among the values is this user's, made on this machine, and nothing was changed since."""
    return hmac.compare_digest(str(values.get("signature")), _signature(values))


def _signature(values: Mapping[str, Any]) -> str:
    unsigned = {name: value for name, value in values.items() if name != "signature"}
    return hmac.new(_key(), json.dumps(unsigned, sort_keys=True).encode(), hashlib.sha256).hexdigest()


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
