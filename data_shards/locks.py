"""One command at a time for each output: a lock file that names the working process and is removed when it ends.

    OUT/.segdiff.lock       of a folder that a command fills          RUN/.train.lock, ...   of a part of a run folder

The holder keeps an flock on the file, writes its identity into it, and touches the file every few seconds. It removes
the file when it ends. The file of a dead holder is taken over:

- On the holder's own machine the kernel has released the flock. If the file system has no locks, the process and its
  start time decide.
- On another machine the flock of a shared file system is not always reliable, so the file is watched: a running holder
  touches it. Clocks are not compared: they jump, and those of machines and file servers differ.

The library filelock is not used: it names no holder, and cannot distinguish a dead machine's lock from a busy one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data_shards.end_signals import stop_this_command
from data_shards.lock_holder import MOST_BYTES, Holder, read_holder, read_holder_at, this_job
from data_shards.problems import InputProblems, OutOfSpace, out_of_space, problem

# The lock file of a folder that a command fills.
FOLDER_LOCK = ".segdiff.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Times:
    """Times in seconds."""

    beat_s: float = 10.0
    """Interval at which a holder touches its file."""
    watch_s: float = 35.0
    """Time without a touch after which a holder on another machine counts as dead: several intervals."""
    same_job_s: float = 90.0
    """Time that a restarted rank waits for the end of its predecessor."""
    grace_s: float = 1.0
    """Time after which a busy lock must name its holder."""
    settle_s: float = 0.5
    """Time after which, without flock, it is known which of two writers was later."""
    poll_s: float = 0.25
    """Time between two checks of a file."""


TIMES = Times()
_begun = False
_held: set[Held] = set()
_lent: set[tuple[int, int, str]] = set()
"""(process, thread, file) of locks within which the same thread may take the same lock again."""


@contextmanager
def locked(file: Path, where: Path, doing: str, *, lends: bool = False) -> Iterator[None]:
    """Hold the lock `file` over `where`, which this command writes; a missing folder is made.

    `doing` completes a sentence about the holder: "is preparing it". With `lends` the same thread may take the lock
    again inside: a stage that calls another.

    Raises InputProblems if another process holds it, or if the folder cannot be written (so this is also a check
    whether it can); OutOfSpace if the disk is full.
    """
    global _begun
    key = (os.getpid(), threading.get_ident(), os.path.realpath(file))
    if key in _lent:
        yield
        return
    made = _make_folder(file.parent, where)
    held = None
    try:
        held = _acquire(file, where, doing)
        _begun = True
        if lends:
            _lent.add(key)
        yield
    finally:
        _lent.discard(key)
        if held is not None:
            held.release()
        with suppress(OSError):  # not empty: there is something to keep
            for folder in made:
                folder.rmdir()


def begin_command() -> None:
    """Call at the start of a command: a process may run several one after another."""
    global _begun
    _begun = False


def work_has_begun() -> bool:
    """Whether this command has held a lock: before that it has written nothing."""
    return _begun


def release_all() -> None:
    """Release the locks of this process. For a thread that ends it where the main thread does not answer."""
    for held in list(_held):
        held.release()


def refuse_where_locked(file: Path, where: Path, doing: str) -> None:
    """For the other ranks of a job whose rank 0 takes the lock: raise InputProblems if rank 0 will, because another job
    holds it or the folder cannot be written. Writes nothing."""
    watch, own = _Watch(file), this_job()
    there = next(folder for folder in file.absolute().parents if os.path.exists(folder))
    if not os.access(there, os.W_OK | os.X_OK):
        raise _not_writable(where, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    while True:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return  # the rank that takes the lock will report it
        try:
            holder, lives = read_holder(descriptor), watch.look(descriptor)
        finally:
            os.close(descriptor)
        if holder is None or holder.job == own:
            return
        lives = holder.is_alive_here if holder.is_alive_here is not None else lives
        if lives is not None:
            if lives:
                raise _in_use(where, holder, doing)
            return
        time.sleep(TIMES.poll_s)


def is_held(file: Path) -> bool:
    """Whether a command holds the lock. One on another machine counts as running while its file is there."""
    with suppress(OSError):
        holder = read_holder_at(file)
        return holder is not None and holder.is_alive_here is not False
    return False


@contextmanager
def short_turn(folder: Path, patience_s: float = 30.0) -> Iterator[None]:
    """Wait for other processes that are in such a block for the same folder: for a file that several commands read,
    change and write again. Needs no lock file; continues without a lock if the file system has none, or if it does not
    become free in time."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        descriptor = None
    begin = time.monotonic()
    try:
        while descriptor is not None and _flock(descriptor) is False and time.monotonic() - begin < patience_s:
            time.sleep(TIMES.poll_s / 10)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lock_beside(path: Path) -> Path:
    """The lock file for the output at `path`."""
    return path.absolute().with_name(f".{path.name}.lock")


class _Watch:
    """Whether a lock file is being touched."""

    def __init__(self, file: Path) -> None:
        self._file, self._since, self._seen, self._said = file, 0.0, (0, b""), False

    def look(self, descriptor: int) -> bool | None:
        """True if it was touched since the last check of the same holder, False if it was not touched for too long,
        None until one of the two is known."""
        touched, content = os.fstat(descriptor).st_mtime_ns, os.pread(descriptor, MOST_BYTES, 0)
        before, self._seen = self._seen, (touched, content)
        if before[1] != content:
            self._since = time.monotonic()
            return None
        if before[0] != touched:
            self._since = time.monotonic()
            return True
        return False if time.monotonic() - self._since > TIMES.watch_s else None

    def say(self, where: Path, holder: Holder) -> None:
        """Print once why the command waits."""
        if not self._said:
            self._said = True
            text = f"{where}: {holder} has not said that it ended; waiting up to {TIMES.watch_s:.0f} s for a sign of it"
            warnings.warn(text, stacklevel=5)


def _acquire(file: Path, where: Path, doing: str) -> Held:
    own, watch, begin = Holder.here(), _Watch(file), time.monotonic()
    while True:
        descriptor = _open(file, where)
        taken = False
        try:
            has_flock = _flock(descriptor)
            if has_flock is not False and not _is_at(descriptor, file):
                continue  # its holder removed it between the two calls
            holder = read_holder(descriptor)
            if _is_free(holder, has_flock):
                gone: bool | None = True
            else:
                gone = _is_gone(holder, has_flock, watch, descriptor, begin, own)
                if gone is False:
                    raise _in_use(where, holder, doing)
            if gone and has_flock is False:  # on a server that does not know yet that its client is dead
                file.unlink(missing_ok=True)
            elif gone:
                taken = _write(descriptor, file, where, own, must_confirm=has_flock is None)
                if taken:
                    return Held(file, descriptor, own)
            elif holder is not None and not holder.shares_kernel:
                watch.say(where, holder)
        finally:
            if not taken:
                os.close(descriptor)
        time.sleep(TIMES.poll_s)


def _is_free(holder: Holder | None, has_flock: bool | None) -> bool:
    """Whether no process can hold the lock: an flock of this machine's own kernel is reliable."""
    if has_flock is True:
        return holder is None or holder.shares_kernel
    return has_flock is None and (holder is None or holder.is_alive_here is False)


def _is_gone(
    holder: Holder | None,
    has_flock: bool | None,
    watch: _Watch,
    descriptor: int,
    begin: float,
    own: Holder,
) -> bool | None:
    """Whether the holder of a lock that is not free is nevertheless dead; None: check again."""
    waited_s = time.monotonic() - begin
    if has_flock is False and (holder is None or holder.shares_kernel):
        # The process with the flock may be about to replace a dead holder's name by its own.
        knows = holder is not None and holder.is_alive_here is not False
        lives: bool | None = True if knows or waited_s > TIMES.grace_s else None
    elif holder is not None and holder.is_alive_here:
        lives = True
    else:
        lives = watch.look(descriptor)
    if lives and holder is not None and own.job and holder.job == own.job and waited_s < TIMES.same_job_s:
        return None
    return None if lives is None else not lives


class Held:
    """A lock that is held: touched from a thread until it is released."""

    def __init__(self, file: Path, descriptor: int, own: Holder) -> None:
        self._file, self._descriptor, self._own = file, descriptor, own
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        _held.add(self)

    def release(self) -> None:
        """Remove the file and release the lock."""
        _held.discard(self)
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            there = read_holder_at(self._file)
            if there is not None and there.token == self._own.token:
                self._file.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        pause_s = TIMES.settle_s  # soon, to detect two that began together without flock
        while not self._ended.wait(pause_s):
            pause_s = TIMES.beat_s
            with suppress(OSError):
                os.utime(self._descriptor)
                if (other := read_holder_at(self._file)) is not None and other.token != self._own.token:
                    # This machine slept, or was cut off. Two commands must not write.
                    warnings.warn(f"{self._file}: {other} has taken over; this command stops", stacklevel=1)
                    stop_this_command()
                    return


def _open(file: Path, where: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(file, flags | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another command has just removed its folder
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, flags | os.O_CREAT, 0o666)
        except PermissionError:  # another user's file in a shared folder; its flock can be seen nevertheless
            if not file.exists():
                raise
            descriptor = os.open(file, flags & ~os.O_RDWR | os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise problem(file, "lock file", "not a file", "remove it") from error
        raise _not_writable(where, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise problem(file, "lock file", "not a file", "remove it")
    return descriptor


def _make_folder(folder: Path, where: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were missing, the innermost first."""
    try:
        missing = [one for one in (folder, *folder.absolute().parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(where, error) from error
    return missing


def _not_writable(where: Path, error: OSError) -> InputProblems | OutOfSpace:
    if out_of_space(error):
        return OutOfSpace(where, str(error))
    value = f"cannot be written ({error.strerror})"
    return problem(where, "output folder", value, "choose another place, or make it writable for you")


def _in_use(where: Path, holder: Holder | None, doing: str) -> InputProblems:
    # A child process of a dead holder may still hold its flock.
    who = "another process" if holder is None or holder.is_alive_here is False else holder
    return problem(where, "at work here", f"{who} {doing}", "wait for it, or stop it")


def _flock(descriptor: int) -> bool | None:
    """True: taken; False: another process has it; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS or error.errno == errno.EBADF:  # NFS: the file is open only for reading
            return None
        raise


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False


def _write(descriptor: int, file: Path, where: Path, own: Holder, *, must_confirm: bool) -> bool:
    """Put this process' name into the file; False if another process was faster."""
    content = json.dumps(asdict(own)).encode() + b"\n"
    try:
        if not os.access(file, os.W_OK):  # another user's file in a shared folder: ours replaces it
            file.unlink()
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
    except OSError as error:
        with suppress(OSError):
            file.unlink()
        raise _not_writable(where, error) from error
    if must_confirm:
        time.sleep(TIMES.settle_s)
        there = read_holder_at(file)
        return there is not None and there.token == own.token
    return _is_at(descriptor, file)
