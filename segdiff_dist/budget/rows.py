"""What each stage of a plan takes."""

from __future__ import annotations

from dataclasses import dataclass

from data_shards.wording import in_words
from data_shards.workers import LEAST_BYTES, LEAST_BYTES_WITH_TORCH
from segdiff_dist.budget.choose import STARTS_S, Candidate, Networks
from segdiff_dist.experiment import Experiment
from segdiff_dist.planning.memory import disk_bytes, plan_memory
from segdiff_dist.planning.network import Network
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
    request = candidate.request
    networks = Networks.of(experiment, request.data_set, request.machine.device)
    prepare, sample = experiment.prepare, experiment.sample
    pixels = prepare.size**2
    volumes, slices = request.data_set.cost(prepare)
    images = (sample.num or 0) + candidate.more_images
    on_gpu = request.machine.device.type == "cuda"
    workers = {name: getattr(experiment, name).num_workers or 1 for name in ("prepare", "sample", "evaluate")}
    torch_bytes = LEAST_BYTES_WITH_TORCH
    found = {
        "prepare": (
            f"{in_words(volumes, 'volume')}, at most {in_words(slices, 'slice')} of {prepare.size} pixels, "
            f"{in_words(workers['prepare'], 'worker')}",
            workers["prepare"] * LEAST_BYTES,
            slices * (1 + prepare.bits // 8) * pixels,
        ),
        "train-segmenter": _training(networks.segmenter, experiment.segmenter.train, on_gpu),
        "train": _training(networks.denoiser, experiment.train, on_gpu),
        "sample": (
            f"{images:,} images of {sample.num or 0:,} masks of {sample.split}, {workers['sample']} workers",
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
    seconds = _seconds(candidate, experiment, images)
    return [Row(name, what, STARTS_S[name] + seconds.get(name, 0.0), *size) for name, (what, *size) in found.items()]


def _seconds(candidate: Candidate, experiment: Experiment, images: int) -> dict[str, float]:
    """How long the stages work that take longer than their start, for this many images."""
    segmenter, denoiser = experiment.segmenter.train, experiment.train
    lengths, validated = candidate.lengths, candidate.validated_s
    return {
        "prepare": candidate.prepare_s,
        "train-segmenter": segmenter.num_images * lengths["segmenter"].seconds + validated["segmenter"],
        "train": denoiser.num_images * lengths["denoiser"].seconds + validated["denoiser"],
        "sample": images * candidate.sampled_s,
        "evaluate": images * candidate.evaluated_s,
    }


def _training(network: Network, config: TrainConfig, on_gpu: bool) -> tuple[str, int, int]:
    """A training's text, bytes of memory and bytes on the disk."""
    size = config.micro_batch_size
    at_once = "as many at once as fit" if size == "auto" else f"{size} at once"
    what = f"{network.num_parameters / 1e6:.1f} M parameters, {config.num_images:,} images, {at_once}"
    memory = plan_memory(network, config, 1, on_gpu).needed("GPU" if on_gpu else "lone host")
    return f"{what}, {config.precision}", memory, disk_bytes(network, config)
