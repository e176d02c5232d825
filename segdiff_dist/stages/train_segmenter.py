"""Train the segmenter that measures the images: it looks for the organs in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from data_shards.feed.config import LoaderConfig
from data_shards.problems import refuse
from segdiff_dist.experiment import collect
from segdiff_dist.ranks.distributed import world_size
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.stages.base import Plan
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.tracking.tracker import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class TrainSegmenter(ConfiguredStage):
    """Train the segmenter into RUN/segmenter. Exit code 3 when the training stopped itself."""

    less_memory: ClassVar = "--segmenter.train.micro-batch-size"
    on_ranks: ClassVar = True
    essential: ClassVar = (
        *("--data", "--run", "--segmenter.train.num-images", "--segmenter.train.global-batch-size"),
        *(
            "--segmenter.train.micro-batch-size",
            "--segmenter.train.lr",
            "--segmenter.train.device",
            "--segmenter.channels",
        ),
    )

    data: str | None = None
    """The shard set that `prepare` wrote: a folder or a URL that fsspec knows."""
    more_data: tuple[str, ...] = ()
    """Further shard sets to train on, alike in labels, size and codec."""
    run: Path | None = None
    """The run folder: the segmenter is written to RUN/segmenter."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> Plan:
        """Opens the set."""
        from segdiff_dist.segmentation.network import segmenter_network
        from segdiff_dist.segmentation.task import SegmenterTask
        from segdiff_dist.stages.training_plan import TrainingPlan
        from segdiff_dist.stages.training_setup import TrainingSetup

        setup = TrainingSetup.open(self, "segmenter.train", "segmenter")
        config, loader, shards = setup.experiment.segmenter, self.loader, setup.shards
        refuse_others = partial(setup.check_settings, "segmenter", "loader")
        collect(
            lambda: refuse(config.problems(setup.side, world_size()) + loader.problems()),
            setup.check_mix,
            setup.check_device,
            refuse_others,
        )
        return TrainingPlan(
            setup=setup,
            stage="segmenter",
            loader=config.augmented(loader),
            network=segmenter_network(config, shards, setup.side),
            make_task=lambda _: SegmenterTask(shards, config, loader, setup.folder / "weights", setup.device),
            refuse_others=refuse_others,
            saved_sections=("segmenter",),
            logged_sections=("segmenter", "loader"),
            message=f"train-segmenter: {setup.device}, {setup.config.precision}",
            next_command=setup.command("train"),
            limits={"multiple_of": config.dice_group},
        ).checked()
