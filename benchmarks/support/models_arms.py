"""The models of benchmarks/models.py: which trainings each consists of, how compute is divided among them, and what
they took.

    OUT/shards, OUT/segmenter            the slices and the segmenter that measures all images (make_data)
    OUT/BY/MODEL-LR-SEED/PART.yaml       the settings of a training
                         PART            its run folder; the last part's has samples and evaluation
                         PART.trained    the settings that it was trained with, when it is finished
                         PART.loss       its validation loss, where it was needed to choose a learning rate

BY is what is equal: flops, or seconds of training steps. Existing results are not made again.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_shards.files import write_atomic
from segdiff_dist.config import merge, to_yaml
from support.recipes_runs import seconds_at
from support.small_runs import flops_of, network_of, shared_settings, stage

Settings = dict[str, Any]
By = Literal["flops", "seconds"]
AUTOENCODER = "train-autoencoder"
# An autoencoder of another learning rate makes other latents, whose validation losses cannot be compared.
AUTOENCODER_LR = 2e-3


@dataclass(frozen=True)
class Part:
    """A training. `share`: of its model's compute. `begins_from`: the field of `denoiser` that names the first part."""

    name: str
    share: float
    settings: Settings = field(default_factory=dict, hash=False)
    begins_from: str | None = None
    stage: str = "train"
    is_compared: bool = True
    """Whether its validation loss counts where a learning rate is chosen."""


def _ddpm(prediction: str, **diffusion: Any) -> Settings:
    sampler = {"solver": "ddim", "num_steps": 25, "timestep_spacing": "trailing", "clip_sample": True}
    process = {"objective": "ddpm", "prediction_type": prediction, **diffusion}
    return {"diffusion": process, "sample": {"sampler": sampler}}


def _one(settings: Settings) -> tuple[Part, ...]:
    return (Part("net", 1.0, settings),)


def _net(**denoiser: Any) -> Settings:
    return {"denoiser": denoiser}


# The five systems.
MODELS: dict[str, tuple[Part, ...]] = {
    "concat": _one(_net(conditioning="concat")),
    "spade": _one(_net(conditioning="spade", spade_channels=16)),
    "controlnet": (
        Part("base", 0.5, _net(conditioning="none"), is_compared=False),
        Part("control", 0.5, _net(conditioning="controlnet"), "base"),
    ),
    "latent": (
        Part("autoencoder", 0.4, stage=AUTOENCODER, is_compared=False),
        Part("net", 0.6, _net(space="latent"), "autoencoder"),
    ),
    "cascade": (Part("low", 0.4), Part("high", 0.6, begins_from="cascade")),
}
# The concatenation with another objective, each on both nets, and with another loss or regularisation.
_OBJECTIVES: dict[str, Settings] = {
    "epsilon": _ddpm("epsilon"),
    "v": _ddpm("v", zero_terminal_snr=True),
    "x0": _ddpm("x0", zero_terminal_snr=True),
    "flow": {"diffusion": {"objective": "flow", "lognormal": [0.0, 1.0]}},
}
_EFFICIENT = _net(net="efficient")
VARIANTS: dict[str, tuple[Part, ...]] = {
    "efficient": _one(_EFFICIENT),
    **{name: _one(settings) for name, settings in _OBJECTIVES.items()},
    **{f"efficient-{name}": _one(merge(settings, _EFFICIENT)) for name, settings in _OBJECTIVES.items()},
    "contrastive": _one({"diffusion": {"contrastive_weight": 0.1}}),
    "siamese": _one({"diffusion": {"consistency_weight": 1.0}}),
    "dropout": _one(_net(dropout=0.1)),
}
ALL = MODELS | VARIANTS


@dataclass(frozen=True)
class Training:
    """A model trained once, with all its parts."""

    args: Namespace
    model: str
    seed: int
    lr: float
    by: By = "flops"
    longer: float = 1.0
    """By so much its parts see more images than at equal FLOPs."""

    @property
    def folder(self) -> Path:
        return self.args.out / self.by / f"{self.model}-{self.lr:g}-{self.seed}"

    @property
    def last(self) -> Path:
        """The run folder that samples."""
        return self.folder / ALL[self.model][-1].name

    @property
    def summary_file(self) -> Path:
        return self.last / "evaluation" / "summary.json"

    def train(self, deadline: float) -> bool:
        """Train what is missing; False if time ran out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in ALL[self.model]:
            settings = self.settings(part)
            trained = self.folder / f"{part.name}.trained"
            if trained.is_file() and trained.read_text() == to_yaml(settings):
                continue
            (self.folder / f"{part.name}.loss").unlink(missing_ok=True)
            print(f"{self.by}/{self.folder.name}: {part.name}, {images_in(settings):,} images", flush=True)
            if not stage(part.stage, part.name, settings, self.folder, deadline):
                return False
            write_atomic(trained, to_yaml(settings))
        return True

    @property
    def is_trained(self) -> bool:
        """Whether all its parts are finished."""
        return all((self.folder / f"{part.name}.trained").is_file() for part in ALL[self.model])

    def measure(self, deadline: float) -> bool:
        """Sample and evaluate; False if time ran out."""
        part = ALL[self.model][-1]
        if self.summary_file.is_file():
            return True
        for work in ("sample", "evaluate"):
            print(f"{self.by}/{self.folder.name}: {work}", flush=True)
            if not stage(work, part.name, self.settings(part), self.folder, deadline):
                return False
        return True

    def settings(self, part: Part) -> Settings:
        """The config file of a part. The parts before it must be trained: they belong to its FLOPs."""
        one = self.settings_for(part, self.args.batch)
        per_image = part_flops(part, one) / self.args.batch
        images = self.longer * part.share * self.args.tflops * 1e12 / per_image
        return self.settings_for(part, max(1, round(images / self.args.batch)) * self.args.batch)

    def settings_for(self, part: Part, images: int) -> Settings:
        """The same for a number of images."""
        args = self.args
        own: Settings = {
            "data": str(args.out / "shards"),
            "run": str(self.folder / part.name),
            "train": {"lr": self.lr, "num_images": images, "global_batch_size": args.batch},
            "validation": {"num_images": 64},
            "sample": {"split": args.split},
        }
        own["train"]["micro_batch_size"] = args.batch
        if part.name == "low":
            own["denoiser"] = {"low_resolution": args.side // 2}
        if part.begins_from is not None:
            own["denoiser"] = {part.begins_from: str(self.folder / ALL[self.model][0].name)}
        settings = merge(
            merge(shared_settings(Namespace(masks=args.masks, seed=self.seed), args.out), own), part.settings
        )
        return settings if part.stage == "train" else settings | {"autoencoder": _autoencoder(settings)}

    @cached_property
    def seconds(self) -> float:
        """Seconds of the training steps of all parts."""
        total = 0.0
        for part in ALL[self.model]:
            images = images_in(self.settings(part))
            total += seconds_at(self.log_of(part), (images,))[images]
        return total

    def log_of(self, part: Part) -> Path:
        inside = self.folder / part.name
        return (inside if part.stage == "train" else inside / "autoencoder") / "log.jsonl"

    def costs(self) -> dict[str, Any]:
        """FLOPs, seconds, images, parameters and memory of the training; seconds of an image."""
        parts = [(part, self.settings(part)) for part in ALL[self.model]]
        rows = [json.loads(line) for part, _ in parts for line in self.log_of(part).read_text().splitlines()]
        networks = [_network(part, settings) for part, settings in parts]
        return {
            "flops": sum(part_flops(part, settings) for part, settings in parts),
            "seconds": self.seconds,
            "images": {part.name: images_in(settings) for part, settings in parts},
            "parameters": {p.name: n.num_parameters for (p, _), n in zip(parts, networks, strict=True)},
            "kept_mib_of_a_batch": max(n.activations(self.args.batch, "fp32", False) for n in networks) / 2**20,
            "process_gib": max(row["host_memory_gib"] for row in rows),
            "seconds_an_image": seconds_an_image(self.last),
        }

    def validation_loss(self) -> float:
        """At the end, of all denoisers that sample: comparable between learning rates of a model alone."""
        return sum(self._loss_of(part) for part in ALL[self.model] if part.is_compared)

    def _loss_of(self, part: Part) -> float:
        file = self.folder / f"{part.name}.loss"
        if not file.is_file():
            write_atomic(file, f"{held_out_loss(self.folder / part.name)}\n")
        return float(file.read_text())


def longer_by_seconds(trainings: list[Training], reference: list[Training]) -> float:
    """How many times as many images a model sees in the seconds of the reference. The fastest seed counts: other
    work on the machine only makes a training slower."""
    return min(t.seconds for t in reference) / min(t.seconds for t in trainings)


def with_seconds(training: Training, longer: float) -> Training:
    """The same model at equal seconds."""
    return replace(training, by="seconds", longer=longer)


def images_in(settings: Settings) -> int:
    """Images of the training of these settings."""
    return int(settings.get("autoencoder", settings)["train"]["num_images"])


def part_flops(part: Part, settings: Settings) -> float:
    """FLOPs of a part's training."""
    if part.stage == "train":
        return flops_of(settings)
    return float(_network(part, settings).flops_per_image) * images_in(settings)


def held_out_loss(run: Path) -> float:
    """The validation loss of the weights that a run samples with. A training gives it to MLflow alone."""
    import torch

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.denoising.schedule import as_trained
    from segdiff_dist.denoising.validation import DenoiserValidation, HeldOutSlices
    from segdiff_dist.experiment import load_experiment

    experiment, device = load_experiment(None, run), torch.device("cpu")
    weights = run / "weights" / experiment.train.averages[0]
    model = Denoiser.load(weights).prepare_for(device)
    diffusion, _ = as_trained(experiment.diffusion, json.loads((weights / "segdiff.json").read_text())["diffusion"])
    shards, loader = ShardSet.open([experiment.given("data")]), experiment.loader
    rows = shards.select(split="val", modalities=loader.modalities, axes=loader.axes, labelled_only=True)
    slices = HeldOutSlices(shards, rows, loader, model.config.soft_masks, model.space, model.lower)
    config = replace(experiment.validation, num_images=256)
    measured = DenoiserValidation(slices, diffusion, experiment.sample.sampler, config, device)
    return float(measured(model, 0)["val_loss"])


def seconds_an_image(run: Path) -> float:
    """Seconds of a worker for an image, over all of a run's images."""
    from segdiff_dist.sampling.store import SampleStore

    store = SampleStore.open(run / "samples")
    return float(sum(store.mark(index)["seconds"] for index in store.done_regions())) / len(store)


def _network(part: Part, settings: Settings) -> Any:
    if part.stage == "train":
        return network_of(settings)
    from data_shards.store.shards import ShardSet
    from segdiff_dist.autoencoding.config import AutoencoderConfig
    from segdiff_dist.autoencoding.network import autoencoder_network

    shapes = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["autoencoder"].items() if k != "train"}
    return autoencoder_network(AutoencoderConfig(**shapes), ShardSet.open([settings["data"]]).size)


def _autoencoder(settings: Settings) -> Settings:
    """The section of an autoencoder of 2x2 pixels a position. Without the perceptual loss: its features are those of
    the segmenter that measures all images."""
    train = {k: v for k, v in settings["train"].items() if k not in ("optimizer", "checkpoint_every_images")}
    return {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention": False,
        "discriminator_start": train["num_images"] // 2,
        "discriminator_channels": 16,
        "discriminator_layers": 2,
        "train": train
        | {
            "optimizer": "adamw",
            "lr": AUTOENCODER_LR,
            "checkpoint_every_images": settings["train"]["checkpoint_every_images"],
        },
    }
