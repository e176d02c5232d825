"""What each stage of a plan takes."""

from __future__ import annotations

from dataclasses import dataclass

from data_shards.wording import in_words
from data_shards.workers import LEAST_BYTES, LEAST_BYTES_WITH_TORCH
from segdiff_dist.budget.choose import STARTS_S, Candidate, Networks
from segdiff_dist.experiment import Experiment
from segdiff_dist.planning.memory import disk_bytes, plan_memory
from segdiff_dist.training.config import TrainConfig

# A file of an exported image: whole blocks, a header.
_BYTES_PER_FILE = 8192


@dataclass(frozen=True)
class Row:
    """One stage. `memory_bytes`: of all its processes together; `num_bytes`: on the disk, before compression."""

    stage: str
    what: str
    seconds: float
    memory_bytes: int
    num_bytes: int


def rows_of(candidate: Candidate, experiment: Experiment) -> list[Row]:
    """A row a stage. `experiment`: as it was made from the candidate."""
    task, machine = candidate.task, candidate.task.machine
    networks = Networks.of(experiment, task.data_set, machine.device)
    prepare, sample = experiment.prepare, experiment.sample
    pixels, validated = prepare.size**2, candidate.validated_s
    volumes, slices = task.data_set.cost(prepare)
    images = (sample.num or 0) + candidate.more_images
    segmenter, denoiser = experiment.segmenter.train, experiment.train
    seconds = {
        "prepare": candidate.prepare_s,
        "train-segmenter": segmenter.num_images * candidate.lengths["segmenter"].seconds + validated["segmenter"],
        "train": denoiser.num_images * candidate.lengths["denoiser"].seconds + validated["denoiser"],
        "sample": images * candidate.sampled_s,
        "evaluate": images * candidate.evaluated_s,
    }
    on_gpu = machine.device.type == "cuda"
    where = "GPU" if on_gpu else "lone host"
    workers = {name: getattr(experiment, name).num_workers or 1 for name in ("prepare", "sample", "evaluate")}

    def training(stage: str, config: TrainConfig) -> tuple[str, int, int]:
        network = networks.segmenter if stage == "segmenter" else networks.denoiser
        at_once = (
            "as many at once as fit" if config.micro_batch_size == "auto" else f"{config.micro_batch_size} at once"
        )
        what = f"{network.num_parameters / 1e6:.1f} M parameters, {config.num_images:,} images, {at_once}"
        memory = plan_memory(network, config, 1, on_gpu).needed(where)
        return f"{what}, {config.precision}", memory, disk_bytes(network, config)

    split = f"{sample.num or 0:,} masks of {sample.split}"
    torch_bytes = LEAST_BYTES_WITH_TORCH
    found = {
        "prepare": (
            f"{in_words(volumes, 'volume')}, at most {in_words(slices, 'slice')} of {prepare.size} pixels, "
            f"{in_words(workers['prepare'], 'worker')}",
            workers["prepare"] * LEAST_BYTES,
            slices * (1 + prepare.bits // 8) * pixels,
        ),
        "train-segmenter": training("segmenter", segmenter),
        "train": training("denoiser", denoiser),
        "sample": (
            f"{images:,} images of {split}, {workers['sample']} workers",
            workers["sample"] * torch_bytes,
            2 * images * pixels,
        ),
        "evaluate": (
            f"{images:,} images, {workers['evaluate']} workers",
            workers["evaluate"] * torch_bytes,
            2 * images * pixels,
        ),
        "report": ("tables as CSV", torch_bytes, 2**20),
        "export": (
            f"{images:,} images as {experiment.export.format}",
            torch_bytes,
            2 * images * (pixels + _BYTES_PER_FILE),
        ),
    }
    return [Row(name, what, STARTS_S[name] + seconds.get(name, 0.0), *size) for name, (what, *size) in found.items()]
