"""The contract of a stage: arguments, `check` -> Plan, `Plan.run` -> Result. Nothing heavy is imported here.

    stage = Sample(run=..., data=...)    the arguments, which are also the flags of `segdiff sample`
    plan = stage.check()                 raises InputProblems with every problem; opens files, writes nothing
    plan.cost()                          what --dry-run prints
    result = plan.start()                runs under the stage's lock and with its tracker
    result.say()                         prints the message and the next command; result.exit_code

docs/add_a_stage.md is the how-to.
"""

from __future__ import annotations

import json
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import tyro

from data_shards.problems import Problem, refuse
from segdiff_dist.stages.cost import Cost
from segdiff_dist.stages.flags import parse_flags
from segdiff_dist.stages.resources import announce, disk_problems, unless_forced

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """What one command does, and its arguments: each field is a flag, and the docstring below it is its help text."""

    aliases: ClassVar[Mapping[str, str]] = {}
    """Short flag -> long flag."""
    essential: ClassVar[tuple[str, ...]] = ()
    """The flags that --help shows; --help-all shows all. Empty: all of them are shown."""
    only_reads: ClassVar[bool] = False
    """Whether it takes no lock."""
    less_memory: ClassVar[str] = ""
    """The flags that, lowered, make it need less memory."""
    needs_temporary_files: ClassVar[bool] = True
    on_ranks: ClassVar[bool] = False
    """Whether a launcher starts it once for each GPU."""

    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the settings and the cost of the work, then stop."""

    @abstractmethod
    def check(self) -> Plan:
        """Find every problem and raise all of them as InputProblems. Opens what the work needs once; writes nothing."""

    @classmethod
    def parse(cls, name: str, args: Sequence[str]) -> Self:
        """The stage from the flags of `segdiff NAME`."""
        return parse_flags(cls, args, prog=f"segdiff {name}", aliases=cls.aliases, essential=cls.essential)

    def settings(self) -> str:
        """The resolved settings as YAML, which --dry-run prints first."""
        return ""


class Plan(ABC):
    """A checked stage: the only thing that can run."""

    def cost(self) -> Cost:
        """The cost of the work, as far as it is known before it starts."""
        return Cost()

    def announced(self) -> tuple[str, Cost, Path] | None:
        """Name, cost and output of work that may be long or large; None for other work, whose cost nobody waits for."""
        return None

    def disk_problems(self) -> list[Problem]:
        """Problems if the output does not fit on its disk. Work that is not announced has its own estimate, if any."""
        announced = self.announced()
        return [] if announced is None else disk_problems(*announced[1:])

    def workers_problems(self) -> list[Problem]:
        """Problems if this machine has not the memory for the workers that the user asks for."""
        return []

    def lock(self) -> AbstractContextManager[None]:
        """Held while the stage runs: no other command may write the same files."""
        return nullcontext()

    def tracker(self) -> Tracker:
        """The tracker for `run`; by default one that records nothing."""
        from segdiff_dist.tracking.config import TrackingConfig
        from segdiff_dist.tracking.tracker import Tracker

        return Tracker(Path(), TrackingConfig(enabled=False), "")

    @abstractmethod
    def run(self, tracker: Tracker) -> Result:
        """Do the work. Raises WorkFailed (data_shards.problems) if a part of it fails."""

    def start(self) -> Result:
        """`run`, with the lock and the tracker. Refused if the output does not fit on the disk."""
        refuse(unless_forced(self.workers_problems()))
        if (announced := self.announced()) is not None:
            announce(*announced)
        else:
            refuse(unless_forced(self.disk_problems()))
        with self.lock(), self.tracker() as tracker:
            return self.run(tracker)

    def start_as_step(self) -> Result:
        """`start`, for a stage that runs others: it prints the work that was already done, and leaves the rest to the
        caller."""
        result = self.start()
        if isinstance(self, Done):
            print("\n".join(result.message), flush=True)
        return result


@dataclass(frozen=True)
class Result:
    """The result of a stage. `message` and `warnings` are lines for the user."""

    message: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Lines for the error stream."""
    exit_code: int = 0
    next_command: str | None = None
    """The next command, for the same folder."""
    value: Any = field(default=None, repr=False)
    """The stage's report, for a caller that is a program."""

    def as_json(self) -> str:
        """One line for a program: message, warnings, next command, exit code."""
        return json.dumps(
            {
                "message": self.message,
                "warnings": self.warnings,
                "next_command": self.next_command,
                "exit_code": self.exit_code,
            }
        )

    def say(self) -> None:
        """Print the message, the warnings and the next command."""
        for line in self.message:
            print(line)
        sys.stdout.flush()
        for line in self.warnings:
            print(line, file=sys.stderr)
        if self.next_command is not None:
            print(f"next: {self.next_command}")


@dataclass(frozen=True)
class Done(Plan):
    """The plan of a stage that has nothing left to do."""

    result: Result

    def cost(self) -> Cost:
        """Nothing."""
        return Cost(notes=self.result.message)

    def run(self, tracker: Tracker) -> Result:
        """Say that there is nothing to do."""
        return self.result


def command(stage: str, *arguments: object) -> str:
    """A command as it can be pasted into a shell."""
    return shlex.join(["segdiff", stage, *map(str, arguments)])


def flag(name: str, value: object) -> tuple[object, ...]:
    """(name, value) for `command`; nothing if the value is None."""
    return () if value is None else (name, value)
