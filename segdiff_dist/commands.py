"""What each command says when its stage is done. One function a command, named like it; returns the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from segdiff_dist import stages

if TYPE_CHECKING:
    from segdiff_dist.experiment import Experiment

TRAINING_STOPPED = 3
"""Exit code of a training that stopped itself. Not 1, which Python gives any error: another start may cure that."""


def phantom(experiment: Experiment) -> int:
    """Write the phantom archive."""
    stages.make_phantom(experiment)
    print(f"phantom archive in {experiment.amos_root}")
    return 0


def annotate(experiment: Experiment) -> int:
    """Make the missing whole-body masks; 1 when some volumes got none."""
    report = stages.annotate(experiment)
    before = f", {report.num_kept} of them there already" if report.num_kept else ""
    print(f"{report.num_masks} whole-body masks in {experiment.wholebody}{before}")
    if report.tool_version is None:
        print("the tool's version is not recorded; --annotate.version-command tells how to ask for it")
    for case_id, reason in report.failed:
        print(f"failed: {case_id}: {reason}")
    if report.failed:
        print("put these right and start the same command again; it tries only them")
    return 1 if report.failed else 0


def prepare(experiment: Experiment) -> int:
    """Write the shard set; 1 when some volumes could not be read."""
    from data_shards.store.inspect import recognised_lines

    report = stages.prepare(experiment)
    done_before = "; it was finished already, nothing to do" if report.skipped_done else ""
    print(f"{report.num_samples:,} slices of {report.num_cases} volumes in {experiment.data}{done_before}")
    if experiment.wholebody is not None:
        print("masks: " + ", ".join(f"{source} of {count} volumes" for source, count in report.masks.items()))
    for line in recognised_lines(report.recognised):
        print(line)
    for case, file, reason in report.failed:
        print(f"failed: {case}: {file}: {reason}")
    if report.failed:
        print("put these right and start the same command again; it tries only them")
    return 1 if report.failed else 0


def inspect(experiment: Experiment) -> int:
    """Print the shard set's tables; 1 when something is wrong with it."""
    from data_shards.store.inspect import format_report, inspect_shards

    report = inspect_shards(experiment.given("data"))
    print(format_report(report))
    return 0 if report.ok else 1


def convert(experiment: Experiment) -> int:
    """Write the shard set in another form."""
    index = stages.convert(experiment)
    print(f"{index['num_samples']:,} slices as {index['store']}, {index['codec']}, in {experiment.converted}")
    return 0


def train(experiment: Experiment) -> int:
    """Train the denoiser; TRAINING_STOPPED when the run stopped itself."""
    return _train(stages.train_denoiser, experiment)


def train_segmenter(experiment: Experiment) -> int:
    """Train the auxiliary segmenter; TRAINING_STOPPED when the run stopped itself."""
    return _train(stages.train_segmenter, experiment)


def _train(stage: Callable[[Experiment], None], experiment: Experiment) -> int:
    from segdiff_dist.training.loop import TrainingStopped

    try:
        stage(experiment)
    except TrainingStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return TRAINING_STOPPED
    return 0


def sample(experiment: Experiment) -> int:
    """Make the missing images."""
    from segdiff_dist.sampling.job import SamplingFailed

    try:
        store = stages.sample(experiment)
    except SamplingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(store):,} images in {store.path}")
    return 0


def plan_sample(experiment: Experiment) -> None:
    """Say how many images, how long and how many bytes; as comments, so that what --dry-run prints stays YAML."""
    from data_shards.problems import InputProblems

    try:
        lines = str(stages.plan_sample(experiment)).splitlines()
    except InputProblems as error:
        lines = ["cannot start:", *map(str, error.problems)]
    print("\n".join(f"# {line}" for line in lines))


def evaluate(experiment: Experiment) -> int:
    """Measure the samples and print the headline table; 1 when too many of them look like training images."""
    from segdiff_dist.downstream.job import DownstreamFailed
    from segdiff_dist.downstream.summary import format_downstream
    from segdiff_dist.evaluation.measure.job import EvaluationFailed
    from segdiff_dist.evaluation.measure.segmenter_check import segmenter_messages
    from segdiff_dist.evaluation.measure.summary import format_table
    from segdiff_dist.evaluation.measure.trust import warnings
    from segdiff_dist.evaluation.metrics.sharpness import sharpness_messages
    from segdiff_dist.sampling.job import SamplingFailed

    try:
        summary = stages.evaluate(experiment)
    except (EvaluationFailed, SamplingFailed, DownstreamFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(summary))
    for message in sharpness_messages(summary["metrics"]):
        print(message)
    for message in segmenter_messages(summary):
        print(f"warning: {message}", file=sys.stderr)
    if "downstream" in summary:
        print(f"\nDice on real slices:\n{format_downstream(summary['downstream'])}\n")
    print(f"report: {(experiment.path('run') / 'evaluation' / 'report.html').resolve()}")
    for warning in warnings(summary):
        print(f"warning: {warning}", file=sys.stderr)
    memorised = summary["trust"].get("memorisation")
    return 0 if memorised is None or memorised["passed"] else 1


def report(experiment: Experiment) -> int:
    """Draw the report of one run again, or set several side by side."""
    print(f"report: {stages.report(experiment).resolve()}")
    return 0


def export(experiment: Experiment) -> int:
    """Write samples or model in the form of others."""
    made = stages.export(experiment)
    print(f"{made} in {experiment.exported}")
    return 0


def volume(experiment: Experiment) -> int:
    """Paint a volume, and say how alike neighbouring slices are."""
    report, config = stages.volume(experiment), experiment.volume
    print(f"{experiment.exported}: {report.num_slices:,} {config.axis} slices of {config.modality}")
    if report.outside > 0:
        print(f"warning: {report.outside:.1%} of the labelled voxels lie outside of what the model's slices show")
    if not report.has_body:
        print("warning: no voxel says where the patient ends (class `body`): the model makes that up, slice by slice")
    other = "independent" if config.noise == "shared" else "shared"
    painted_mm, real_mm = report.gap_mm
    for name, value in (
        (f"{config.noise} noise, {painted_mm:g} mm apart", report.difference),
        (f"{other} noise, {painted_mm:g} mm apart", report.difference_other),
        (f"real slices, {real_mm:g} mm apart", report.difference_real),
    ):
        if value is not None:
            print(f"mean difference between neighbouring slices, {name}: {value:.2f} grey values")
    return 0


def average(experiment: Experiment) -> int:
    """Write weights averaged over another length, from the run's snapshots."""
    folder, misfit = stages.average(experiment)
    print(f"{folder}: its profile is {misfit:.1%} off the one asked for (0 % is exact)")
    return 0


def track(experiment: Experiment) -> int:
    """Send MLflow what waits in the run's spool."""
    from segdiff_dist.tracking.tracker import send_spool

    run = experiment.path("run")
    print(f"{send_spool(run, experiment.tracking.adopt):,} records of {run} sent to MLflow")
    return 0


def demo(experiment: Experiment) -> int:
    """The whole line on the phantom."""
    from segdiff_dist.demo import run_demo

    return run_demo(experiment)
