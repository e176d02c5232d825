"""The `segmenter` section. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from data_shards.feed.config import LoaderConfig
from data_shards.problems import Problem
from data_shards.settings import Execution, Result
from segdiff_dist.training.config import TrainConfig

# Group normalisation instead of MONAI's instance normalisation: it keeps how bright an image is, and unlike batch
# normalisation it has no running statistics that an average of the weights would not fit.
NORM_GROUPS = 8


@dataclass(frozen=True)
class SegmenterConfig:
    """The auxiliary U-Net and its training. Defaults: section 4.2 of the paper (batch 64, lr 1e-2)."""

    channels: Result[tuple[int, ...]] = (16, 32, 64, 128, 256, 512)
    first_stride: Result[int] = 2
    """2 is the paper's. 1 keeps a level at full resolution, for slices so small that organs are a few pixels wide."""
    num_res_units: Result[int] = 0
    kernel_size: Result[int] = 3
    rotate_degrees: Result[float] = 0.0
    """As in the `loader` section, whose value counts for the denoiser alone."""
    zoom: Result[float] = 0.0
    """Likewise."""
    dice_over: Result[int] = 8
    """Slices that Dice is taken over in training, as if they were one image; micro-batches are multiples of it, so that
    the loss depends on neither their size nor the number of ranks."""
    validation_batch_size: Execution[int] = 64
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
    def dice_group(self) -> int:
        """dice_over, or the whole of a smaller global batch."""
        return min(self.dice_over, self.train.global_batch_size)

    def problems(self, size: int | None = None, ranks: int = 1) -> list[Problem]:
        """What is out of range."""
        found = self.train.problems("segmenter.train", ranks)
        micro = self.train.micro_batch_size
        if self.dice_over < 1:
            found.append(Problem("config", "segmenter.dice_over", str(self.dice_over), "give at least 1"))
        elif micro == "auto" or micro % self.dice_group:
            remedy = f"give a multiple of {self.dice_group}, the slices that Dice is taken over (segmenter.dice_over)"
            found.append(Problem("config", "segmenter.train.micro_batch_size", str(micro), remedy))
        for augmentation in self.augmented(LoaderConfig()).problems():
            found.append(replace(augmentation, field=augmentation.field.replace("loader.", "segmenter.")))
        if self.first_stride not in (1, 2):
            found.append(Problem("config", "segmenter.first_stride", str(self.first_stride), "give 1 or 2"))
        if any(c % NORM_GROUPS for c in self.channels):
            remedy = f"give multiples of {NORM_GROUPS}"
            found.append(Problem("config", "segmenter.channels", str(list(self.channels)), remedy))
        if len(self.channels) < 2 or min(self.channels) < 1:
            found.append(Problem("config", "segmenter.channels", str(list(self.channels)), "give two or more levels"))
        elif size is not None and size % 2 ** (len(self.channels) - 1):
            remedy = f"{len(self.channels)} levels halve {size} pixels unevenly"
            found.append(Problem("config", "segmenter.channels", str(list(self.channels)), remedy))
        return found
