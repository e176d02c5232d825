"""A rank that dies or hangs stops the run within a stated time, and is named: nobody waits for it for ever.

In each rank a thread writes, about once a second, that the process lives and how far its main thread has come, into
the store in which the ranks met (rank 0 holds it). Rank 0 reads what all have written and, where one is missing, writes
the verdict, which the others read. So each asks little of the store, whatever their number; and it goes on while main
threads are stuck inside a collective.
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
from segdiff_dist.ranks.distributed import name_ranks, rank, world_size

STOPPED = 75
"""Exit code of a rank that stops because of another. EX_TEMPFAIL of sysexits.h: the same command may well succeed."""

_LAST_WORDS_S = 5.0
_numbers = itertools.count()


@dataclass
class Sign:
    """What a rank writes of itself."""

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
    """`left` when it needs the others no more, `interrupted` when all are to leave now, `broken: why` when a collective
    broke off, `failed: why` else."""


@dataclass(frozen=True)
class Verdict:
    """Why the run must stop, and whose fault it is."""

    why: str
    ranks: tuple[int, ...]


class Heartbeat:
    """Watches over the ranks while it is entered; in a world of one it does nothing.

    A rank that gives no sign of life for `dead_after_s` is dead, stopped or cut off; one whose main thread has not
    called `beat` for `hang_timeout_s` hangs. The others then print who it was, call `last_words` (at most 5 s: what
    must reach the disk) and exit with code 75, whatever their main threads are doing. So does a rank that the store has
    not answered for `dead_after_s`, since then rank 0 or the network is gone.

    Enter when torch.distributed is up, and leave, on every rank. An exception that leaves through it is told to the
    others, but for KeyboardInterrupt and InputProblems, which ranks raise together. The exception of a collective that
    broke off waits until it is known who broke it.
    """

    def __init__(
        self, hang_timeout_s: float, dead_after_s: float = 15.0, last_words: Callable[[], None] | None = None
    ) -> None:
        self._dead_after_s, self._last_words = dead_after_s, last_words
        self._interval_s = min(1.0, dead_after_s / 5)
        self._sign = Sign(socket.gethostname(), os.getpid())
        self._court = Court(world_size(), hang_timeout_s, dead_after_s, self._interval_s) if rank() == 0 else None
        self._unanswered = 0
        self._has_failed = False
        self._told, self._over = threading.Event(), threading.Event()

    def __enter__(self) -> Heartbeat:
        if world_size() > 1:
            self._prefix = f"segdiff/heartbeat/{next(_numbers)}"
            self._thread = threading.Thread(target=self._tell_and_ask, name="heartbeat", daemon=True)
            self._thread.start()
            self._told.wait(self._dead_after_s)  # from here on a death is noticed
            threading.Thread(target=self._mind_the_store, name="heartbeat-store", daemon=True).start()
        return self

    def beat(self, images_seen: int) -> None:
        """The main thread goes on. Call equally often on every rank: each step, and before waiting for the others."""
        self._sign.images_seen = images_seen
        self._sign.beats += 1

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Around what may take long on any rank: for `seconds` no rank counts as hanging."""
        self._sign.patience_s = seconds
        try:
            yield
        finally:
            self._sign.patience_s = 0.0
            self._sign.beats += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if world_size() == 1:
            return
        together = error is None or isinstance(error, (KeyboardInterrupt, InputProblems))
        if error is not None and _broke_off(error):
            self._sign.state = f"broken: {_in_short(error)}"
            self._thread.join(self._dead_after_s + 12 * self._interval_s)  # it ends this process
        elif together:
            self._sign.state = "left" if error is None else "interrupted"
            if self._court is not None:
                self._court.all_left.wait()  # the store goes when rank 0 does
        else:
            self._has_failed = True
            self._sign.state = f"failed: {_in_short(error)}"
            if self._court is not None:
                time.sleep(5 * self._interval_s)  # until the others know
        self._over.set()
        self._thread.join(self._dead_after_s)

    def _tell_and_ask(self) -> None:
        """The thread: write this rank's sign; judge on rank 0, ask for the verdict on the others."""
        import torch.distributed as dist

        try:
            store = self._connect()
            keys = [f"{self._prefix}/{number}" for number in range(world_size())]
            over = False
            while not over:
                over = self._told.is_set() and self._over.wait(self._interval_s)
                self._sign.ticks += 1
                self._sign.where = _line_of_the_main_thread()
                store.set(keys[rank()], json.dumps(asdict(self._sign)))
                self._told.set()
                verdict = self._judge(store, keys) if self._court is not None else self._ask(store)
                self._unanswered = 0
                if verdict is not None and not over:
                    self._stop(verdict)
        except (dist.DistError, RuntimeError) as error:  # the store's errors are either, by version of torch
            if not self._over.is_set():
                gone = f"rank 0 at {os.environ['MASTER_ADDR']}, which holds the run together, is gone"
                self._stop(Verdict(f"{gone} ({_in_short(error)})", (0,)))

    def _connect(self) -> Any:
        """A connection of its own, since one that the main thread waits on serves nobody else."""
        import torch.distributed as dist

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self._dead_after_s)
        )

    def _judge(self, store: Any, keys: Sequence[str]) -> Verdict | None:
        assert self._court is not None
        present = self._court.signs is not None or store.check(keys)
        signs = [Sign(**json.loads(text)) for text in store.multi_get(keys)] if present else None
        missing = () if present else tuple(n for n, key in enumerate(keys) if not store.check([key]))
        verdict = self._court.judge(signs, missing, time.monotonic())
        if verdict is not None:
            store.set(f"{self._prefix}/verdict", json.dumps(asdict(verdict)))
            self._over.wait(3 * self._interval_s)  # the others read it as long as rank 0 lives
        return verdict

    def _ask(self, store: Any) -> Verdict | None:
        key = f"{self._prefix}/verdict"
        if not store.check([key]):
            return None
        found = json.loads(store.get(key))
        return Verdict(found["why"], tuple(found["ranks"]))

    def _mind_the_store(self) -> None:
        """The other thread: a host that is cut off answers nothing and closes nothing, so the first waits for ever.

        It counts its own rounds, not time, so that nothing is held against a process that was stopped for a while.
        """
        while not self._over.wait(self._interval_s):
            self._unanswered += 1
            if self._unanswered * self._interval_s > self._dead_after_s + 2 * self._interval_s:
                where = os.environ["MASTER_ADDR"]
                why = f"rank 0 at {where}, which holds the run together, has not answered for {self._dead_after_s:g} s"
                self._stop(Verdict(f"{why}: its process or host is dead, stopped or cut off", (0,)))

    def _stop(self, verdict: Verdict) -> None:
        """Print the verdict and end this process; not while it is on its way out with an error of its own."""
        if self._has_failed:
            return
        lines = [f"error: rank {rank()} ({self._sign.host}) stops: {verdict.why}; the same command goes on"]
        if rank() in verdict.ranks:
            stack = "".join(traceback.format_stack(_frame_of_the_main_thread())).rstrip()
            lines += [f"rank {rank()}'s main thread stands at:", stack]
        # Not by way of sys.stderr: the main thread may be stuck while it holds that.
        os.write(2, ("\n" + "\n".join(lines) + "\n").encode())
        if self._last_words is not None:
            words = threading.Thread(target=self._last_words, name="heartbeat-last-words", daemon=True)
            words.start()
            words.join(_LAST_WORDS_S)
        os._exit(STOPPED)


class Court:
    """Judges the ranks by their signs; on rank 0. Reads no clock and no store: a function of what it was shown."""

    def __init__(self, num_ranks: int, hang_timeout_s: float, dead_after_s: float, interval_s: float) -> None:
        self._hang_timeout_s, self._dead_after_s = hang_timeout_s, dead_after_s
        # Deaths are counted in rounds of judging: while rank 0 itself was stopped, nobody is held to have been silent.
        self._dead_after_rounds = max(2, round(dead_after_s / interval_s))
        self._silent_rounds = [0] * num_ranks
        self._failed_rounds = self._broken_rounds = 0
        self._moved_s: list[float] = []
        self._began_s: float | None = None
        self.signs: list[Sign] | None = None
        self.all_left = threading.Event()

    def judge(self, signs: list[Sign] | None, missing: tuple[int, ...], now_s: float) -> Verdict | None:
        """Called every interval with all ranks' signs, by rank, or None and who is `missing` until all have written
        one."""
        if signs is None:
            self._began_s = now_s if self._began_s is None else self._began_s
            if now_s - self._began_s > self._hang_timeout_s:
                who = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
                return Verdict(f"rank {who} has not begun to train within {self._hang_timeout_s:g} s", missing)
            return None
        before, self.signs = self.signs, signs
        if before is None:
            before, self._moved_s = signs, [now_s] * len(signs)
        for n, (old, new) in enumerate(zip(before, signs, strict=True)):
            self._silent_rounds[n] = 0 if new.ticks != old.ticks else self._silent_rounds[n] + 1
            if new.beats != old.beats:
                self._moved_s[n] = now_s
        here = [n for n, sign in enumerate(signs) if sign.state not in ("left", "interrupted")]
        if not here:
            self.all_left.set()
            return None
        return self._failed(here) or self._dead(here) or self._broken(here) or self._hung(here, now_s)

    def _failed(self, here: list[int]) -> Verdict | None:
        """A round later than it shows, so that an error which all ranks raise is raised by all."""
        failed = [n for n in here if self._sign(n).state.startswith("failed")]
        self._failed_rounds = self._failed_rounds + 1 if failed else 0
        if self._failed_rounds < 2:
            return None
        return Verdict(f"{self._names(failed)} {self._sign(failed[0]).state}", tuple(failed))

    def _dead(self, here: list[int]) -> Verdict | None:
        dead = [n for n in here if self._silent_rounds[n] >= self._dead_after_rounds]
        if not dead:
            return None
        why = (
            f"{self._names(dead)} gave no sign of life for {self._dead_after_s:g} s, last seen at "
            f"{self._sign(dead[0]).images_seen:,} images: its process or host is dead, stopped or cut off"
        )
        return Verdict(why, tuple(dead))

    def _broken(self, here: list[int]) -> Verdict | None:
        """A collective broke off: because a rank died, which shows soon, or left; or for a reason of the network's. Or
        a rank was interrupted and the others were not."""
        broken = [n for n in here if self._sign(n).state.startswith("broken")]
        gone = [n for n in range(len(self._silent_rounds)) if n not in here]
        waiting = broken or any(self._sign(n).state == "interrupted" for n in gone)
        self._broken_rounds = self._broken_rounds + 1 if waiting else 0
        if self._broken_rounds <= self._dead_after_rounds + 3:
            return None
        if gone:
            return Verdict(f"{self._names(gone)} left while the others still needed it", tuple(gone))
        return Verdict(f"on {self._names(broken)} a collective is {self._sign(broken[0]).state}", tuple(broken))

    def _hung(self, here: list[int], now_s: float) -> Verdict | None:
        limit_s = max(self._hang_timeout_s, *(self._sign(n).patience_s for n in here))
        if max(now_s - self._moved_s[n] for n in here) <= limit_s:
            return None
        # Ranks beat equally often, so whoever waits in a collective is ahead of the one that does not come; and where
        # beats are too coarse for that, many wait at one line and few stand at another.
        groups: dict[tuple[int, str], list[int]] = {}
        for n in here:
            groups.setdefault((self._sign(n).beats, self._sign(n).where), []).append(n)
        (slowest, *others) = sorted(groups.items(), key=lambda item: (item[0][0], len(item[1]), item[1]))
        (_, where), who = slowest
        why = (
            f"{self._names(who)} hangs at {self._sign(who[0]).images_seen:,} images in {where}: "
            f"for {limit_s:g} s no main thread has gone on"
        )
        for (_, where), waiting in others[:3]:
            why += f"; {self._names(waiting)} in {where}"
        return Verdict(why, tuple(who))

    def _sign(self, number: int) -> Sign:
        assert self.signs is not None
        return self.signs[number]

    def _names(self, numbers: list[int]) -> str:
        assert self.signs is not None
        return name_ranks(numbers, [sign.host for sign in self.signs])


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
