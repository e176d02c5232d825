"""Train the autoencoder of latent diffusion, and measure its reconstructions. Other models need none."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_shards.feed.config import LoaderConfig
from data_shards.problems import refuse
from segdiff_dist.autoencoding.config import AutoencoderConfig, segmenter_weights
from segdiff_dist.experiment import collect, refuse_another_config
from segdiff_dist.ranks.distributed import pick_device, world_size
from segdiff_dist.stages.base import Plan, command
from segdiff_dist.stages.configured import ConfiguredStage, address_flag, recipe_of
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.segmentation.segmenter import Segmenter


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoder(ConfiguredStage):
    """Train the autoencoder into RUN/autoencoder. Exit code 3 when the training stopped itself."""

    less_memory: ClassVar = "--autoencoder.train.micro-batch-size"
    on_ranks: ClassVar = True
    essential: ClassVar = (
        *("--data", "--run", "--autoencoder.segmenter", "--autoencoder.block-out-channels"),
        *("--autoencoder.latent-channels", "--autoencoder.discriminator-start", "--autoencoder.train.num-images"),
        *("--autoencoder.train.global-batch-size", "--autoencoder.train.micro-batch-size"),
        *("--autoencoder.train.lr", "--autoencoder.train.device"),
    )

    data: str | None = None
    """The shard set: a folder or a URL that fsspec knows."""
    more_data: tuple[str, ...] = ()
    """Further shard sets to train on, alike in labels, size and codec."""
    run: Path | None = None
    """The run folder: the autoencoder is written to RUN/autoencoder."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> Plan:
        """Opens the set and the segmenter."""
        from data_shards.feed.mixing import mix_groups
        from segdiff_dist.autoencoding.network import autoencoder_network
        from segdiff_dist.autoencoding.task import AutoencoderTask
        from segdiff_dist.stages.training_plan import TrainingPlan, settle_precision, side_of, training_rows
        from segdiff_dist.training.captured import device_problems

        loader = self.loader
        run, shards = self.open_run_and_data(self.more_data)
        folder = run / "autoencoder"
        train = settle_precision(self.autoencoder.train, self.experiment, "autoencoder.train", folder / "checkpoints")
        config = replace(self.autoencoder, train=train)
        experiment = replace(self.experiment, autoencoder=config)
        side, rows = side_of(shards, loader.crop_size), training_rows(experiment, shards, labelled_only=False)
        refuse_others = partial(refuse_another_config, experiment, folder / "checkpoints", ("autoencoder", "loader"))
        picked = partial(pick_device, train.device, "autoencoder.train.device")
        *_, segmenter = collect(
            lambda: refuse(config.problems(side, world_size()) + loader.problems()),
            lambda: loader.mix and mix_groups(shards, rows, loader.mix),
            lambda: refuse(device_problems(train, "autoencoder.train", picked())),
            refuse_others,
            lambda: _open_segmenter(config, run, shards),
        )
        device = picked()
        return TrainingPlan(
            experiment=experiment,
            stage="autoencoder",
            section="autoencoder.train",
            folder=folder,
            shards=shards,
            rows=rows,
            loader=loader,
            config=train,
            device=device,
            recipe=recipe_of(self.config),
            network=autoencoder_network(config, side),
            make_task=lambda _: AutoencoderTask(shards, side, config, loader, folder / "weights", device),
            refuse_others=refuse_others,
            saved_sections=("autoencoder",),
            logged_sections=("autoencoder", "loader"),
            message=f"train-autoencoder: {device}, {train.precision}{_losses_message(config)}",
            next_command=command("train", "--run", run, *_on_latents(run), *address_flag(experiment)),
            limits={},
            final_measurement=_Reconstructions(shards, loader, segmenter, folder, device),
        ).checked()


def _on_latents(run: Path) -> tuple[object, ...]:
    """The flags of a denoiser that uses this autoencoder."""
    return "--denoiser.space", "latent", "--denoiser.autoencoder", run, "--denoiser.net", "unet"


@dataclass(frozen=True)
class _Reconstructions:
    """Measures the reconstructions when the training is over."""

    shards: ShardSet
    loader: LoaderConfig
    segmenter: Segmenter | None
    folder: Path
    device: Any

    @property
    def is_done(self) -> bool:
        """Whether the figures are there."""
        from segdiff_dist.evaluation.measure.reconstructions import FIGURES

        return (self.folder / FIGURES).is_file()

    def __call__(self) -> tuple[tuple[str, ...], dict[str, float], Path | None]:
        """Lines for the user, metrics and the picture for the tracker."""
        from segdiff_dist.autoencoding.autoencoder import Autoencoder
        from segdiff_dist.evaluation.measure.reconstructions import PICTURE, measure_reconstructions

        autoencoder = Autoencoder.load(self.folder / "weights", self.device)
        found = measure_reconstructions(self.shards, self.loader, autoencoder, self.segmenter, self.folder)
        if found is None:
            return ("the set has no validation slice: its reconstructions are not measured",), {}, None
        picture = self.folder / PICTURE
        lines = (*found.lines(), f"  pictures: {picture}")
        if self.segmenter is None:
            lines = (*lines, "  without a segmenter (--autoencoder.segmenter RUN) there is no Dice")
        return lines, found.metrics(), picture


def _open_segmenter(config: AutoencoderConfig, run: Path, shards: ShardSet) -> Segmenter | None:
    """The segmenter that is given, else that of the run folder, if it fits; None without one."""
    from segdiff_dist.segmentation.segmenter import Segmenter

    given = segmenter_weights(run if config.segmenter is None else config.segmenter)
    if not (given / DESCRIPTION).is_file():
        return None  # a given one that is missing is refused by AutoencoderConfig.problems
    segmenter = Segmenter.load(given)
    refuse(list(segmenter.problems(shards.label_table, shards.modalities, None)))
    return segmenter


def _losses_message(config: AutoencoderConfig) -> str:
    """Which of the further losses are used."""
    perceptual = "perceptual loss" if config.segmenter is not None else "no perceptual loss (--autoencoder.segmenter)"
    if not config.has_discriminator:
        return f", {perceptual}, no discriminator"
    return f", {perceptual}, discriminator from image {config.discriminator_start:,} on"
