"""Train the diffusion model (the denoiser); on many GPUs: `deepspeed --module segdiff_dist train`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_shards.feed.config import LoaderConfig
from data_shards.problems import problem, refuse
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig, ValidationConfig
from segdiff_dist.experiment import Experiment, collect, refuse_another_config
from segdiff_dist.ranks.distributed import is_main, pick_device, world_size
from segdiff_dist.stages.base import Plan, command
from segdiff_dist.stages.configured import ConfiguredStage, address_flag, recipe_of
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.training.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.cascade import LowerStage
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.denoising.latent_space import LatentSpace
    from segdiff_dist.denoising.task import DenoiserTask
    from segdiff_dist.tracking.tracker import Tracker

_SECTIONS = ("denoiser", "diffusion", "train", "validation", "loader")
# A run that has checkpoints refuses others of these.
_STARTED_WITH = ("denoiser", "diffusion", "train", "loader")


@dataclass(frozen=True, kw_only=True)
class Train(ConfiguredStage):
    """Train the diffusion model (the denoiser) into RUN/checkpoints and RUN/weights. The same command again resumes
    from the newest complete checkpoint. Without --config: the paper's net of 113.7 M parameters, which needs a GPU.
    Exit code 3 when the training stopped itself."""

    less_memory: ClassVar = "--train.micro-batch-size, or give --train.activation-checkpointing"
    on_ranks: ClassVar = True
    essential: ClassVar = (
        *("--data", "--run", "--more-data", "--train.num-images", "--train.global-batch-size"),
        *("--train.micro-batch-size", "--train.lr", "--train.precision", "--train.zero-stage"),
        *("--train.activation-checkpointing", "--train.checkpoint-every-images", "--train.device", "--train.seed"),
        *("--diffusion.objective", "--denoiser.block-out-channels", "--denoiser.layers-per-block"),
        *("--loader.modalities", "--loader.axes", "--loader.crop-size"),
    )

    data: str | None = None
    """The shard set that `prepare` wrote: a folder or a URL that fsspec knows."""
    more_data: tuple[str, ...] = ()
    """Further shard sets to train on, alike in labels, size and codec."""
    run: Path | None = None
    """The run folder: checkpoints, weights, samples, evaluation, MLflow's database."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> Plan:
        """Opens the set; chooses device, kernels and attention."""
        from segdiff_dist.attention import choose_attention
        from segdiff_dist.denoising.cascade import copies_bytes, stage_message
        from segdiff_dist.denoising.denoiser import choose_kernels
        from segdiff_dist.denoising.latent_space import find_space
        from segdiff_dist.denoising.latents import latents_bytes, latents_message
        from segdiff_dist.denoising.network_shapes import denoiser_network
        from segdiff_dist.stages import training_plan
        from segdiff_dist.stages.training_plan import TrainingPlan, small_config

        denoiser, diffusion, loader = self.denoiser, self.diffusion, self.loader
        run, shards = self.open_run_and_data(self.more_data)
        config = training_plan.settle_precision(self.train, self.experiment, "train", run / "checkpoints")
        experiment, compiling = replace(self.experiment, train=config), replace(self, train=config)
        side = training_plan.side_of(shards, loader.crop_size)
        rows = training_plan.training_rows(experiment, shards, labelled_only=denoiser.conditioning != "none")
        picked = partial(pick_device, config.device, "train.device")
        [latent] = collect(lambda: find_space(denoiser, diffusion, side, shards.modalities))
        others = partial(_refuse_others, experiment, run, latent, shards)
        net_side = side // latent.factor if latent is not None else denoiser.low_resolution or side
        base, lower, *_, attention, kernels = collect(
            lambda: _fitting_base(self, run, shards, rows),
            lambda: _fitting_lower(self, run, shards, rows),
            *_rules(self, config, shards, rows, net_side),
            others,
            lambda: choose_attention(denoiser.attention, picked(), denoiser.attention_head_dim),
            lambda: choose_kernels(denoiser.kernels, picked()),
        )
        device = picked()
        _warn_of_no_masks(experiment, shards)

        return TrainingPlan(
            experiment=experiment,
            stage="train",
            section="train",
            folder=run,
            shards=shards,
            rows=rows,
            loader=loader,
            config=config,
            device=device,
            recipe=recipe_of(self.config),
            network=denoiser_network(
                denoiser, shards, side, device, None if base is None else base.net, latent, diffusion.passes, lower
            ),
            make_extra=None if latent is None else partial(_encode, self, run, shards, rows, device),
            extra_bytes=latents_bytes(latent, loader, len(rows)) + copies_bytes(lower, len(config.averages) + 1),
            make_task=partial(_make_task, self, run, shards, rows, device),
            refuse_others=others,
            # Later stages use the denoiser's loader and data.
            saved_sections=(*_SECTIONS, "data", "more_data"),
            logged_sections=_SECTIONS,
            message=f"train: {device}, {config.precision}, kernels: {kernels}, attention: {attention}"
            + latents_message(latent, loader)
            + stage_message(denoiser, lower),
            next_command=command("sample", "--run", run, *address_flag(experiment)),
            limits={"small": lambda: small_config(shards, side, device)},
            compile_kernels=_compiling(compiling, shards, side, device) if kernels == "triton" else None,
        ).checked()


def _refuse_others(experiment: Experiment, run: Path, latent: LatentSpace | None, shards: ShardSet) -> None:
    """Refuse to go on with a training of other settings, or on other latents."""
    from segdiff_dist.denoising.latents import refuse_other_latents

    collect(
        lambda: refuse_another_config(experiment, run / "checkpoints", _STARTED_WITH),
        lambda: refuse_other_latents(run, latent, shards),
    )


def _warn_of_no_masks(experiment: Experiment, shards: ShardSet) -> None:
    """Say before the training that `sample` would find no masks after it."""
    loader, split = experiment.loader, experiment.sample.split
    rows = shards.select(split=split, modalities=loader.modalities, axes=loader.axes)
    if not len(rows) and experiment.sample.masks is None and is_main():
        remedy = "give `sample` another --split or --masks FOLDER, or prepare the set with --prepare.split 0.7 0.1 0.2"
        print(
            f"warning: {shards.root}: no labelled slice in split {split!r}, which `sample` reads; {remedy}",
            file=sys.stderr,
        )


def _rules(
    stage: Train, config: TrainConfig, shards: ShardSet, rows: np.ndarray, net_side: int
) -> tuple[Callable[[], object], ...]:
    """Checks of the sections, each of which raises the problems that it finds."""
    from data_shards.feed.mixing import mix_groups
    from segdiff_dist.denoising.task import find_problems
    from segdiff_dist.training.captured import device_problems

    diffusion, loader = stage.diffusion, stage.loader
    return (
        lambda: refuse(find_problems(shards, net_side, stage.denoiser, diffusion)),
        lambda: refuse(stage.denoiser.loader_problems(loader)),
        lambda: refuse(config.problems("train", world_size()) + loader.problems()),
        lambda: refuse(stage.validation.problems(diffusion)),
        lambda: refuse(stage.tracking.problems()),
        lambda: loader.mix and mix_groups(shards, rows, loader.mix),
        lambda: refuse(device_problems(config, "train", pick_device(config.device, "train.device"))),
    )


def _fitting_base(stage: Train, run: Path, shards: ShardSet, rows: np.ndarray) -> Base | None:
    """The base of a ControlNet, which goes with the settings."""
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.stages.training_plan import modalities_of, side_of

    base = Base.find(stage.denoiser, run)
    if base is not None:
        side, seen = side_of(shards, stage.loader.crop_size), modalities_of(shards, rows)
        refuse(base.problems(stage.denoiser, stage.diffusion, side, shards.modalities, seen))
    return base


def _fitting_lower(stage: Train, run: Path, shards: ShardSet, rows: np.ndarray) -> LowerStage | None:
    """The lower stage of a cascade, which goes with the settings."""
    from segdiff_dist.denoising.cascade import LowerStage
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.stages.training_plan import modalities_of, side_of

    denoiser, side = stage.denoiser, side_of(shards, stage.loader.crop_size)
    own = denoiser.low_resolution
    if own is not None and (own >= side or side % own):
        remedy = f"give a divisor of the slices' side ({side}) below it, such as {side // 2}"
        raise problem("config", "denoiser.low_resolution", own, remedy)
    below = Base.below(denoiser, run)
    if below is None:
        return None
    refuse(below.problems_below(denoiser, stage.diffusion, shards, side, modalities_of(shards, rows)))
    return LowerStage.open(below.folder)


def _compiling(stage: Train, shards: ShardSet, side: int, device: torch.device) -> Callable[[int], None] | None:
    """Compiles the kernels of micro-batches of a given number of images on this GPU; None if they cannot be known
    before."""
    from segdiff_dist.denoising.kernels_ahead import compile_kernels, plan_of

    config, table = stage.train, shards.label_table
    net = stage.denoiser
    if net.space != "pixel" or net.low_resolution is not None or net.cascade is not None:
        return None
    if device.type != "cuda" or (config.zero_stage == 0 and config.precision == "bf16"):
        return None  # under autocast, dtypes depend on the device
    passes = stage.diffusion.passes
    return lambda images: compile_kernels(plan_of(net, table, side, passes * images, config.precision, device))


def _encode(stage: Train, run: Path, shards: ShardSet, rows: np.ndarray, device: torch.device) -> np.ndarray | None:
    """The latents of the slices to train and to validate on, and their scale, in RUN/latents."""
    from segdiff_dist.denoising.latent_space import LatentSpace
    from segdiff_dist.denoising.latents import latents_of
    from segdiff_dist.training.engine import start_distributed

    start_distributed(device)
    space = LatentSpace.open(str(stage.denoiser.autoencoder))
    space.move_to(device)
    return latents_of(space, shards, rows, stage.loader, run)


def _make_task(
    stage: Train, run: Path, shards: ShardSet, rows: np.ndarray, device: torch.device, tracker: Tracker
) -> DenoiserTask:
    """The training task and its validation. Measures sigma_data if the objective needs it."""
    from segdiff_dist.denoising.cascade import LowerStage, ShrunkSpace
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.denoising.latents import run_space
    from segdiff_dist.denoising.sample_grid import SampleGrids
    from segdiff_dist.denoising.sigma_data import with_sigma_data
    from segdiff_dist.denoising.task import DenoiserTask
    from segdiff_dist.denoising.validation import DenoiserValidation, HeldOutSlices
    from segdiff_dist.stages.training_plan import modalities_of, side_of

    denoiser, loader = stage.denoiser, stage.loader
    base, latent = Base.find(denoiser, run), run_space(denoiser, run / "weights")
    below, side = Base.below(denoiser, run), side_of(shards, loader.crop_size)
    shrunk = ShrunkSpace.of(denoiser, side)
    if latent is not None:
        latent.move_to(device)
    process = with_sigma_data(
        stage.diffusion if base is None else base.with_its_sigma_data(stage.diffusion),
        shards,
        rows,
        on_latents=latent is not None,
        factor=1 if shrunk is None else shrunk.factor,
    )
    if process.consistency_weight > 0 and process.consistency_ramp_images is None:
        process = replace(process, consistency_ramp_images=stage.train.num_images)
    held_out = shards.select(
        split="val", modalities=loader.modalities, axes=loader.axes, labelled_only=denoiser.conditioning != "none"
    )
    validation = DenoiserValidation(
        HeldOutSlices(
            *(shards, held_out, loader, denoiser.soft_masks, latent or shrunk),
            None if below is None else LowerStage.open(below.folder),
        ),
        process,
        replace(stage.experiment.sample.sampler, guidance=1.0),
        stage.validation,
        device,
        SampleGrids(run / "pictures", shards.label_table, tracker),
    )
    task = DenoiserTask(shards, side, denoiser, process, stage.train.seed, run / "weights", device, validation)
    task.model.trained_on = modalities_of(shards, rows)
    return task
