"""The `segdiff` program: `cli.run`, whose imports take a moment, in which Ctrl-C is one line too."""

from __future__ import annotations

import sys


def run(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        from segdiff_dist import cli
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; nothing was started\n")
        return 130
    return cli.run(argv)
