"""The `segmenter` section. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Interval, MinLen

from data_shards.feed.config import Degrees, Fraction, LoaderConfig
from data_shards.problems import Problem
from data_shards.ranges import Channels, Count, names_of, range_problems
from data_shards.settings import Execution, Result
from segdiff_dist.training.config import TrainConfig

# Group normalisation instead of MONAI's instance normalisation: it keeps the brightness of an image. Unlike batch
# normalisation it has no running statistics, which would not fit an average of the weights.
NORM_GROUPS = 8


@dataclass(frozen=True)
class SegmenterConfig:
    """The auxiliary U-Net and its training. Defaults: section 4.2 of the paper (batch 64, lr 1e-2)."""

    channels: Result[Annotated[tuple[Channels, ...], MinLen(2)]] = (16, 32, 64, 128, 256, 512)
    """Channels of each level, from the finest to the coarsest."""
    first_stride: Result[Literal[1, 2]] = 2
    """2 is the paper's. 1 keeps a level at full resolution, for slices so small that organs are a few pixels wide."""
    num_res_units: Result[Annotated[int, Interval(ge=0, le=64)]] = 0
    """Residual units of each level. 0: plain convolutions, as in the paper."""
    kernel_size: Result[Annotated[int, Interval(ge=1, le=63)]] = 3
    """Side of the convolutions, in pixels."""
    rotate_degrees: Result[Degrees] = 0.0
    """Rotate the segmenter's training slices by up to this angle either way. `loader.rotate_degrees` counts for the
    denoiser only."""
    zoom: Result[Fraction] = 0.0
    """Scale the segmenter's training slices by up to this fraction either way. `loader.zoom` counts for the denoiser
    only."""
    dice_over: Result[Count] = 8
    """Slices over which Dice is computed in training, as if they were one image. Micro-batches are multiples of it, so
    that the loss depends on neither their size nor the number of ranks."""
    validation_batch_size: Execution[Count] = 64
    """Slices a rank takes through the net at once in a validation."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            num_images=2_000_000,
            lr=1e-2,
            micro_batch_size=64,
            warmup_images=6_400,
            ema_lengths=(0.05,),
            checkpoint_every_images=100_000,
        )
    )

    def augmented(self, loader: LoaderConfig) -> LoaderConfig:
        """The loader's settings with this section's augmentation."""
        return replace(loader, rotate_degrees=self.rotate_degrees, zoom=self.zoom)

    @property
    def multiple(self) -> int:
        """Its levels halve slices whose side is a multiple of this evenly."""
        return 2 ** (len(self.channels) - 1)

    @property
    def dice_group(self) -> int:
        """dice_over, or the whole of a smaller global batch."""
        return min(self.dice_over, self.train.global_batch_size)

    def problems(self, size: int | None = None, ranks: int = 1) -> list[Problem]:
        """Values out of range, and settings that do not go together."""
        problems = range_problems(self, "config", "segmenter.")
        wrong = names_of(problems)
        problems += (of_training := self.train.problems("segmenter.train", ranks))
        micro = self.train.micro_batch_size
        if "dice_over" not in wrong and not of_training and (micro == "auto" or micro % self.dice_group):
            remedy = f"give a multiple of {self.dice_group}, the slices that Dice is taken over (segmenter.dice_over)"
            problems.append(Problem("config", "segmenter.train.micro_batch_size", str(micro), remedy))
        if "channels" not in wrong and any(c % NORM_GROUPS for c in self.channels):
            remedy = f"give multiples of {NORM_GROUPS}"
            problems.append(Problem("config", "segmenter.channels", str(list(self.channels)), remedy))
        if "channels" not in wrong and size is not None and size % self.multiple:
            levels = f"{len(self.channels)} levels halve {size} pixels unevenly"
            remedy = f"{levels}: give fewer, or a multiple of {self.multiple}"
            problems.append(Problem("config", "segmenter.channels", str(list(self.channels)), remedy))
        return problems
