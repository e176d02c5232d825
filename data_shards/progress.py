"""The progress of a stage: a bar in a terminal; in a file or a log, a line now and then, without control characters."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

# In the environment: no progress at all (`segdiff COMMAND --quiet`).
QUIET = "SEGDIFF_QUIET"
# Seconds between the lines in a file.
_LINE_EVERY_S = 30.0
_LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}"


def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool = False, **settings: Any) -> Any:
    """tqdm's bar on the error stream, for `iterable` or a `total` and update(); settings are tqdm's."""
    disable = disable or bool(os.environ.get(QUIET))
    if disable or sys.stderr.isatty():
        return _Bar(iterable, disable=disable, **settings)
    in_a_file = {"mininterval": _LINE_EVERY_S, "maxinterval": _LINE_EVERY_S, "bar_format": _LINE}
    return _Bar(iterable, file=_Lines(sys.stderr), **{**settings, **in_a_file})


class _Bar(tqdm):
    """tqdm's bar, which is not drawn any more when Python ends: modules have then lost their globals."""

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            super().__del__()


class _Lines:
    """A stream that gets what tqdm draws as whole lines, not more often than one in _LINE_EVERY_S, and the last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last, self._written_at = stream, "", -_LINE_EVERY_S

    def write(self, text: str) -> None:
        line, now = " ".join(text.replace("\x1b[A", "").split()), time.monotonic()
        is_due = now - self._written_at >= _LINE_EVERY_S or (" 100 %, " in line and " 100 %, " not in self._last)
        if line and is_due:
            self._stream.write(f"{line}\n")
            self._last, self._written_at = line, now

    def flush(self) -> None:
        self._stream.flush()
