"""How a command ends: an error that a user can correct becomes a message and an exit code.

0 done, 1 some of the input failed, 2 input refused before work started, 3 training stopped itself, 130 interrupted,
143 ended by SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from contextlib import suppress
from types import TracebackType

from data_shards import end_signals, memory_guard
from data_shards.locks import work_has_begun
from data_shards.problems import InputProblems, WorkFailed, describe


class ExitStatus:
    """A context that turns the errors of a command into a message and an exit code. `only_reads`: the command takes no
    lock. `guard`: of its memory. `as_json`: print the error for a program too, in place of the result."""

    def __init__(self, as_json: bool = False) -> None:
        self.code, self.only_reads, self.guard = 0, False, memory_guard.Guard("segdiff", "")
        self._as_json, self._errors = as_json, [""]

    def __enter__(self) -> ExitStatus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Whether the error was one that a user can correct. Such errors are printed here."""
        try:
            if error is None:
                sys.stdout.flush()
                return False
            code = self._code_of(error)
            if code is not None:
                self.code = code
                if self._as_json and os.environ.get("RANK", "0") == "0":
                    line = {"message": [], "warnings": self._errors, "next_command": None, "exit_code": code}
                    print(json.dumps(line))
            sys.stdout.flush()
            return code is not None
        except OSError as unprinted:
            self._unprinted(unprinted)
            return True

    def _code_of(self, error: BaseException) -> int | None:
        """Print the problem; None for an error that a user cannot correct."""
        if isinstance(error, InputProblems):
            self._errors = [str(found) for found in error.problems]
            return _say_problems(error)
        if isinstance(error, WorkFailed):
            return self._say(str(error), error.exit_code)
        if self.guard.reason and isinstance(error, KeyboardInterrupt):
            return self._say(self.guard.reason, 1)
        if memory_guard.is_of_memory(error):
            return self._say(memory_guard.out_of_memory(self.guard.name, self.guard.lower, error), 1)
        if isinstance(error, KeyboardInterrupt):
            return self._say_ended()
        if isinstance(error, OSError):
            if _reader_is_gone():
                raise error
            self._say(describe(error), 1)
            if self.only_reads or work_has_begun():  # a disk may fill, and a server go away
                return 1
            print("nothing was started", file=sys.stderr)
            return 2
        # A library's import that is broken off may turn that into an error of its own.
        return self._say_ended() if end_signals.comes_of_interruption(error) else None

    def _say_ended(self) -> int:
        text, code = end_signals.ending()
        self._errors = [text]
        sys.stderr.write(end_signals.last_line("" if self.only_reads else end_signals.CONTINUES))
        return code

    def _say(self, message: str, code: int) -> int:
        self._errors = [message]
        print(f"error: {message}", file=sys.stderr)
        return code

    def _unprinted(self, error: OSError) -> None:
        """The output has no reader, or the disk is full. Further output is dropped, or Python would try again as it
        ends."""
        if _reader_is_gone():
            # The reader has closed the pipe (`segdiff --help | head`). SIGPIPE itself stays off: it would also kill a
            # process whose store or tracker closes a connection.
            self.code = 141  # what a shell shows for a command that SIGPIPE ended
        else:
            with suppress(OSError):
                print(f"error: {describe(error)}", file=sys.stderr)
            self.code = 1
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())


def _say_problems(error: InputProblems) -> int:
    # Once a machine, since a file may be missing on one of them only. Every launcher sets MASTER_ADDR: without it, RANK
    # is left of an earlier launch, and no other process will say anything.
    is_alone = "MASTER_ADDR" not in os.environ
    if os.environ.get("LOCAL_RANK", "0") == "0" or is_alone:
        is_main = os.environ.get("RANK", "0") == "0" or is_alone
        where = "error" if is_main else f"error on {socket.gethostname()}"
        for found in error.problems:
            print(f"{where}: {found}", file=sys.stderr)
        plural = "s" if len(error.problems) > 1 else ""
        print(f"{len(error.problems)} problem{plural}; nothing was started", file=sys.stderr)
    return 2


def _reader_is_gone() -> bool:
    """Whether the output has lost its reader."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the stream of a notebook or a test is not a file
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
