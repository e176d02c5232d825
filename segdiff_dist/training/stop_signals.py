"""Signals that ask a training to stop. The training ends its step first and writes a checkpoint."""

from __future__ import annotations

import signal
from typing import Any

from data_shards.end_signals import leave_closed_terminal


class StopSignals:
    """Use as a context: `asked` becomes True at Ctrl-C, SIGTERM, SIGUSR1, or SIGHUP unless that is ignored (`nohup`).

    Slurm sends SIGUSR1 before it takes a job's machines away, and a terminal SIGHUP when it is closed. A second Ctrl-C
    raises KeyboardInterrupt at once.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> StopSignals:
        self.asked = False
        hangup = () if signal.getsignal(signal.SIGHUP) in (signal.SIG_IGN, None) else (signal.SIGHUP,)
        self._old = {s: signal.signal(s, self._ask) for s in (*self._SIGNALS, *hangup)}
        return self

    def _ask(self, number: int, _: Any) -> None:
        if number == signal.SIGHUP:
            leave_closed_terminal()
        # At Ctrl-C the terminal sends SIGINT to the ranks, and DeepSpeed's launcher then sends them SIGTERM too.
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
