"""The part of `evaluate --downstream`: trainings of segmenters with and without the generated images. It keeps the
contract of a stage, but has no command of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from segdiff_dist.experiment import Experiment
from segdiff_dist.stages.base import Plan, Result
from segdiff_dist.stages.configured import plain, weights_name
from segdiff_dist.stages.cost import Cost, duration

if TYPE_CHECKING:
    from segdiff_dist.downstream.job import Downstream
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.tracking.tracker import Tracker


def check_downstream(experiment: Experiment, run: Path, samples: SampleStore) -> DownstreamPlan:
    """Plan the trainings on a run's samples; the workers are those of the evaluation."""
    from segdiff_dist.downstream.job import Sections, plan
    from segdiff_dist.evaluation.metrics.sums import Interval

    evaluate = experiment.evaluate
    sample = replace(experiment.sample, weights=weights_name(experiment, experiment.sample.weights))
    sections = Sections(experiment.diffusion, sample, experiment.segmenter, experiment.loader, evaluate.workers)
    interval = Interval(evaluate.bootstrap_samples, evaluate.seed)
    return DownstreamPlan(experiment, plan(run, samples, experiment.downstream, sections, interval))


@dataclass(frozen=True)
class DownstreamPlan(Plan):
    """Trainings that can begin."""

    experiment: Experiment
    job: Downstream

    def cost(self) -> Cost:
        """Their number, and the time of those that are missing; sampling and tests come on top."""
        seconds, missing = self.job.seconds(), len(self.job.missing())
        takes = "" if seconds is None else f": about {duration(seconds)}"
        note = f"trainings of --downstream: {self.job.num_trainings}, {missing} missing{takes}"
        shorter = "fewer trainings: --downstream.seeds 0 --downstream.real-fractions 1"
        return Cost(seconds=seconds, notes=(note,), what=f"{missing} trainings of --downstream", shorter=shorter)

    def run(self, tracker: Tracker) -> Result:
        """Train, test and record. The result's value is the summary."""
        from segdiff_dist.downstream.summary import format_downstream, scalars
        from segdiff_dist.evaluation.report.shared_terms import shared_terms

        summary = self.job.make()
        tracker.log_params({"downstream": plain(self.experiment)["downstream"]})
        tracker.log_metrics(scalars(summary))
        tracker.log_artifact(self.job.folder / "summary.json", "downstream")
        table = f"\nDice on real slices:\n{format_downstream(summary)}\n{shared_terms(summary)}\n"
        return Result((table,), value=summary)
