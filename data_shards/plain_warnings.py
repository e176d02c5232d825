"""Warnings as one line, `warning: TEXT`. Python's own form begins with a place in the source, of no use to a user."""

from __future__ import annotations

import warnings


def begin() -> None:
    """From now on in this process: for processes that run a command, or work for one."""
    warnings.formatwarning = _line


def _line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
