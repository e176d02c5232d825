"""`segdiff evaluate --downstream`: images of the train split's masks, trainings on Ray, and the table.

RUN/downstream/samples generated images of masks of training patients, a sample store RUN/downstream/generated the same
as a shard set RUN/downstream/trainings/NAME a segmenter each, and its scores: trainer.py RUN/downstream/settings.json
the settings that all trainings depend on RUN/downstream/summary.json the table Finished trainings are kept: the same
command runs the missing ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.documents import read_json, reading
from data_shards.fan_out import TaskFailure, fan_out
from data_shards.feed.config import LoaderConfig
from data_shards.files import write_atomic
from data_shards.locks import lock_beside, locked
from data_shards.problems import InputProblems, Problem, WorkFailed, explain_full_disk, problem, refuse
from data_shards.settings import identity
from data_shards.store.set_index import read_index
from data_shards.store.shards import ShardSet
from data_shards.workers import WorkersConfig
from segdiff_dist.config import differences
from segdiff_dist.downstream.arms import Training, trainings_of
from segdiff_dist.downstream.config import DownstreamConfig
from segdiff_dist.downstream.memory import trainings_problems
from segdiff_dist.downstream.summary import summarise
from segdiff_dist.downstream.trainer import SCORES, Inputs, Trainer, test_rows, training_rows
from segdiff_dist.evaluation.metrics.sums import Interval
from segdiff_dist.planning import memory as memory_planning
from segdiff_dist.planning.duration import duration_s, is_short
from segdiff_dist.ranks.distributed import pick_device
from segdiff_dist.ranks.precision import settled
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.job import sample, weights_digest
from segdiff_dist.sampling.store_files import JOB
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import segmenter_network
from segdiff_dist.training.throughput import peak_flops

if TYPE_CHECKING:
    from segdiff_dist.denoising.config import DiffusionConfig
    from segdiff_dist.sampling.store import SampleStore

FOLDER, SUMMARY = "downstream", "summary.json"
_SAMPLES, _GENERATED, _TRAININGS, _SETTINGS = "samples", "generated", "trainings", "settings.json"


class DownstreamFailed(WorkFailed):
    """Some trainings failed. The others are kept, and the same call tries the failed ones again."""


@dataclass(frozen=True)
class Sections:
    """The sections of the run's configuration that the trainings use beside their own."""

    diffusion: DiffusionConfig
    sample: SampleConfig
    """The settings of the evaluated samples; the new samples get the same."""
    segmenter: SegmenterConfig
    loader: LoaderConfig
    workers: WorkersConfig
    """Who samples and trains."""


@dataclass(frozen=True)
class Downstream:
    """A checked job, made by `plan`."""

    run: Path
    shards: ShardSet
    config: DownstreamConfig
    diffusion: DiffusionConfig
    sample: SampleConfig
    segmenter: SegmenterConfig
    loader: LoaderConfig
    split: str
    interval: Interval
    workers: WorkersConfig
    """Who samples and trains."""

    @property
    def folder(self) -> Path:
        """The folder of all its files."""
        return self.run / FOLDER

    @property
    def num_trainings(self) -> int:
        """Number of trainings of all arms, with those that are finished."""
        return len(trainings_of(self.config))

    def missing(self) -> list[Training]:
        """The trainings that have no scores yet."""
        done = self.folder / _TRAININGS
        return [one for one in trainings_of(self.config) if not (done / one.name / SCORES).is_file()]

    def seconds(self) -> float | None:
        """Of the missing trainings on this machine, by their FLOPs; None on a cluster, whose machines are not known."""
        import torch

        if self.workers.ray_address is not None:
            return None
        pool, missing = self.workers.pool(), len(self.missing())
        network = segmenter_network(self.segmenter, self.shards, self.shards.size)
        if missing == 0 or is_short(network, missing * self.segmenter.train.num_images):
            return 0.0
        peak = peak_flops(torch.device(pool.device), self.segmenter.train.precision).flops
        num_devices = min(pool.num_workers // pool.num_beside, missing)  # the workers on a CPU share its cores
        return duration_s(network, missing * self.segmenter.train.num_images, peak * max(1, num_devices))

    def make(self) -> dict[str, Any]:
        """Sample, train, test; returns what summary.json holds.

        InputProblems if another process works on it. SamplingFailed and DownstreamFailed where a part failed; the
        rest is kept.
        """
        held = locked(lock_beside(self.folder), self.folder, "is training segmenters for it")
        with held, explain_full_disk(self.folder):
            return self._make()

    def _make(self) -> dict[str, Any]:
        write_atomic(self.folder / _SETTINGS, json.dumps(_settings(self), indent=1) + "\n")
        rows = training_rows(self.shards, self.loader)
        samples = sample(self.run, self.shards, rows, self.diffusion, self.sample, workers=self.workers)
        generated = _as_shards(samples, self.shards, self.folder / _GENERATED)
        trainings = trainings_of(self.config)
        done = self.folder / _TRAININGS
        _train(self, generated, self.missing(), len(trainings))
        summary = summarise(
            {one: done / one.name / SCORES for one in trainings},
            self.shards,
            rows,
            num_generated=len(samples),
            interval=self.interval,
        )
        summary |= {"settings": _settings(self), "samples": str(samples.path)}
        validation = [] if self.split == "val" else test_rows(self.shards, self.loader, "val").tolist()
        summary["granted"] = {
            "num_validation_slices": len(validation),
            "num_validation_patients": len(set(self.shards.patients(validation))),
            "num_mask_patients": len(set(self.shards.patients(samples.items["row"].unique()))),
        }
        write_atomic(self.folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
        return summary


def plan(
    run: Path, evaluated: SampleStore, config: DownstreamConfig, sections: Sections, interval: Interval
) -> Downstream:
    """Check everything; nothing is written. `evaluated`: the run's samples, whose shard set is the real data.

    Raises InputProblems, all at once: settings out of range, a set of another size than the model's images, nothing to
    train or test on, trainings that were started with other settings, and trainings that do not fit into memory.
    """
    if "shards" not in evaluated.job:
        value = "made from masks without images"
        raise problem(evaluated.path, "samples", value, "evaluate samples whose masks come from a shard set")
    shards = ShardSet.open(evaluated.job["shards"])
    with reading(evaluated.path / JOB, "the description of a job", "sample again"):
        split = config.split or evaluated.job["sample"]["split"]
    segmenter = sections.segmenter
    train = replace(
        segmenter.train,
        num_images=config.num_images or segmenter.train.num_images,
        precision=settled(segmenter.train.precision, pick_device(sections.workers.device)),
    )
    made = Downstream(
        run.resolve(),
        shards,
        config,
        sections.diffusion,
        _training_images(run, evaluated, config, sections.sample),
        replace(segmenter, train=train),
        # A mix would name groups of the real set alone. No crop: the set must have the size of the model's images.
        replace(sections.loader, mix={}, crop_size=None),
        split,
        interval,
        # The threads of the sample section, since rounding depends on their number.
        replace(sections.workers, threads_per_worker=sections.sample.threads_per_worker, most_on_cpu=None),
    )
    refuse([*config.problems(), *_problems(made, int(evaluated.image.shape[-1]))])
    refuse(_memory_problems(made))
    return made


def _training_images(run: Path, evaluated: SampleStore, config: DownstreamConfig, sample: SampleConfig) -> SampleConfig:
    """The settings of the generated images to train on: of the train split's masks, each in its own modality."""
    return replace(
        sample,
        precision=evaluated.job["sample"].get("precision", sample.precision),
        split="train",
        masks=None,
        num=config.num_masks,
        samples_per_mask=config.images_per_mask,
        diverse_masks=None,
        cross_modality_masks=0,
        target_modality="same",
        out=run.resolve() / FOLDER / _SAMPLES,
    )


def _problems(made: Downstream, size: int) -> Iterator[Problem]:
    shards, loader = made.shards, made.loader
    if made.split == "train":
        remedy = "give val or test: on the train split a segmenter is tested on its own training slices"
        yield Problem("config", "downstream.split", "train (that of the samples)", remedy)
    if size != shards.size:
        value = f"{shards.size} pixels a side, but the model makes images of {size}"
        yield Problem(shards.root, "size", value, "prepare a set of the model's size, and sample from that")
    if not len(training_rows(shards, loader)):
        yield Problem(shards.root, "train split", "no labelled slice", "widen loader.modalities or loader.axes")
    if made.split != "train" and not len(test_rows(shards, loader, made.split)):
        yield Problem(shards.root, f"{made.split} split", "no labelled slice", "give another downstream.split")
    yield from made.segmenter.problems(shards.size)
    before = made.folder / _SETTINGS
    if before.is_file():
        old, new = read_json(before, f"remove {made.folder}", "settings"), _settings(made)
        for key, was, now in differences(old, new):
            remedy = f"use that value, or remove {made.folder}"
            yield Problem(str(before), key, f"{was!r} there, {now!r} now", remedy)


def _memory_problems(made: Downstream) -> list[Problem]:
    """Memory problems of this machine. The machines of a cluster are not checked."""
    import torch

    num_missing = len(made.missing())
    if made.workers.ray_address is not None or not num_missing:
        return []
    pool = made.workers.pool()
    num_workers = min(pool.num_workers, num_missing)
    network = segmenter_network(made.segmenter, made.shards, made.shards.size)
    capacity = memory_planning.capacity_of(torch.device(pool.device))
    num_beside = min(pool.num_beside, num_workers)
    return trainings_problems(network, made.segmenter, capacity, num_workers, num_beside)


def _settings(made: Downstream) -> dict[str, Any]:
    """The settings that every training depends on, without its patients and its seed: more shares and seeds only add
    trainings."""
    segmenter = identity(made.segmenter)
    del segmenter["train"]["seed"]
    return json.loads(
        json.dumps(
            {
                "segmenter": segmenter,
                "loader": identity(made.loader.resolved(made.shards.modalities)),
                "sample": made.sample.result_settings(made.diffusion.objective),
                "weights_digest": weights_digest(made.run / "weights" / made.sample.weights),
                "shards_digest": made.shards.digest,
                "split": made.split,
            }
        )
    )


def _provenance_of(out: Path) -> Any:
    """The provenance of the set in `out`; None if no set can be read."""
    with suppress(InputProblems):
        return read_index(out).get("synthetic")
    return None


def _as_shards(samples: SampleStore, real: ShardSet, out: Path) -> Path:
    """The images as a set that can be opened together with the real one; written once."""
    from data_shards.progress import progress_bar
    from segdiff_dist.export.config import ExportConfig
    from segdiff_dist.export.samples import FinishedSamples
    from segdiff_dist.export.shards import write_shard_set

    finished = FinishedSamples.of(samples, None)
    if _provenance_of(out) == finished.provenance:
        return out
    shutil.rmtree(out, ignore_errors=True)
    iterated = progress_bar(finished, total=len(finished), desc="as shards", unit="img")
    config = ExportConfig(format="shards", split="train", codec=real.codec)
    write_shard_set(out, finished, iterated, config, bits=real.bits, soft_edge="edge" in real.parts)
    return out


def _train(made: Downstream, generated: Path, missing: list[Any], total: int) -> None:
    """Every missing training on a worker: one a GPU, or one a core."""
    from data_shards.progress import progress_bar

    failures = []
    bar = progress_bar(total=total, initial=total - len(missing), desc="downstream", unit="training")
    with made.workers.joined(), bar:
        pool = made.workers.pool()  # of the cluster, if one was joined
        inputs = Inputs(
            made.shards.resolved,
            generated,
            made.folder / _TRAININGS,
            made.segmenter,
            made.loader,
            made.split,
            pool.device,
        )
        for done in fan_out(
            partial(Trainer, inputs),
            missing,
            num_workers=pool.num_workers,
            gpus_per_worker=pool.gpus_per_worker,
            address=made.workers.ray_address,
        ):
            if isinstance(done.result, TaskFailure):
                failures.append(f"{done.task.name}: {done.result.error}")
            bar.update(1)
    if failures:
        text = f"{len(failures)} of {len(missing)} trainings failed, the first: {failures[0]}"
        raise DownstreamFailed(f"{text}; the others are kept, and the same command tries these again")
