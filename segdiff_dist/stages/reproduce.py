"""Table 1 of the paper: its four models, from the AMOS data to the table, beside the published values.

Prepare, train the segmenter, then train, sample and evaluate each column, and write the page. Every step is a stage:
finished steps are skipped, interrupted ones continue.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_shards.fan_out import ray_session
from data_shards.files import write_atomic
from data_shards.locks import FOLDER_LOCK, locked
from data_shards.problems import Problem, WorkFailed, problem, refuse
from data_shards.wording import in_words
from segdiff_dist.config import as_dict, to_yaml
from segdiff_dist.evaluation.measure.result_files import read_summary
from segdiff_dist.experiment import Experiment, collect
from segdiff_dist.reproduce import plan, table
from segdiff_dist.reproduce.settings import Experiments, Table1Settings, patients, resolve, sampled_splits
from segdiff_dist.stages.base import Plan, Result, Stage
from segdiff_dist.stages.chain import evaluate_once, run_stage
from segdiff_dist.stages.cost import Cost
from segdiff_dist.stages.prepare import Prepare
from segdiff_dist.stages.sample import Sample
from segdiff_dist.stages.train import Train
from segdiff_dist.stages.train_segmenter import TrainSegmenter
from segdiff_dist.tracking.tracker import Tracker


class StepFailed(WorkFailed):
    """A step on several ranks failed; it printed the reason."""


@dataclass(frozen=True, kw_only=True)
class Reproduce(Stage):
    """A published table made again, end to end. The same command again goes on."""

    table1: Annotated[Table1Settings, tyro.conf.arg(name="")]

    def check(self) -> ReproducePlan:
        """Check everything that can be known before the first step; each stage checks its step again."""
        settings = self.table1
        experiments = resolve(settings)
        _, preparation = collect(
            lambda: refuse(_problems(experiments)),
            lambda: Prepare.of(experiments.prepare).over(experiments.prepare).check(),
        )
        return ReproducePlan(settings, experiments.sampled_from(sampled_splits(settings, experiments)), preparation)


@dataclass(frozen=True)
class ReproducePlan(Plan):
    """The experiments of the table's columns, and the checked first step."""

    settings: Table1Settings
    experiments: Experiments
    preparation: Plan

    def cost(self) -> Cost:
        """A line a step, predicted for the GPUs that the settings name."""
        return Cost(notes=tuple(plan.describe(plan.steps(self.settings, self.experiments), self.settings).split("\n")))

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the table's folder."""
        return locked(self.settings.out / FOLDER_LOCK, self.settings.out, "is making this table")

    def run(self, tracker: Tracker) -> Result:
        """Run every step that is not done, and write the table."""
        from segdiff_dist.training.loop import TrainingStopped

        settings, experiments = self.settings, self.experiments
        _check_gpus(settings.gpus)
        steps = list(self._steps())
        with ray_session(experiments.prepare.prepare.ray_address):
            for number, (what, step) in enumerate(steps, 1):
                print(f"\n[{number}/{len(steps)}] {what}", flush=True)
                start = time.perf_counter()
                try:
                    step()
                except TrainingStopped as error:
                    raise StepFailed(str(error)) from error
                print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
        measured = [
            table.Measured(name, experiments.recipes[name], column, read_summary(column.path("run")))
            for name, column in experiments.columns.items()
        ]
        made = table.build(measured, patients(settings.amos))
        table.write(settings.out, made)
        lines = (f"\n{table.comparability(made)}", f"table: {(settings.out / 'table1.html').resolve()}")
        return Result(lines, value=made)

    def _steps(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        experiments, gpus = self.experiments, self.settings.gpus
        yield "prepare", partial(_prepare, self.preparation, experiments.prepare)
        yield "train-segmenter", partial(_train, "train-segmenter", experiments.segmenter, gpus)
        for name, column in experiments.columns.items():
            title = table.TITLES[name]
            yield f"{title}: train", partial(_train, "train", column, gpus)
            yield f"{title}: sample", partial(run_stage, Sample, column)
            yield f"{title}: evaluate", partial(evaluate_once, column)


def _check_gpus(gpus: int) -> None:
    import torch

    if torch.cuda.is_available() and gpus > torch.cuda.device_count():
        raise problem(
            "command line", "gpus", gpus, f"this machine has {torch.cuda.device_count()}; --dry-run takes any"
        )


def _problems(experiments: Experiments) -> list[Problem]:
    """The segmenter is not trained yet, but problems of the other settings should be reported now."""
    evaluations = [replace(column.evaluate, segmenter=None, device="auto") for column in experiments.columns.values()]
    # A problem that several columns share is reported once.
    return list(dict.fromkeys(found for evaluation in evaluations for found in evaluation.problems()))


def _prepare(preparation: Plan, experiment: Experiment) -> None:
    report = preparation.start().value
    done = "; it was finished already, nothing to do" if report.skipped_done else ""
    print(f"{in_words(report.num_samples, 'slice')} of {in_words(report.num_cases, 'volume')}{done}")
    for case_id, file, reason in report.failed:
        print(f"left out: {case_id}: {file}: {reason}")
    if not report.num_cases:
        raise problem(experiment.given("amos_root"), "volumes", "none could be read", "see above")


def _train(command: str, experiment: Experiment, ranks: int) -> None:
    """The stage in this process, or on `ranks` ranks of this machine, each of which runs `segdiff COMMAND`."""
    if ranks == 1:
        run_stage(TrainSegmenter if command == "train-segmenter" else Train, experiment)
        return
    run = experiment.path("run")
    # Beside the run folder, whose own config.yaml records what the stage was started with. It names the run, too.
    config = run.with_name(f"{run.name}.yaml")
    write_atomic(config, to_yaml(as_dict(experiment)))
    # -P: so that no module of the current folder replaces one of torch or of this project.
    launcher = ["-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    segdiff = str(Path(sys.executable).with_name("segdiff"))
    ended = subprocess.run([sys.executable, *launcher, segdiff, command, "--config", str(config)], check=False)
    if ended.returncode:
        raise StepFailed(f"{command} of {run} on {ranks} ranks ended with {ended.returncode}")
