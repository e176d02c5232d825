"""The sections `denoiser`, `diffusion` and `validation`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt, MinLen

from data_shards.feed.config import LoaderConfig
from data_shards.problems import Problem
from data_shards.ranges import (
    Channels,
    Count,
    Layers,
    NonNegative,
    Positive,
    SettingChecks,
    Share,
    WholeNumber,
    names_of,
    range_problems,
)
from data_shards.settings import Execution, Result, ResultWhereSet, Resumable
from segdiff_dist.config.choices import AttentionBackend
from segdiff_dist.weight_files import DESCRIPTION
from segdiff_kernels.backend import Kernels

MaskEncoding = Literal["onehot", "embedding", "scalar_255", "scalar_signed"]
Conditioning = Literal["concat", "add", "multiply", "spade", "controlnet", "none"]
GuidanceRemoves = Literal["mask", "class", "both"]
PredictionType = Literal["epsilon", "v", "x0"]
LossWeighting = Literal["none", "min_snr", "edm"]
BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
Objective = Literal["ddpm", "edm", "flow"]
SigmaSpacing = Literal["karras", "log_snr"]
TimestepSpacing = Literal["leading", "trailing", "linspace", "karras", "log_snr"]
Net = Literal["unet", "efficient", "compact"]
Space = Literal["pixel", "latent"]
# Side of the squares of pixels that the stem joins into one position; 1: no stem.
_STEM: dict[Net, int] = {"unet": 1, "efficient": 2, "compact": 4}
# What images depend on when they are sampled; the rest of DiffusionConfig says how the network is trained.
DDPM_FIELDS = ("num_train_timesteps", "beta_schedule", "prediction_type", "zero_terminal_snr", "snr_shift")
SIGMA_FIELDS = ("objective", "sigma_data", "lognormal", "snr_shift")
LEVELS_FIELD = "distilled_levels"  # of students alone, in addition


@dataclass(frozen=True)
class DenoiserConfig:
    """The network. The defaults are the paper's (section 4.2): 113.7 M parameters at 256x256."""

    block_out_channels: Result[Annotated[tuple[Channels, ...], MinLen(1)]] = (128, 128, 256, 256, 512, 512)
    """Channels of each level, from the finest to the coarsest. Every level halves the feature map."""
    layers_per_block: Result[Layers] = 2
    """Residual blocks of each level."""
    attention_resolutions: Result[tuple[int, ...]] = (16,)
    """Sides of the feature maps at which the blocks hold self-attention. The middle block always does. The sides are
    halves of the image's side. `net: efficient` has halved it already at the first level, compact twice."""
    attention_head_dim: Result[Count] = 8
    """Channels of each attention head."""
    norm_num_groups: Result[Count] = 32
    """Groups of the group normalisation."""
    dropout: ResultWhereSet[Annotated[float, Ge(0), Lt(1)]] = 0.0
    """Share of the values that training drops in each residual block. Against memorisation of small archives;
    Karras et al. 2022 take 0.05 to 0.25. What is dropped is a function of seed and position."""
    augmentation_labels: ResultWhereSet[bool] = False
    """Give the net what the loader's augmentation did to each slice (flip, angle, zoom, crop, grey values), so that its
    images do not show it (Karras et al. 2022). Sampling asks for slices as they are stored."""
    net: Result[Net] = "unet"
    """unet: the paper's. efficient: more depth for the same time. Its levels begin at half the image's side, behind a
    stem that makes four channels of each 2x2 pixels, and the time embedding scales and shifts what a norm gives.
    compact: the same with 4x4 pixels, for large images on small machines."""
    space: ResultWhereSet[Space] = "pixel"
    """What the net denoises. latent: the latents of an autoencoder, whose sides `attention_resolutions` then names
    (Rombach et al. 2022)."""
    autoencoder: Resumable[str | None] = None
    """The autoencoder of space latent: the run folder of `segdiff train-autoencoder`, or RUN/autoencoder/weights."""
    low_resolution: ResultWhereSet[Count | None] = None
    """The net denoises slices that are shrunk to this side, by area, and reads the share of each class in a pixel: the
    lower stage of a cascade. null: slices as they are. `attention_resolutions` then names sides of shrunk slices."""
    cascade: ResultWhereSet[str | None] = None
    """Super-resolution: the net also reads the images of this trained denoiser of `low_resolution` (Ho et al. 2022). A
    run folder, or a folder of weights. Sampling then runs both."""
    conditioning: Result[Conditioning] = "concat"
    """How the net reads the mask. concat, add, multiply: it is joined to the noised image. spade: it scales and shifts
    what the norms give, at each pixel (Park et al. 2019). controlnet: a trained denoiser is frozen, and a copy of its
    encoder reads the mask (Zhang et al. 2023). none: it reads no mask, and learns from slices without labels too."""
    base: ResultWhereSet[str | None] = None
    """The trained denoiser of conditioning controlnet: a run folder, or a folder of weights. It was trained without
    masks (none), or with mask_dropout."""
    spade_channels: Result[Channels] = 128
    """Features of the mask at each level, for conditioning spade. The default is Park et al.'s."""
    spade_norms: Result[Literal["decoder", "all"]] = "decoder"
    """The norms that read the mask, for conditioning spade: those of the decoder (Wang et al. 2022), or all."""
    mask_encoding: Result[MaskEncoding] = "onehot"
    """onehot: one channel for each class. embedding: a learned vector for each class. scalar_255: the label number in
    one channel, as label / 255 (Konz et al.). scalar_signed: 2 * label / 255 - 1 (the paper's code)."""
    mask_embedding_dim: Result[Count] = 8
    """Length of the vectors of mask_encoding embedding."""
    soft_masks: Result[bool] = False
    """Mix the two classes of pixels at borders by their shares. Needs a set with `prepare.soft_edge`."""
    class_conditioning: Result[bool] = True
    """Give the net the modality and the axis."""
    attention: Resumable[AttentionBackend] = "auto"
    """What computes attention: xformers, which needs a GPU, or torch (sdpa). auto: xformers if it runs here."""
    kernels: Resumable[Kernels] = "auto"
    """What computes the net: Triton's fused kernels, which need a GPU, or torch, through diffusers' own modules. auto:
    the kernels if they run here. The weights are the same."""

    @property
    def stem(self) -> int:
        """Side of the squares of pixels that become one position of the first level; 1 for `net: unet`."""
        return _STEM[self.net]

    def sides(self, size: int) -> list[int]:
        """Feature-map sides of the levels, for images of side `size`."""
        return [size // self.stem // 2**level for level in range(len(self.block_out_channels))]

    def problems(self, size: int | None = None) -> list[Problem]:
        """Problems of the settings, also for slices of side `size` if it is known."""
        problems = range_problems(self, "config", "denoiser.")
        wrong = names_of(problems)
        if "block_out_channels" not in wrong:
            problems += self._channel_problems(wrong, size)
        if self.soft_masks and self.mask_encoding.startswith("scalar"):
            remedy = "a scalar can hold one class only; use mask_encoding onehot or embedding"
            problems.append(Problem("config", "denoiser.soft_masks", "True", remedy))
        problems += self._conditioning_problems()
        return problems

    def _conditioning_problems(self) -> Iterator[Problem]:
        """Settings that do not go with the conditioning."""
        lacking = {
            "spade": "the kernels have no scale and shift for each pixel",
            "controlnet": "the kernels do not compute a ControlNet",
        }.get(self.conditioning)
        if lacking is not None and self.kernels == "triton":
            yield Problem("config", "denoiser.kernels", "triton", f"{lacking}: use kernels auto or torch, or concat")
        if self.dropout > 0 and self.kernels == "triton":
            yield Problem(
                "config", "denoiser.kernels", "triton", "the kernels have no dropout: use kernels auto or torch"
            )
        if self.dropout > 0 and self.conditioning == "controlnet":
            yield Problem("config", "denoiser.dropout", str(self.dropout), "its base is frozen as it is: give 0")
        if self.augmentation_labels and self.conditioning == "controlnet":
            remedy = "its base is frozen as it is, and only a copy of its encoder learns: turn it off"
            yield Problem("config", "denoiser.augmentation_labels", "True", remedy)
        if (self.conditioning == "controlnet") != (self.base is not None):
            remedy = "only conditioning controlnet has a base: leave it out, or use that"
            if self.base is None:
                remedy = "give the run folder of a trained denoiser, as of --denoiser.conditioning none"
            yield Problem("config", "denoiser.base", str(self.base), remedy)
        if self.conditioning == "none" and self.soft_masks:
            yield Problem("config", "denoiser.soft_masks", "True", "conditioning none reads no mask: turn it off")

    def loader_problems(self, loader: LoaderConfig) -> list[Problem]:
        """Settings that do not go with the loader's."""
        if not self.augmentation_labels or loader.augments:
            return []
        remedy = "the loader does not augment: give --loader.flip, --loader.zoom 0.1 or the like, or turn it off"
        return [Problem("config", "denoiser.augmentation_labels", "True", remedy)]

    def space_problems(self) -> Iterator[Problem]:
        """Settings that do not go with the space."""
        if self.space == "pixel":
            if self.autoencoder is not None:
                yield Problem("config", "denoiser.autoencoder", self.autoencoder, "give denoiser.space latent with it")
            yield from self._cascade_problems()
            return
        for name in ("low_resolution", "cascade"):
            if (value := getattr(self, name)) is not None:
                remedy = "a cascade works on pixels: leave it out, or use denoiser.space pixel"
                yield Problem("config", f"denoiser.{name}", str(value), remedy)
        if self.autoencoder is None:
            remedy = "give the run folder of `segdiff train-autoencoder`"
            yield Problem("config", "denoiser.autoencoder", "None", remedy)
        if self.mask_encoding.startswith("scalar"):
            remedy = "the mean of several label numbers is another label: use onehot or embedding"
            yield Problem("config", "denoiser.mask_encoding", self.mask_encoding, remedy)
        if self.conditioning == "controlnet":
            remedy = "a ControlNet works on pixels: use concat, spade or space pixel"
            yield Problem("config", "denoiser.conditioning", self.conditioning, remedy)
        if self.net != "unet":
            yield Problem("config", "denoiser.net", self.net, "its stem is for pixels: use unet for space latent")

    def _cascade_problems(self) -> Iterator[Problem]:
        names = [name for name in ("low_resolution", "cascade") if getattr(self, name) is not None]
        if names and self.conditioning == "controlnet":
            remedy = f"a ControlNet is no stage of a cascade: use concat, or leave out denoiser.{names[0]}"
            yield Problem("config", "denoiser.conditioning", self.conditioning, remedy)
        if self.low_resolution is not None and self.mask_encoding.startswith("scalar"):
            remedy = "the mean of several label numbers is another label: use onehot or embedding"
            yield Problem("config", "denoiser.mask_encoding", self.mask_encoding, remedy)

    @property
    def multiple(self) -> int:
        """Its levels halve slices whose side is a multiple of this evenly."""
        return self.stem * 2 ** (len(self.block_out_channels) - 1)

    def _channel_problems(self, wrong: set[str], size: int | None) -> Iterator[Problem]:
        """Problems of numbers that must divide others. `wrong`: the settings that are out of range."""
        channels, groups = self.block_out_channels, self.norm_num_groups
        attending = {channels[-1]}  # the middle block
        multiple = self.multiple
        where, shown = "config", str(list(channels))
        if "norm_num_groups" not in wrong and any(c % groups for c in channels):
            remedy = f"give channels that norm_num_groups ({groups}) divides"
            yield Problem(where, "denoiser.block_out_channels", shown, remedy)
        if size is not None and size % multiple:
            stem = f", behind a stem of {self.stem}x{self.stem} pixels," if self.stem > 1 else ""
            remedy = (
                f"{len(channels)} levels{stem} halve {size} pixels unevenly: give fewer, or a multiple of {multiple}"
            )
            yield Problem(where, "denoiser.block_out_channels", shown, remedy)
        elif size is not None:
            sides = self.sides(size)
            attending |= {c for c, side in zip(channels, sides, strict=True) if side in self.attention_resolutions}
            if unknown := [r for r in self.attention_resolutions if r not in sides]:
                remedy = f"the levels are {', '.join(map(str, sides))} pixels wide; give some of these, or none"
                yield Problem(where, "denoiser.attention_resolutions", str(unknown), remedy)
        if "attention_head_dim" not in wrong and any(c % self.attention_head_dim for c in attending):
            widths = ", ".join(map(str, sorted(attending)))
            remedy = f"give a number that divides the channels of the levels with attention ({widths})"
            yield Problem(where, "denoiser.attention_head_dim", str(self.attention_head_dim), remedy)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule, the network's prediction, and the weights of its errors.

    The defaults are the paper's: N = 1000, linear, epsilon, every timestep alike, nothing dropped. docs/recipes.md has
    formulas and sources.
    """

    objective: Result[Objective] = "ddpm"
    """ddpm: timesteps of a schedule, and a prediction_type (Ho et al. 2020). edm: continuous noise levels and EDM's
    preconditioning (Karras et al. 2022). flow: rectified flow (Liu et al. 2022). edm and flow draw ln sigma from
    `lognormal` and have a prediction of their own: they do not use prediction_type and the schedule."""
    sigma_data: Result[Positive | None] = None
    """Standard deviation of the images in [-1, 1], for objective edm. null: it is measured on the training slices."""
    num_train_timesteps: Result[Annotated[int, Ge(2)]] = 1000
    """Timesteps of the schedule."""
    beta_schedule: Result[BetaSchedule] = "linear"
    """How the noise grows with the timesteps."""
    prediction_type: Result[PredictionType] = "epsilon"
    """What the net predicts: the noise (epsilon), v (Salimans and Ho 2022) or the image (x0)."""
    zero_terminal_snr: Result[bool] = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2024)."""
    snr_shift: Result[Positive] = 1.0
    """The signal-to-noise ratio is multiplied by the square of this number. It adapts a schedule to another image size
    (Hoogeboom et al. 2023): give the size that the schedule was made for, divided by the images' size. 0.25 takes a
    schedule from 64 to 256 pixels."""
    timestep_sampling: Result[Literal["uniform", "lognormal"]] = "uniform"
    """uniform: every timestep is drawn equally often. lognormal: the logarithm of the noise level is drawn from a
    normal distribution (Karras et al. 2022)."""
    lognormal: Result[tuple[float, float]] = (-1.2, 1.2)
    """Mean and standard deviation of ln sigma (P_mean and P_std); for flow, of the logit of t. The defaults are Karras
    et al.'s. Esser et al. 2024 use 0 and 1 for flow."""
    loss_weighting: Result[LossWeighting] = "none"
    """How much the error at each noise level counts. none: equally. min_snr: Hang et al. 2023. edm: Karras et al.
    2022."""
    min_snr_gamma: Result[Positive] = 5.0
    """Gamma of loss_weighting min_snr. The default is Hang et al.'s."""
    edm_sigma_data: Result[Positive] = 0.5
    """Standard deviation of the images in [-1, 1] in loss_weighting edm. The default is Karras et al.'s."""
    mask_dropout: Result[Share] = 0.0
    """Probability that a sample is shown without its mask. Guidance that removes the mask needs it."""
    class_dropout: Result[Share] = 0.0
    """Probability that a sample is shown without modality and axis."""
    joint_dropout: Result[Share] = 0.0
    """Probability that a sample is shown without mask, modality and axis."""
    organ_dropout: Result[Share] = 0.0
    """Probability that a sample is ablated: its mask then loses each organ with probability 0.5 (Konz et al. 2024)."""
    dice_weight: Result[NonNegative] = 0.0
    """Weight of 1 - Dice between the mask and the segmenter's prediction on the predicted x_0. 0 leaves it out."""
    dice_segmenter: Result[str | None] = None
    """The segmenter's weights: the folder RUN/segmenter/weights of `segdiff train-segmenter`."""
    contrastive_weight: ResultWhereSet[NonNegative] = 0.0
    """Weight of the region-specific contrastive loss (MAISI-v2, 2026): without some organs in the mask, the prediction
    must differ where they were, and nowhere else. A step costs twice as much. 0 leaves it out; the authors' is 0.01."""
    contrastive_delta: ResultWhereSet[Positive] = 2.0
    """A mean difference above this one is not rewarded. The default is the authors'."""
    consistency_weight: ResultWhereSet[NonNegative] = 0.0
    """Weight of Siamese-Diffusion's noise consistency (2025), for small archives: the net also predicts from mask and
    slice, and the prediction from the mask alone must come near that one. A step costs twice as much. 0 leaves it out;
    the authors' is 1."""
    consistency_ramp_images: ResultWhereSet[Count | None] = None
    """Images over which the slice's weight grows from 0 to 1. null: all of the training, as the authors'."""
    distilled_levels: ResultWhereSet[tuple[float, ...] | None] = None
    """The noise levels of a student's steps, as alpha_bar = 1 / (1 + sigma^2). `segdiff distil` sets them."""

    def problems(self) -> list[Problem]:
        """Values out of range, and settings that do not go together."""
        prefix = "diffusion."
        checks = SettingChecks(self, "config", prefix, range_problems(self, "config", prefix))
        self._check_objective(checks)
        self._check_schedule(checks)
        self._check_dropped_conditions(checks)
        self._check_further_terms(checks)
        return checks.problems

    def _check_objective(self, checks: SettingChecks) -> None:
        """Settings of the other objectives."""
        if self.objective != "ddpm":
            own = f"{self.objective} has no timesteps and its own prediction"
            for name in ("prediction_type", "zero_terminal_snr", "timestep_sampling", "beta_schedule"):
                default = DiffusionConfig.__dataclass_fields__[name].default
                is_default = getattr(self, name) == default
                checks.require(name, is_default, f"{own}: leave it out, or use objective ddpm")
            has_weight_twice = (self.objective, self.loss_weighting) == ("edm", "edm")
            checks.require("loss_weighting", not has_weight_twice, "objective edm already has that weight: use none")
        remedy = "only objective edm has it: leave it out"
        checks.require("sigma_data", self.sigma_data is None or self.objective == "edm", remedy)

    def _check_schedule(self, checks: SettingChecks) -> None:
        """Schedules and loss weights that leave out the noise levels where sampling begins."""
        zero_snr, weighting = self.zero_terminal_snr, self.loss_weighting
        remedy = "with epsilon the last step does not determine the image; use prediction_type v or x0"
        checks.require("zero_terminal_snr", not (zero_snr and self.prediction_type == "epsilon"), remedy)
        remedy = "gives pure noise, where sampling begins, the weight 0: use none or edm, or no zero_terminal_snr"
        checks.require("loss_weighting", not (zero_snr and weighting == "min_snr"), remedy)
        predicts_noise = self.objective == "ddpm" and self.prediction_type == "epsilon"
        remedy = (
            "on epsilon most of the loss is in the last tenth of the steps: use none or min_snr, or prediction_type v"
        )
        checks.require("loss_weighting", not (predicts_noise and weighting == "edm"), remedy)
        remedy = "never draws the last timestep of zero_terminal_snr, where sampling begins; use uniform"
        checks.require("timestep_sampling", not (zero_snr and self.timestep_sampling == "lognormal"), remedy)
        checks.require("lognormal", self.lognormal[1] > 0, "give a standard deviation above 0")

    def _check_dropped_conditions(self, checks: SettingChecks) -> None:
        """Probabilities that exclude each other."""
        dropped = self.mask_dropout + self.class_dropout + self.joint_dropout
        remedy = "mask_dropout, class_dropout and joint_dropout add up to more than 1"
        checks.require("joint_dropout", dropped <= 1, remedy)

    def _check_further_terms(self, checks: SettingChecks) -> None:
        """The Dice, contrastive and consistency terms of the loss."""
        if self.dice_weight > 0:
            remedy = "give the folder of a segmenter's weights; `segdiff train-segmenter --help` says how to train one"
            weights = None if self.dice_segmenter is None else Path(self.dice_segmenter)
            checks.require("dice_segmenter", weights is not None and (weights / DESCRIPTION).is_file(), remedy)
        remedy = "organ_dropout teaches to add the organs that a mask lacks, this the opposite: give 0 for one of them"
        checks.require("contrastive_weight", self.contrastive_weight == 0 or self.organ_dropout == 0, remedy)
        remedy = "with contrastive_weight too, a step would predict three times: give 0 for one of them"
        checks.require("consistency_weight", self.consistency_weight == 0 or self.contrastive_weight == 0, remedy)
        remedy = "only consistency_weight has a second prediction: leave it out, or give that a weight"
        has_use = self.consistency_ramp_images is None or self.consistency_weight > 0
        checks.require("consistency_ramp_images", has_use, remedy)

    @property
    def passes(self) -> int:
        """Images that the net computes in training, for each of a batch."""
        return 2 if self.contrastive_weight > 0 or self.consistency_weight > 0 else 1

    @property
    def process(self) -> dict[str, Any]:
        """The values that sampling depends on."""
        names = DDPM_FIELDS if self.objective == "ddpm" else SIGMA_FIELDS
        found = {name: getattr(self, name) for name in names}
        return found if self.distilled_levels is None else found | {LEVELS_FIELD: self.distilled_levels}


@dataclass(frozen=True)
class ValidationConfig:
    """The measurements and pictures every `train.validate_every_images`. Nothing here changes the trained weights."""

    num_images: Result[Count] = 64
    """Slices in the validation loss. More of them make it less noisy, and slower."""
    num_pictures: Result[WholeNumber] = 8
    """Masks of the sample grid. 0 draws none."""
    num_steps: Result[Count] = 25
    """DDIM steps of a picture, with trailing timesteps, or on Karras et al.'s grid for objective edm."""
    batch_size: Execution[Count] = 16
    """Images a rank takes through the net at once."""
    seed: Result[int] = 0
    """Seed of slices, noise and timesteps. Runs can be compared if it is the same."""

    def problems(self, diffusion: DiffusionConfig) -> list[Problem]:
        """Values out of range, and values that do not go with the net's training."""
        problems = range_problems(self, "config", "validation.")
        most = diffusion.num_train_timesteps
        if diffusion.objective == "ddpm" and self.num_steps > most:
            remedy = f"the net knows {most} timesteps: give at most that many"
            problems.append(Problem("config", "validation.num_steps", str(self.num_steps), remedy))
        return problems
