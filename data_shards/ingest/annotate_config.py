"""The `annotate` section. Imports nothing heavy."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Literal

from data_shards.choices import Modality
from data_shards.fan_out import num_cores
from data_shards.field_source import FROM_A_PERSON
from data_shards.modalities import OF_MR
from data_shards.problems import Problem
from data_shards.ranges import Count, NonNegative, Positive, Some, range_problems
from data_shards.settings import Execution, Result
from data_shards.workers import WorkersConfig

if TYPE_CHECKING:
    from data_shards.ingest.cases import Case

# Its command line since v2 (github.com/wasserth/TotalSegmentator); --ml writes one file with all classes.
TOTALSEGMENTATOR = "TotalSegmentator"
_TOTALSEGMENTATOR_TASK = {"CT": "total", "MR": "total_mr"} | dict.fromkeys(OF_MR, "total_mr")
_TOTALSEGMENTATOR_COMMAND = f"{TOTALSEGMENTATOR} -i {{image}} -o {{mask}} --ml --task {{task}}"
_PLACEHOLDERS = ("image", "mask", "modality", "case_id")


@dataclass(frozen=True)
class AnnotateConfig:
    """The tool that makes the whole-body masks, and the number of volumes at a time."""

    tool: Result[Literal["totalsegmentator", "command"]] = "totalsegmentator"
    """`totalsegmentator` runs the installed TotalSegmentator and maps its classes by name; `command` runs `command`,
    whose masks already have the whole-body table's ids."""
    command: Result[str | None] = field(default=None, metadata=FROM_A_PERSON)
    """The command of tool `command`. {image}, {mask}, {modality} and {case_id} are filled in word by word,
    without a shell."""
    version_command: Result[str | None] = field(default=None, metadata=FROM_A_PERSON)
    """A command that prints the version of the tool. The first line is recorded."""
    modalities: Result[Some[Modality] | None] = None
    """The modalities whose cases are used. null: all."""
    modality: Result[Modality | None] = None
    """The modality of every case of the archive, if dataset.json does not state it, or states it wrongly."""
    num_workers: Execution[Count] = 1
    """Volumes at a time."""
    threads_per_worker: Execution[Count | None] = None
    """CPU threads of each worker. null: this machine's cores, shared among the workers."""
    gpus_per_worker: Execution[NonNegative] = 0.0
    """Share of a GPU that each worker gets. More than 0 spreads the workers over several GPUs."""
    timeout_s: Execution[Positive | None] = None
    """Longest time for one volume. null: no limit."""
    ray_address: Execution[str | None] = field(default=None, metadata=FROM_A_PERSON)
    """A Ray cluster to join. local: Ray on this machine. null: the same, but for small jobs plain processes."""

    @property
    def workers(self) -> WorkersConfig:
        """The workers. Threads: this machine's cores, shared among the workers."""
        threads = self.threads_per_worker or max(1, num_cores() // self.num_workers)
        return WorkersConfig("annotate", self.num_workers, threads, ray_address=self.ray_address)

    def problems(self, where: str = "annotate") -> list[Problem]:
        """Everything out of range, each with a remedy; empty if the config can be used."""
        problems = range_problems(self, where)

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                problems.append(Problem(where, name, repr(getattr(self, name)), remedy))

        if self.tool == "command":
            remedy = "give the command that makes a mask, as 'mytool --in {image} --out {mask}'"
            check("command", self.command is not None, remedy)
        else:
            for name in ("command", "version_command"):
                check(name, getattr(self, name) is None, "leave it out, or use tool command")
        if self.command is not None:
            problems += _template_problems(where, "command", self.command, _PLACEHOLDERS, ("image", "mask"))
        if self.version_command is not None:
            problems += _template_problems(where, "version_command", self.version_command, (), ())
        return problems

    def words(self, case: Case, mask: Path) -> list[str]:
        """The command that makes `mask` of a case."""
        values = {"image": case.image, "mask": mask, "modality": case.modality, "case_id": case.case_id}
        values["task"] = task_of(case.modality) or ""
        return [word.format(**values) for word in shlex.split(self.template)]

    @property
    def template(self) -> str:
        """The command of one volume, with placeholders."""
        return self.command if self.command is not None else _TOTALSEGMENTATOR_COMMAND


def task_of(modality: str) -> str | None:
    """TotalSegmentator's task for images of a modality; None if it has none."""
    return _TOTALSEGMENTATOR_TASK.get(modality)


def _template_problems(
    where: str, name: str, template: str, allowed: Collection[str], needed: Collection[str]
) -> Iterator[Problem]:
    try:
        words = shlex.split(template)
        fields = {field for word in words for _, field, _, _ in Formatter().parse(word) if field is not None}
    except ValueError as error:
        yield Problem(where, name, repr(template), f"correct its quotes or braces ({error})")
        return
    if not words:
        yield Problem(where, name, repr(template), "give a command")
    for other in sorted(fields - set(allowed)):
        known = f"use {', '.join(f'{{{one}}}' for one in allowed)}" if allowed else "none can be used here"
        yield Problem(where, name, f"placeholder {{{other}}}", f"{known}; {{{{ and }}}} stand for braces")
    for other in sorted(set(needed) - fields):
        yield Problem(where, name, repr(template), f"say where it takes {{{other}}}")
