"""`segdiff reproduce table1`: prepare, the segmenter, then for each column train, sample and evaluate; and the page.

Every step is a stage of segdiff_dist.stages: what is done is passed over, what was interrupted goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.documents import read_json
from data_shards.fan_out import ray_session
from data_shards.files import write_atomic
from data_shards.ingest.prepare import find_problems
from data_shards.locks import FOLDER_LOCK, locked
from data_shards.problems import InputProblems, problem, refuse
from data_shards.store.set_index import file_sha256
from segdiff_dist import stages
from segdiff_dist.config import as_dict, to_yaml
from segdiff_dist.evaluation.measure.saved import read_summary
from segdiff_dist.experiment import Experiment
from segdiff_dist.reproduce import plan, table
from segdiff_dist.reproduce.settings import Experiments, Table1Settings, patients, resolve, sampled_splits

_MEASURED = "measured.json"
# Of the evaluate section: what changes no number, and where the segmenter lies, of which the digest tells.
_NOT_MEASURED = ("num_workers", "batch_size", "device", "ray_address", "segmenter")


class StepFailed(RuntimeError):
    """A step on several ranks ended badly; its own words stand above."""


def main(args: list[str]) -> int:
    """Parse, then plan or reproduce; returns the exit code."""
    import tyro

    from segdiff_dist.evaluation.measure.job import EvaluationFailed
    from segdiff_dist.sampling.job import SamplingFailed
    from segdiff_dist.training.loop import TrainingStopped

    settings: Table1Settings = tyro.cli(
        Table1Settings, args=args, prog="segdiff reproduce", description="A published table made again, end to end."
    )
    experiments = _checked(settings)
    if settings.dry_run:
        print(plan.describe(plan.steps(settings, experiments), settings))
        return 0
    try:
        made = reproduce(settings, experiments)
    except (TrainingStopped, SamplingFailed, EvaluationFailed, StepFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table.verdict(made)}\ntable: {(settings.out / 'table1.html').resolve()}")
    return 0


def reproduce(settings: Table1Settings, experiments: Experiments) -> dict[str, Any]:
    """Run every step that is not done and write the table; returns what table1.json holds."""
    _check_gpus(settings.gpus)
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("prepare", partial(_prepare, experiments.prepare)),
        ("train-segmenter", partial(_train, "train-segmenter", experiments.segmenter, settings.gpus)),
    ]
    for name, column in experiments.columns.items():
        title = table.TITLES[name]
        steps += [
            (f"{title}: train", partial(_train, "train", column, settings.gpus)),
            (f"{title}: sample", partial(stages.sample, column)),
            (f"{title}: evaluate", partial(evaluate_once, column)),
        ]
    with (
        locked(settings.out / FOLDER_LOCK, settings.out, "is making this table"),
        ray_session(experiments.prepare.prepare.ray_address),
    ):
        for number, (what, step) in enumerate(steps, 1):
            print(f"\n[{number}/{len(steps)}] {what}", flush=True)
            start = time.perf_counter()
            step()
            print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
        measured = [
            table.Measured(name, experiments.recipes[name], column, _summary(column))
            for name, column in experiments.columns.items()
        ]
        made = table.build(measured, patients(settings.amos))
        table.write(settings.out, made)
    return made


def evaluate_once(column: Experiment) -> None:
    """`segdiff evaluate`, unless the same samples were measured before with the same segmenter and settings, and what
    that left is still there: `segdiff evaluate --run` by hand may have put other figures in its place."""
    from segdiff_dist.sampling.store import SampleStore, identity

    folder = column.path("run") / "evaluation"
    assert column.evaluate.segmenter is not None
    of = {
        "evaluate": {k: v for k, v in as_dict(column)["evaluate"].items() if k not in _NOT_MEASURED},
        "samples": identity(SampleStore.open(column.path("run") / "samples").job),
        "segmenter": file_sha256(column.evaluate.segmenter / "model.safetensors"),
    }
    mark, summary, report = folder / _MEASURED, folder / "summary.json", folder / "report.html"
    is_there = all(file.is_file() for file in (mark, summary, report))
    if is_there and _marked(mark) == of | {"summary": file_sha256(summary)}:
        print(f"evaluate: measured already in {folder}; nothing to do")
        return
    mark.unlink(missing_ok=True)
    stages.evaluate(column)
    write_atomic(mark, json.dumps(of | {"summary": file_sha256(summary)}, indent=2) + "\n")


def _marked(mark: Path) -> dict[str, Any]:
    """What the mark says; nothing where it is damaged: it is measured again then."""
    with suppress(InputProblems):
        return read_json(mark, "remove it")
    return {}


def _summary(column: Experiment) -> dict[str, Any]:
    return read_summary(column.path("run"))


def _checked(settings: Table1Settings) -> Experiments:
    """The experiments with the split that each column's masks come from; all that can be seen now is refused now."""
    experiments = resolve(settings)
    prepared = experiments.prepare
    refuse(find_problems(settings.amos, Path(prepared.given("data")), prepared.prepare, prepared.wholebody))
    for column in experiments.columns.values():
        # The segmenter is yet to be trained; what is wrong with the rest should not wait for that.
        refuse(replace(column.evaluate, segmenter=None, device="auto").problems())
    return experiments.sampled_from(sampled_splits(settings, experiments))


def _check_gpus(gpus: int) -> None:
    import torch

    if torch.cuda.is_available() and gpus > torch.cuda.device_count():
        raise problem(
            "command line", "gpus", gpus, f"this machine has {torch.cuda.device_count()}; --dry-run takes any"
        )


def _prepare(experiment: Experiment) -> None:
    report = stages.prepare(experiment)
    done = "; it was finished already, nothing to do" if report.skipped_done else ""
    print(f"{report.num_samples:,} slices of {report.num_cases} volumes{done}")
    for case_id, file, reason in report.failed:
        print(f"left out: {case_id}: {file}: {reason}")
    if not report.num_cases:
        raise problem(experiment.given("amos_root"), "volumes", "none could be read", "see above")


def _train(command: str, experiment: Experiment, ranks: int) -> None:
    """The stage in this process, or on `ranks` ranks of this machine, each of which runs `segdiff COMMAND`."""
    if ranks == 1:
        stage = stages.train_segmenter if command == "train-segmenter" else stages.train_denoiser
        stage(experiment)
        return
    run = experiment.path("run")
    # Beside the run folder, whose own config.yaml tells the stage what it was started with. It names the run, too.
    config = run.with_name(f"{run.name}.yaml")
    write_atomic(config, to_yaml(as_dict(experiment)))
    # -P: no module of the current folder is taken for torch's or ours.
    launcher = ["-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    segdiff = str(Path(sys.executable).with_name("segdiff"))
    ended = subprocess.run([sys.executable, *launcher, segdiff, command, "--config", str(config)], check=False)
    if ended.returncode:
        raise StepFailed(f"{command} of {run} on {ranks} ranks ended with {ended.returncode}")
