"""The training task of the autoencoder: reconstruction, KL divergence, perceptual and adversarial loss.

Rombach et al. 2022, eq. 25. Dimensions: B batch, C latent channels, H, W image rows and columns, h, w those of a
latent, P patches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.feed.config import LoaderConfig
from data_shards.problems import problem
from data_shards.records import Batch
from segdiff_dist.autoencoding.autoencoder import save_autoencoder
from segdiff_dist.autoencoding.config import AutoencoderConfig, segmenter_weights
from segdiff_dist.autoencoding.network import AutoencoderNet, latent_shape
from segdiff_dist.autoencoding.perceptual import PerceptualLoss
from segdiff_dist.pixels import to_model_range
from segdiff_dist.ranks.distributed import sum_over_ranks
from segdiff_dist.training.held_out import held_out_batches
from segdiff_dist.weight_files import DESCRIPTION
from segdiff_kernels import philox

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

_SEGMENTER_DIGEST = "segmenter_sha256"


class AutoencoderTask:
    """Learns to reconstruct the slices of the train split from latents near the standard normal distribution.

    One optimiser has both networks: the autoencoder's losses give no gradient to the discriminator, and the
    discriminator's none to the autoencoder. Noise of the posterior is keyed by (seed, position). With a discriminator
    the newest weights are kept, since PSNR prefers a blur; without, those with the best PSNR on the validation split.
    """

    name = "autoencoder"
    passes = 1

    def __init__(
        self,
        shards: ShardSet,
        size: int,
        config: AutoencoderConfig,
        loader: LoaderConfig,
        weights: Path,
        device: torch.device,
    ) -> None:
        self.shards, self.size, self.config, self.loader = shards, size, config, loader
        self.weights, self.device = weights, device
        self.perceptual: PerceptualLoss | None = None
        if config.segmenter is not None and config.perceptual_weight > 0:
            given = segmenter_weights(config.segmenter)
            self.perceptual = PerceptualLoss(given, shards.label_table, shards.modalities, device)
            _refuse_another_segmenter(weights, self.perceptual.weights_sha256, given)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            self.model: nn.Module = AutoencoderNet(config)
        self._validation_rows = shards.select(split="val", modalities=loader.modalities, axes=loader.axes)
        chooses = len(self._validation_rows) > 0 and not config.has_discriminator
        self.score = "val_psnr_db" if chooses else None

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss. Its value is that of reconstruction, KL and perceptual loss.

        The adversarial losses add their gradient only. Their values say nothing about progress, and where they begin
        they would look like a spike. Metrics: each part without its weight; kl in nats a pixel.
        """
        config = self.config
        noise_BChw = philox.normal(
            config.train.seed, philox.STREAM_LATENT, batch.position_B, latent_shape(config, self.size)
        )
        y_B1HW, mean_BChw, log_variance_BChw, *scores = forward(batch.image_BHW, noise_BChw)
        x_B1HW = to_model_range(batch.image_BHW)
        parts = {
            "l1": (y_B1HW - x_B1HW).abs().flatten(1).mean(1),
            "kl": kl_divergence(mean_BChw, log_variance_BChw) / x_B1HW[0].numel(),
        }
        loss_B = parts["l1"] + config.kl_weight * parts["kl"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(y_B1HW, x_B1HW, batch.modality_B)
            loss_B = loss_B + config.perceptual_weight * parts["perceptual"]
        metrics = {name: torch.stack((part_B.sum(), torch.ones_like(part_B).sum())) for name, part_B in parts.items()}
        if scores:
            generator_B, discriminator_B = hinge_losses(*scores)
            begun_B = (batch.position_B >= config.discriminator_start).to(generator_B.dtype)
            adversarial_B = begun_B * (config.discriminator_weight * generator_B + discriminator_B)
            loss_B = loss_B + (adversarial_B - adversarial_B.detach())
            for name, part_B in (("generator", generator_B), ("discriminator", discriminator_B)):
                metrics[name] = torch.stack(((begun_B * part_B).sum(), begun_B.sum()))
        return loss_B.mean(), {name: value.detach() for name, value in metrics.items()}

    def validate(self, forward: Callable[..., Any], images_seen: int) -> dict[str, float]:
        """PSNR in dB of the reconstructions of the validation split, the mean over slices. The ranks share the work."""
        rows, config = self._validation_rows, self.config
        if len(rows) == 0:
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch, counts in held_out_batches(
            self.shards, rows, self.loader, config.validation_batch_size, self.device
        ):
            error_B1HW = forward(batch.image_BHW).clamp(-1, 1) - to_model_range(batch.image_BHW)
            if counts:
                # The range of [-1, 1] is 2. The least error is that of 16-bit slices.
                psnr_B = 10.0 * (4.0 / error_B1HW.double().square().flatten(1).mean(1).clamp(min=2.0**-32)).log10()
                sums += torch.stack((psnr_B.sum(), torch.ones_like(psnr_B).sum()))
        total, number = sum_over_ranks(sums).tolist()
        return {"val_psnr_db": total / number}

    def export(self, average: str, weights: dict[str, Tensor]) -> None:
        """Write the autoencoder of the first average; the discriminator stays in the checkpoints."""
        if average != self.config.train.averages[0]:
            return
        prefix = "autoencoder."
        own = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        training = {} if self.perceptual is None else {_SEGMENTER_DIGEST: self.perceptual.weights_sha256}
        save_autoencoder(self.weights, own, self.config, self.size, self.shards.modalities, training)


def kl_divergence(mean_BChw: Tensor, log_variance_BChw: Tensor) -> Tensor:
    """float32 [B]: KL of N(mean, variance) from N(0, 1), the sum over a latent. Kingma and Welling 2014, appendix B."""
    each_BChw = mean_BChw.square() + log_variance_BChw.exp() - 1.0 - log_variance_BChw
    return 0.5 * each_BChw.flatten(1).sum(1)


def hinge_losses(judged_BP: Tensor, real_BP: Tensor, made_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The autoencoder's and the discriminator's adversarial loss, float32 [B] each, from scores of patches.

    Lim and Ye 2017, the halves of Rombach et al.'s code. `judged_BP` and `made_BP` are scores of the same
    reconstruction.
    """
    discriminator_B = 0.5 * (F.relu(1.0 - real_BP) + F.relu(1.0 + made_BP)).mean(1)
    return -judged_BP.mean(1), discriminator_B


def _refuse_another_segmenter(weights: Path, sha256: str, given: Path) -> None:
    """A resumed run must have the segmenter that it was started with."""
    file = weights / DESCRIPTION
    before = json.loads(file.read_text()).get(_SEGMENTER_DIGEST, sha256) if file.is_file() else sha256
    if before != sha256:
        value = f"not the weights the run was started with (sha256 {before[:12]}...)"
        raise problem(given, "autoencoder.segmenter", value, "restore them, or use another run folder")
