"""Things that libraries expect of a process: open standard streams, a home folder that can be written, a user's name, a
temporary folder; and how OpenMP's threads wait.

In a container under a user id without a passwd entry (docker run --user, OpenShift), or with a read-only root, they may
all be missing, and each library fails with another message. Call `complete` before libraries are imported.
"""

from __future__ import annotations

import os
import pwd
import stat
import sys
import tempfile
from pathlib import Path

from data_shards.problems import Problem

# How often a thread of OpenMP looks whether it may go on, before it sleeps. libgomp's own number is 300,000, some
# milliseconds, in which threads that wait take the cores from those that they wait for, if other processes want them
# too. With 1,000, libgomp's number for more threads than cores, a step beside four busy processes takes 13 s instead of
# 31, and as long as before on quiet cores (docs/log.md). Read as torch is loaded; results are the same.
_OPENMP = {"GOMP_SPINCOUNT": "1000"}
_OPENMP_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Caches of compilers and matplotlib; by default under the home folder.
_CACHES = {"TRITON_HOME": ".", "TORCH_EXTENSIONS_DIR": "torch_extensions", "MPLCONFIGDIR": "matplotlib"}


def complete() -> str | None:
    """Set HOME and USER for this process and its children if they are missing, and how threads wait for each other.
    Returns a line if HOME was changed.

    A home folder that can be read but not written stays, since credentials are read there; only caches go elsewhere.
    """
    if not any(name in os.environ for name in _OPENMP_BY_USER):
        os.environ.update(_OPENMP)
    entry = _passwd_entry()
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")) and entry is None:
        os.environ["USER"] = os.environ["LOGNAME"] = f"uid-{os.getuid()}"  # getpass.getuser reads these
    given = os.environ.get("HOME")
    home = given or (entry.pw_dir if entry is not None else "")
    if home and is_writable(home):
        return None
    place = _private_folder()
    if place is None:  # the command says so, if it needs temporary files
        return None
    if home.strip("/") and os.path.isdir(home) and os.access(home, os.R_OK | os.X_OK):
        for name, folder in _CACHES.items():
            os.environ.setdefault(name, str(place / folder))
        return None
    os.environ["HOME"] = str(place)
    what = "not set" if given is None else f"{given!r}, not a folder that can be written"
    return f"HOME is {what}: {place} takes its place; set HOME to choose another"


def open_standard_streams() -> None:
    """Open the standard streams that were closed (`segdiff ... >&-`) on nothing. Otherwise the next files get their
    numbers, and what a library or a child process prints goes into those files."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number and not _is_open(number):
            os.dup2(nowhere, number)
            os.close(nowhere)
            nowhere = number
        os.set_inheritable(nowhere, True)
        setattr(sys, name, open(nowhere, mode, encoding="utf-8"))  # noqa: SIM115


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def temporary_folder_problems() -> list[Problem]:
    """The reason why no temporary file can be made."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        value = f"no temporary folder can be written ({error.strerror})"
        return [Problem("environment", "TMPDIR", value, "set TMPDIR to a folder that can be, on a local disk")]
    return []


def _passwd_entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None


def is_writable(folder: str) -> bool:
    """Whether this user can write to the folder."""
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _private_folder() -> Path | None:
    """A private folder of this user under the temporary folder, the same at every start so that caches last; None if
    nothing can be written."""
    if temporary_folder_problems():
        return None
    folder = Path(tempfile.gettempdir()) / f"segdiff-home-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # Anybody who can write there could make this user run a program.
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
        return Path(tempfile.mkdtemp(prefix="segdiff-home-"))
    except OSError:
        return None
