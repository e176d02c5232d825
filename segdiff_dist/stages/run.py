"""Every stage from your volumes to a report and a synthetic data set, in the hours given; resumes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.documents import shown
from data_shards.problems import Problem, problem, refuse
from segdiff_dist.config import as_dict, flatten, read_yaml
from segdiff_dist.shipped import find_config
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.budgeted import MADE_FOR, PLAN, Budgeted, Planned, locked_folder
from segdiff_dist.stages.chain import Step, evaluate_once, in_a_row, stage_of, times_line
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.stages.cost import Cost
from segdiff_dist.stages.export import Export
from segdiff_dist.stages.prepare import Prepare
from segdiff_dist.stages.report import Report
from segdiff_dist.stages.sample import Sample
from segdiff_dist.stages.train import Train
from segdiff_dist.stages.train_segmenter import TrainSegmenter

if TYPE_CHECKING:
    from segdiff_dist.experiment import Experiment
    from segdiff_dist.tracking.tracker import Tracker

# `evaluate` draws the page itself.
_REPORT_FORMATS = "csv"


@dataclass(frozen=True, kw_only=True)
class Run(Budgeted):
    """Train a model on DATA, measure its images, and write a report and a synthetic data set, in the hours given. The
    plan chooses every setting that you do not give, also where a default is printed here. `segdiff plan` writes the
    plan and stops; a plan that is there is used as it is. The same command again does what is missing."""

    def check(self) -> RunPlan:
        """Reads the plan that is there, or makes one."""
        there = self._plan_there()
        if there is None:
            return RunPlan(self, self.folder, self.planned(), is_new=True)
        planned = Planned.read(there)
        refuse([*self._of_other_folders(there, planned), *self._contradictions(there, planned)])
        return RunPlan(self, planned.experiment.path("data").parent, planned, is_new=False)

    def _of_other_folders(self, there: Path, planned: Planned) -> Iterator[Problem]:
        """Problems if the plan is not for DATA, or does not write to the folder."""
        data = planned.experiment.path("amos_root")
        if self.amos_root is not None and self.amos_root.resolve() != data.resolve():
            value = f"{self.amos_root}, and {there} is the plan for {data}"
            yield Problem("command line", "DATA", value, "give another --out")
        is_in_folder = self.out is not None or there != self._given_plan
        if is_in_folder and self.folder.resolve() not in planned.folders:
            value = f"{self.folder}, and {there} is the plan for {planned.folders[0]}"
            remedy = "correct the paths data, run and exported in it, or give another --out"
            yield Problem("command line", "--out", value, remedy)

    def _contradictions(self, there: Path, planned: Planned) -> list[Problem]:
        """Problems of flags and of values of --config that are not those of the plan, which is used as it is."""
        of_plan, given = flatten(as_dict(planned.experiment)), flatten(as_dict(self.experiment))
        if planned.hours is not None:  # an old plan does not say for what it was made
            of_plan |= {key: getattr(planned, key) for key in MADE_FOR}
            given |= {key: getattr(self, key) for key in MADE_FOR}
        in_file = () if self._given_plan else flatten(self.configured())
        places = {key: (str(self.config), key) for key in in_file}
        places |= {key: ("command line", f"--{key.replace('_', '-')}") for key in self.typed}
        go_on, plan_again = f"leave it out to go on by {there}", "or remove it or give another --out for a new plan"
        return [
            Problem(
                *place,
                f"{shown(given.get(key))}, and {shown(of_plan.get(key))} in the plan",
                f"{go_on}, {plan_again}" if key in MADE_FOR else f"{go_on}, change that file, {plan_again}",
            )
            for key, place in places.items()
            if given.get(key) != of_plan.get(key)
        ]

    @property
    def _given_plan(self) -> Path | None:
        """--config, if it is a plan."""
        config = None if self.config is None else find_config(self.config)
        return config if config is not None and "exported" in read_yaml(config) else None

    def _plan_there(self) -> Path | None:
        """--config if it is a plan, else that of --out or of the folder."""
        if (given := self._given_plan) is not None:
            return given
        return next((file for file in (self.file, self.folder / PLAN) if file.is_file()), None)


@dataclass(frozen=True)
class RunPlan(Plan):
    """The stages in a row."""

    stage: Run
    folder: Path
    planned: Planned
    is_new: bool

    def cost(self) -> Cost:
        """The table of a new plan."""
        return Cost(notes=self.planned.lines or (self.used,))

    @property
    def used(self) -> str:
        """Which plan is used, for one that was there."""
        is_said = self.planned.hours is not None or not set(MADE_FOR) & set(self.stage.typed)
        return f"by the plan in {self.folder}{'' if is_said else '; --hours and --recipe count for a new plan'}"

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the folder; each stage also takes its own."""
        return locked_folder(self.folder)

    def run(self, tracker: Tracker) -> Result:
        """Run every stage; the result is where report and data set are."""
        from data_shards.fan_out import ray_session

        planned, experiment = self.planned, self.planned.experiment
        if self.is_new and (self.folder / PLAN).exists():
            raise problem(self.folder / PLAN, "plan", "made by another command as this one began", "start it again")
        print(*(planned.lines or (self.used,)), sep="\n", flush=True)
        if self.is_new:
            planned.write(self.folder / PLAN, command("run", experiment.amos_root, "--hours", f"{self.stage.hours:g}"))
        times_s: dict[str, float] = {}
        exit_code = 0
        with ray_session(experiment.prepare.ray_address):
            for title, result, seconds in in_a_row(self._steps()):
                times_s[title] = seconds
                if result is not None:
                    print("\n".join((*result.message, *result.warnings)), flush=True)
                    exit_code = max(exit_code, result.exit_code)
        run, model = experiment.path("run"), self.folder / "model"
        lines = (
            f"\n{times_line(times_s)}",
            f"report: {(run / 'evaluation' / 'report.html').resolve()}",
            f"synthetic data set ({experiment.export.format}): {planned.exported.resolve()}",
        )
        after = None if model.exists() else command("export", model, "--run", run, "--format", "pipeline")
        return Result(lines, exit_code=exit_code, next_command=after, value=planned)

    def _steps(self) -> list[Step]:
        experiment = self.planned.experiment
        trained = (("train-segmenter", TrainSegmenter), ("train", Train), ("sample", Sample))
        return [
            ("prepare", partial(_start, Prepare, experiment)),
            *((name, partial(_start, kind, experiment)) for name, kind in trained),
            ("evaluate", partial(evaluate_once, experiment)),
            ("report", self._report),
            ("export", self._export),
        ]

    def _report(self) -> Result:
        experiment = self.planned.experiment
        return Report(runs=(experiment.path("run"),), format=_REPORT_FORMATS, experiment=experiment).check().start()

    def _export(self) -> Result | None:
        planned = self.planned
        if planned.exported.exists():
            print(f"export: {planned.exported} is there already; nothing to do")
            return None
        stage = replace(Export.of(planned.experiment), exported=planned.exported, run=planned.experiment.path("run"))
        return stage.check().start()


def _start(kind: type[ConfiguredStage], experiment: Experiment) -> Result:
    return stage_of(kind, experiment).check().start()
