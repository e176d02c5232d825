"""A rank that dies or hangs stops the run within a stated time, and the others print which rank it was.

torch.distributed's own watchdog is not enough: it watches only NCCL's collectives, not gloo's and not a hang outside of
one, and it does not say which rank is missing.

In each rank a thread writes a status about once a second: that the process lives, and how far its main thread has come.
It writes into the store through which the ranks found each other; rank 0 holds this store. Rank 0 reads the status of
all ranks. If one is missing, it writes the reason to stop, which the others read. So each rank sends few requests,
whatever the number of ranks, and the threads go on while main threads wait inside a collective.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

from data_shards.problems import InputProblems
from segdiff_dist.ranks.distributed import format_ranks, rank, world_size

STOPPED = 75
"""Exit code of a rank that stops because of another. EX_TEMPFAIL of sysexits.h: the same command may well succeed."""

_LAST_WORDS_S = 5.0
_numbers = itertools.count()


@dataclass
class RankStatus:
    """The status that a rank reports."""

    host: str
    pid: int
    ticks: int = 0
    """Counted by the thread: the process lives."""
    beats: int = 0
    """Counted by the main thread: it goes on."""
    images_seen: int = 0
    where: str = ""
    """The line of Python that the main thread is in."""
    patience_s: float = 0.0
    state: str = "running"
    """`running`; `left`: it no longer needs the others; `interrupted`: all must leave now; `broken: REASON`: a
    collective failed; `failed: REASON`: any other error."""


@dataclass(frozen=True)
class StopReason:
    """Why the run must stop, and which ranks are the cause."""

    message: str
    ranks: tuple[int, ...]


class Heartbeat:
    """Watches the ranks while it is entered; in a world of one it does nothing.

    A rank counts as dead, stopped or cut off if its status does not change for `dead_after_s`. It hangs if its main
    thread has not called `beat` for `hang_timeout_s`. The other ranks then print which rank it was, call `last_words`
    (at most 5 s, for data that must reach the disk) and exit with code 75, whatever their main threads are doing. A
    rank that gets no answer from the store for `dead_after_s` does the same, since then rank 0 or the network is gone.

    Enter and leave it on every rank, while torch.distributed is up. An exception that leaves through it is reported to
    the others, except KeyboardInterrupt and InputProblems, which all ranks raise together. The exception of a failed
    collective waits until it is known which rank caused it.
    """

    def __init__(
        self, hang_timeout_s: float, dead_after_s: float = 15.0, last_words: Callable[[], None] | None = None
    ) -> None:
        self._dead_after_s, self._last_words = dead_after_s, last_words
        self._interval_s = min(1.0, dead_after_s / 5)
        self._status = RankStatus(socket.gethostname(), os.getpid())
        self._monitor = (
            RankMonitor(world_size(), hang_timeout_s, dead_after_s, self._interval_s) if rank() == 0 else None
        )
        self._unanswered = 0
        self._has_failed = False
        self._has_reported, self._over = threading.Event(), threading.Event()

    def __enter__(self) -> Heartbeat:
        if world_size() > 1:
            self._prefix = f"segdiff/heartbeat/{next(_numbers)}"
            self._thread = threading.Thread(target=self._report_and_check, name="heartbeat", daemon=True)
            self._thread.start()
            self._has_reported.wait(self._dead_after_s)  # from here on a death is noticed
            threading.Thread(target=self._watch_the_store, name="heartbeat-store", daemon=True).start()
        return self

    def beat(self, images_seen: int) -> None:
        """Report that the main thread goes on. Call equally often on every rank: each step, and before waiting for the
        others."""
        self._status.images_seen = images_seen
        self._status.beats += 1

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """A context for work that may take long on any rank: for `seconds` no rank counts as hanging."""
        self._status.patience_s = seconds
        try:
            yield
        finally:
            self._status.patience_s = 0.0
            self._status.beats += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if world_size() == 1:
            return
        together = error is None or isinstance(error, (KeyboardInterrupt, InputProblems))
        if error is not None and _broke_off(error):
            self._status.state = f"broken: {_in_short(error)}"
            self._thread.join(self._dead_after_s + 12 * self._interval_s)  # it ends this process
        elif together:
            self._status.state = "left" if error is None else "interrupted"
            if self._monitor is not None:
                self._monitor.all_left.wait()  # the store goes when rank 0 does
        else:
            self._has_failed = True
            self._status.state = f"failed: {_in_short(error)}"
            if self._monitor is not None:
                time.sleep(5 * self._interval_s)  # until the others know
        self._over.set()
        self._thread.join(self._dead_after_s)

    def _report_and_check(self) -> None:
        """The thread: report this rank's status; on rank 0 check all of them, on the others ask whether to stop."""
        import torch.distributed as dist

        try:
            store = self._connect()
            keys = [f"{self._prefix}/{number}" for number in range(world_size())]
            over = False
            while not over:
                over = self._has_reported.is_set() and self._over.wait(self._interval_s)
                self._status.ticks += 1
                self._status.where = _line_of_the_main_thread()
                store.set(keys[rank()], json.dumps(asdict(self._status)))
                self._has_reported.set()
                reason = self._check_all(store, keys) if self._monitor is not None else self._ask(store)
                self._unanswered = 0
                if reason is not None and not over:
                    self._stop(reason)
        except (dist.DistError, RuntimeError) as error:  # depends on the version of torch
            if not self._over.is_set():
                gone = f"rank 0 at {os.environ['MASTER_ADDR']}, which holds the run together, is gone"
                self._stop(StopReason(f"{gone} ({_in_short(error)})", (0,)))

    def _connect(self) -> Any:
        """A separate connection, since the main thread may block its own."""
        import torch.distributed as dist

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self._dead_after_s)
        )

    def _check_all(self, store: Any, keys: Sequence[str]) -> StopReason | None:
        assert self._monitor is not None
        present = self._monitor.statuses is not None or store.check(keys)
        statuses = [RankStatus(**json.loads(text)) for text in store.multi_get(keys)] if present else None
        missing = () if present else tuple(n for n, key in enumerate(keys) if not store.check([key]))
        reason = self._monitor.check(statuses, missing, time.monotonic())
        if reason is not None:
            store.set(f"{self._prefix}/stop", json.dumps(asdict(reason)))
            self._over.wait(3 * self._interval_s)  # the others read it as long as rank 0 lives
        return reason

    def _ask(self, store: Any) -> StopReason | None:
        key = f"{self._prefix}/stop"
        if not store.check([key]):
            return None
        reason = json.loads(store.get(key))
        return StopReason(reason["message"], tuple(reason["ranks"]))

    def _watch_the_store(self) -> None:
        """The other thread: a host that is cut off neither answers nor closes the connection, so the first thread waits
        for ever.

        It counts its own rounds, not seconds, so that a process that was stopped for a while does not count as cut off.
        """
        while not self._over.wait(self._interval_s):
            self._unanswered += 1
            if self._unanswered * self._interval_s > self._dead_after_s + 2 * self._interval_s:
                where = os.environ["MASTER_ADDR"]
                silent = (
                    f"rank 0 at {where}, which holds the run together, has not answered for {self._dead_after_s:g} s"
                )
                self._stop(StopReason(f"{silent}: its process or host is dead, stopped or cut off", (0,)))

    def _stop(self, reason: StopReason) -> None:
        """Print the reason and end this process, unless it is already leaving with its own error."""
        if self._has_failed:
            return
        lines = [f"error: rank {rank()} ({self._status.host}) stops: {reason.message}; the same command continues"]
        if rank() in reason.ranks:
            stack = "".join(traceback.format_stack(_frame_of_the_main_thread())).rstrip()
            lines += [f"rank {rank()}'s main thread is at:", stack]
        # Not through sys.stderr: the main thread may hang while it holds the lock of that.
        os.write(2, ("\n" + "\n".join(lines) + "\n").encode())
        if self._last_words is not None:
            words = threading.Thread(target=self._last_words, name="heartbeat-last-words", daemon=True)
            words.start()
            words.join(_LAST_WORDS_S)
        os._exit(STOPPED)


class RankMonitor:
    """Decides on rank 0 whether the run must stop, from the statuses alone: it reads no clock and no store."""

    def __init__(self, num_ranks: int, hang_timeout_s: float, dead_after_s: float, interval_s: float) -> None:
        self._hang_timeout_s, self._dead_after_s = hang_timeout_s, dead_after_s
        # Silence is counted in calls of check(): while rank 0 itself is stopped, no rank counts as silent.
        self._dead_after_rounds = max(2, round(dead_after_s / interval_s))
        self._silent_rounds = [0] * num_ranks
        self._failed_rounds = self._broken_rounds = 0
        self._moved_s: list[float] = []
        self._began_s: float | None = None
        self.statuses: list[RankStatus] | None = None
        self.all_left = threading.Event()

    def check(self, statuses: list[RankStatus] | None, missing: tuple[int, ...], now_s: float) -> StopReason | None:
        """Call it every interval with the statuses by rank. Until every rank has reported one: None, and the ranks that
        are `missing`."""
        if statuses is None:
            self._began_s = now_s if self._began_s is None else self._began_s
            if now_s - self._began_s > self._hang_timeout_s:
                who = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
                return StopReason(f"rank {who} has not begun to train within {self._hang_timeout_s:g} s", missing)
            return None
        before, self.statuses = self.statuses, statuses
        if before is None:
            before, self._moved_s = statuses, [now_s] * len(statuses)
        for n, (old, new) in enumerate(zip(before, statuses, strict=True)):
            self._silent_rounds[n] = 0 if new.ticks != old.ticks else self._silent_rounds[n] + 1
            if new.beats != old.beats:
                self._moved_s[n] = now_s
        here = [n for n, status in enumerate(statuses) if status.state not in ("left", "interrupted")]
        if not here:
            self.all_left.set()
            return None
        return self._failed(here) or self._dead(here) or self._broken(here) or self._hung(here, now_s)

    def _failed(self, here: list[int]) -> StopReason | None:
        """One call after the first report, so that an error which all ranks raise is raised by all."""
        failed = [n for n in here if self._status(n).state.startswith("failed")]
        self._failed_rounds = self._failed_rounds + 1 if failed else 0
        if self._failed_rounds < 2:
            return None
        return StopReason(f"{self._names(failed)} {self._status(failed[0]).state}", tuple(failed))

    def _dead(self, here: list[int]) -> StopReason | None:
        dead = [n for n in here if self._silent_rounds[n] >= self._dead_after_rounds]
        if not dead:
            return None
        message = (
            f"{self._names(dead)} gave no sign of life for {self._dead_after_s:g} s, last seen at "
            f"{self._status(dead[0]).images_seen:,} images: its process or host is dead, stopped or cut off"
        )
        return StopReason(message, tuple(dead))

    def _broken(self, here: list[int]) -> StopReason | None:
        """A collective failed, or a rank was interrupted and the others were not.

        A collective fails because a rank died, which is noticed soon, because a rank left, or because the network
        failed.
        """
        broken = [n for n in here if self._status(n).state.startswith("broken")]
        gone = [n for n in range(len(self._silent_rounds)) if n not in here]
        waiting = broken or any(self._status(n).state == "interrupted" for n in gone)
        self._broken_rounds = self._broken_rounds + 1 if waiting else 0
        if self._broken_rounds <= self._dead_after_rounds + 3:
            return None
        if gone:
            return StopReason(f"{self._names(gone)} left while the others still needed it", tuple(gone))
        return StopReason(f"on {self._names(broken)} a collective is {self._status(broken[0]).state}", tuple(broken))

    def _hung(self, here: list[int], now_s: float) -> StopReason | None:
        limit_s = max(self._hang_timeout_s, *(self._status(n).patience_s for n in here))
        if max(now_s - self._moved_s[n] for n in here) <= limit_s:
            return None
        # Ranks beat equally often, so a rank that waits in a collective is ahead of the one that does not come. If
        # beats are too coarse for that, many ranks wait at one line and few are at another.
        groups: dict[tuple[int, str], list[int]] = {}
        for n in here:
            groups.setdefault((self._status(n).beats, self._status(n).where), []).append(n)
        (slowest, *others) = sorted(groups.items(), key=lambda item: (item[0][0], len(item[1]), item[1]))
        (_, where), who = slowest
        message = (
            f"{self._names(who)} hangs at {self._status(who[0]).images_seen:,} images in {where}: "
            f"for {limit_s:g} s no main thread has gone on"
        )
        for (_, where), waiting in others[:3]:
            message += f"; {self._names(waiting)} in {where}"
        return StopReason(message, tuple(who))

    def _status(self, number: int) -> RankStatus:
        assert self.statuses is not None
        return self.statuses[number]

    def _names(self, numbers: list[int]) -> str:
        assert self.statuses is not None
        return format_ranks(numbers, [status.host for status in self.statuses])


def _frame_of_the_main_thread() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _line_of_the_main_thread() -> str:
    frame = _frame_of_the_main_thread()
    if frame is None:
        return "nowhere"
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def _broke_off(error: BaseException) -> bool:
    """Whether a collective failed, which mostly means that another rank is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _in_short(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
