"""The configuration for a data set, a machine and the hours there are.

A recipe is a shipped configuration. The first one counts whose nets fit into the memory and whose shortest useful
training fits into the hours. Values that a user gives are kept; batches, precision, workers and lengths are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from data_shards.fan_out import num_cores
from data_shards.problems import problem, refuse
from segdiff_dist.budget.data_set import DataSet
from segdiff_dist.budget.lengths import Length, fit, least_seconds
from segdiff_dist.budget.speed import pass_s, training_s
from segdiff_dist.config import as_dict, flatten, merge, read_yaml, validate
from segdiff_dist.denoising.network_shapes import denoiser_network
from segdiff_dist.denoising.samplers import num_evaluations
from segdiff_dist.experiment import Experiment
from segdiff_dist.planning.memory import HIGH, Capacity, alternatives, capacity_of, memory_problems, plan_memory
from segdiff_dist.planning.network import Network
from segdiff_dist.ranks.distributed import pick_device
from segdiff_dist.ranks.precision import settled
from segdiff_dist.segmentation.network import segmenter_network
from segdiff_dist.shipped import find_config
from segdiff_dist.training.config import TrainConfig

# The best first. `amos_small` has 64x64 pixels, the others 256x256.
_ON_GPU, _ON_CPU = ("best_ct_mr", "starter", "amos_small"), ("starter", "amos_small")
# The part of a recipe's own lengths that is of use. A quarter of amos_small is 2,400 images; at its size Dice was 0.641
# after 800 and 0.706 after 3,200 (README.md). starter and best_ct_mr: assumed.
_LEAST_PART, _USUAL_PART = {"best_ct_mr": 0.02, "starter": 1.0}, 0.25
_LEAST_MASKS = 16
# Passes over the training slices after which more of them bring little; assumed. A recipe's own length is no less.
_MOST_PASSES = 100
# The hours are not used up: the speed of a machine that does other work changes.
_USED = 0.9
_CHECKPOINTS, _LOG_LINES = 6, 60
# Shares of the rest of the time: a segmenter learns sooner than a denoiser.
_SHARES = {"segmenter": 0.2, "denoiser": 0.65, "masks": 0.15}
# Seconds of a stage besides its images: libraries, Ray, MLflow. Measured with the smoke configuration on two cores.
STARTS_S = {
    **{"prepare": 10.0, "train-segmenter": 20.0, "train": 25.0, "sample": 15.0},
    **{"evaluate": 40.0, "report": 5.0, "export": 5.0},
}
# One core at 256 pixels (docs/results.md).
_EVALUATED_A_SECOND, _EVALUATED_SIDE = 19.0, 256
# A step of training over its forward and backward passes: optimiser, averages, the loader's share of the cores.
_STEP = 1.3
_PREPARED_A_SECOND = 475.0


@dataclass(frozen=True)
class Machine:
    """What there is to work with."""

    device: torch.device
    cores: int
    capacity: Capacity
    free_bytes: int
    """On the disk of the output folder."""

    @classmethod
    def here(cls, free_bytes: int) -> Machine:
        """This machine, now."""
        device = pick_device("auto")
        return cls(device, num_cores(), capacity_of(device), free_bytes)


@dataclass(frozen=True)
class Speed:
    """Seconds for one image: a training step's part of each network, and a pass through each."""

    segmenter: float
    denoiser: float
    segmenter_pass: float
    denoiser_pass: float


@dataclass(frozen=True)
class BudgetRequest:
    """What is asked. `given`: values that are kept, as in a configuration file; `recipe`: the configuration to begin
    with, None for the best that fits; `paths`: amos_root, data, run."""

    data_set: DataSet
    machine: Machine
    hours: float
    paths: Mapping[str, str]
    given: Mapping[str, Any]
    recipe: str | None = None

    @cached_property
    def kept(self) -> set[str]:
        """Dotted keys of the given values."""
        return set(flatten(self.given))

    @property
    def seconds(self) -> float:
        """Seconds to plan for: not all of the hours (_USED)."""
        return _USED * 3600 * self.hours


@dataclass(frozen=True)
class Candidate:
    """A recipe for this data set, with batches that fit into the memory."""

    request: BudgetRequest
    recipe: str
    experiment: Experiment
    speed: Speed

    @cached_property
    def num_slices(self) -> dict[str, int]:
        """Slices by split: those of training, of validation and of the masks to sample."""
        splits = {"train", "val", self.experiment.sample.split}
        return {one: self.request.data_set.num_slices(self.experiment.prepare, one) for one in splits}

    @property
    def more_images(self) -> int:
        """Images besides one for each mask."""
        sample = self.experiment.sample
        diverse = self.num_slices[sample.split] if sample.diverse_masks is None else sample.diverse_masks
        return diverse * (sample.samples_per_mask - 1) + sample.cross_modality_masks * min(2, sample.samples_per_mask)

    @property
    def sampled_s(self) -> float:
        """Seconds of an image that is made."""
        sample = self.experiment.sample
        return self.speed.denoiser_pass * num_evaluations(sample.sampler, self.experiment.diffusion)

    @property
    def evaluated_s(self) -> float:
        """Seconds of an image that is measured."""
        return evaluation_s(self.experiment.prepare.size, self.experiment.evaluate.workers.pool().num_workers)

    @cached_property
    def prepare_s(self) -> float:
        """Volumes are read as a whole, of however many slices."""
        prepare = self.experiment.prepare
        slices = self.request.data_set.cost(prepare)[1] * prepare.slice_stride
        return slices / (_PREPARED_A_SECOND * prepare.workers.num_on_cores)

    @property
    def validated_s(self) -> dict[str, float]:
        """Seconds of all validations of each network."""
        own = self.experiment.validation
        passes = own.num_images + own.num_pictures * own.num_steps
        segmented = _CHECKPOINTS * self.num_slices["val"] * self.speed.segmenter_pass
        return {"segmenter": segmented, "denoiser": _CHECKPOINTS * passes * self.speed.denoiser_pass}

    @property
    def fixed_s(self) -> float:
        """Seconds that no length changes."""
        more = self.more_images * (self.sampled_s + self.evaluated_s)
        return sum(STARTS_S.values()) + self.prepare_s + sum(self.validated_s.values()) + more

    @cached_property
    def lengths(self) -> dict[str, Length]:
        """What may be chosen."""
        experiment, request = self.experiment, self.request
        part = _LEAST_PART.get(self.recipe, _USUAL_PART)
        most = _MOST_PASSES * self.num_slices["train"]
        masks = max(1, self.num_slices[experiment.sample.split])
        trained = {
            "segmenter": ("segmenter.train.num_images", experiment.segmenter.train, self.speed.segmenter),
            "denoiser": ("train.num_images", experiment.train, self.speed.denoiser),
        }
        found = {}
        for name, (key, config, seconds) in trained.items():
            least = _whole(part * config.num_images, config.global_batch_size)
            ends = (config.num_images,) * 2 if key in request.kept else (least, max(config.num_images, most))
            found[name] = Length(*ends, _SHARES[name], _STEP * seconds)
        ends = (min(_LEAST_MASKS, masks), masks)
        if "sample.num" in request.kept:
            ends = (min(masks, experiment.sample.num or masks),) * 2
        return found | {"masks": Length(*ends, _SHARES["masks"], self.sampled_s + self.evaluated_s)}

    @property
    def least_s(self) -> float:
        """Seconds of the shortest run that is of use."""
        return self.fixed_s + least_seconds(self.lengths)

    def chosen(self) -> Experiment | None:
        """The configuration; None if the hours are too few."""
        numbers = fit(self.request.seconds - self.fixed_s, self.lengths)
        if numbers is None:
            return None
        changes = {
            "train": _timed(self.experiment.train, numbers["denoiser"]),
            "segmenter": {"train": _timed(self.experiment.segmenter.train, numbers["segmenter"])},
            "sample": {"num": numbers["masks"]},
        }
        return validate(Experiment, merge(merge(as_dict(self.experiment), changes), self.request.given), "plan")


@dataclass(frozen=True)
class Networks:
    """Both networks, as shapes."""

    segmenter: Network
    denoiser: Network

    @classmethod
    def of(cls, experiment: Experiment, data_set: DataSet, device: torch.device) -> Networks:
        """The networks of an experiment, on slices of this data set."""
        side = experiment.loader.crop_size or experiment.prepare.size
        return cls(
            segmenter_network(experiment.segmenter, data_set, side),
            denoiser_network(experiment.denoiser, data_set, side, device, passes=experiment.diffusion.passes),
        )


Measure = Callable[[Experiment, Networks, torch.device], Speed]


def measured(experiment: Experiment, networks: Networks, device: torch.device) -> Speed:
    """The speed of this machine, in a few passes of each network."""
    found = {}
    sections = {"segmenter": experiment.segmenter.train, "denoiser": experiment.train}
    for name, config in sections.items():
        network: Network = getattr(networks, name)
        images = 8 if config.micro_batch_size == "auto" else config.micro_batch_size
        precision = settled(config.precision, device)
        found[name] = training_s(network, images, device, precision) * network.passes
        found[f"{name}_pass"] = pass_s(network, images, device, precision)
    return Speed(**found)


def choose(request: BudgetRequest, measure: Measure = measured) -> tuple[Candidate, Experiment]:
    """The best recipe that fits, and the configuration made from it. Raises InputProblems if none does."""
    device = request.machine.device
    names = (_ON_GPU if device.type == "cuda" else _ON_CPU) if request.recipe is None else (request.recipe,)
    too_long: list[Candidate] = []
    for name in names:
        is_last = name == names[-1]
        experiment, networks = _fitted(request, _adapted(request, name))
        found = partial(_memory_problems, experiment, networks, request.machine.capacity)
        if problems := found():
            refuse(problems if is_last and not too_long else [])
            continue
        candidate = Candidate(request, name, experiment, measure(experiment, networks, device))
        if (chosen := candidate.chosen()) is not None:
            return candidate, chosen
        too_long.append(candidate)
    least = min(too_long, key=lambda one: one.least_s)
    hours = least.least_s / _USED / 3600
    numbers = {name: one.least for name, one in least.lengths.items()}
    value = (
        f"{request.hours:g}, and the least that is of use needs {math.ceil(hours * 100) / 100:g} ({least.recipe}: "
        f"the segmenter on {numbers['segmenter']:,} images, the denoiser on {numbers['denoiser']:,}, "
        f"{numbers['masks']:,} masks sampled)"
    )
    raise problem(
        "command line", "--hours", value, f"give --hours {_rounded_up(hours)}, or shorter lengths by --config"
    )


def _rounded_up(hours: float) -> str:
    step = 0.05 if hours < 2 else 0.5
    return f"{(int(hours / step) + 1) * step:g}"


def _adapted(request: BudgetRequest, recipe: str) -> Experiment:
    """The recipe for this data set, with the given values."""
    data_set, device = request.data_set, request.machine.device
    values = merge(as_dict(Experiment()), read_yaml(find_config(recipe)))
    own: dict[str, Any] = {
        "sample": {"split": data_set.sampled_split, "num": None},
        "export": {"format": data_set.export_format, "modality": None},
    }
    if len(data_set.present) == 1:
        own["sample"]["cross_modality_masks"] = 0
    if not set(values["loader"]["mix"] or {}) <= set(data_set.present):
        values["loader"]["mix"] = {}
    if "prepare.axes" in request.kept:
        own["loader"] = {"axes": request.given["prepare"]["axes"]}
    values = merge(merge(values, own), request.given) | dict(request.paths)
    for section in (values["train"], values["segmenter"]["train"]):
        section["precision"] = settled(section["precision"], device)
    return validate(Experiment, values, "plan")


def _fitted(request: BudgetRequest, experiment: Experiment) -> tuple[Experiment, Networks]:
    """The experiment with micro-batches that fit into the memory, if any do, and numbers of workers."""
    networks = Networks.of(experiment, request.data_set, request.machine.device)
    fitting = partial(_fitting, capacity=request.machine.capacity)
    segmenter = experiment.segmenter
    changes = {
        "train": fitting("train", networks.denoiser, experiment.train),
        "segmenter": {
            "train": fitting("segmenter.train", networks.segmenter, segmenter.train, multiple_of=segmenter.dice_group)
        },
        "prepare": {"num_workers": experiment.prepare.workers.num_on_cores},
        "sample": {"num_workers": experiment.sample.workers.pool().num_workers},
        "evaluate": {"num_workers": experiment.evaluate.workers.pool().num_workers},
    }
    return validate(Experiment, merge(merge(as_dict(experiment), changes), request.given), "plan"), networks


def _fitting(
    section: str, network: Network, config: TrainConfig, *, capacity: Capacity, multiple_of: int = 1
) -> dict[str, Any]:
    """The largest micro-batch that fits, without activation checkpointing if possible; the smallest if none does."""
    plan_of = partial(plan_memory, network, ranks=1, on_gpu=capacity.gpu is not None)
    changed = config
    for changed in (config, *(one for _, one in alternatives(section, config, 1, multiple_of))):
        if capacity.lacks(plan_of(config=changed), HIGH) is None:
            break
    return {
        "micro_batch_size": changed.micro_batch_size,
        "activation_checkpointing": changed.activation_checkpointing,
    }


def _memory_problems(experiment: Experiment, networks: Networks, capacity: Capacity) -> list[Any]:
    sections = (
        ("train", networks.denoiser, experiment.train),
        ("segmenter.train", networks.segmenter, experiment.segmenter.train),
    )
    return [found for section in sections for found in memory_problems(*section, capacity)]


def _timed(config: TrainConfig, num_images: int) -> dict[str, Any]:
    """A training's points in time, for its length."""
    batch = config.global_batch_size
    num_images = _whole(num_images, batch)
    return {
        "num_images": num_images,
        "warmup_images": min(config.warmup_images, num_images // 20),
        "checkpoint_every_images": _whole(num_images / _CHECKPOINTS, batch),
        "log_every_images": _whole(num_images / _LOG_LINES, batch),
        "snapshot_every_images": None,
    }


def _whole(images: float, batch: int) -> int:
    """A number of images in whole steps; at least one."""
    return max(1, round(images / batch)) * batch


def evaluation_s(size: int, workers: int) -> float:
    """Seconds of an image of `size` pixels that is measured."""
    return max(0.1, (size / _EVALUATED_SIDE) ** 2) / (_EVALUATED_A_SECOND * workers)
