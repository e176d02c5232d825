"""The `segdiff` program: `cli.run`, whose imports take a moment, in which it can be ended in order too."""

from __future__ import annotations

import sys

from data_shards.end_signals import CONTINUES, ended_by_signals, ending, last_line


def run(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    then = "nothing was started"
    try:
        with ended_by_signals():
            from segdiff_dist import cli

            then = CONTINUES
            return cli.run(argv)
    except KeyboardInterrupt:
        sys.stderr.write(last_line(then))
        return ending()[1]
