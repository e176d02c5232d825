"""Damage, reading and outcome of one attempt, in a process that another one watches: its time and its memory are
limited."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import random
import resource
import shutil
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from campaign.damage import damaged
from campaign.inputs import Kind, copy_of

OUTCOMES = ("refused", "same result", "another valid file", "unclean", "hung", "swollen", "silently wrong")
FAULTS = OUTCOMES[3:]
# An attempt takes milliseconds of processor time; inputs are some KB.
MOST_S, MOST_BYTES = 20.0, 256 * 2**20
# Of a process that waits for ever: on a busy machine, one that works waits for a core too.
_MOST_WAITING = 6
# Above what the process holds already, so that a wrong size is an error and not the end of the machine.
_ROOM_BYTES = 4 * 2**30
_LONGEST = 6_000


@dataclass
class Tally:
    """What became of some attempts. `faults`: number, outcome and words of each that is a fault of ours."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: int, outcome: str, words: str) -> None:
        self.counts[outcome] += 1
        if outcome in FAULTS:
            self.faults.append({"number": number, "outcome": outcome, "what": words[-1500:]})


def attempt(kind: Kind, good: Path, place: Path, good_digest: str, seed: int, number: int) -> tuple[str, str]:
    """Damage one file of a copy of the good input, read it, and say what became of it; the copy is whole again."""
    rng = random.Random(f"{kind.name}/{seed}/{number}")
    targets = kind.targets(good)
    file = targets[rng.randrange(len(targets))]
    there = place / file.relative_to(good)
    there.write_bytes(damaged(file.name, file.read_bytes(), rng))
    os.utime(there, ns=(number, number))
    _forget_peak()
    before = _peak_bytes()
    outcome, words = _read(kind, place, good_digest)
    copy_of(good, place) if kind.writes else there.write_bytes(file.read_bytes())
    grown = _peak_bytes() - before
    if grown > MOST_BYTES:
        outcome, words = "swollen", f"{grown / 2**20:.0f} MiB more; {words}"
    return outcome, f"{file.relative_to(good)}: {words}"


def _read(kind: Kind, place: Path, good_digest: str) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = kind.read(place)
        except Exception as error:
            if _is_of_memory(error):
                return "swollen", traceback.format_exc()
            is_clean = isinstance(error, kind.refusals) and 0 < len(str(error)) < _LONGEST
            return ("refused", str(error)) if is_clean else ("unclean", traceback.format_exc())
    if found == good_digest:
        return "same result", ""
    if not kind.has_checksums:
        return "another valid file", ""
    return ("refused", str(said[0].message)) if said else ("silently wrong", "read, with another result")


def _is_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of resident memory begins anew


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def serve(kind: Kind, good: Path, place: Path, seed: int, pipe: Connection) -> None:
    """In a process of its own: read the good input, then answer each number with its outcome."""
    parent = os.getppid()
    os.setsid()
    os.environ["SEGDIFF_LEAN_IMPORTS"] = "1"
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    gc.freeze()  # what the parent has left must not be freed during an attempt: it would hide what that one takes
    ctypes.CDLL(None).malloc_trim(0)  # nor be taken again: a parent that has trained keeps what it frees
    copy_of(good, place)
    try:
        good_digest = kind.read(place)
        assert kind.read(place) == good_digest, "a good input has two results"
    except Exception:
        pipe.send(traceback.format_exc())
        return
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + _ROOM_BYTES, held + _ROOM_BYTES))
    pipe.send(None)
    while os.getppid() == parent:  # this process holds the other end too, so the pipe does not end with its parent
        if pipe.poll(2.0):
            pipe.send(attempt(kind, good, place, good_digest, seed, pipe.recv()))


class Watched:
    """The process of `serve`, which is ended and replaced when it answers too late."""

    def __init__(self, kind: Kind, good: Path, place: Path, seed: int) -> None:
        self._arguments = (kind, good, place, seed)
        self._start()

    def _start(self) -> None:
        gc.collect()  # not after the fork: what owns threads waits for them when it is freed, and there they are gone
        context = multiprocessing.get_context("fork")  # of this process, which has loaded the libraries
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(*self._arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(120):
            self.end()
            raise RuntimeError(f"{self._arguments[0].name}: the good input is not read within two minutes")
        if (failure := self._pipe.recv()) is not None:
            raise RuntimeError(f"{self._arguments[0].name}: the good input is not read: {failure}")

    def outcome(self, number: int, most_s: float = MOST_S) -> tuple[str, str]:
        """Of one attempt. `most_s`: of processor time."""
        try:
            self._pipe.send(number)
            outcome, words = "hung", f"no answer in {most_s:g} s of processor time"
            if self._answers(most_s):
                outcome, words = self._pipe.recv()
                if outcome != "swollen":  # a process may keep the memory, and then does not grow the next time
                    return outcome, words
        except (EOFError, OSError):
            self._process.join(10)
            outcome, words = "unclean", f"the process ended with {self._process.exitcode}"
        self.end()
        self._start()
        return outcome, words

    def _answers(self, most_s: float) -> bool:
        begun, used_s = time.monotonic(), self._used_s()
        while not self._pipe.poll(0.2):
            if self._used_s() - used_s > most_s or time.monotonic() - begun > _MOST_WAITING * most_s:
                return False
        return True

    def _used_s(self) -> float:
        """Processor time of the process that reads."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:  # it has ended, which the pipe says
            return 0.0
        return float(times.user + times.system)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def run_attempts(kind: Kind, folder: Path, seed: int, numbers: range) -> Iterator[tuple[int, str, str]]:
    """Number, outcome and words of each attempt. `folder`: a place for the good input and its copy."""
    good = made_input(kind, folder)
    watched = Watched(kind, good, folder / kind.name, seed)
    try:
        for number in numbers:
            yield number, *watched.outcome(number)
    finally:
        watched.end()


def made_input(kind: Kind, folder: Path) -> Path:
    """The good input in `folder`, made in a process of its own where it is not there yet."""
    good, marker = folder / f"{kind.name}.good", folder / f"{kind.name}.made"
    if not marker.exists():
        shutil.rmtree(good, ignore_errors=True)
        good.mkdir(parents=True)
        gc.collect()
        maker = multiprocessing.get_context("fork").Process(target=kind.make, args=(good,))
        maker.start()
        maker.join()
        if maker.exitcode != 0:
            raise RuntimeError(f"{kind.name}: the good input could not be made")
        marker.touch()
    return good
