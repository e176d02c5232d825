"""Measure a run's images: metrics with intervals, figures, report.html."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_shards.problems import Problem, explain_full_disk, problem, refuse
from segdiff_dist.downstream.config import DownstreamConfig
from segdiff_dist.evaluation.images.config import ImagesConfig
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.experiment import collect, save_experiment
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import (
    ConfiguredStage,
    address_flag,
    open_tracker,
    plain,
    refuse_addresses,
)
from segdiff_dist.stages.cost import Cost, duration
from segdiff_dist.stages.evaluate_downstream import check_downstream
from segdiff_dist.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from segdiff_dist.evaluation.images.folder import ImageFolder
    from segdiff_dist.evaluation.measure.checks import Checked
    from segdiff_dist.sampling.mask_patients import MaskPatients
    from segdiff_dist.stages.evaluate_downstream import DownstreamPlan
    from segdiff_dist.tracking.tracker import Tracker

_RECORDED = ("summary.json", "samples.parquet", "report.html", "figures")


@dataclass(frozen=True, kw_only=True)
class Evaluate(ConfiguredStage):
    """Measure the samples. Exit code 1 when too many of them look like training images."""

    aliases: ClassVar = {"--out": "--run"}
    less_memory: ClassVar = "--evaluate.num-workers or --evaluate.batch-size"
    essential: ClassVar = (
        *("--run", "--downstream", "--evaluate.memorisation", "--evaluate.segmenter", "--evaluate.fid-weights"),
        *("--real", "--evaluate.patient", "--evaluate.num-workers", "--evaluate.ray-address", "--evaluate.device"),
        *("--images", "--masks", "--modality", "--images.label-map", "--images.size"),
    )

    run: Path | None = None
    """The run folder: samples are read from RUN/samples, everything is written to RUN/evaluation. With --images a new
    folder, for the images too."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    amos_root: Path | None = None
    """DATA of `segdiff prepare`, for the figure of intensities before clipping."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    downstream: DownstreamConfig = field(default_factory=DownstreamConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> EvaluatePlan:
        """Opens samples, shard set and segmenter."""
        from segdiff_dist.evaluation.measure.checks import check

        if self.images:
            return self._check_images()
        experiment = self.experiment
        run, *_ = collect(
            lambda: self.existing_run(),
            lambda: refuse(self.images.problems()),
            lambda: refuse(self.tracking.problems()),
        )
        refuse_addresses(experiment, (run,))
        checked = check(run, self.evaluate)
        downstream = check_downstream(experiment, run, checked.store) if self.evaluate.downstream else None
        return EvaluatePlan(self, run, len(checked.store), int(checked.store.image.shape[-1]), checked, downstream)

    def _check_images(self) -> EvaluatePlan:
        """Reads the images and masks once."""
        from segdiff_dist.evaluation.images.check import check_images

        run, *_ = collect(
            self._new_folder,
            lambda: refuse(self.images.problems()),
            lambda: refuse(self.tracking.problems()),
        )
        folder = check_images(run, self.images, self.evaluate)
        return EvaluatePlan(self, run, len(folder), folder.size, images=folder)

    def _new_folder(self) -> Path:
        if self.run is None:
            raise problem("command line", "--out", "not given", "name a new folder for the images and the result")
        return self.path("run")


@dataclass(frozen=True)
class EvaluatePlan(Plan):
    """Samples that can be measured, `side` pixels a side; `images`: those of a folder, which are stored first;
    `downstream`: the trainings on them, if asked for."""

    stage: Evaluate
    run_folder: Path
    num_images: int
    side: int
    checked: Checked | None = None
    downstream: DownstreamPlan | None = None
    images: ImageFolder | None = None

    def cost(self) -> Cost:
        """Two label maps of an image; the time of the usual metrics by their speed on an AMD EPYC."""
        notes = ["disk: label maps before compression"] + ([] if self.images is None else [self.images.words()])
        notes += [] if self.downstream is None else self.downstream.cost().notes
        notes += [*self._mask_patients.messages, *self._memorisation_notes()]
        num_maps = 2 if self.images is None else 4  # and what is stored of a folder: images and masks
        workers = self.stage.evaluate.workers.num_on_cores
        notes.append(f"time: metrics without further networks, {workers} workers, as on an AMD EPYC")
        num_bytes = num_maps * self.num_images * self.side**2
        return Cost(images=self.num_images, seconds=self._metrics_s, num_bytes=num_bytes, notes=tuple(notes))

    @property
    def _metrics_s(self) -> float:
        from segdiff_dist.budget.choose import STARTS_S, evaluation_s

        return STARTS_S["evaluate"] + self.num_images * evaluation_s(
            self.side, self.stage.evaluate.workers.num_on_cores
        )

    def workers_problems(self) -> list[Problem]:
        """Problems of evaluate.num_workers."""
        return self.stage.evaluate.workers.memory_problems()

    def announced(self) -> tuple[str, Cost, Path] | None:
        """Its images and bytes; label maps are compressed well. The search for training images says its time itself."""
        num_bytes = 2 * self.num_images * self.side**2
        trainings = Cost() if self.downstream is None else self.downstream.cost()
        seconds = self._metrics_s + (trainings.seconds or 0.0)
        cost = replace(trainings, images=self.num_images, seconds=seconds, num_bytes=num_bytes, sure_share=0.01)
        return "evaluate", cost, self.run_folder

    @cached_property
    def _mask_patients(self) -> MaskPatients:
        """The patients of a folder's masks."""
        from segdiff_dist.sampling.mask_patients import MaskPatients, mask_patients

        if self.images is not None:
            return mask_patients(self.images.items, self.images.job, self.stage.evaluate.patient)
        return MaskPatients() if self.checked is None else self.checked.subject.patients

    def _memorisation_notes(self) -> list[str]:
        """What the search for training images compares, and how long CPUs take for it."""
        from segdiff_dist.evaluation.measure.memorisation import memorisation_cost

        config = self.stage.evaluate
        cost = None if self.checked is None else memorisation_cost(self.run_folder, config, self.checked.subject)
        if cost is None:
            return []
        workers = config.workers.num_on_cores
        return [f"memorisation: {cost[0]}: about {duration(cost[1] / workers)} on {workers} cores of a CPU"]

    def lock(self) -> AbstractContextManager[None]:
        """The lock of RUN/evaluation."""
        from segdiff_dist.evaluation.measure.job import evaluation_lock

        if self.images is not None:
            self.run_folder.mkdir(parents=True, exist_ok=True)
        return evaluation_lock(self.run_folder, lends=True)

    def tracker(self) -> Tracker:
        """The tracker of the run folder."""
        return open_tracker(self.stage.experiment, "evaluate", self.run_folder)

    def run(self, tracker: Tracker) -> Result:
        """Measure, draw, record; then the trainings."""
        from segdiff_dist.evaluation.evaluate import draw, evaluate
        from segdiff_dist.evaluation.measure.checks import check
        from segdiff_dist.evaluation.measure.tracked_metrics import COLUMNS, TABLE, headline, table
        from segdiff_dist.export.register import register_evaluated
        from segdiff_dist.tracking.data_sets import log_samples, log_shards

        experiment, run, config = self.stage.experiment, self.run_folder, self.stage.evaluate
        if self.images is not None:
            print(self.images.words(), flush=True)
            self._store_images(self.images)
        save_experiment(experiment, ("evaluate", "downstream"))
        tracker.log_params({"evaluate": plain(experiment)["evaluate"]})
        for line in [*filter(None, [self._mask_patients.line]), *self._memorisation_notes()]:
            print(line, flush=True)
        checked = self.checked or check(run, config)
        summary = evaluate(run, config, amos_root=experiment.amos_root, checked=checked)
        if checked.subject.shards is not None:
            log_shards(tracker, checked.subject.shards, "evaluation")
        log_samples(tracker, checked.store, "evaluation")
        tracker.log_metrics(headline(summary))
        tracker.log_about(self._about(summary))
        trained = None
        if self.downstream is not None:
            trained = self.downstream.run(tracker)
            summary["downstream"] = trained.value
            draw(run, amos_root=experiment.amos_root)  # the report again, which then shows the table
        tracker.log_table(COLUMNS, table(summary), TABLE)
        for name in _RECORDED:
            tracker.log_artifact(run / "evaluation" / name, "evaluation/figures" if name == "figures" else "evaluation")
        tracker.log_artifact(run / "config.yaml")
        register_evaluated(run, summary, tracker)
        return self._result(summary, () if trained is None else trained.message, self._mask_patients.guess)

    def _store_images(self, images: ImageFolder) -> None:
        """Write those of a folder to RUN/samples."""
        from segdiff_dist.sampling.store import locked

        path = self.run_folder / "samples"
        with locked(path, lends=True), explain_full_disk(path):
            images.store(path)

    def _about(self, summary: dict[str, Any]) -> str:
        """The headline as a sentence."""
        from segdiff_dist.evaluation.measure.summary_text import headline_dice

        name = headline_dice([summary["metrics"]])
        entry = summary["metrics"].get(name)
        low, high = (entry or {}).get("ci95") or (float("nan"), float("nan"))
        dice = "" if entry is None else f", `{name}` {entry['value']:.3f} ({low:.3f} to {high:.3f})"
        return (
            f"{summary['num_samples']:,} images of {summary['num_patients']:,} patients{dice}. All numbers: the table "
            "`evaluation/metrics.json`; the page: `evaluation/report.html`, both among the artifacts."
        )

    def _result(self, summary: dict[str, Any], more: tuple[str, ...], guess: str | None) -> Result:
        """The table of metrics, then `more`, and the next command."""
        from segdiff_dist.evaluation.measure.segmenter_check import segmenter_messages
        from segdiff_dist.evaluation.measure.summary_text import format_table
        from segdiff_dist.evaluation.measure.trust import warnings
        from segdiff_dist.evaluation.metrics.sharpness import sharpness_messages

        run = self.run_folder
        message = [format_table(summary), *sharpness_messages(summary["metrics"]), *more]
        message.append(f"report: {(run / 'evaluation' / 'report.html').resolve()}")
        found = (*filter(None, [guess]), *segmenter_messages(summary), *warnings(summary))
        warned = [f"warning: {line}" for line in found]
        memorised = summary["trust"].get("memorisation")
        passed = memorised is None or memorised["passed"]
        out = run.with_name(f"{run.name}-png")
        address = address_flag(self.stage.experiment)
        is_known = out.exists() or "images" in summary["provenance"]["sample_job"]
        after = None if is_known else command("export", out, "--run", run, "--format", "png", *address)
        return Result(tuple(message), tuple(warned), 0 if passed else 1, after, summary)
