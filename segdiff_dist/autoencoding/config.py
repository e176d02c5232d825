"""The `autoencoder` section. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from data_shards.problems import Problem
from data_shards.ranges import Channels, Count, Layers, NonNegative, WholeNumber, names_of, range_problems
from data_shards.settings import Execution, Result
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.weight_files import DESCRIPTION

# A patch discriminator of n layers halves n times and then loses a pixel in each of its last two convolutions.
_LEAST_PATCHES = 3


@dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoder of latent diffusion and its training (Rombach et al. 2022, section 3.1 and appendix G)."""

    block_out_channels: Result[Annotated[tuple[Channels, ...], MinLen(2)]] = (64, 128, 256)
    """Channels of each level, from the finest to the coarsest. Every level after the first halves the side: three
    levels make one latent position of 4x4 pixels."""
    layers_per_block: Result[Layers] = 2
    """Residual blocks of each level of the encoder. The decoder has one more."""
    latent_channels: Result[Channels] = 4
    """Numbers at each position of a latent."""
    norm_num_groups: Result[Count] = 32
    """Groups of the group normalisation."""
    attention: Result[bool] = True
    """Self-attention at the coarsest level."""
    kl_weight: Result[NonNegative] = 1e-6
    """Weight of the KL divergence from the standard normal distribution, in nats a pixel. The default is Rombach et
    al.'s."""
    segmenter: Result[str | None] = None
    """A run folder with a segmenter of `segdiff train-segmenter`, or its weights: RUN/segmenter/weights. The features
    of its encoder give the perceptual loss. null: no perceptual loss."""
    perceptual_weight: Result[NonNegative] = 1.0
    """Weight of the distance of the segmenter's features, where a segmenter is given."""
    discriminator_weight: Result[NonNegative] = 0.1
    """Weight of the adversarial loss. 0: no discriminator, and the weights with the best PSNR are kept."""
    discriminator_start: Result[WholeNumber] = 200_000
    """Images before the discriminator begins. The autoencoder then has learned the coarse part."""
    discriminator_channels: Result[Channels] = 64
    """Channels of the patch discriminator's first layer (Isola et al. 2017)."""
    discriminator_layers: Result[Count] = 3
    """Layers that double its channels. Three see patches of 70 pixels."""
    validation_batch_size: Execution[Count] = 16
    """Slices a rank takes through the net at once in a validation."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            num_images=800_000,
            global_batch_size=16,
            micro_batch_size=4,
            betas=(0.5, 0.9),
            warmup_images=3_200,
            ema_lengths=(0.05,),
            checkpoint_every_images=50_000,
            log_every_images=1_600,
        )
    )

    @property
    def factor(self) -> int:
        """Pixels of the side of a latent position."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def has_discriminator(self) -> bool:
        """Whether the training has a discriminator."""
        return self.discriminator_weight > 0

    def problems(self, size: int | None = None, ranks: int = 1) -> list[Problem]:
        """Values out of range, and settings that do not go together."""
        problems = range_problems(self, "config", "autoencoder.")
        wrong = names_of(problems)
        problems += self.train.problems("autoencoder.train", ranks)

        def check(name: str, good: bool, remedy: str) -> None:
            if not (good or wrong & {name}):
                value = getattr(self, name)
                shown = list(value) if isinstance(value, tuple) else value
                problems.append(Problem("config", f"autoencoder.{name}", str(shown), remedy))

        groups = self.norm_num_groups
        if not wrong & {"norm_num_groups", "block_out_channels"}:
            remedy = f"give channels that norm_num_groups ({groups}) divides"
            check("block_out_channels", not any(c % groups for c in self.block_out_channels), remedy)
        if size is not None and not wrong:
            levels = len(self.block_out_channels)
            check("block_out_channels", size % self.factor == 0, f"{levels} levels halve {size} pixels unevenly")
            patches = size // 2**self.discriminator_layers
            remedy = f"it leaves fewer than {_LEAST_PATCHES} patches of {size} pixels: give fewer layers"
            check("discriminator_layers", not self.has_discriminator or patches >= _LEAST_PATCHES, remedy)
        if self.segmenter is not None:
            remedy = "give a run folder with a segmenter; `segdiff train-segmenter --help` says how to train one"
            check("segmenter", (segmenter_weights(self.segmenter) / DESCRIPTION).is_file(), remedy)
        return problems


def segmenter_weights(given: str | Path) -> Path:
    """The folder of a segmenter's weights, from a run folder or from the folder itself."""
    inside = Path(given) / "segmenter" / "weights"
    return inside if inside.is_dir() else Path(given)
