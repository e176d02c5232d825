"""Imports of libraries without those of their dependencies that this project never calls.

MONAI imports MLflow, pandas, matplotlib and half of SciPy for parts other than its networks and losses; DeepSpeed
imports MLflow for its autotuner; diffusers imports torch's compiler for its caches; webdataset imports torch. Without
these a worker that segments is ready after 4 s of processor time instead of 10, a rank that trains after 8 instead of
10 to 13, a worker that samples after 2 instead of 4.5, and a worker that prepares after 1 instead of 2.5. Each of these
libraries treats a missing dependency as an optional one.

Python's garbage collector rests during these imports, and at the process's end: it would look through all objects of
these libraries for garbage, in which there is none. That saves 1 s of the 3.6 that a worker needs to start and end.

Only processes that run a command of this project, or work for one, do this. In a program that uses this project as a
library, MONAI's imports stay unchanged.
"""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_SWITCH = "SEGDIFF_LEAN_IMPORTS"


def begin() -> None:
    """Switch this on for this process and its children. SEGDIFF_LEAN_IMPORTS=0 in the environment forbids it."""
    os.environ.setdefault(_SWITCH, "1")
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


def are_on() -> bool:
    """Whether this is switched on in this process."""
    return os.environ.get(_SWITCH) == "1"


@contextmanager
def uncollected() -> Iterator[None]:
    """A context in which no garbage is collected, for imports: what they make stays. Does nothing if this is not
    switched on."""
    rests = are_on() and gc.isenabled()
    if rests:
        gc.disable()
    try:
        yield
    finally:
        if rests:
            gc.enable()


@contextmanager
def without(*libraries: str) -> Iterator[None]:
    """A context in which imports of this thread do not find these libraries or modules, unless they are already loaded.

    Other threads find them. Does nothing if it is not switched on.
    """
    if not are_on():
        yield
        return
    finder = _Missing(libraries, threading.get_ident())
    sys.meta_path.insert(0, finder)
    try:
        with uncollected():
            yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def without_package_map() -> Iterator[None]:
    """A context in which importlib.metadata does not read the files of every installed package to find out which
    package a module is from: 0.6 s of processor time. Does nothing if this is not switched on.
    """
    if not are_on():
        yield
        return
    search = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = dict
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = search


def keep_pyarrow_from_pandas() -> None:
    """Let pyarrow look for pandas now, where it does not find it, and not again when it converts its first array.

    That import takes 0.3 s of processor time in every process that opens a shard set. to_pandas works all the same.
    """
    if are_on():
        import pyarrow

        with without("pandas"):
            pyarrow.array([0])


class _Missing(MetaPathFinder):
    """An import finder that reports some libraries as not installed, for one thread."""

    def __init__(self, libraries: Sequence[str], thread: int) -> None:
        self._libraries, self._thread = frozenset(libraries), thread

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_left_out = fullname in self._libraries or fullname.partition(".")[0] in self._libraries
        if is_left_out and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{fullname} is left out here", name=fullname)
        return None
