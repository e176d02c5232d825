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
from segdiff_dist.experiment import Experiment, collect
from segdiff_dist.ranks.distributed import is_main, world_size
from segdiff_dist.stages.base import Plan
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.training.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.cascade import LowerStage, ShrunkSpace
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.denoising.latent_space import LatentSpace
    from segdiff_dist.denoising.task import DenoiserTask
    from segdiff_dist.denoising.validation import DenoiserValidation
    from segdiff_dist.stages.training_setup import TrainingSetup
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
        from segdiff_dist.stages.training_plan import TrainingPlan, small_config
        from segdiff_dist.stages.training_setup import TrainingSetup

        denoiser, diffusion, loader = self.denoiser, self.diffusion, self.loader
        setup = TrainingSetup.open(self, "train", labelled_only=denoiser.conditioning != "none")
        shards, side = setup.shards, setup.side
        [latent] = collect(lambda: find_space(denoiser, diffusion, side, shards.modalities))
        others = partial(_refuse_others, setup, latent)
        net_side = side // latent.factor if latent is not None else denoiser.low_resolution or side
        base, lower, *_, attention, kernels = collect(
            lambda: _fitting_base(setup),
            lambda: _fitting_lower(setup),
            *_rules(setup, net_side),
            others,
            lambda: choose_attention(denoiser.attention, setup.device, denoiser.attention_head_dim),
            lambda: choose_kernels(denoiser.kernels, setup.device),
        )
        _warn_of_no_masks(setup.experiment, shards)
        frozen = None if base is None else base.net
        return TrainingPlan(
            setup=setup,
            stage="train",
            loader=loader,
            network=denoiser_network(denoiser, shards, side, setup.device, frozen, latent, diffusion.passes, lower),
            make_extra=None if latent is None else partial(_encode, setup),
            extra_bytes=latents_bytes(latent, loader, len(setup.rows))
            + copies_bytes(lower, len(setup.config.averages) + 1),
            make_task=partial(_make_task, setup),
            refuse_others=others,
            # Later stages use the denoiser's loader and data.
            saved_sections=(*_SECTIONS, "data", "more_data"),
            logged_sections=_SECTIONS,
            message=f"train: {setup.device}, {setup.config.precision}, kernels: {kernels}, attention: {attention}"
            + latents_message(latent, loader)
            + stage_message(denoiser, lower),
            next_command=setup.command("sample"),
            limits={"small": lambda: small_config(shards, side, setup.device)},
            compile_kernels=_compiling(setup) if kernels == "triton" else None,
        ).checked()


def _refuse_others(setup: TrainingSetup, latent: LatentSpace | None) -> None:
    """Refuse to go on with a training of other settings, or on other latents."""
    from segdiff_dist.denoising.latents import refuse_other_latents

    collect(
        lambda: setup.check_settings(*_STARTED_WITH),
        lambda: refuse_other_latents(setup.run, latent, setup.shards),
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


def _rules(setup: TrainingSetup, net_side: int) -> tuple[Callable[[], object], ...]:
    """Checks of the sections, each of which raises the problems that it finds."""
    from segdiff_dist.denoising.task import find_problems

    experiment, loader = setup.experiment, setup.experiment.loader
    denoiser, diffusion = experiment.denoiser, experiment.diffusion
    return (
        lambda: refuse(find_problems(setup.shards, net_side, denoiser, diffusion)),
        lambda: refuse(denoiser.loader_problems(loader)),
        lambda: refuse(setup.config.problems("train", world_size()) + loader.problems()),
        lambda: refuse(experiment.validation.problems(diffusion)),
        lambda: refuse(experiment.tracking.problems()),
        setup.check_mix,
        setup.check_device,
    )


def _fitting_base(setup: TrainingSetup) -> Base | None:
    """The base of a ControlNet, which goes with the settings."""
    from segdiff_dist.denoising.frozen_base import Base

    denoiser, diffusion = setup.experiment.denoiser, setup.experiment.diffusion
    base = Base.find(denoiser, setup.run)
    if base is not None:
        refuse(base.problems(denoiser, diffusion, setup.side, setup.shards.modalities, setup.modalities))
    return base


def _fitting_lower(setup: TrainingSetup) -> LowerStage | None:
    """The lower stage of a cascade, which goes with the settings."""
    from segdiff_dist.denoising.cascade import LowerStage
    from segdiff_dist.denoising.frozen_base import Base

    denoiser, diffusion, side = setup.experiment.denoiser, setup.experiment.diffusion, setup.side
    own = denoiser.low_resolution
    if own is not None and (own >= side or side % own):
        remedy = f"give a divisor of the slices' side ({side}) below it, such as {side // 2}"
        raise problem("config", "denoiser.low_resolution", own, remedy)
    below = Base.below(denoiser, setup.run)
    if below is None:
        return None
    refuse(below.problems_below(denoiser, diffusion, setup.shards, side, setup.modalities))
    return LowerStage.open(below.folder)


def _compiling(setup: TrainingSetup) -> Callable[[int], None] | None:
    """Compiles the kernels of micro-batches of a given number of images on this GPU; None if they cannot be known
    before."""
    from segdiff_dist.denoising.kernels_ahead import compile_kernels, plan_of

    config, table, side, device = setup.config, setup.shards.label_table, setup.side, setup.device
    net = setup.experiment.denoiser
    if net.space != "pixel" or net.low_resolution is not None or net.cascade is not None:
        return None
    if device.type != "cuda" or (config.zero_stage == 0 and config.precision == "bf16"):
        return None  # under autocast, dtypes depend on the device
    passes = setup.experiment.diffusion.passes
    return lambda images: compile_kernels(plan_of(net, table, side, passes * images, config.precision, device))


def _encode(setup: TrainingSetup) -> np.ndarray | None:
    """The latents of the slices to train and to validate on, and their scale, in RUN/latents."""
    from segdiff_dist.denoising.latent_space import LatentSpace
    from segdiff_dist.denoising.latents import latents_of
    from segdiff_dist.training.engine import start_distributed

    start_distributed(setup.device)
    space = LatentSpace.open(str(setup.experiment.denoiser.autoencoder))
    space.move_to(setup.device)
    return latents_of(space, setup.shards, setup.rows, setup.experiment.loader, setup.run)


def _make_task(setup: TrainingSetup, tracker: Tracker) -> DenoiserTask:
    """The training task and its validation."""
    from segdiff_dist.denoising.cascade import ShrunkSpace
    from segdiff_dist.denoising.latents import run_space
    from segdiff_dist.denoising.task import DenoiserTask

    denoiser, shards, weights = setup.experiment.denoiser, setup.shards, setup.run / "weights"
    space = run_space(denoiser, weights)
    if space is not None:
        space.move_to(setup.device)
    shrunk = ShrunkSpace.of(denoiser, setup.side)
    process = _measured_diffusion(setup, on_latents=space is not None, factor=1 if shrunk is None else shrunk.factor)
    validation = _validation(setup, process, space or shrunk, tracker)
    seed = setup.config.seed
    task = DenoiserTask(shards, setup.side, denoiser, process, seed, weights, setup.device, validation)
    task.model.trained_on = setup.modalities
    return task


def _measured_diffusion(setup: TrainingSetup, on_latents: bool, factor: int) -> DiffusionConfig:
    """The diffusion with its sigma_data, measured on these slices if the objective needs it, and the length of its
    consistency ramp. `factor`: how much smaller than the slices the denoised images are."""
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.denoising.sigma_data import with_sigma_data

    denoiser, diffusion = setup.experiment.denoiser, setup.experiment.diffusion
    base = Base.find(denoiser, setup.run)
    process = with_sigma_data(
        diffusion if base is None else base.with_its_sigma_data(diffusion),
        setup.shards,
        setup.rows,
        on_latents=on_latents,
        factor=factor,
    )
    if process.consistency_weight > 0 and process.consistency_ramp_images is None:
        process = replace(process, consistency_ramp_images=setup.config.num_images)
    return process


def _validation(
    setup: TrainingSetup, process: DiffusionConfig, space: LatentSpace | ShrunkSpace | None, tracker: Tracker
) -> DenoiserValidation:
    """Losses and pictures of held-out slices during the training."""
    from segdiff_dist.denoising.cascade import LowerStage
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.denoising.sample_grid import SampleGrids
    from segdiff_dist.denoising.validation import DenoiserValidation, HeldOutSlices

    shards, loader, denoiser = setup.shards, setup.experiment.loader, setup.experiment.denoiser
    below = Base.below(denoiser, setup.run)
    held_out = shards.select(
        split="val", modalities=loader.modalities, axes=loader.axes, labelled_only=denoiser.conditioning != "none"
    )
    return DenoiserValidation(
        HeldOutSlices(
            *(shards, held_out, loader, denoiser.soft_masks, space),
            None if below is None else LowerStage.open(below.folder),
        ),
        process,
        replace(setup.experiment.sample.sampler, guidance=1.0),
        setup.experiment.validation,
        setup.device,
        SampleGrids(setup.run / "pictures", shards.label_table, tracker),
    )
