"""A folder of volumes and some hours: what `plan` and `run` share."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import tyro

from data_shards.files import write_atomic
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.locks import locked
from data_shards.problems import Problem, problem, refuse
from segdiff_dist.config import as_dict, flatten, merge, read_yaml, to_yaml, validate
from segdiff_dist.experiment import Experiment, load_experiment, value_of
from segdiff_dist.shipped import find_config, shipped_names
from segdiff_dist.stages.base import command
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.stages.cost import duration, size
from segdiff_dist.stages.resources import free_bytes, unless_forced
from segdiff_dist.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from segdiff_dist.budget.choose import Machine
    from segdiff_dist.budget.rows import Row

PLAN = "run.yaml"
_YAML = (".yaml", ".yml")
_FLAG = re.compile(r"--((?:prepare|tracking)\.[\w.-]+|hours\b|recipe\b)")
# Arguments that a plan is made for. They and the places of its work are not kept for another plan.
MADE_FOR = ("hours", "recipe")
_OF_ONE_PLAN = ("amos_root", "data", "run", "exported", *MADE_FOR)
_MOST_HOURS = 24 * 90
_TITLES = ("stage", "what", "time", "memory", "disk")


@dataclass(frozen=True, kw_only=True)
class Budgeted(ConfiguredStage):
    """A data set and the hours for it."""

    writes: ClassVar = ("data", "run")
    essential: ClassVar = (
        *("--hours", "--out", "--recipe", "--config", "--prepare.modality", "--prepare.labels", "--prepare.patient"),
        *("--prepare.size", "--prepare.axes", "--prepare.layout", "--prepare.channel"),
    )

    amos_root: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """Your data: a folder of volumes and their label files, as nnU-Net, AMOS, MSD or TotalSegmentator have them, as
    DICOM, or in images/ and labels/."""
    hours: float = 8.0
    """The hours that all stages together may take on this machine: above 0."""
    out: Path | None = None
    """The folder for everything: the plan (run.yaml), the slices, the run folder, the synthetic data set. null:
    runs/NAME, with DATA's name."""
    recipe: str | None = None
    """The shipped configuration to begin with: best_ct_mr, starter, amos_small or another. null: the best one that fits
    into machine and hours. Values of --config are kept in any case."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    typed: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """The keys of the flags that were typed: their values are kept."""

    @classmethod
    def parse(cls, name: str, args: Sequence[str]) -> Self:
        """Also notes which flags were typed."""
        stage = super().parse(name, args)
        found = (match[1] for arg in args if (match := _FLAG.match(arg)))
        keys = (key.replace("-", "_").replace(".no_", ".") for key in found)
        return replace(stage, typed=tuple(dict.fromkeys(keys)))

    def settings(self) -> str:
        """None before the plan is made."""
        return ""

    @property
    def folder(self) -> Path:
        """The folder of everything that the plan makes."""
        if self.out is None:
            return Path("runs") / self.path("amos_root").resolve().name
        return self.out.with_suffix("") if self.out.suffix in _YAML else self.out

    @property
    def file(self) -> Path:
        """The file of the plan."""
        return self.out if self.out is not None and self.out.suffix in _YAML else self.folder / PLAN

    def kept(self) -> dict[str, Any]:
        """The values that are not chosen: of --config, and of flags."""
        values = self.configured()
        for key in (key for key in self.typed if key not in _OF_ONE_PLAN):
            nested: Any = value_of(self.experiment, key)
            for part in reversed(key.split(".")):
                nested = {part: nested}
            values = merge(values, nested)
        return values

    def configured(self) -> dict[str, Any]:
        """The values of --config that a plan keeps."""
        values = {} if self.config is None else read_yaml(find_config(self.config))
        return {key: value for key, value in values.items() if key not in _OF_ONE_PLAN}

    def problems(self) -> list[Problem]:
        """Problems of the flags."""
        problems = self.experiment.sample.seed_problems()
        if not (math.isfinite(self.hours) and 0 < self.hours <= _MOST_HOURS):
            remedy = f"give a number above 0, at most {_MOST_HOURS}"
            problems.append(Problem("command line", "--hours", f"{self.hours:g}", remedy))
        if self.recipe is not None and self.recipe not in shipped_names():
            problems.append(
                Problem("command line", "--recipe", self.recipe, f"give one of {', '.join(shipped_names())}")
            )
        if self.out is not None and self.folder.exists() and not self.folder.is_dir():
            problems.append(Problem(str(self.out), "--out", "not a folder", "give another path"))
        return problems

    def planned(self) -> Planned:
        """Look at data and machine, and choose."""
        from data_shards.ingest.prepare import check
        from segdiff_dist.budget.choose import BudgetRequest, Machine, choose
        from segdiff_dist.budget.data_set import NNUNET, DataSet
        from segdiff_dist.budget.rows import rows_of

        refuse(self.problems())
        data, folder = self.path("amos_root").resolve(), self.folder.resolve()
        paths = {"amos_root": str(data), "data": str(folder / "shards"), "run": str(folder / "run")}
        data_set = DataSet.of(check(data, Path(paths["data"]), self.prepare, self.experiment.wholebody))
        kept = self.kept()
        if self.experiment.wholebody is None:
            refuse(data_set.split_problems(flatten(kept).get("sample.split")))
        machine = Machine.here(free_bytes(folder))
        candidate, experiment = choose(BudgetRequest(data_set, machine, self.hours, paths, kept, self.recipe))
        rows = rows_of(candidate, experiment)
        refuse(unless_forced(_disk_problems(folder, rows, machine.free_bytes)))
        is_nnunet = experiment.export.format == NNUNET
        exported = folder / ("Dataset900_Synthetic" if is_nnunet else f"synthetic-{experiment.export.format}")
        return Planned(
            experiment,
            exported,
            self.hours,
            (data_set.described, _machine_line(machine), f"recipe: {candidate.recipe}", *table_lines(rows)),
            recipe=candidate.recipe,
            seconds=sum(row.seconds for row in rows),
            num_bytes=sum(row.num_bytes for row in rows),
        )


@dataclass(frozen=True)
class Planned:
    """A configuration for everything. `lines`: what was recognised, and the table; none for a plan from a file.
    `hours`, `recipe`: what it was made for; None and empty in an old file, which does not say."""

    experiment: Experiment
    exported: Path
    hours: float | None
    lines: tuple[str, ...] = ()
    recipe: str = ""
    seconds: float = 0.0
    num_bytes: int = 0

    @classmethod
    def read(cls, file: Path) -> Planned:
        """One that was written."""
        arguments: dict[str, Any] = {}
        experiment = load_experiment(file, None, arguments=arguments)
        if not isinstance(arguments.get("exported"), str) or experiment.amos_root is None:
            raise problem(file, "exported", "missing", f"it is no plan: write it again by {command('plan', '--help')}")
        made_for = validate(_MadeFor, {key: arguments.get(key) for key in MADE_FOR}, file)
        return cls(experiment, Path(arguments["exported"]), made_for.hours, recipe=made_for.recipe or "")

    @property
    def folders(self) -> list[Path]:
        """The folders that everything is written to."""
        experiment = self.experiment
        paths = (experiment.path("data"), experiment.path("run"), self.exported)
        return [path.resolve().parent for path in paths]

    def write(self, file: Path, by: str) -> None:
        """As a configuration that every stage takes. `by`: the command that made it."""
        made = {key: getattr(self, key) for key in MADE_FOR}
        values = as_dict(self.experiment) | made | {"exported": str(self.exported)}
        file.parent.mkdir(parents=True, exist_ok=True)
        head = (
            f"# {by}\n# Every command takes this file by --config. Other hours, or another recipe, need a new plan.\n"
        )
        write_atomic(file, head + to_yaml(values))


@dataclass(frozen=True)
class _MadeFor:
    """What a plan was made for, for checking a file."""

    hours: float | None
    recipe: str | None


def locked_folder(folder: Path) -> AbstractContextManager[None]:
    """The lock of the folder of everything."""
    return locked(folder / ".run.lock", folder, "is running there")


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Aligned columns, and the sums."""
    total = ("in all", "", duration(sum(row.seconds for row in rows)), "", size(sum(row.num_bytes for row in rows)))
    cells = [
        _TITLES,
        *((row.stage, row.what, duration(row.seconds), size(row.memory_bytes), size(row.num_bytes)) for row in rows),
        total,
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_TITLES))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _machine_line(machine: Machine) -> str:
    host, gpu = machine.capacity.host, machine.capacity.gpu
    parts = [f"{machine.cores} cores"]
    parts += [] if host is None else [f"{size(host.available)} of memory free"]
    parts += ["no GPU"] if gpu is None else [f"a GPU with {size(gpu.available)} free"]
    return f"machine: {', '.join(parts)}, {size(machine.free_bytes)} of disk free"


def _disk_problems(folder: Path, rows: Sequence[Row], free: int) -> list[Problem]:
    needed = sum(row.num_bytes for row in rows)
    if needed <= free:
        return []
    remedy = "make room, give --out on another disk, or smaller slices: --prepare.size N, --prepare.slice-stride N"
    return [Problem(str(folder), "disk", f"needs up to {size(needed)}, and {size(free)} are free", remedy)]
