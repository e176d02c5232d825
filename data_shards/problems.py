"""Problems that the user can correct, collected so that all of them are reported at once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Remedies for errors of the operating system.
_REMEDIES = {
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable for you, or choose another place"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY), "choose another path"),
    errno.ENOENT: "restore it, or give another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: give the path itself",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open: raise the limit (ulimit -n)"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.EREMOTEIO), "the disk or its server fails: see to it first"),
    errno.ENOMEM: "free memory first",
}


@dataclass(frozen=True)
class Problem:
    """One problem of the input: file, field, value and remedy."""

    where: str
    field: str
    value: str
    remedy: str

    def __str__(self) -> str:
        # A value of 10 MB is not printed whole.
        field, value = _without_middle(self.field, 200), _without_middle(self.value, 1000)
        text = f"{_without_middle(self.where, 1000)}: {field}: {value}; {_without_middle(self.remedy, 1000)}"
        return printable(text)


def printable(text: str) -> str:
    """The text on one line: a path may have line breaks, a terminal's control characters, and bytes that are not UTF-8.
    They are written as Python's escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _without_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-(most // 3 - 5) :]}"


class InputProblems(ValueError):
    """Input refused before work starts. The command line prints each problem and exits with 2."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems, "InputProblems needs at least one problem"
        super().__init__("\n".join(str(p) for p in self.problems))

    def __reduce__(self) -> tuple[type[InputProblems], tuple[tuple[Problem, ...]]]:
        return InputProblems, (self.problems,)


def refuse(problems: Iterable[Problem]) -> None:
    """Raise InputProblems when there is at least one problem."""
    found = tuple(problems)
    if found:
        raise InputProblems(found)


def problem(where: object, field: str, value: object, remedy: str) -> InputProblems:
    """A single problem as an exception."""
    return InputProblems([Problem(str(where), field, str(value), remedy)])


class Attempts:
    """Steps that may each raise InputProblems. Their problems are collected, their results kept by name."""

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        self.problems = list(problems)
        self.results: dict[str, Any] = {}

    def make(self, name: str, step: Callable[[], Any]) -> None:
        """Do the step. A step that is refused has no result."""
        try:
            self.results[name] = step()
        except InputProblems as error:
            self.problems.extend(error.problems)


class WorkFailed(RuntimeError):
    """Some of the work could not be done; the rest is kept. The command line prints it and exits with its code."""

    exit_code = 1


class OutOfSpace(WorkFailed):
    """The disk is full, or a quota is reached. No half-written file counts as complete; the same command continues."""

    def __init__(self, folder: object, reason: str) -> None:
        super().__init__(f"{folder}: no space left ({reason}); make room and start the same command again")


@contextmanager
def explain_full_disk(folder: object) -> Iterator[None]:
    """Turn the error of a full disk into OutOfSpace, also if a library has changed its type."""
    try:
        yield
    except (InputProblems, OutOfSpace):
        raise
    except Exception as error:
        if out_of_space(error) if isinstance(error, OSError) and error.errno else is_about_full_disk(str(error)):
            raise OutOfSpace(folder, " ".join(str(error).split())[:300]) from error
        raise


@contextmanager
def removed_on_failure(path: Path) -> Iterator[Path]:
    """Leave no half-written output: a file or folder of this name is removed if the block fails."""
    try:
        yield path
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        raise


class ShardFailed(WorkFailed):
    """A shard could not be written; the finished ones are kept, and the same command continues."""


class DamagedSample(WorkFailed, ValueError):
    """The bytes of a sample are not those that were written, or not what the set's index says."""


def out_of_space(error: OSError) -> bool:
    """Whether an OSError means that the disk is full, not only that one file cannot be written."""
    return error.errno in _FULL


def is_about_full_disk(text: str) -> bool:
    """The same for the message of an error from another process."""
    return any(os.strerror(code) in text for code in _FULL)


def describe(error: OSError) -> str:
    """One line for the user about an unexpected error: path, reason and remedy."""
    if error.args and isinstance(error.args[0], list) and error.args[0]:  # shutil.Error: (from, to, why) of each file
        _, path, reason = error.args[0][0]
        return printable(f"{path}: {' '.join(str(reason).split())}; put that right and start the same command again")
    paths = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if out_of_space(error):
        return printable(str(OutOfSpace(paths[-1] if paths else "disk", reason)))
    remedy = _REMEDIES.get(error.errno or 0, "put that right and start the same command again")
    return printable(f"{': '.join([*paths[-1:], reason])}; {remedy}")
