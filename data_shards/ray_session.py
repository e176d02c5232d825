"""Ray started on this machine for one command, or a cluster joined.

A Ray that is started here belongs to this user alone: it listens on the loopback address, accepts only calls with a
secret of this process, and keeps its files in a private folder that is removed afterwards. Its workers do not import
modules from the current folder. The safety of a joined cluster depends on its configuration (launch/cluster/README.md).
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from data_shards.end_signals import take_back_signals
from data_shards.host_memory import cpu_quota
from data_shards.liveness import kill
from data_shards.problems import problem

# In the environment of a session's workers: a folder for temporary files, which ends with the session. A worker that is
# killed leaves its own in the machine's.
SCRATCH = "SEGDIFF_SCRATCH"
# As an address: start Ray on this machine, also for a job that local processes could do.
THIS_MACHINE = "local"
# Ray's own processes on each machine, and on the first one.
_SERVERS = ("raylet", "gcs_server")
_is_ours = False  # whether this process has started the Ray that runs
# Size of Ray's object store, enough for the result of a task; tasks pass paths and rows, not pixels.
_OBJECT_STORE_BYTES = 200 * 1024**2
# If nothing listens at an address, Ray itself tries for minutes, and then ends the process.
_CONNECT_TIMEOUT_S = 10.0
# Ray starts in seconds, on a busy machine in half a minute. If one of its processes dies meanwhile, it may wait for
# ever.
SAY_AFTER_S, START_TIMEOUT_S = 20.0, 180.0
# Ray stops in a second or two.
STOP_TIMEOUT_S = 60.0
# Ray puts sockets at FOLDER/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store, and a socket's path has
# 107 bytes at most (unix(7)).
_MOST_FOLDER_BYTES = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")

# Ray reads these when it is imported. The first two would print lines that do not concern the user; with the last, a
# call after the session's end fails instead of starting another Ray.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Join the cluster at `address`, or start Ray on this machine (None, THIS_MACHINE); the session that started it
    also stops it.

    Nested sessions share the outer one, so a command with several stages starts Ray once. Raises InputProblems if no
    cluster answers, or Ray does not start within 3 minutes.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    is_here = address is None or address == THIS_MACHINE
    with _on_this_machine(num_cpus or num_cores()) if is_here else _joined(str(address)):
        yield


def is_running() -> bool:
    """Whether this process has a Ray session. Does not import Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def scratch_folder() -> str | None:
    """Where a worker of a Ray that was started for a command puts temporary files; None elsewhere: the machine's."""
    return os.environ.get(SCRATCH)


def has_ended() -> bool:
    """Whether a Ray that this process has started has lost one of its two servers: no worker can start any more."""
    if not _is_ours or not is_running():
        return False
    names = [_name(child) for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return not set(_SERVERS) <= set(names)


def num_cores() -> int:
    """Cores that this process may use: fewer than the machine has under taskset, Slurm or a container's limits."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def one_line(error: BaseException, most: int = 500) -> str:
    """An error as text for a message of one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:most]


_PRIVATE = {
    # The switch by which Ray keeps to the loopback address, on Windows and macOS by default.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Workers are started when there is an actor for them. One that is started ahead and dies as it starts is waited for
    # without end.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_AUTH_MODE": "token",
    # Ray's workers would have niceness 15: beside any other process they get a thirtieth of a core's time. Here they do
    # the work of a command, and have its niceness.
    "RAY_worker_niceness": "0",
}


@contextmanager
def _on_this_machine(num_cpus: int) -> Iterator[None]:
    global _is_ours
    import ray

    folder = _private_folder()
    (folder / "t").mkdir()
    own = {"RAY_AUTH_TOKEN": secrets.token_hex(32), SCRATCH: str(folder / "t")}
    with _authentication(), _environment(_PRIVATE | own), _loopback():
        _read_authentication()
        started = _started(
            "Ray on this machine",
            f"`segdiff doctor` says what this machine can run; logs are in {folder}",
            lambda: ray.init(
                "local",  # whatever RAY_ADDRESS says
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(folder / "r"),
                # Without shared memory Ray would not start. Where it is too small, Ray itself takes a folder.
                _plasma_directory=None if os.access("/dev/shm", os.W_OK | os.X_OK) else str(folder),
                job_config=_job_config(),
                **_COMMON,
            ),
            is_ours=True,
        )
        has_started = False
        try:
            with started:
                has_started = _is_ours = True
                yield
        finally:
            _is_ours = False
            if has_started or isinstance(sys.exc_info()[1], KeyboardInterrupt):  # its logs say why it did not start
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _joined(address: str) -> Iterator[None]:
    import ray

    _must_answer(address)
    remedy = "`ray status` shows it; a cluster with a token accepts only those who have it (launch/cluster/README.md)"
    with _started(f"Ray at {address}", remedy, lambda: ray.init(address=address, job_config=_job_config(), **_COMMON)):
        yield


_COMMON: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}


def _start_again_where_slow(start: Callable[[], object], is_over: threading.Event) -> None:
    """Ray gives its own processes 30 s to start, which may not be enough on a busy machine, so it is tried again: three
    or four times, until `is_over`. Each time more of its files are in memory."""
    import ray

    begun = time.monotonic()
    while True:
        try:
            start()
            return
        except Exception as error:
            is_slow = "timed out during startup" in str(error)
            if is_over.is_set() or not is_slow or time.monotonic() - begun > START_TIMEOUT_S / 2:
                raise
            ray.shutdown()


@contextmanager
def _started(where: str, remedy: str, start: Callable[[], object], is_ours: bool = False) -> Iterator[None]:
    """A context in which Ray runs. Calls ray.init in a thread, since it may wait for ever. Raises InputProblems if it
    fails or takes too long.

    The thread lives as long as the session: the system kills Ray's processes when the thread that started them ends
    (PR_SET_PDEATHSIG of prctl(2), which counts threads).
    """
    failed: list[BaseException] = []
    is_there, is_over = threading.Event(), threading.Event()

    def begin() -> None:
        try:
            _start_again_where_slow(start, is_over)
        except BaseException as error:  # Ray also raises plain Exceptions, for example if its raylet does not start
            failed.append(error)
        is_there.set()
        is_over.wait()

    threading.Thread(target=begin, name="ray", daemon=True).start()
    try:
        if not is_there.wait(SAY_AFTER_S):
            warnings.warn(f"waiting for {where} to start, {START_TIMEOUT_S:.0f} s at most", stacklevel=5)
            if not is_there.wait(START_TIMEOUT_S - SAY_AFTER_S):
                raise problem(where, "start", f"did not start within {START_TIMEOUT_S:.0f} s", remedy)
        if failed:
            raise problem(where, "start", one_line(failed[0]), remedy) from failed[0]
        take_back_signals()
        yield
    finally:
        is_starting = not is_there.is_set()
        if not is_starting:  # also parts that had started when the rest failed
            _shut_down(where, is_ours)
        is_over.set()
        if is_starting and is_ours:  # interrupted, or given up
            kill(_own_processes())


def within(seconds: float, do: Callable[[], object]) -> bool:
    """Whether `do` ended within the given seconds; otherwise it continues in a thread that nobody waits for. Its errors
    are ignored: for stopping things that are no longer needed."""
    thread = threading.Thread(target=_quietly, args=(do,), name="ray: stop", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _quietly(do: Callable[[], object]) -> None:
    with suppress(Exception):
        do()


def _shut_down(where: str, is_ours: bool) -> None:
    """ray.shutdown, which may wait for ever for processes that do not answer. Nothing is left of a Ray that was started
    here."""
    import ray

    processes = _own_processes() if is_ours else []
    has_stopped = within(STOP_TIMEOUT_S, ray.shutdown)
    kill(processes)
    if not has_stopped:
        done = "its processes were killed" if is_ours else "it is left as it is"
        warnings.warn(f"{where} did not stop within {STOP_TIMEOUT_S:.0f} s; {done}", stacklevel=5)


def _own_processes() -> list[psutil.Process]:
    """Ray's processes that this one started, with those that they started."""
    ours = [child for child in psutil.Process().children() if _name(child) in _SERVERS]
    return [*ours, *(below for one in ours for below in one.children(recursive=True))]


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def _private_folder() -> Path:
    """A new private folder of this user, with a path that is short enough for Ray's sockets."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        if len(os.fsencode(f"{parent}/sd-12345678/r")) <= _MOST_FOLDER_BYTES and os.access(parent, os.W_OK | os.X_OK):
            # Mode 0700. Ray opens its own folder to everybody, so it gets a folder inside this one.
            return Path(tempfile.mkdtemp(prefix="sd-", dir=parent))
    value = f"{tempfile.gettempdir()} has too long a path for Ray's sockets"
    raise problem("environment", "TMPDIR", value, f"set TMPDIR to a folder of at most {_MOST_FOLDER_BYTES - 14} bytes")


@contextmanager
def _loopback() -> Iterator[None]:
    """The same as RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, where Ray was imported before and has read it."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _authentication() -> Iterator[None]:
    """A context after which Ray has the mode and token from before."""
    try:
        yield
    finally:
        _read_authentication()


def _read_authentication() -> None:
    """Make Ray read mode and token from the environment again, since it caches them."""
    from ray import _raylet

    engine: Any = _raylet  # compiled, so that no type of it is known
    engine.Config.initialize("")
    engine.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of this process and its children, restored afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _job_config() -> Any:
    """Ray lets its workers import modules from the driver's current folder; a `nibabel.py` there would be executed."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _WithoutCurrentFolder()
    return config


class _WithoutCurrentFolder(list[str]):
    """The folders that Ray adds to its workers' module path, without the current one, which it adds last."""

    def extend(self, folders: Iterable[str]) -> None:
        kept, current = list(folders), os.path.abspath(os.curdir)
        if current in kept:
            kept.reverse()
            kept.remove(current)
            kept.reverse()
        super().extend(kept)


def _must_answer(address: str) -> None:
    """Refuse a host:port where nothing listens; Ray itself refuses other addresses (`auto`)."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        remedy = "start it with `ray start --head`, or leave the address out to use this machine alone"
        raise problem(f"Ray at {address}", "address", f"nothing answers ({error})", remedy) from error
