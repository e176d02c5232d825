"""Scripts run with the code of another checkout or commit, so that both are measured in turns in one run."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.harness import Contender, compare, measure, report

# Turns of the same code differ by this much on a machine that others use too; each run measures it (`again`).
_AS_FAST = 0.97
HERE = Path(__file__).resolve().parents[2]


def revision(checkout: Path) -> str:
    """The short name of the commit that is checked out."""
    return _git(checkout, "rev-parse", "--short", "HEAD")


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the code of a commit of this repository, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="bench-commit-") as folder:
        checkout = Path(folder) / "code"
        _git(HERE, "worktree", "add", "--detach", str(checkout), commit)
        try:
            yield checkout
        finally:
            _git(HERE, "worktree", "remove", "--force", str(checkout))


def numbers_of(script: Path, checkout: Path, *words: object) -> list[float]:
    """The numbers in the last line that a script prints, in a process that imports segdiff from `checkout`."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    line = [sys.executable, str(script), *map(str, words)]
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


@contextmanager
def answers_of(script: Path, checkout: Path, *words: object) -> Iterator[Callable[[object], float]]:
    """A process of a script that imports segdiff from `checkout`: a call sends it a line and returns its answer."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    line = [sys.executable, str(script), *map(str, words)]
    with subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def ask(question: object) -> float:
            print(question, file=asked, flush=True)
            return float(answers.readline())

        yield ask


def against(args: argparse.Namespace, words: Sequence[object], *, unit: str) -> None:
    """Rates of this code and of that of the commit args.against, and their ratio; `words`: for data_once.py."""
    script = Path(__file__).with_name("data_once.py")

    def turns(checkout: Path) -> Contender:
        def turn() -> tuple[float, float]:
            units, seconds = numbers_of(script, checkout, *words)
            return units, seconds

        return turn

    with checked_out(args.against) as other:
        names = {"this code": HERE, f"code of {revision(other)}": other, "this code, again": HERE}
        rates = measure({name: turns(of) for name, of in names.items()}, 1 if args.quick else args.rounds)
    ours, theirs, again = names
    report(args, rates, [compare(rates, ours, theirs, _AS_FAST), compare(rates, again, ours)], unit=unit)


def _git(folder: Path, *words: str) -> str:
    command = ("git", "-C", str(folder), *words)
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    ).stdout.strip()
