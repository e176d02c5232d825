"""What every training opens and chooses before the checks of its own: run folder, data, precision, device."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from data_shards.feed.mixing import mix_groups
from data_shards.problems import InputProblems, problem, refuse
from data_shards.store.shards import ShardSet
from segdiff_dist.config import flatten, read_yaml
from segdiff_dist.experiment import Experiment, recorded_config, refuse_another_config
from segdiff_dist.ranks.distributed import is_main, pick_device
from segdiff_dist.ranks.precision import cpu_has_bf16, settled
from segdiff_dist.stages.base import command
from segdiff_dist.stages.configured import ConfiguredStage, address_flag, recipe_of
from segdiff_dist.training.captured import device_problems
from segdiff_dist.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The opened files and the settings of one training, alike on every rank."""

    experiment: Experiment
    """With `config` at `section`."""
    section: str
    """The dotted key of `config`, as flags name it: `segmenter.train`."""
    config: TrainConfig
    """Its precision is never `auto`, except for a device that is not there, which check_device refuses."""
    recipe: str | None
    """The name of the configuration, where one was given."""
    run: Path
    folder: Path
    """The folder of checkpoints/ and weights/: RUN, or one in it."""
    shards: ShardSet
    side: int
    """Side of the cropped slices, in pixels."""
    rows: np.ndarray
    """The slices to train on."""

    @classmethod
    def open(cls, stage: ConfiguredStage, section: str, folder: str = "", *, labelled_only: bool = True) -> Self:
        """Open the run folder and the shard set of a stage. `section`: where its TrainConfig is; `folder`: the name of
        the network's folder in the run folder. Raises InputProblems."""
        given = stage.experiment
        run, shards = stage.open_run_and_data(given.more_data)
        config = _settle_precision(given, section, run / folder / "checkpoints")
        loader = given.loader
        return cls(
            experiment=_with_value(given, section, config),
            section=section,
            config=config,
            recipe=recipe_of(stage.config),
            run=run,
            folder=run / folder,
            shards=shards,
            side=_side_of(shards, loader.crop_size),
            rows=shards.select(
                split="train", modalities=loader.modalities, axes=loader.axes, labelled_only=labelled_only
            ),
        )

    @cached_property
    def device(self) -> torch.device:
        """This rank's device. Raises InputProblems if it is not there."""
        device: torch.device = pick_device(self.config.device, f"{self.section}.device")
        return device

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of the slices to train on."""
        codes = set(self.shards.modality_N[self.rows].tolist())
        return tuple(name for code, name in enumerate(self.shards.modalities) if code in codes)

    def check_mix(self) -> None:
        """Raises InputProblems if the set has no slices for a part of loader.mix."""
        if mix := self.experiment.loader.mix:
            mix_groups(self.shards, self.rows, mix)

    def check_device(self) -> None:
        """Raises InputProblems if the device is not there or cannot do what the settings ask of it."""
        refuse(device_problems(self.config, self.section, self.device))

    def check_settings(self, *sections: str) -> None:
        """Raises InputProblems if the folder has a training that began with other settings in these sections."""
        refuse_another_config(self.experiment, self.folder / "checkpoints", sections)

    def command(self, stage: str, *flags: object) -> str:
        """The command of a stage on the same run folder, for the user."""
        return command(stage, "--run", self.run, *flags, *address_flag(self.experiment))


def _with_value(section: Any, key: str, value: Any) -> Any:
    """A copy of a section with another value at a dotted key."""
    name, _, rest = key.partition(".")
    return replace(section, **{name: _with_value(getattr(section, name), rest, value) if rest else value})


def _settle_precision(experiment: Experiment, section: str, checkpoints: Path) -> TrainConfig:
    """The TrainConfig at `section` with a precision in place of `auto`: that of the checkpoints, else the device's fast
    one. It stays `auto` for a device that is not there."""
    config: TrainConfig = attrgetter(section)(experiment)
    if config.precision != "auto":
        _warn_of_slow_bf16(config, section)
        return config
    recorded = recorded_config(experiment, checkpoints)
    begun = {} if recorded is None else flatten(read_yaml(recorded))
    precision = begun.get(f"{section}.precision", "auto")
    with suppress(InputProblems):
        precision = settled(precision, pick_device(config.device))
    return replace(config, precision=precision)


def _warn_of_slow_bf16(config: TrainConfig, section: str) -> None:
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.precision == "bf16" and on_cpu and not cpu_has_bf16() and is_main():
        remedy = f"fp32 is about ten times faster here: --{section}.precision auto"
        sys.stderr.write(f"warning: {section}.precision: bf16: this CPU has no arithmetic for it; {remedy}\n")


def _side_of(shards: ShardSet, crop_size: int | None) -> int:
    """Side of the network's input, in pixels."""
    if crop_size is not None and crop_size > shards.size:
        raise problem(
            "config", "loader.crop_size", crop_size, f"the slices of {shards.root} are {shards.size} pixels wide"
        )
    return crop_size or shards.size
