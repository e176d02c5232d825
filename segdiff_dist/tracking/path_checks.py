"""Paths in a run folder's own files: only those inside the folder are followed.

A run folder may come from somebody else, and its spool names files. A path is followed where it is relative, has no
`..`, and meets no link, device or pipe on its way, nor below it. So nothing outside the folder is read, written or
removed, whatever the folder says.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath


def why_not_plain(recorded: object) -> str | None:
    """Why a recorded path is not inside the folder, judged by its text alone; None if it is inside."""
    if not isinstance(recorded, str) or not recorded or "\0" in recorded:
        return f"{recorded!r:.80} is not a path"
    if recorded.startswith("/") or ".." in PurePosixPath(recorded).parts:
        return f"{recorded!r:.80} leads out of the run folder"
    return None


def why_not_inside(folder: Path, recorded: object) -> str | None:
    """Why a recorded path is not read, written or removed; None for a file or folder inside `folder`.

    For a folder, everything in it is checked. A path that does not exist is "gone".
    """
    if (reason := why_not_plain(recorded)) is not None:
        return reason
    path = folder
    try:
        for part in PurePosixPath(str(recorded)).parts:
            path = path / part
            mode = path.lstat().st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                return f"{path} is a link, a device or a pipe"
        found = odd_entry(path)
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is gone"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if found is None else f"{found} is a link, a device or a pipe"


def odd_entry(path: Path) -> Path | None:
    """The first entry at or below `path` that is neither a file nor a folder: a link, a device, a pipe. None if there
    is none, or no such path. Raises OSError if a folder cannot be listed."""
    if not os.path.lexists(path):
        return None
    mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode):
        return None if stat.S_ISREG(mode) else path
    waiting = [path]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    return Path(entry.path)
    return None


def open_plain(path: Path, flags: int, mode: int = 0o644) -> int:
    """os.open of a file that is not a link, device or pipe; never waits. Raises OSError, also FileNotFoundError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no file")
    return descriptor
