"""Train the autoencoder of latent diffusion, and measure its reconstructions. Other models need none."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_shards.feed.config import LoaderConfig
from data_shards.problems import refuse
from segdiff_dist.autoencoding.config import AutoencoderConfig, segmenter_weights
from segdiff_dist.experiment import collect
from segdiff_dist.ranks.distributed import world_size
from segdiff_dist.stages.base import Plan
from segdiff_dist.stages.configured import ConfiguredStage
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
        from segdiff_dist.autoencoding.network import autoencoder_network
        from segdiff_dist.autoencoding.task import AutoencoderTask
        from segdiff_dist.stages.training_plan import TrainingPlan
        from segdiff_dist.stages.training_setup import TrainingSetup

        setup = TrainingSetup.open(self, "autoencoder.train", "autoencoder", labelled_only=False)
        config, loader, shards = setup.experiment.autoencoder, self.loader, setup.shards
        side, folder = setup.side, setup.folder
        refuse_others = partial(setup.check_settings, "autoencoder", "loader")
        *_, segmenter = collect(
            lambda: refuse(config.problems(side, world_size()) + loader.problems()),
            setup.check_mix,
            setup.check_device,
            refuse_others,
            lambda: _open_segmenter(config, setup.run, shards),
        )
        return TrainingPlan(
            setup=setup,
            stage="autoencoder",
            loader=loader,
            network=autoencoder_network(config, side),
            make_task=lambda _: AutoencoderTask(shards, side, config, loader, folder / "weights", setup.device),
            refuse_others=refuse_others,
            saved_sections=("autoencoder",),
            logged_sections=("autoencoder", "loader"),
            message=f"train-autoencoder: {setup.device}, {setup.config.precision}{_losses_message(config)}",
            next_command=setup.command("train", *_on_latents(setup.run)),
            final_measurement=_Reconstructions(shards, loader, segmenter, folder, setup.device),
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
