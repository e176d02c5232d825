"""The denoiser's training task: the loss of a batch, with every random draw keyed by position.

Dimensions: B batch, C channels, K classes, H rows, W columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_shards.labels import LabelTable
from data_shards.modalities import MODALITIES
from data_shards.problems import Problem, problem
from data_shards.records import Batch
from segdiff_dist.denoising.conditioning import Conditions, drop_conditions
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.contrast import ContrastiveTerm, predict_pair
from segdiff_dist.denoising.denoiser import TRAINED_ON, Denoiser
from segdiff_dist.denoising.frozen_base import Base, kept_weights
from segdiff_dist.denoising.latents import run_space
from segdiff_dist.denoising.organ_dropout import drop_organs, organ_flags
from segdiff_dist.denoising.process import Noised, make_process, noised_by_position
from segdiff_dist.denoising.siamese import ImagePrior, NoiseConsistency
from segdiff_dist.pixels import to_model_range
from segdiff_dist.ranks.distributed import is_main
from segdiff_dist.segmentation.segmenter import Segmenter
from segdiff_dist.weight_files import DESCRIPTION
from segdiff_kernels.weighted_mse import weighted_mse, weighted_mse_reference

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet


_SEGMENTER_DIGEST = "dice_segmenter_sha256"
_OF_MASKS = ("mask_dropout", "joint_dropout", "organ_dropout")


class DenoiserTask:
    """Section 3 of the paper: predict the noise (or v, or x_0) of a noised slice, given its mask.

    For objective edm, `diffusion` must hold sigma_data (sigma_data.py); for consistency_weight,
    consistency_ramp_images; for space latent, latents.py must have measured the scale. `validation` is called as
    Task.validate is, and returns metrics of held-out slices; without it there are none. `find_problems` checks the
    settings beforehand.
    """

    name = "train"
    score = None  # the newest weights are exported

    def __init__(
        self,
        shards: ShardSet,
        size: int,
        denoiser: DenoiserConfig,
        diffusion: DiffusionConfig,
        seed: int,
        weights: Path,
        device: torch.device,
        validation: Callable[[Callable[..., Any], int], dict[str, float]] | None = None,
    ) -> None:
        self.seed, self.diffusion, self.weights, self.validation = seed, diffusion, weights, validation
        self.dice_term = None
        if diffusion.dice_weight > 0:
            self.dice_term = DiceTerm(
                Path(str(diffusion.dice_segmenter)), shards.label_table, device, shards.modalities
            )
            _refuse_another_segmenter(weights, self.dice_term, str(diffusion.dice_segmenter))
        self.passes, self.contrastive_term = diffusion.passes, None
        if diffusion.contrastive_weight > 0:
            self.contrastive_term = ContrastiveTerm(shards.label_table, diffusion.contrastive_delta, seed, device)
        self.base = Base.find(denoiser, weights.parent)
        below = Base.below(denoiser, weights.parent)
        lower = None if below is None else below.kept_below(weights.parent, copy=is_main())
        with _seeded(seed):
            net = None if self.base is None else self.base.net
            latent = run_space(denoiser, weights)
            table, modalities = shards.label_table, shards.modalities
            model = Denoiser(denoiser, table, size, modalities, net, latent=latent, lower=lower)
            self.consistency = _consistency(model, diffusion)
        if self.base is not None:
            self.base.begin(model)
            if is_main():
                self.base.keep(weights.parent)
        self.model = model.prepare_for(device)
        self.process = make_process(diffusion, device)

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L_m of the paper's section 3.2, weighted by noise level, plus the Dice, contrastive and consistency terms.

        Metrics: the unweighted squared error by quarters of the noise levels, and those of the terms.
        """
        process, space = self.process, self.model.space
        clean_BCHW = None if space is None else space.x_0(batch)
        x_BCHW, target_BCHW, level_B = self._noised(batch, clean_BCHW)

        shown, time_B, contrast, informed_BCHW = self.conditions(batch), process.time(level_B), None, None
        if self.model.draws is not None:  # predict_pair doubles the batch
            self.model.draws.at(self.seed, batch.position_B.repeat(self.passes))
        if self.consistency is not None:
            clean_BCHW = to_model_range(batch.image_BHW) if clean_BCHW is None else clean_BCHW
            prior_BCHW = self.consistency.weighted(clean_BCHW, batch.position_B)
            prediction_BCHW, informed_BCHW = self.consistency.predict_pair(forward, x_BCHW, time_B, shown, prior_BCHW)
        elif self.contrastive_term is None:
            prediction_BCHW = forward(x_BCHW, time_B, *shown)
        else:
            erased = self.conditions(batch, self.contrastive_term.erased)
            prediction_BCHW, without_BCHW = predict_pair(forward, x_BCHW, time_B, shown, erased)
            contrast = self.contrastive_term(prediction_BCHW, without_BCHW, target_BCHW, shown, erased)

        mean_squares = weighted_mse if self.model.uses_kernels else weighted_mse_reference
        loss, error_B = mean_squares(prediction_BCHW, target_BCHW, process.weight(level_B))
        metrics = process.sums(error_B, level_B)
        if self.consistency is not None and informed_BCHW is not None:
            level_weight_B = process.weight(level_B)
            more, sums = self.consistency.further_terms(prediction_BCHW, informed_BCHW, target_BCHW, level_weight_B)
            loss, metrics = loss + more, metrics | sums
        if self.dice_term is not None:
            x0_pred_BCHW = process.x_0(prediction_BCHW, x_BCHW, level_B)
            dice_loss_B, has_organs_B = self.dice_term(x0_pred_BCHW, batch)
            # alpha_bar: 1 without noise, 0 in pure noise, where x0_pred is a guess.
            weight_B = process.alpha_bar(level_B) * has_organs_B
            loss = loss + self.diffusion.dice_weight * (weight_B * dice_loss_B).mean()
            metrics["dice_loss"] = torch.stack(((weight_B * dice_loss_B).sum(), weight_B.sum())).detach()
        if contrast is not None:
            loss = loss + self.diffusion.contrastive_weight * contrast.loss_B.mean()
            metrics |= contrast.metrics()
        return loss, metrics

    def _noised(self, batch: Batch, clean_BCHW: Tensor | None) -> Noised:
        """A batch with its noise; `clean_BCHW`: its slices in the net's space, if that is not the pixels'."""
        if clean_BCHW is None:
            return self.process.noised(batch, self.seed, use_kernels=self.model.uses_kernels)
        return noised_by_position(self.process, clean_BCHW, batch.position_B, self.seed)

    def validate(self, forward: Callable[..., Any], images_seen: int) -> dict[str, float]:
        """The metrics of `validation`; see Task.validate."""
        return {} if self.validation is None else self.validation(forward, images_seen)

    def export(self, average: str, weights: dict[str, Tensor]) -> None:
        """Write weights/`average` as a diffusers folder, with the settings they were trained with."""
        training: dict[str, Any] = {"diffusion": asdict(self.diffusion)}
        if self.model.trained_on != self.model.modalities:
            training[TRAINED_ON] = list(self.model.trained_on)
        if self.dice_term is not None:
            training[_SEGMENTER_DIGEST] = self.dice_term.weights_sha256
        frozen = {} if self.base is None else kept_weights(self.weights.parent)
        self.model.save(self.weights / average, frozen | weights, training)

    def conditions(self, batch: Batch, erased: Callable[[Conditions, Tensor], Conditions] | None = None) -> Conditions:
        """The conditions of each slice, without those that are dropped at its position in the order. `erased` changes
        the masks before."""
        diffusion, seed, position_B = self.diffusion, self.seed, batch.position_B
        conditions = self.model.conditions_of(batch)
        if self.model.lower is not None:
            low_B1hw, level_B = self.model.lower.drawn_condition(batch.image_BHW, seed, position_B)
            conditions = conditions._replace(low_B1hw=low_B1hw, level_B=level_B)
        conditions = drop_organs(conditions, self.model.label_table, diffusion.organ_dropout, seed, position_B)
        if erased is not None:
            conditions = erased(conditions, position_B)
        return drop_conditions(
            conditions,
            seed,
            position_B,
            mask_only=diffusion.mask_dropout,
            class_only=diffusion.class_dropout,
            both=diffusion.joint_dropout,
        )


class DiceTerm:
    """1 - soft Dice between a mask and a trained, frozen segmenter's prediction on x0_pred: the paper's future work.

    Raises InputProblems if the weights are missing or have other labels than `table`, or other modalities.
    """

    def __init__(
        self, weights: Path, table: LabelTable, device: torch.device, modalities: tuple[str, ...] = MODALITIES
    ) -> None:
        segmenter = Segmenter.load(weights, device)
        if segmenter.label_table != table:
            tables = f"{segmenter.label_table.name!r} there, {table.name!r} in the shard set"
            raise problem(weights, "label table", tables, "train a segmenter on this label set")
        if segmenter.modalities != modalities:
            value = f"{', '.join(segmenter.modalities)} there, {', '.join(modalities)} here"
            raise problem(weights, "modalities", value, "train a segmenter on this set")
        self.net, self.weights_sha256 = segmenter.net.requires_grad_(False), segmenter.weights_sha256
        self._is_organ_K = organ_flags(table, device)

    def __call__(self, x0_pred_BCHW: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """float32 [B] mean over the organs in the mask of 1 - 2 sum(p m) / (sum p + sum m); and [B], 1 if the mask has
        organs.

        m is the mask of the set, without organ dropout. Milletari et al. 2016, with p instead of p^2.
        """
        p_BKHW = self.net.scores(x0_pred_BCHW.clamp(-1.0, 1.0), batch.modality_B).softmax(dim=1)
        m_BKHW = torch.nn.functional.one_hot(batch.mask_BHW.long(), p_BKHW.shape[1]).movedim(-1, 1).to(p_BKHW.dtype)
        size_BK = m_BKHW.sum(dim=(2, 3))
        present_BK = ((size_BK > 0) & self._is_organ_K).to(p_BKHW.dtype)
        both_BK = torch.einsum("bkhw,bkhw->bk", p_BKHW, m_BKHW)
        # The clamp prevents 0/0 for an absent class, whose gradient would be NaN; `present` leaves the class out.
        dice_BK = 2.0 * both_BK / (p_BKHW.sum(dim=(2, 3)) + size_BK).clamp(min=1e-6)
        num_present_B = present_BK.sum(dim=1)
        loss_B = ((1.0 - dice_BK) * present_BK).sum(dim=1) / num_present_B.clamp(min=1.0)
        return loss_B, (num_present_B > 0).to(loss_B.dtype)


def find_problems(shards: ShardSet, size: int, denoiser: DenoiserConfig, diffusion: DiffusionConfig) -> list[Problem]:
    """Problems of these settings with each other and with this set."""
    problems = denoiser.problems(size) + diffusion.problems()
    if diffusion.distilled_levels is not None:
        remedy = "the run holds a student: go on with `segdiff distil`, or give another run folder"
        problems.append(Problem("config", "diffusion.distilled_levels", str(diffusion.distilled_levels), remedy))
    if denoiser.conditioning == "none":
        remedy = "the network reads no mask (denoiser.conditioning none): give 0"
        problems += [
            Problem("config", f"diffusion.{name}", str(value), remedy)
            for name in (*_OF_MASKS, "dice_weight", "contrastive_weight", "consistency_weight")
            if (value := getattr(diffusion, name)) > 0
        ]
    if diffusion.consistency_weight > 0 and denoiser.kernels == "triton":
        remedy = "the kernels do not read the slice beside the mask: use kernels auto or torch in training"
        problems.append(Problem("config", "denoiser.kernels", "triton", remedy))
    if diffusion.contrastive_weight > 0 and not shards.label_table.organ_ids:
        remedy = f"the label table {shards.label_table.name!r} has no organs that could be erased: give 0"
        problems.append(Problem("config", "diffusion.contrastive_weight", str(diffusion.contrastive_weight), remedy))
    if denoiser.soft_masks and "edge" not in shards.parts:
        remedy = "prepare the set with mask_resize soft and soft_edge, or turn it off"
        problems.append(Problem(str(shards.root), "denoiser.soft_masks", "the set keeps no soft edges", remedy))
    if not denoiser.class_conditioning:
        for name in ("class_dropout", "joint_dropout"):
            value = getattr(diffusion, name)
            if value > 0:
                remedy = "the network does not get the class (denoiser.class_conditioning); give 0"
                problems.append(Problem("config", f"diffusion.{name}", str(value), remedy))
    return problems


def _consistency(model: Denoiser, diffusion: DiffusionConfig) -> NoiseConsistency | None:
    """The second prediction of `consistency_weight`. The model gets the part that reads the slice."""
    if diffusion.consistency_weight == 0:
        return None
    assert diffusion.consistency_ramp_images is not None
    encoder = model.unet if model.control is None else model.control
    model.image_prior = prior = ImagePrior(encoder, model.shape[0], model.config.stem)
    return NoiseConsistency(prior, diffusion.consistency_weight, diffusion.consistency_ramp_images)


def _refuse_another_segmenter(weights: Path, dice_term: DiceTerm, given: str) -> None:
    """A resumed run must have the segmenter it was started with. The run's exported weights hold that segmenter's
    digest."""
    for description in sorted(weights.glob(f"[!.]*/{DESCRIPTION}")):
        before = json.loads(description.read_text()).get(_SEGMENTER_DIGEST, dice_term.weights_sha256)
        if before != dice_term.weights_sha256:
            others = f"not the weights the run was started with (sha256 {before[:12]}...)"
            raise problem(given, "diffusion.dice_segmenter", others, "restore them, or use another run folder")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights are a function of the seed alone; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
