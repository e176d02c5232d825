"""Train the segmenter that measures the images: it looks for the organs in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from data_shards.feed.config import LoaderConfig
from data_shards.problems import refuse
from segdiff_dist.experiment import collect, refuse_another_config
from segdiff_dist.ranks.distributed import pick_device, world_size
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.stages.base import Plan, command
from segdiff_dist.stages.configured import ConfiguredStage, address_flag, recipe_of
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
        from data_shards.feed.mixing import mix_groups
        from segdiff_dist.segmentation.network import segmenter_network
        from segdiff_dist.segmentation.task import SegmenterTask
        from segdiff_dist.stages.training_plan import TrainingPlan, settle_precision, side_of, training_rows
        from segdiff_dist.training.captured import device_problems

        loader = self.loader
        run, shards = self.open_run_and_data(self.more_data)
        train = settle_precision(
            self.segmenter.train, self.experiment, "segmenter.train", run / "segmenter/checkpoints"
        )
        config = replace(self.segmenter, train=train)
        experiment = replace(self.experiment, segmenter=config)
        folder, side, rows = run / "segmenter", side_of(shards, loader.crop_size), training_rows(experiment, shards)
        refuse_others = partial(refuse_another_config, experiment, folder / "checkpoints", ("segmenter", "loader"))
        picked = partial(pick_device, config.train.device, "segmenter.train.device")
        collect(
            lambda: refuse(config.problems(side, world_size()) + loader.problems()),
            lambda: loader.mix and mix_groups(shards, rows, loader.mix),
            lambda: refuse(device_problems(config.train, "segmenter.train", picked())),
            refuse_others,
        )
        device = picked()
        return TrainingPlan(
            experiment=experiment,
            stage="segmenter",
            section="segmenter.train",
            folder=folder,
            shards=shards,
            rows=rows,
            loader=config.augmented(loader),
            config=config.train,
            device=device,
            recipe=recipe_of(self.config),
            network=segmenter_network(config, shards, side),
            make_task=lambda _: SegmenterTask(shards, config, loader, folder / "weights", device),
            refuse_others=refuse_others,
            saved_sections=("segmenter",),
            logged_sections=("segmenter", "loader"),
            message=f"train-segmenter: {device}, {train.precision}",
            next_command=command("train", "--run", run, *address_flag(experiment)),
            limits={"multiple_of": config.dice_group},
        ).checked()
