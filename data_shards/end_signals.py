"""SIGTERM and SIGHUP end a command as Ctrl-C does: by an exception in its main thread, so that locks are released and
temporary folders are removed.

Slurm, Kubernetes, systemd, `timeout` and `kill` send SIGTERM; a terminal that is closed sends SIGHUP. By default both
end a process at once, without a word.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
CONTINUES = "the same command continues from here"
# A signal that comes so soon after another is the same request: `timeout` sends two, and a shell repeats SIGHUP.
_SAME_REQUEST_S = 10.0
_pid = 0
_received: tuple[int, float] | None = None
"""The signal that ended this command, and when."""


class Ended(KeyboardInterrupt):
    """Raised by a signal. What handles Ctrl-C handles it."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP raise Ended in the main thread; the handlers from before are restored.

    A signal that is ignored stays ignored, as `nohup` wants it. Further signals do not disturb a command that is
    ending. In another thread, where no handler can be set, the context does nothing.
    """
    global _pid, _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _pid, _received, before = os.getpid(), None, {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):  # None: not set by Python, which could not restore it
                signal.signal(number, _end)
        yield
    finally:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, handler)


def take_back_signals() -> None:
    """Set the handlers of `ended_by_signals` again after a library has set its own below Python, as Ray does: it prints
    where in its code the signal came."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is _end:
                signal.signal(number, _end)


def ending(number: int | None = None) -> tuple[str, int]:
    """How this command was ended, in words, and its exit code. `number`: the signal; None: the one that it got in
    `ended_by_signals`, else Ctrl-C."""
    if number is None:
        number = signal.SIGINT if _received is None else _received[0]
    text = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return text, 128 + number


def last_line(then: str = CONTINUES, number: int | None = None) -> str:
    """The line that a command ends with: how it was ended, as `ending` says it, and what is to be known then."""
    text, code = ending(number)
    # A terminal shows ^C, or an unfinished bar, in the line before.
    lead = "\n" if code == 128 + signal.SIGINT or os.isatty(2) else ""
    return lead + "; ".join(filter(None, (text, then))) + "\n"


def comes_of_interruption(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C or Ended, or was raised while such a one was handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def leave_closed_terminal() -> None:
    """Drop what is printed from now on if the terminal was closed: printing there would be an error."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    for descriptor, event in poll.poll(0):
        if event & select.POLLHUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def stop_this_command() -> None:
    """Stop this command as Ctrl-C does, from any thread; as SIGTERM does where Ctrl-C is ignored, as in a shell's
    background."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM if ignored else signal.SIGINT)


def _end(number: int, _: FrameType | None) -> None:
    global _received
    if os.getpid() != _pid:  # a forked process, which is not the command
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if number == signal.SIGHUP:
        leave_closed_terminal()
    now = time.monotonic()
    is_repeated = _received is not None and now - _received[1] < _SAME_REQUEST_S
    if is_repeated or comes_of_interruption(sys.exc_info()[1]):
        return
    _received = number, now
    raise Ended(signal.Signals(number).name)
