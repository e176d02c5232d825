"""The `diffusion` section, and DDPM's schedules, noising and targets. All objectives: process.py.

Dimensions: B batch, C channels, H rows, W columns, T training timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_shards.problems import Problem
from segdiff_dist.denoising.loss_weighting import LossWeighting, PredictionType

BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
Objective = Literal["ddpm", "edm", "flow"]

# What images depend on when they are sampled; the rest of DiffusionConfig says how the network is trained.
_DDPM_FIELDS = ("num_train_timesteps", "beta_schedule", "prediction_type", "zero_terminal_snr", "snr_shift")
_SIGMA_FIELDS = ("objective", "sigma_data", "lognormal", "snr_shift")


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule, what the network predicts, and what counts as a good prediction.

    The defaults are the paper's: N = 1000, linear, epsilon, every timestep alike, nothing dropped. docs/recipes.md has
    formulas and sources.
    """

    objective: Objective = "ddpm"
    """ddpm: timesteps of a schedule, and a prediction_type (Ho et al. 2020). edm: continuous noise levels and EDM's
    preconditioning (Karras et al. 2022). flow: rectified flow (Liu et al. 2022). The last two draw ln sigma from
    `lognormal`, and have a prediction of their own: prediction_type and the schedule are not used."""
    sigma_data: float | None = None
    """Standard deviation of the images in [-1, 1], for objective edm; null: measured on the training slices."""
    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "linear"
    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2024)."""
    snr_shift: float = 1.0
    """Multiply the signal-to-noise ratio by its square. For images of another size than the schedule was made for:
    that size / the images' (Hoogeboom et al. 2023), so 0.25 takes a schedule from 64 to 256 pixels."""
    timestep_sampling: Literal["uniform", "lognormal"] = "uniform"
    """lognormal: the noise level's logarithm is drawn from a normal distribution (Karras et al. 2022)."""
    lognormal: tuple[float, float] = (-1.2, 1.2)
    """Mean and standard deviation of ln sigma (P_mean and P_std); for flow, of the logit of t. The defaults are Karras
    et al.'s; Esser et al. 2024 use 0 and 1 for flow."""
    loss_weighting: LossWeighting = "none"
    min_snr_gamma: float = 5.0
    """Hang et al.'s."""
    edm_sigma_data: float = 0.5
    """Standard deviation of the images in [-1, 1] in loss_weighting edm. Karras et al.'s."""
    mask_dropout: float = 0.0
    """Probability that a sample is shown without its mask: guidance that removes the mask needs it."""
    class_dropout: float = 0.0
    """Likewise without modality and axis."""
    joint_dropout: float = 0.0
    """Likewise without either."""
    organ_dropout: float = 0.0
    """Probability that a sample is ablated: its mask then loses each organ with probability 0.5 (Konz et al. 2024)."""
    dice_weight: float = 0.0
    """Weight of 1 - Dice between the mask and what the segmenter sees in the predicted x_0; 0 leaves it out."""
    dice_segmenter: str | None = None
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
        names = _DDPM_FIELDS if self.objective == "ddpm" else _SIGMA_FIELDS
        return {name: getattr(self, name) for name in names}


def as_trained(config: DiffusionConfig, trained: dict[str, Any]) -> tuple[DiffusionConfig, dict[str, tuple[Any, Any]]]:
    """`config` with what the weights' segdiff.json says of the process they were trained on, and where the two differ:
    name -> (trained, config's). Old weights do not say all; what is measured in training (sigma_data) the config need
    not say."""
    objective = trained.get("objective", "ddpm")
    names = _DDPM_FIELDS if objective == "ddpm" else _SIGMA_FIELDS
    said = {name: trained[name] for name in names if name in trained} | {"objective": objective}
    said = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    differ = {name: (value, getattr(config, name)) for name, value in said.items() if getattr(config, name) != value}
    if config.sigma_data is None:
        differ.pop("sigma_data", None)
    own = {} if objective == config.objective else {name: getattr(DiffusionConfig(), name) for name in _DDPM_FIELDS}
    return replace(config, **{**own, "sigma_data": None, **said}), differ


def make_scheduler(config: DiffusionConfig) -> Any:
    """diffusers' DDIMScheduler for this schedule: its alphas_cumprod are what training noises by and sampling walks."""
    from diffusers import DDIMScheduler

    settings = {
        "num_train_timesteps": config.num_train_timesteps,
        "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(config.beta_schedule, config.beta_schedule),
        "prediction_type": {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[config.prediction_type],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }
    scheduler = DDIMScheduler(**settings)
    if config.snr_shift == 1.0:
        return scheduler
    betas_T = shifted_betas(scheduler.alphas_cumprod, config.snr_shift)
    return DDIMScheduler(**{**settings, "rescale_betas_zero_snr": False, "trained_betas": betas_T.tolist()})


def shifted_betas(alphas_cumprod_T: Tensor, shift: float) -> Tensor:
    """float64 [T] betas of the schedule whose SNR is shift^2 times this one's, so log SNR moves by 2 ln(shift).

    Hoogeboom et al. 2023, "simple diffusion", with shift = reference size / image size. An SNR of 0 stays 0.
    """
    a_T = alphas_cumprod_T.double()
    shifted_T = shift**2 * a_T / (shift**2 * a_T + 1.0 - a_T)
    return 1.0 - shifted_T / torch.cat((shifted_T.new_ones(1), shifted_T[:-1]))


def q_sample(x_0_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_B: Tensor) -> Tensor:
    """Noise clean images to their timesteps: x_t = sqrt(a) x_0 + sqrt(1 - a) noise.

    x_0 in [-1, 1]; all float, same device. Ho et al. 2020, eq. 4.
    """
    a_B111 = alphas_cumprod_B[:, None, None, None]
    return a_B111.sqrt() * x_0_BCHW + (1.0 - a_B111).sqrt() * noise_BCHW


def prediction_target(prediction_type: str, x_0_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_B: Tensor) -> Tensor:
    """What the network should give: the noise, the image, or v = sqrt(a) noise - sqrt(1 - a) x_0.

    v: Salimans and Ho 2022, section 4.
    """
    if prediction_type == "epsilon":
        return noise_BCHW
    if prediction_type == "x0":
        return x_0_BCHW
    a_B111 = alphas_cumprod_B[:, None, None, None]
    return a_B111.sqrt() * noise_BCHW - (1.0 - a_B111).sqrt() * x_0_BCHW


def predicted_x_0(prediction_type: str, prediction_BCHW: Tensor, x_t_BCHW: Tensor, alphas_cumprod_B: Tensor) -> Tensor:
    """The clean image that a prediction means at x_t: the inverse of prediction_target.

    With epsilon no timestep may be pure noise. Salimans and Ho 2022, section 4.
    """
    if prediction_type == "x0":
        return prediction_BCHW
    a_B111 = alphas_cumprod_B[:, None, None, None]
    if prediction_type == "epsilon":
        return (x_t_BCHW - (1.0 - a_B111).sqrt() * prediction_BCHW) / a_B111.sqrt()
    return a_B111.sqrt() * x_t_BCHW - (1.0 - a_B111).sqrt() * prediction_BCHW
