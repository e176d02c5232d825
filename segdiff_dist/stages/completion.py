"""Shell completion: every command and flag, as a script that tyro writes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from data_shards.problems import problem
from segdiff_dist import stages

SHELLS = ("bash", "zsh", "tcsh")


def print_completion(args: Sequence[str]) -> None:
    """Print the script for the shell that `args` names."""
    if tuple(args[:1]) not in {(shell,) for shell in SHELLS}:
        raise problem("command line", "shell", " ".join(args) or "not given", f"name one of {', '.join(SHELLS)}")
    commands: Any = functools.reduce(
        operator.or_, (Annotated[stages.load(name), tyro.conf.subcommand(name)] for name in stages.NAMES)
    )
    try:
        tyro.cli(commands, prog="segdiff", args=["--tyro-print-completion", args[0]])
    except SystemExit as end:
        if end.code:
            raise
