"""Ranks and devices: the rank of a process in a distributed run, and the settings that all ranks must share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from data_shards import end_signals, locks
from data_shards.problems import Problem, problem, refuse

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ADDRESS = {"MASTER_ADDR", "MASTER_PORT"}
# How often a rank that waits for others looks whether it was interrupted.
_LOOK_S = 0.2
_UNSET = "where no launcher started this command, `unset RANK WORLD_SIZE MASTER_ADDR` and start it again"


def rank() -> int:
    """This process' global rank; 0 outside a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the run; 1 outside a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process' rank on its machine; 0 outside a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes the files that only one rank may write."""
    return rank() == 0


def pick_device(requested: str, field: str = "device") -> Any:
    """A torch.device for `auto | cpu | cuda`; `auto` takes this rank's GPU if there is one. `field`: the setting's name
    in --help, for the message."""
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise problem("config", field, "cuda", "no CUDA GPU is visible here; give auto or cpu")
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def prepare_environment() -> None:
    """Set the environment variables that the launcher did not set. Call before torch.distributed starts.

    A process that no launcher started becomes a world of one rank. On several machines gloo gets the network interface
    that leads to rank 0. Its own choice, the interface of the machine's name, is often the loopback.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        # A machine that cannot resolve its own name has no other.
        if loopback := _interface_towards("127.0.0.1"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    refuse(launcher_problems())
    if world_size() > 1 and (interface := _interface_towards(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def leave_launcher(command: str) -> str | None:
    """Remove a launcher's variables from the environment, for a command that is one process.

    Returns a note if they name more than one rank: set by a launcher, or left in a shell by an earlier one.
    """
    left = {name: os.environ.pop(name) for name in _LAUNCHERS if name in os.environ}
    if (left.get("RANK", "0"), left.get("WORLD_SIZE", "1")) == ("0", "1"):
        return None
    said = " ".join(f"{name}={value}" for name, value in left.items())
    return f"note: {command} is one process: {said} of the environment are not used"


def launcher_problems() -> list[Problem]:
    """Problems of the ranks that the environment names."""
    given = {name: os.environ[name] for name in _LAUNCHERS if name in os.environ and name != "MASTER_ADDR"}
    has_address = set(os.environ) >= _ADDRESS
    wrong = [name for name, value in given.items() if not value.isdecimal()]
    if not wrong and "WORLD_SIZE" in given and "RANK" not in given:
        wrong = ["WORLD_SIZE"]
    elif not wrong and (rank() >= world_size() or (world_size() > 1 and not has_address)):
        wrong = ["RANK"]
    missing = "" if has_address else ", without MASTER_ADDR and MASTER_PORT"
    values = f"{' '.join(f'{name}={value}' for name, value in given.items())}{missing}: no launcher sets that"
    return [Problem("environment", name, values, _UNSET) for name in wrong[:1]]


@contextmanager
def naming_missing_ranks(after_s: float = 5.0) -> Iterator[None]:
    """A context for the time until all ranks are connected. A rank that has waited for `after_s` prints for which ranks
    and where, and again every five minutes. If the shell has the RANK of an earlier launch, a process waits in vain.
    Ctrl-C, SIGTERM and SIGHUP end it at once; torch, which waits in C++, would not hear them."""
    if world_size() == 1:
        yield
        return
    met = threading.Event()
    with _signals() as received:
        thread = threading.Thread(target=_remind, args=(met, received, after_s), name="who-is-missing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            met.set()
            thread.join()


def _remind(met: threading.Event, received: int, after_s: float) -> None:
    others = "rank 0" if rank() else "rank 1" if world_size() == 2 else f"ranks 1 to {world_size() - 1}"
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    begun, due_s = time.monotonic(), after_s
    while not met.wait(min(_LOOK_S, after_s)):
        numbers = os.read(received, 64) if select.select([received], [], [], 0)[0] else b""
        for number in (signal.SIGINT, *end_signals.SIGNALS):
            if number in numbers:
                os.write(2, end_signals.last_line(number=number).encode())
                locks.release_all()
                os._exit(end_signals.ending(number)[1])
        if (waited_s := time.monotonic() - begun) >= due_s:
            waiting = f"rank {rank()} of {world_size()} has waited {waited_s:.0f} s for {others} at {where}"
            sys.stderr.write(f"{waiting}; {_UNSET}\n")
            sys.stderr.flush()
            due_s = waited_s + 300.0


@contextmanager
def _signals() -> Iterator[int]:
    """A pipe that gets the number of each signal, also while the main thread is not in Python."""
    received, sent = os.pipe()
    os.set_blocking(sent, False)
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(sent, warn_on_full_buffer=False) if is_main_thread else -1
    try:
        yield received
    finally:
        if is_main_thread:
            signal.set_wakeup_fd(before)
        os.close(received)
        os.close(sent)


def sum_over_ranks(values: Any) -> Any:
    """The tensor's sum over ranks, in place, on every rank."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank: small picklable values, over the network, without the GPU.

    Call on every rank, after torch.distributed was started.
    """
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_side_group())
    return values


def check_agreement(what: Mapping[str, str]) -> None:
    """Refuse to start if ranks differ in settings, data, code or layout.

    `what`: name -> text, both short; names by which a user finds the value to correct, such as `train.lr`. Call on
    every rank, after torch.distributed was started; it costs one small gather. Raises the same InputProblems on every
    rank, one problem a name, with each value and the ranks and hosts that have it.
    """
    digest = hashlib.sha256(repr(sorted(what.items())).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    ranks = gather_objects((socket.gethostname(), dict(what)))
    hosts = [host for host, _ in ranks]
    problems = []
    for name in sorted({name for _, theirs in ranks for name in theirs}):
        holders: dict[str, list[int]] = {}
        for number, (_, theirs) in enumerate(ranks):
            holders.setdefault(_shortened(theirs[name]) if name in theirs else "nothing", []).append(number)
        if len(holders) > 1:
            values = ", ".join(f"{value} on {format_ranks(who, hosts)}" for value, who in holders.items())
            problems.append(
                Problem("ranks", name, values, "start all ranks with the same command, config, data and code")
            )
    refuse(problems)


def format_ranks(ranks: Iterable[int], hosts: list[str]) -> str:
    """Some ranks as text: `ranks 0-2, 5 (node-0, node-1)`. `hosts` by rank."""
    numbers = sorted(ranks)
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    spans = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    names = list(dict.fromkeys(hosts[n] for n in numbers))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {spans} ({shown})"


def code_versions() -> dict[str, str]:
    """The software of this rank, for check_agreement: versions of Python and of the engines, and a digest of this
    project's own code."""
    digest = hashlib.sha256()
    for package in ("data_shards", "segdiff_dist", "segdiff_kernels"):
        folder = Path(import_module(package).__path__[0])
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(folder)}\0".encode() + file.read_bytes())
    versions = {f"{name} version": metadata.version(name) for name in ("torch", "deepspeed", "diffusers")}
    return {"Python version": platform.python_version(), **versions, "segdiff's code": digest.hexdigest()}


class DelayedMax:
    """The maximum of numbers over ranks, one exchange late, so that no rank waits for the network.

    It uses the CPU and gloo, while the GPU works. The n+1-th exchange returns the values of the n-th, on all ranks. So
    all of them learn at the same step that a rank was asked to stop. A world of one has the same delay. Make it, and
    call it, on every rank.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        import torch

        self._names = names
        self._group = _side_group() if world_size() > 1 else None
        self._maxima = torch.zeros(len(names), dtype=torch.float64)
        self._work: Any = None

    def exchange(self, values: Mapping[str, float]) -> dict[str, float]:
        """Put this rank's `values`; returns the maxima over ranks of those put by the previous call, zeros at first.

        Every name must have a value, none of them NaN.
        """
        import torch
        import torch.distributed as dist

        agreed = self.finish()
        self._maxima = torch.tensor([values[name] for name in self._names], dtype=torch.float64)
        if self._group is not None:
            self._work = dist.all_reduce(self._maxima, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def finish(self) -> dict[str, float]:
        """Wait for the pending exchange; returns the maxima of the last put. Call before leaving the loop."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return dict(zip(self._names, self._maxima.tolist(), strict=True))


_side: tuple[Any, Any] | None = None
"""(the world, a gloo group of all its ranks)"""


def _side_group() -> Any:
    """A gloo group of all ranks, besides the one that reduces gradients. Every rank must make the first call."""
    import torch.distributed as dist

    global _side
    if _side is None or _side[0] is not dist.group.WORLD:
        # Longer than any wait should be: heartbeat.py ends a useless wait earlier, and names the rank.
        _side = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(hours=2)))
    return _side[1]


def _shortened(text: str, length: int = 60) -> str:
    if len(text) <= length:
        return repr(text)
    return f"{text[:length]!r}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches `host` over IPv4; None if it is unknown."""
    siocgifaddr = 0x8915  # linux/sockios.h: an interface's IPv4 address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: it only picks the route
        except OSError:
            return None
        ours = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), siocgifaddr, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == ours:
                return name
    return None
