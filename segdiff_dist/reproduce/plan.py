"""The cost of reproducing the table: counts from the archive's headers, time and disk. Predicted, not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from data_shards.ingest import archive
from data_shards.ingest.counts import count_slices
from data_shards.labels import LABEL_TABLES
from data_shards.wording import in_words
from segdiff_dist.denoising.samplers import num_evaluations
from segdiff_dist.experiment import Experiment
from segdiff_dist.planning import scaling
from segdiff_dist.reproduce.settings import COLUMN_NAMES, Experiments, Table1Settings
from segdiff_dist.reproduce.table import TITLES
from segdiff_dist.training.config import TrainConfig

# Tensor cores of an H100 do TF32 at half the rate of bf16 (data sheet: 494.5 and 989.5 TFLOP/s).
_TF32 = replace(scaling.INFINIBAND, flops=scaling.INFINIBAND.flops / 2)
# fp32 sampling uses none of them (sampling/worker.py): 67 TFLOP/s on the data sheet.
_FP32 = replace(scaling.INFINIBAND, flops=67e12)
# Below this a step is bound by launching kernels and reading data, which the model of docs/scale.md leaves out.
_SMALLEST_FLOP = 1e11


@dataclass(frozen=True)
class Step:
    """One stage. seconds: None if there is no estimate; bytes: upper bound of the files that it leaves on the disk."""

    name: str
    what: str
    seconds: float | None
    num_bytes: float


def steps(settings: Table1Settings, experiments: Experiments) -> list[Step]:
    """Every step of the reproduction in order, as on `settings.gpus` H100. Reads headers, makes nothing."""
    segmenter_run, config = experiments.segmenter, experiments.prepare.prepare
    cases = archive.read_archive(settings.amos, config.modalities, config.modality)
    counted = count_slices(cases, config)
    sides = (1 + config.bits // 8) * config.size**2
    slices = in_words(counted.slices, "slice")
    found = [
        Step("prepare", f"{slices} of {in_words(counted.volumes, 'volume')}", None, counted.slices * sides),
        _training("train-segmenter", _segmenter_network(segmenter_run), segmenter_run.segmenter.train, settings.gpus),
    ]
    for name in (n for n in COLUMN_NAMES if n in experiments.columns):
        column, title = experiments.columns[name], TITLES[name]
        network = _denoiser_network(column)
        num = _num_images(column)
        passes = num_evaluations(column.sample.sampler, column.diffusion)
        machine = _FP32 if column.sample.precision == "fp32" else scaling.INFINIBAND
        # A forward pass is a third of a training step's work.
        work_s = num * passes * network.flop_per_image / 3 / (machine.flops * machine.mfu * settings.gpus)
        sample_s = work_s if network.flop_per_image >= _SMALLEST_FLOP else None
        split = column.sample.split
        what = f"at most {num:,} images, {passes} passes each, masks of split {split}"
        found += [
            _training(f"{title}: train", network, column.train, settings.gpus),
            Step(f"{title}: sample", what, sample_s, num * 2 * config.size**2),
            Step(f"{title}: evaluate", "metrics, figures, report", None, num * 2 * config.size**2),
        ]
    return found


def describe(found: list[Step], settings: Table1Settings) -> str:
    """The steps as a table, and their sum, for a person."""
    rows = [(step.name, step.what, _duration(step.seconds), _size(step.num_bytes)) for step in found]
    known = [step.seconds for step in found if step.seconds is not None]
    rows.append(("in all", "", _duration(sum(known) if known else None), _size(sum(step.num_bytes for step in found))))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    plural = "s" if settings.gpus > 1 else ""
    basis = f"Time is predicted for {settings.gpus} H100{plural} (docs/scale.md), one step after the other; - where"
    return "\n".join([*lines, f"{basis} that model says nothing. Bytes are at most."])


def _training(name: str, network: scaling.NetworkCosts, train: TrainConfig, gpus: int) -> Step:
    micro = train.global_batch_size // gpus if train.micro_batch_size == "auto" else train.micro_batch_size
    machine = _TF32 if train.precision == "fp32" else scaling.INFINIBAND
    plan = scaling.ParallelPlan(gpus, train.global_batch_size, micro, train.zero_stage)
    seconds = None
    if network.flop_per_image >= _SMALLEST_FLOP:
        seconds = train.num_images / scaling.images_per_s(network, machine, plan)
    # fp32 weights, two moments and the averages; one checkpoint more while the oldest is not yet gone.
    state = network.parameters * 4 * (3 + network.averages)
    exported = network.parameters * 4 * (1 + network.averages)
    what = f"{train.num_images:,} images, batch {train.global_batch_size}, {train.precision}"
    return Step(name, what, seconds, state * (train.keep_checkpoints + 1) + exported)


def _num_images(column: Experiment) -> int:
    """The masks of a sample job, if the split has enough; 0 means all, since headers do not give their number."""
    sample, num = column.sample, column.sample.num or 0
    diverse = num if sample.diverse_masks is None else min(sample.diverse_masks, num)
    return num + diverse * (sample.samples_per_mask - 1)


def _denoiser_network(column: Experiment) -> scaling.NetworkCosts:
    """The column's net for the scaling model: built without memory, with its FLOPs counted."""
    import torch

    from segdiff_dist.denoising.denoiser import Denoiser

    size = column.loader.crop_size or column.prepare.size
    with torch.device("meta"):
        model = Denoiser(column.denoiser, LABEL_TABLES[column.prepare.label_set], size)
        x_t_BCHW, mask_BHW = torch.zeros(1, 1, size, size), torch.zeros(1, size, size, dtype=torch.uint8)
        zero_B = torch.zeros(1, dtype=torch.int64)
    return _network(column, column.train, model, x_t_BCHW, zero_B, mask_BHW, zero_B)


def _segmenter_network(segmenter_run: Experiment) -> scaling.NetworkCosts:
    import torch

    from segdiff_dist.segmentation.network import SegmenterNet

    size = segmenter_run.loader.crop_size or segmenter_run.prepare.size
    with torch.device("meta"):
        model = SegmenterNet(segmenter_run.segmenter, LABEL_TABLES[segmenter_run.prepare.label_set].num_classes)
        image_BHW, zero_B = torch.zeros(1, size, size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    return _network(segmenter_run, segmenter_run.segmenter.train, model, image_BHW, zero_B)


def _network(experiment: Experiment, train: TrainConfig, model: Any, *inputs: Any) -> scaling.NetworkCosts:
    from segdiff_dist.training.throughput import count_flops

    return scaling.NetworkCosts(
        parameters=sum(p.numel() for p in model.parameters()),
        flop_per_image=count_flops(model, *inputs),
        averages=len(train.ema_lengths),
        bytes_per_image=(1 + experiment.prepare.bits // 8) * experiment.prepare.size**2,
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{math.ceil(seconds)} s"


def _size(num_bytes: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
