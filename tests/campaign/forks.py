"""Commands in processes forked from one that has imported the libraries: a command then starts in a tenth of a second,
and a kill with its restart takes a quarter of the time.

`python -m campaign.forks MODULES` serves lines of JSON on its input. A forked process ends like any interpreter, with
its threads and its exit functions.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any


class Command:
    """A command that was started; of a `Forks`."""

    def __init__(self, forks: Forks, pid: int, errors: Path) -> None:
        self.pid, self._forks, self._errors, self._code = pid, forks, errors, None

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative where a signal ended it; None if it runs for longer than this."""
        end = time.monotonic() + seconds
        while self._code is None:
            self._code = self._forks.ask(code_of=self.pid)
            if self._code is None and time.monotonic() > end:
                return None
            time.sleep(0.02)
        return self._code

    def said(self) -> str:
        """Its error stream so far."""
        return self._errors.read_text(errors="replace")


class Forks:
    """A process that starts commands. `modules`: files of the names that it imports first."""

    def __init__(self, modules: Sequence[Path], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "campaign.forks", *map(str, modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._last: Command | None = None

    def start(self, arguments: list[str], errors: Path, modules: Path | None = None) -> Command:
        """`segdiff ARGUMENTS` in a session of its own. At its end it writes the names of its modules."""
        pid = self.ask(arguments=arguments, errors=str(errors), modules=None if modules is None else str(modules))
        assert isinstance(pid, int)
        self._last = Command(self, pid, errors)
        return self._last

    def ask(self, **request: Any) -> int | None:
        """The answer to one line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that starts commands has ended")
        answer: int | None = json.loads(line)
        return answer

    def end(self) -> None:
        """End it, and the command that it has started last, if that still runs."""
        if self._last is not None and self._last.wait(0.0) is None:
            with suppress(ProcessLookupError):
                os.killpg(self._last.pid, signal.SIGKILL)
        self._process.communicate()


def serve(modules: Sequence[Path]) -> None:
    """Import, then answer lines until the input ends."""
    from data_shards import lean_imports

    lean_imports.begin()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries print as they are imported
    for name in dict.fromkeys(name for file in modules for name in file.read_text().split()):
        with suppress(Exception):
            import_module(name)
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    # Arrow's jemalloc has a thread that it starts again in a forked process.
    assert len(set(names) - {"jemalloc_bg_thd"}) == 1, f"a process with threads cannot be forked: {names}"
    gc.freeze()  # a collection at a command's end would copy every page of this process, which took 6 s of 9
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "arguments" in request:
            pid = os.fork()
            if pid == 0:
                _become(request["arguments"], Path(request["errors"]), request["modules"])
            answer: int | None = pid
        else:
            answer = _code_of(request["code_of"], codes)
        print(json.dumps(answer), file=answers, flush=True)


def _code_of(pid: int, codes: dict[int, int]) -> int | None:
    if pid not in codes:
        there, status = os.waitpid(pid, os.WNOHANG)
        if there:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes.get(pid)


def _become(arguments: list[str], errors: Path, modules: str | None) -> None:
    """Run a command in this process, which ends with it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nowhere = os.open(os.devnull, os.O_RDWR)
    said = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number, stream in enumerate((nowhere, nowhere, said)):
        os.dup2(stream, number)
    sys.argv = ["segdiff", *arguments]
    from segdiff_dist.cli import run

    code = run(arguments)
    if modules is not None:
        names = [name for name, one in list(sys.modules.items()) if one is not None and name != "__main__"]
        Path(modules).write_text("\n".join(names))
    sys.exit(code)


if __name__ == "__main__":
    serve([Path(name) for name in sys.argv[1:]])
