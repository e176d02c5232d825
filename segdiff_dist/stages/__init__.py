"""One file a command: its arguments, its check, its work, and its messages. base.py has the contract.

`segdiff --help` shows a file's docstring. docs/add_a_stage.md says how to add a command.
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segdiff_dist.stages.base import Plan, Stage

__all__ = ["GROUPS", "NAMES", "Plan", "Stage", "load", "summary"]

# In the order of the help text: what a newcomer needs first; then the order the data goes.
GROUPS = {
    "to begin with": ("doctor", "demo", "studio", "paint"),
    "your own data in one line": ("plan", "run"),
    "stage by stage, in the order the data goes": (
        *("phantom", "annotate", "prepare", "inspect", "convert", "train-segmenter", "train-autoencoder", "train"),
        *("average", "distil", "sample", "evaluate", "report", "export"),
    ),
    "further": ("volume", "serve", "track", "reproduce"),
}
NAMES = tuple(name for names in GROUPS.values() for name in names)


def load(name: str) -> type[Stage]:
    """The class of a command. Imports its module, and with it torch and whatever else the command needs."""
    from segdiff_dist.stages.base import Stage

    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    [stage] = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Stage) and value.__module__ == module.__name__
    ]
    return stage


def summary(name: str) -> str:
    """A command's description in one line; read without importing its module, so that help needs no torch."""
    source = files(__name__).joinpath(f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
