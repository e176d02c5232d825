"""The sections `denoiser`, `diffusion` and `validation`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_shards.problems import Problem
from data_shards.settings import Execution, Result, Resumable
from segdiff_dist.config.choices import AttentionBackend
from segdiff_kernels.backend import Kernels

MaskEncoding = Literal["onehot", "embedding", "scalar_255", "scalar_signed"]
Conditioning = Literal["concat", "add", "multiply"]
GuidanceRemoves = Literal["mask", "class", "both"]
PredictionType = Literal["epsilon", "v", "x0"]
LossWeighting = Literal["none", "min_snr", "edm"]
BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
Objective = Literal["ddpm", "edm", "flow"]
SigmaSpacing = Literal["karras", "log_snr"]
TimestepSpacing = Literal["leading", "trailing", "linspace", "karras", "log_snr"]
Net = Literal["unet", "efficient"]
# The side of the square of pixels that the net takes as one: 1 is no stem.
_STEM: dict[Net, int] = {"unet": 1, "efficient": 2}
# What images depend on when they are sampled; the rest of DiffusionConfig says how the network is trained.
DDPM_FIELDS = ("num_train_timesteps", "beta_schedule", "prediction_type", "zero_terminal_snr", "snr_shift")
SIGMA_FIELDS = ("objective", "sigma_data", "lognormal", "snr_shift")


@dataclass(frozen=True)
class DenoiserConfig:
    """The network. The defaults are the paper's (section 4.2): 113.7 M parameters at 256x256."""

    block_out_channels: Result[tuple[int, ...]] = (128, 128, 256, 256, 512, 512)
    layers_per_block: Result[int] = 2
    attention_resolutions: Result[tuple[int, ...]] = (16,)
    """Feature-map sides at which the blocks hold self-attention; the middle block always does. They are halves of the
    image's side, which `net: efficient` has already halved at the first level."""
    attention_head_dim: Result[int] = 8
    norm_num_groups: Result[int] = 32
    net: Result[Net] = "unet"
    """unet: the paper's. efficient: its levels begin at half the image's side, behind a stem that makes four channels
    of each 2x2 pixels, and the time scales and shifts what a norm gives. More depth for the same time."""
    conditioning: Result[Conditioning] = "concat"
    """How the mask is joined to the noised image: concatenated, added or multiplied."""
    mask_encoding: Result[MaskEncoding] = "onehot"
    """One channel a class; a learned embedding of the class; or the label number in one channel, as label / 255
    (Konz et al.) or 2 * label / 255 - 1 (the paper's code)."""
    mask_embedding_dim: Result[int] = 8
    soft_masks: Result[bool] = False
    """Mix the two classes of pixels at borders by their shares; for sets with `prepare.soft_edge`."""
    class_conditioning: Result[bool] = True
    """Tell the net the modality and the axis."""
    attention: Resumable[AttentionBackend] = "auto"
    kernels: Resumable[Kernels] = "auto"
    """What computes the net: Triton's fused kernels, which need a GPU, or torch, through diffusers' own modules. auto:
    the kernels where they run. The weights are the same."""

    @property
    def stem(self) -> int:
        """Side of the squares of pixels that become one position of the first level; 1 for `net: unet`."""
        return _STEM[self.net]

    def sides(self, size: int) -> list[int]:
        """Feature-map sides of the levels, for images of side `size`."""
        return [size // self.stem // 2**level for level in range(len(self.block_out_channels))]

    def problems(self, size: int | None = None) -> list[Problem]:
        """What is out of range, also for slices of side `size` where it is known."""
        found = []

        def add(name: str, value: object, remedy: str) -> None:
            found.append(Problem("config", f"denoiser.{name}", str(value), remedy))

        channels, groups = self.block_out_channels, self.norm_num_groups
        if not channels or min(channels) < 1 or groups < 1 or any(c % groups for c in channels):
            add("block_out_channels", list(channels), f"give channels that norm_num_groups ({groups}) divides")
        if self.layers_per_block < 1:
            add("layers_per_block", self.layers_per_block, "give at least 1")
        attending = {channels[-1]} if channels else set()  # the middle block
        multiple = self.stem * 2 ** max(0, len(channels) - 1)
        if size is not None and size % multiple:
            stem = ", behind a stem that halves too," if self.stem > 1 else ""
            remedy = (
                f"{len(channels)} levels{stem} halve {size} pixels unevenly: give fewer, or a multiple of {multiple}"
            )
            add("block_out_channels", list(channels), remedy)
        elif size is not None:
            sides = self.sides(size)
            attending |= {c for c, side in zip(channels, sides, strict=True) if side in self.attention_resolutions}
            if strangers := [r for r in self.attention_resolutions if r not in sides]:
                remedy = f"the levels are {', '.join(map(str, sides))} pixels wide; give some of these, or none"
                add("attention_resolutions", strangers, remedy)
        if self.attention_head_dim < 1 or any(c % self.attention_head_dim for c in attending):
            widths = ", ".join(map(str, sorted(attending)))
            add(
                "attention_head_dim",
                self.attention_head_dim,
                f"give a width that divides {widths}, those of the levels with attention",
            )
        if self.mask_embedding_dim < 1:
            add("mask_embedding_dim", self.mask_embedding_dim, "give at least 1")
        if self.soft_masks and self.mask_encoding.startswith("scalar"):
            add("soft_masks", True, "a scalar can hold one class only; use mask_encoding onehot or embedding")
        return found


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule, what the network predicts, and what counts as a good prediction.

    The defaults are the paper's: N = 1000, linear, epsilon, every timestep alike, nothing dropped. docs/recipes.md has
    formulas and sources.
    """

    objective: Result[Objective] = "ddpm"
    """ddpm: timesteps of a schedule, and a prediction_type (Ho et al. 2020). edm: continuous noise levels and EDM's
    preconditioning (Karras et al. 2022). flow: rectified flow (Liu et al. 2022). The last two draw ln sigma from
    `lognormal`, and have a prediction of their own: prediction_type and the schedule are not used."""
    sigma_data: Result[float | None] = None
    """Standard deviation of the images in [-1, 1], for objective edm; null: measured on the training slices."""
    num_train_timesteps: Result[int] = 1000
    beta_schedule: Result[BetaSchedule] = "linear"
    prediction_type: Result[PredictionType] = "epsilon"
    zero_terminal_snr: Result[bool] = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2024)."""
    snr_shift: Result[float] = 1.0
    """Multiply the signal-to-noise ratio by its square. For images of another size than the schedule was made for:
    that size / the images' (Hoogeboom et al. 2023), so 0.25 takes a schedule from 64 to 256 pixels."""
    timestep_sampling: Result[Literal["uniform", "lognormal"]] = "uniform"
    """lognormal: the noise level's logarithm is drawn from a normal distribution (Karras et al. 2022)."""
    lognormal: Result[tuple[float, float]] = (-1.2, 1.2)
    """Mean and standard deviation of ln sigma (P_mean and P_std); for flow, of the logit of t. The defaults are Karras
    et al.'s; Esser et al. 2024 use 0 and 1 for flow."""
    loss_weighting: Result[LossWeighting] = "none"
    min_snr_gamma: Result[float] = 5.0
    """Hang et al.'s."""
    edm_sigma_data: Result[float] = 0.5
    """Standard deviation of the images in [-1, 1] in loss_weighting edm. Karras et al.'s."""
    mask_dropout: Result[float] = 0.0
    """Probability that a sample is shown without its mask: guidance that removes the mask needs it."""
    class_dropout: Result[float] = 0.0
    """Likewise without modality and axis."""
    joint_dropout: Result[float] = 0.0
    """Likewise without either."""
    organ_dropout: Result[float] = 0.0
    """Probability that a sample is ablated: its mask then loses each organ with probability 0.5 (Konz et al. 2024)."""
    dice_weight: Result[float] = 0.0
    """Weight of 1 - Dice between the mask and what the segmenter sees in the predicted x_0; 0 leaves it out."""
    dice_segmenter: Result[str | None] = None
    """The segmenter's weights: the folder RUN/segmenter/weights of `segdiff train-segmenter`."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        found = []

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                found.append(Problem("config", f"diffusion.{name}", str(getattr(self, name)), remedy))

        if self.objective != "ddpm":
            own = f"{self.objective} has no timesteps and its own prediction"
            for name in ("prediction_type", "zero_terminal_snr", "timestep_sampling", "beta_schedule"):
                default = DiffusionConfig.__dataclass_fields__[name].default
                check(name, getattr(self, name) == default, f"{own}: leave it out, or use objective ddpm")
            again = "edm has that weight by itself: use none"
            check("loss_weighting", (self.objective, self.loss_weighting) != ("edm", "edm"), again)
        remedy = "only objective edm has it: leave it out"
        check("sigma_data", self.sigma_data is None or self.objective == "edm", remedy)
        check("sigma_data", self.sigma_data is None or self.sigma_data > 0, "give more than 0, or null to measure it")
        zero_snr = self.zero_terminal_snr
        check("num_train_timesteps", self.num_train_timesteps >= 2, "give at least 2")
        check(
            "zero_terminal_snr",
            not (zero_snr and self.prediction_type == "epsilon"),
            "with epsilon the last step says nothing of the image; use prediction_type v or x0",
        )
        check(
            "timestep_sampling",
            not (zero_snr and self.timestep_sampling == "lognormal"),
            "never draws the last timestep of zero_terminal_snr, where sampling begins; use uniform",
        )
        for name in ("snr_shift", "min_snr_gamma", "edm_sigma_data"):
            check(name, getattr(self, name) > 0, "give more than 0")
        check("lognormal", self.lognormal[1] > 0, "give a standard deviation above 0")
        for name in ("mask_dropout", "class_dropout", "joint_dropout", "organ_dropout"):
            check(name, 0 <= getattr(self, name) <= 1, "give 0 to 1")
        dropped = self.mask_dropout + self.class_dropout + self.joint_dropout
        check("joint_dropout", dropped <= 1, "mask_dropout, class_dropout and joint_dropout add up to more than 1")
        check("dice_weight", self.dice_weight >= 0, "give at least 0")
        if self.dice_weight > 0:
            remedy = "give the folder of a segmenter's weights; `segdiff train-segmenter --help` says how to train one"
            weights = None if self.dice_segmenter is None else Path(self.dice_segmenter)
            check("dice_segmenter", weights is not None and (weights / "segdiff.json").is_file(), remedy)
        return found

    @property
    def process(self) -> dict[str, Any]:
        """The values that sampling depends on."""
        names = DDPM_FIELDS if self.objective == "ddpm" else SIGMA_FIELDS
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured and drawn every `train.validate_every_images`. Nothing here changes what is trained."""

    num_images: Result[int] = 64
    """Slices in the validation loss. More make it less noisy, and slower."""
    num_pictures: Result[int] = 8
    """Masks of the sample grid; 0 draws none."""
    num_steps: Result[int] = 25
    """DDIM steps of a picture, with trailing timesteps, or on Karras et al.'s grid for objective edm."""
    batch_size: Execution[int] = 16
    """Images a rank takes through the net at once."""
    seed: Result[int] = 0
    """Of slices, noise and timesteps. Keep it to compare runs."""

    def problems(self, diffusion: DiffusionConfig) -> list[Problem]:
        """What is out of range, for a net that is trained so."""
        found = []
        for name, low in (("num_images", 1), ("num_pictures", 0), ("num_steps", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value < low:
                found.append(Problem("config", f"validation.{name}", str(value), f"give at least {low}"))
        most = diffusion.num_train_timesteps
        if diffusion.objective == "ddpm" and self.num_steps > most:
            remedy = f"the net knows {most} timesteps: give at most that many"
            found.append(Problem("config", "validation.num_steps", str(self.num_steps), remedy))
        return found
