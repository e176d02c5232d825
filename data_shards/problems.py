"""What a person can put right, collected so that all of it is said at once."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input: where, which field, what was found and what to do about it."""

    where: str
    field: str
    value: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.value}; {self.remedy}"


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
    """A single problem, ready to raise."""
    return InputProblems([Problem(str(where), field, str(value), remedy)])


class OutOfSpace(RuntimeError):
    """The disk is full, or a quota is reached. Nothing half-written is taken for whole; the same command goes on."""

    def __init__(self, folder: object, reason: str) -> None:
        super().__init__(f"{folder}: no space left ({reason}); make room and start the same command again")


@contextmanager
def saying_when_full(folder: object) -> Iterator[None]:
    """Turn the error of a full disk into OutOfSpace."""
    try:
        yield
    except OSError as error:
        if out_of_space(error):
            raise OutOfSpace(folder, str(error)) from error
        raise


class ShardFailed(RuntimeError):
    """A shard could not be written; the finished ones are kept, and the same command goes on."""


def out_of_space(error: OSError) -> bool:
    """Whether an OSError says that no more can be written, as opposed to a file that cannot be."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
