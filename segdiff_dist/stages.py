"""The stages of an experiment, in the order the data goes. Each refuses bad input first, then works, then records.

A stage that is done already does nothing and says so; one that was interrupted goes on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.documents import read_json
from data_shards.feed.mixing import mix_groups
from data_shards.locks import FOLDER_LOCK, lock_beside, locked, refuse_where_locked
from data_shards.problems import (
    OutOfSpace,
    Problem,
    out_of_space,
    problem,
    refuse,
    saying_when_full,
)
from data_shards.store.shards import ShardSet
from segdiff_dist.attention import choose_attention
from segdiff_dist.experiment import Experiment, collect, refuse_another_config, save_experiment
from segdiff_dist.ranks.distributed import is_main, pick_device, world_size
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.tracker import Tracker


def make_phantom(experiment: Experiment) -> None:
    """`segdiff phantom OUT`."""
    from data_shards.phantom import find_problems, write_phantom

    out = experiment.path("amos_root")
    refuse(find_problems(out, experiment.phantom))
    if experiment.run is None:
        write_phantom(out, experiment.phantom)
        return
    with (
        locked(out / FOLDER_LOCK, out, "is writing it", lends=True),
        _tracker(experiment, "phantom", experiment.run) as tracker,
    ):
        write_phantom(out, experiment.phantom)
        tracker.log_params({"phantom": _plain(experiment)["phantom"]})
        tracker.log_artifact(out / "dataset.json", "phantom")


def annotate(experiment: Experiment) -> Any:
    """`segdiff annotate AMOS_ROOT WHOLEBODY`; returns data_shards.ingest.annotate's report."""
    from data_shards.ingest import annotate as annotating

    root, wholebody = collect(lambda: experiment.path("amos_root"), lambda: experiment.path("wholebody"))
    # Checked here, before a tracker makes a folder for a stage that will not start.
    refuse(annotating.find_problems(root, wholebody, experiment.annotate))
    with (
        locked(wholebody / FOLDER_LOCK, wholebody, "is annotating it", lends=True),
        _tracker(experiment, "annotate", experiment.run or wholebody) as tracker,
    ):
        report = annotating.annotate(root, wholebody, experiment.annotate)
        tracker.log_params(
            {"annotate": _plain(experiment)["annotate"], "annotate_tool_version": report.tool_version or "unknown"}
        )
        tracker.log_metrics({"annotate/num_masks": report.num_masks, "annotate/num_failed": len(report.failed)})
        tracker.log_artifact(wholebody / annotating.ANNOTATIONS, "annotate")
    return report


def prepare(experiment: Experiment) -> Any:
    """`segdiff prepare AMOS_ROOT OUT`; returns data_shards.ingest.prepare's report."""
    from data_shards.ingest.prepare import prepare as prepare_shards

    root, out = collect(lambda: experiment.path("amos_root"), lambda: experiment.path("data"))
    # Checked here, before a tracker makes a folder for a stage that will not start.
    from data_shards.ingest.prepare import find_problems

    refuse(find_problems(root, out, experiment.prepare, experiment.wholebody))
    with (
        locked(out / FOLDER_LOCK, out, "is preparing it", lends=True),
        _tracker(experiment, "prepare", experiment.run or out) as tracker,
    ):
        report = prepare_shards(root, out, experiment.prepare, wholebody=experiment.wholebody)
        if not report.num_samples:
            return report
        shards = ShardSet.open(out)
        tracker.log_params({"prepare": shards.index["preprocessing"], "shards_digest": shards.digest})
        tracker.log_metrics(
            {
                "prepare/num_samples": len(shards),
                "prepare/num_cases": report.num_cases,
                "prepare/num_failed": len(report.failed),
            }
        )
        tracker.log_artifact(out / "index.json", "prepare")
    return report


def convert(experiment: Experiment) -> dict[str, Any]:
    """`segdiff convert SHARDS OUT`; returns the new set's index."""
    from data_shards.store.convert import convert as convert_shards

    source, out = collect(lambda: experiment.given("data"), lambda: experiment.path("converted"))
    return convert_shards(source, out, experiment.convert)


def train_segmenter(experiment: Experiment) -> None:
    """`segdiff train-segmenter`: the auxiliary U-Net into RUN/segmenter."""
    from segdiff_dist.footprint import segmenter_network
    from segdiff_dist.segmentation import SegmenterTask

    config, loader = experiment.segmenter, experiment.loader
    run, shards = _open_run_and_data(experiment, experiment.more_data)
    folder = run / "segmenter"
    collect(
        lambda: refuse(config.problems(_side(shards, loader.crop_size), world_size()) + loader.problems()),
        lambda: loader.mix and mix_groups(shards, _training_rows(experiment, shards), loader.mix),
        lambda: pick_device(config.train.device),
        lambda: refuse_another_config(experiment, folder / "checkpoints", ("segmenter", "loader")),
    )
    device = pick_device(config.train.device)
    _train(
        experiment,
        shards,
        "segmenter",
        folder,
        lambda _: SegmenterTask(shards, config, loader, folder / "weights", device),
        config.augmented(loader),
        config.train,
        segmenter_network(config, shards, _side(shards, loader.crop_size)),
        multiple_of=config.dice_group,
    )


def train_denoiser(experiment: Experiment) -> None:
    """`segdiff train`: the denoiser into RUN/checkpoints and RUN/weights."""
    from segdiff_dist.denoising.denoiser import choose_kernels
    from segdiff_dist.denoising.sigma_data import with_sigma_data
    from segdiff_dist.denoising.task import DenoiserTask, find_problems
    from segdiff_dist.denoising.validation import DenoiserValidation
    from segdiff_dist.footprint import denoiser_network, small_config

    denoiser, loader, config = experiment.denoiser, experiment.loader, experiment.train
    run, shards = _open_run_and_data(experiment, experiment.more_data)
    side = _side(shards, loader.crop_size)
    diffusion = experiment.diffusion
    collect(
        lambda: refuse(find_problems(shards, side, denoiser, diffusion)),
        lambda: refuse(config.problems("train", world_size()) + loader.problems()),
        lambda: refuse(experiment.validation.problems(diffusion)),
        lambda: refuse(experiment.tracking.problems()),
        lambda: loader.mix and mix_groups(shards, _training_rows(experiment, shards), loader.mix),
        lambda: choose_attention(denoiser.attention, pick_device(config.device), denoiser.attention_head_dim),
        lambda: choose_kernels(denoiser.kernels, pick_device(config.device)),
        lambda: refuse_another_config(experiment, run / "checkpoints", ("denoiser", "diffusion", "train", "loader")),
    )

    def make_task(tracker: Tracker) -> DenoiserTask:
        device = pick_device(config.device)
        if is_main():
            kernels = choose_kernels(denoiser.kernels, device)
            attention = choose_attention(denoiser.attention, device, denoiser.attention_head_dim)
            print(f"train: {device}, kernels: {kernels}, attention: {attention}")
        process = with_sigma_data(diffusion, shards, _training_rows(experiment, shards))
        validation = DenoiserValidation(
            shards,
            shards.select(split="val", modalities=loader.modalities, axes=loader.axes),
            loader,
            process,
            replace(experiment.sample.sampler, guidance=1.0),
            experiment.validation,
            run,
            device,
            soft_masks=denoiser.soft_masks,
            tracker=tracker,
        )
        weights = run / "weights"
        return DenoiserTask(shards, side, denoiser, process, config.seed, weights, device, validation)

    network = denoiser_network(denoiser, shards, side, pick_device(config.device))
    small = partial(small_config, shards, side, pick_device(config.device))
    _train(experiment, shards, "train", run, make_task, loader, config, network, small=small)


def average(experiment: Experiment) -> tuple[Path, float]:
    """`segdiff average`: weights of another length into RUN/weights; returns their folder, and how far their profile
    stays from the one asked for (segdiff_dist.training.ema.misfit)."""
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.training.export import average_snapshots

    run, wanted = experiment.path("run"), experiment.average
    refuse(wanted.problems())
    like = run / "weights" / experiment.train.averages[0]
    model = Denoiser.load(like)
    weights, misfit = average_snapshots(run, experiment.train, wanted.length, wanted.images_seen)
    folder = run / "weights" / wanted.name
    with locked(lock_beside(folder), folder, "is writing it"), saying_when_full(folder):
        model.save(folder, weights, read_json(like / "segdiff.json", "copy the weights again"))
    return folder, misfit


def sample(experiment: Experiment) -> Any:
    """`segdiff sample`: RUN/samples; returns the SampleStore."""
    from segdiff_dist.sampling.job import make_job, prepare_job
    from segdiff_dist.sampling.store import locked as at_work

    run, shards, rows, config = _sampled_from(experiment)
    # Checked here, before a job that will not start leaves its settings in the run folder.
    job = prepare_job(run, shards, rows, experiment.diffusion, config)
    if job.classes is not None:
        print(job.classes, flush=True)
    with at_work(job.path, lends=True), _tracker(experiment, "sample", run) as tracker:
        if config.out is None:
            save_experiment(experiment, ("sample",))
        tracker.log_params({"sample": _plain(experiment)["sample"]})
        store = make_job(job, config)
        tracker.log_metrics({"sample/num_images": len(store)})
        tracker.log_artifact(store.path / "job.json", "samples")
    return store


def plan_sample(experiment: Experiment) -> Any:
    """`segdiff sample --dry-run`: the sampling.plan.Plan of the job; nothing is written."""
    from segdiff_dist.sampling.plan import plan

    run, shards, rows, config = _sampled_from(experiment)
    return plan(run, shards, rows, experiment.diffusion, config)


def _sampled_from(experiment: Experiment) -> tuple[Path, ShardSet, Any, Any]:
    """Run, shard set, its rows to draw masks from, and the settings; checked."""
    from segdiff_dist.sampling.job import weights_digest

    config = experiment.sample
    config = replace(config, weights=_weights_name(experiment, config.weights))
    run, shards = _open_run_and_data(experiment)
    collect(
        lambda: refuse(config.problems()),
        lambda: config.ray_address or pick_device(config.device),
        lambda: weights_digest(run / "weights" / config.weights),
    )
    rows = shards.select(split=config.split, modalities=experiment.loader.modalities, axes=experiment.loader.axes)
    return run, shards, rows, config


def evaluate(experiment: Experiment) -> dict[str, Any]:
    """`segdiff evaluate`: RUN/evaluation; returns the summary."""
    from segdiff_dist.evaluation.evaluate import evaluate as evaluate_run
    from segdiff_dist.evaluation.measure.checks import check
    from segdiff_dist.evaluation.measure.job import at_work
    from segdiff_dist.evaluation.measure.summary import scalars
    from segdiff_dist.export.register import register_evaluated

    run = experiment.path("run")
    refuse(experiment.evaluate.problems() + experiment.tracking.problems())
    _must_be_a_run(run)
    _refuse_addresses(experiment, (run,))
    check(run, experiment.evaluate)  # here too, before an evaluation that will not start leaves anything behind
    downstream = _plan_downstream(experiment) if experiment.evaluate.downstream else None
    with at_work(run, lends=True), _tracker(experiment, "evaluate", run) as tracker:
        save_experiment(experiment, ("evaluate", "downstream"))
        tracker.log_params({"evaluate": _plain(experiment)["evaluate"]})
        summary = evaluate_run(run, experiment.evaluate, amos_root=experiment.amos_root)
        tracker.log_metrics(scalars(summary))
        if downstream is not None:
            summary["downstream"] = _make_downstream(experiment, downstream, tracker)
        for name in ("summary.json", "samples.parquet", "report.html", "figures"):
            tracker.log_artifact(run / "evaluation" / name, "evaluation/figures" if name == "figures" else "evaluation")
        tracker.log_artifact(run / "config.yaml")
        register_evaluated(run, summary, tracker)
    return summary


def _plan_downstream(experiment: Experiment) -> Any:
    """The checked downstream.job.Downstream of a run whose samples are there."""
    from segdiff_dist.downstream.job import plan
    from segdiff_dist.evaluation.metrics.sums import Interval
    from segdiff_dist.sampling.store import SampleStore

    run, sample, evaluate = experiment.path("run"), experiment.sample, experiment.evaluate
    sample = replace(
        sample,
        weights=_weights_name(experiment, sample.weights),
        device=evaluate.device,
        num_workers=evaluate.num_workers,
        ray_address=evaluate.ray_address,
    )
    return plan(
        run,
        SampleStore.open(run / "samples"),
        experiment.downstream,
        diffusion=experiment.diffusion,
        sample=sample,
        segmenter=experiment.segmenter,
        loader=experiment.loader,
        interval=Interval(evaluate.bootstrap_samples, evaluate.seed),
    )


def _make_downstream(experiment: Experiment, planned: Any, tracker: Tracker) -> dict[str, Any]:
    """Train and test, record, and draw the report again, which then tells of it."""
    from segdiff_dist.downstream.summary import scalars
    from segdiff_dist.evaluation.evaluate import draw

    made: dict[str, Any] = planned.make()
    tracker.log_params({"downstream": _plain(experiment)["downstream"]})
    tracker.log_metrics(scalars(made))
    tracker.log_artifact(planned.folder / "summary.json", "downstream")
    draw(planned.run, amos_root=experiment.amos_root)
    return made


def report(experiment: Experiment) -> Path:
    """`segdiff report RUN [RUN ...]`: figures and report.html of one run drawn again, or the page that sets several
    side by side; nothing is measured. Returns the page."""
    from segdiff_dist.evaluation.evaluate import draw
    from segdiff_dist.evaluation.measure.saved import drawing
    from segdiff_dist.evaluation.report.comparison import open_runs
    from segdiff_dist.evaluation.report.comparison_page import COMPARISON, write_comparison

    folders, out = experiment.runs, experiment.compared
    found = []
    if not folders:
        found.append(Problem("command line", "RUN", "not given", "name one evaluated run folder, or several"))
    if len(folders) == 1 and out is not None:
        found.append(Problem("command line", "--out", str(out), "name several runs; of one, it is RUN/evaluation"))
    if out is not None and out.is_dir():
        found.append(Problem(str(out), "--out", "a folder", "name an HTML file"))
    _refuse_addresses(experiment, folders)
    _, runs = collect(lambda: refuse(found), lambda: open_runs(folders))
    if len(runs) > 1:
        page = out or Path(COMPARISON)
        with locked(lock_beside(page), page, "is writing it"), saying_when_full(page), drawing(runs[0].folder):
            return write_comparison(runs, page)
    [run] = runs
    amos_root = experiment.amos_root or run.settings.get("amos_root")
    with drawing(run.folder):
        return draw(run.folder, amos_root=Path(amos_root) if isinstance(amos_root, str | Path) else None)


def export(experiment: Experiment) -> str:
    """`segdiff export OUT`: a run's samples, or its model; returns what was written."""
    from segdiff_dist.export.job import export_model, export_samples

    config = experiment.export
    run, out = collect(lambda: experiment.path("run"), lambda: experiment.path("exported"))
    _must_be_a_run(run)
    if config.format != "pipeline":
        _refuse_addresses(experiment, (run,))
        return f"{export_samples(run, out, config):,} images"
    export_model(
        run / "weights" / _weights_name(experiment, config.weights),
        out,
        experiment.diffusion,
        experiment.sample.sampler,
    )
    return "a diffusers pipeline"


def volume(experiment: Experiment) -> Any:
    """`segdiff volume MASK OUT`: returns its export.volume.VolumeReport."""
    from segdiff_dist.export.volume import make_volume, painter, volume_problems
    from segdiff_dist.pipeline import SegGuidedPipeline

    config, sample = experiment.volume, experiment.sample
    mask, out = collect(lambda: experiment.path("mask_volume"), lambda: experiment.path("exported"))
    run, shards = _open_run_and_data(experiment)
    weights = run / "weights" / _weights_name(experiment, sample.weights)
    refuse(volume_problems(mask, out, config))
    with locked(lock_beside(out), out, "is making it"):
        pipeline = SegGuidedPipeline.from_weights(
            weights, experiment.diffusion, sample.sampler, device=sample.device, precision=sample.precision
        )
        paint, size = painter(pipeline, config, sample.seed), pipeline.size_with(shards)
        return make_volume(mask, out, paint, size, shards, config)


def _train(
    experiment: Experiment,
    shards: ShardSet,
    stage: str,
    folder: Path,
    make_task: Any,
    loader: Any,
    config: Any,
    network: Any,
    **limits: Any,
) -> None:
    """`network`: a training.memory_plan.Network; `limits`: what else memory_problems takes."""
    from segdiff_dist.training.checkpoint import complete_ones, read_state
    from segdiff_dist.training.export import is_exported
    from segdiff_dist.training.loop import TrainingJob, train
    from segdiff_dist.training.memory_plan import capacity_of, memory_problems, refuse_together, warn_of_length

    newest = next(iter(complete_ones(folder / "checkpoints")), None)
    images_seen = read_state(newest)["images_seen"] if newest is not None else 0
    if newest is not None and images_seen >= config.num_images and is_exported(newest, folder):
        if is_main():
            print(f"{stage}: already trained on {config.num_images:,} images in {folder}; nothing to do")
        return
    device = pick_device(config.device)
    section = "segmenter.train" if stage == "segmenter" else stage
    too_little = memory_problems(section, network, config, capacity_of(device), ranks=world_size(), **limits)
    if world_size() == 1:
        refuse(too_little)
    warn_of_length(section, network, config.num_images - images_seen, config, device)
    run = experiment.path("run")
    own = ("segmenter",) if stage == "segmenter" else ("denoiser", "diffusion", "train", "validation")
    rows = _training_rows(experiment, shards)
    sections = (*own, "loader")
    with _training_lock(folder):
        refuse_together(too_little, device)
        with _tracker(experiment, stage, run) as tracker:
            if is_main():
                # The denoiser's loader and data are what the later stages go by.
                save_experiment(experiment, own if stage == "segmenter" else (*own, "loader", "data", "more_data"))
            tracker.log_params({name: _plain(experiment)[name] for name in sections} | {"shards_digest": shards.digest})
            if is_main():
                tracker.log_artifact(run / "config.yaml")
            settings = _plain(experiment)
            train(TrainingJob(make_task(tracker), shards, rows, loader, config, folder, tracker, device, settings))


def _training_lock(folder: Path) -> AbstractContextManager[None]:
    """Held by the main rank of a job; the others refuse what it refuses, so that none waits for it in vain."""
    file, doing = folder / ".train.lock", "is training there"
    if is_main():
        return locked(file, folder, doing)
    refuse_where_locked(file, folder, doing)
    return nullcontext()


def _open_data(experiment: Experiment, more: tuple[str, ...]) -> ShardSet:
    return ShardSet.open([experiment.given("data"), *more], cache=experiment.loader.cache)


def _open_run_and_data(experiment: Experiment, more: tuple[str, ...] = ()) -> tuple[Path, ShardSet]:
    run, shards = collect(lambda: experiment.path("run"), lambda: _open_data(experiment, more))
    if run.exists() and not run.is_dir():
        raise problem(run, "run", "not a folder", "give another path")
    return run, shards


def _training_rows(experiment: Experiment, shards: ShardSet) -> Any:
    return shards.select(split="train", modalities=experiment.loader.modalities, axes=experiment.loader.axes)


def _refuse_addresses(experiment: Experiment, runs: tuple[Path, ...]) -> None:
    """Refuse samples whose shard set is behind an address that a run folder alone names."""
    from segdiff_dist.sampling.store_files import foreign_addresses

    refuse([found for run in runs for found in foreign_addresses(run / "samples", experiment.data)])


def _must_be_a_run(run: Path) -> None:
    if not run.is_dir():
        refuse([Problem(str(run), "run", "no such folder", "give the folder that training and sampling wrote")])


def _weights_name(experiment: Experiment, name: str) -> str:
    """The folder under RUN/weights; `ema` is the first average."""
    return experiment.train.averages[0] if name == "ema" else name


def _side(shards: ShardSet, crop_size: int | None) -> int:
    if crop_size is not None and crop_size > shards.size:
        raise problem(
            "config", "loader.crop_size", crop_size, f"the slices of {shards.root} are {shards.size} pixels wide"
        )
    return crop_size or shards.size


def _plain(experiment: Experiment) -> dict[str, Any]:
    from segdiff_dist.config import as_dict

    return as_dict(experiment)


def _tracker(experiment: Experiment, stage: str, folder: Path) -> Tracker:
    """The main rank records; the others keep quiet."""
    config = experiment.tracking if is_main() else TrackingConfig(enabled=False)
    try:
        return Tracker(folder, config, stage)
    except OSError as error:
        if out_of_space(error):
            raise OutOfSpace(folder, str(error)) from error
        remedy = "make it writable, or choose another; without a record: --tracking.no-enabled"
        raise problem(folder, "run folder", f"cannot be written ({error})", remedy) from error
