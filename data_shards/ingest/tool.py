"""External programs, run without a shell: their output is kept, and none outlives the worker that started it."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_LAST_LINES, _LAST_CHARACTERS = 4, 600
# Much longer than a program takes to print its version, even if it imports a deep learning library.
_ANSWER_TIMEOUT_S = 120.0


def run_tool(words: list[str], log: Path, timeout_s: float | None) -> str:
    """Run a tool without a shell; its output goes to `log`, and its process group ends after `timeout_s`. Returns why
    it failed, or an empty text."""
    with log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            return f"{words[0]} cannot be started: {error.strerror}"
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"{words[0]} took longer than {timeout_s:g} s and was stopped{last_words(log)}"
        except BaseException:
            _end(process)
            raise
    how = f"code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    return f"{words[0]} ended with {how}{last_words(log)}" if code != 0 else ""


def last_words(log: Path) -> str:
    """The last lines of a tool's output, as the end of a sentence."""
    return _said(log.read_bytes())


def ask(words: list[str]) -> tuple[list[str], str]:
    """Run a program that ends quickly: the lines that it prints, at least one, or the reason why there are none."""
    try:
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, timeout=_ANSWER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"{shlex.join(words)}: {error}"
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode != 0 or not lines:
        return [], f"{shlex.join(words)} ended with code {done.returncode}{_said(done.stderr)}"
    return lines, ""


def _end_with_parent() -> None:
    """Runs in the tool's process before it starts: the tool is killed when the worker is (Ctrl-C kills workers)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the tool and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _said(output: bytes) -> str:
    # A progress bar rewrites its line: only the last state is of interest.
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].strip() for line in output.decode(errors="replace").split("\n")]
    words = " | ".join([line for line in lines if line][-_LAST_LINES:])
    return f"; it said: {words[-_LAST_CHARACTERS:]}" if words else "; it said nothing"
