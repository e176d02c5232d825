"""The noise that images are trained on and sampled from: timesteps of a schedule (DDPM), or continuous noise levels
(EDM, rectified flow).

For every objective the network's input, its target, and the image that follows from its prediction are linear:

    x = signal x_0 + spread noise                          sigma = spread / signal is the noise level
    target = target_from_x0 x_0 + target_from_noise noise
    x_0 = x0_from_x x + x0_from_prediction prediction

So the rest of the system has only one kind of process. Samplers work with the variance-preserving form of x, whose
signal is sqrt(a) and whose spread is sqrt(1 - a), with alpha_bar a = 1 / (1 + sigma^2).
Dimensions: B batch, C channels, H rows, W columns, N levels, T training timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_shards.records import Batch
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.loss_weighting import (
    NUM_BUCKETS,
    lognormal_timesteps,
    loss_weights,
    sums_by_timestep,
    weight_of_x0_error,
)
from segdiff_dist.denoising.schedule import make_scheduler
from segdiff_kernels import philox
from segdiff_kernels.condition_input import condition_input, condition_input_reference
from segdiff_kernels.noising import LinearPrediction, mixed, predicted_x_0, prediction_target, q_sample

# Levels up to this many std from the mean count as seen in a training that draws ln sigma from N(mean, std^2): Karras
# et al. 2022 sample from 80 with a net trained on N(-1.2, 1.2^2), which is 4.7.
_TRAINED_STDS = 5.0


class Noised(NamedTuple):
    """A training batch with its noise: x and target float32 [B, 1, H, W]; level_B as the process counts levels."""

    x_BCHW: Tensor
    target_BCHW: Tensor
    level_B: Tensor


class LinearForm(NamedTuple):
    """The module's three equations at some noise levels, float64 [N] each. `scale`: x of the network is scale times x
    in its variance-preserving form."""

    signal: Tensor
    spread: Tensor
    scale: Tensor
    target_from_x0: Tensor
    target_from_noise: Tensor
    x0_from_x: Tensor
    x0_from_prediction: Tensor


class TimestepProcess:
    """DDPM's: levels are the int64 timesteps of a schedule, which the network gets as they are."""

    def __init__(self, config: DiffusionConfig, device: torch.device | None = None) -> None:
        self.config = config
        self.alphas_cumprod_T: Tensor = make_scheduler(config).alphas_cumprod.to(device)
        self._weight_T = loss_weights(
            config.loss_weighting,
            config.prediction_type,
            self.alphas_cumprod_T,
            min_snr_gamma=config.min_snr_gamma,
            edm_sigma_data=config.edm_sigma_data,
        )

    def noised(self, batch: Batch, seed: int, *, use_kernels: bool) -> Noised:
        """The batch's images with noise and levels drawn by (seed, position)."""
        # Uniform timesteps are drawn by the operator itself, as drawn_levels draws them.
        is_uniform = self.config.timestep_sampling == "uniform"
        timestep_B = None if is_uniform else self.drawn_levels(batch.position_B, seed)
        noised = (condition_input if use_kernels else condition_input_reference)(
            batch.image_BHW,
            batch.position_B,
            self.alphas_cumprod_T,
            seed=seed,
            prediction_type=self.config.prediction_type,
            timestep_B=timestep_B,
        )
        return Noised(*noised)

    def drawn_levels(self, position_B: Tensor, seed: int) -> Tensor:
        """The levels [B] that `noised` draws."""
        if self.config.timestep_sampling == "lognormal":
            return lognormal_timesteps(seed, position_B, self.alphas_cumprod_T, *self.config.lognormal)
        return philox.timesteps(seed, position_B, self.config.num_train_timesteps)

    def with_noise(self, x_0_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Noised:
        """Given images, noise and levels."""
        a_B = self.alphas_cumprod_T[level_B]
        x_BCHW = q_sample(x_0_BCHW, noise_BCHW, a_B)
        return Noised(x_BCHW, prediction_target(self.config.prediction_type, x_0_BCHW, noise_BCHW, a_B), level_B)

    def spread_levels(self, u_N: np.ndarray) -> Tensor:
        """The levels [N] at these quantiles, 0 to 1, of the levels that training draws."""
        return torch.from_numpy((u_N * self.config.num_train_timesteps).astype(np.int64))

    def time(self, level_B: Tensor) -> Tensor:
        """The network's timestep for these levels, [B]."""
        return level_B

    def weight(self, level_B: Tensor) -> Tensor:
        """float32 [B]: the weight of a sample's squared error in the loss."""
        return self._weight_T[level_B]

    def alpha_bar(self, level_B: Tensor) -> Tensor:
        """float32 [B]: 1 without noise, 0 in pure noise."""
        return self.alphas_cumprod_T[level_B]

    def x_0(self, prediction_BCHW: Tensor, x_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """The image that follows from a prediction at the network's input x."""
        return predicted_x_0(self.config.prediction_type, prediction_BCHW, x_BCHW, self.alphas_cumprod_T[level_B])

    def sums(self, error_B: Tensor, level_B: Tensor) -> dict[str, Tensor]:
        """Sum and count, float32 [2], of the errors by quarters of the timesteps."""
        return sums_by_timestep(error_B, level_B, self.config.num_train_timesteps)

    def sigma_range(self) -> tuple[float, float]:
        """The lowest and highest noise level of the training; infinite if it includes pure noise."""
        low, high = self.log_sigma_T()[[0, -1]]
        return math.exp(low), math.exp(high)

    def time_at(self, sigma: float) -> float:
        """The timestep of a noise level, a fraction between two timesteps: linear in ln sigma."""
        log_sigma_T = self.log_sigma_T()
        known = np.isfinite(log_sigma_T)
        return float(np.interp(math.log(sigma), log_sigma_T[known], np.flatnonzero(known)))

    def scale_at(self, alpha_bar: float) -> float:
        """The factor from x in its variance-preserving form to the network's input."""
        return 1.0

    def x_0_at(self, prediction_BCHW: Tensor, x_t_BCHW: Tensor, alpha_bar: float) -> Tensor:
        """The image that follows from a prediction if all samples have one level; x_t in its variance-preserving
        form."""
        a_B = torch.full((len(x_t_BCHW),), alpha_bar, device=x_t_BCHW.device)
        return predicted_x_0(self.config.prediction_type, prediction_BCHW, x_t_BCHW, a_B)

    def step_predictions(self, alpha_bars: Sequence[float]) -> str | Sequence[LinearPrediction]:
        """The same for each of these levels, for segdiff_kernels.sampler_step."""
        return self.config.prediction_type

    def log_sigma_T(self) -> np.ndarray:
        """float64 [T]: ln sigma of each timestep; infinite in pure noise."""
        a_T = self.alphas_cumprod_T.double().cpu().numpy()
        with np.errstate(divide="ignore"):
            return 0.5 * (np.log1p(-a_T) - np.log(a_T))


class SigmaProcess:
    """EDM's (Karras et al. 2022) and rectified flow's (Liu et al. 2022; Esser et al. 2024): levels are ln sigma.

    In training ln sigma is normal, less ln(snr_shift). For flow, whose x is (1 - t) x_0 + t noise, sigma is
    t / (1 - t), so ln sigma is the logit of t, and t is logit-normal.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        mean, self._std = config.lognormal
        self._mean = mean - math.log(config.snr_shift)

    def noised(self, batch: Batch, seed: int, *, use_kernels: bool) -> Noised:
        """As of TimestepProcess."""
        level_B = self.drawn_levels(batch.position_B, seed)
        form = self.form(level_B)
        levels_B4 = torch.stack((form.signal, form.spread, form.target_from_x0, form.target_from_noise), dim=1).float()
        noised = (condition_input if use_kernels else condition_input_reference)(
            batch.image_BHW,
            batch.position_B,
            None,
            seed=seed,
            prediction_type=None,
            levels_B4=levels_B4,
        )
        return Noised(noised.input_B1HW, noised.target_B1HW, level_B)

    def drawn_levels(self, position_B: Tensor, seed: int) -> Tensor:
        """As of TimestepProcess."""
        z_B = philox.normal(seed, philox.STREAM_TIMESTEP, position_B, (1,))[:, 0]
        return self._mean + self._std * z_B

    def with_noise(self, x_0_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Noised:
        """As of TimestepProcess."""
        form = LinearForm(*(part.float() for part in self.form(level_B)))
        x_BCHW = mixed(x_0_BCHW, noise_BCHW, form.signal, form.spread)
        return Noised(x_BCHW, mixed(x_0_BCHW, noise_BCHW, form.target_from_x0, form.target_from_noise), level_B)

    def spread_levels(self, u_N: np.ndarray) -> Tensor:
        """As of TimestepProcess: the normal distribution's quantiles."""
        inside_N = torch.from_numpy(u_N).clamp(1e-6, 1.0 - 1e-6)
        return (self._mean + self._std * torch.special.ndtri(inside_N)).float()

    def time(self, level_B: Tensor) -> Tensor:
        """float32 [B]: EDM's c_noise = ln(sigma) / 4, as 1000 / 3 (c_noise + 1.75), or 1000 t of flow. So both are in 0
        to 1000, where the sinusoids of the time embedding differ."""
        if self.config.objective == "flow":
            return 1000.0 * level_B.sigmoid()
        return ((level_B + 7.0) / 12.0 * 1000.0).clamp(0.0, 1000.0)

    def weight(self, level_B: Tensor) -> Tensor:
        """As of TimestepProcess. `none` is 1 on the network's own error: EDM's weight, and flow's."""
        if self.config.loss_weighting == "none":
            return torch.ones_like(level_B)
        wanted_B = weight_of_x0_error(
            self.config.loss_weighting,
            (-2.0 * level_B.double()).exp(),
            min_snr_gamma=self.config.min_snr_gamma,
            edm_sigma_data=self.config.edm_sigma_data,
        )
        return (wanted_B * self.form(level_B).x0_from_prediction.square()).float()

    def alpha_bar(self, level_B: Tensor) -> Tensor:
        """As of TimestepProcess."""
        return (-2.0 * level_B).sigmoid()

    def x_0(self, prediction_BCHW: Tensor, x_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """As of TimestepProcess."""
        form = self.form(level_B)
        return mixed(x_BCHW, prediction_BCHW, form.x0_from_x.float(), form.x0_from_prediction.float())

    def sums(self, error_B: Tensor, level_B: Tensor) -> dict[str, Tensor]:
        """Sum and count, float32 [2], of the errors by quarters of the drawn levels: loss_sigma_FROM_TO."""
        shares = torch.arange(1, NUM_BUCKETS, dtype=torch.float64) / NUM_BUCKETS
        edges = self._mean + self._std * torch.special.ndtri(shares)
        names = ["0", *(f"{edge:.2g}" for edge in edges.exp().tolist()), "inf"]
        bucket_B = torch.bucketize(level_B, edges.to(level_B))
        inside_BN = bucket_B[:, None] == torch.arange(NUM_BUCKETS, device=error_B.device)
        sums_N2 = torch.stack(((error_B.detach().float()[:, None] * inside_BN).sum(0), inside_BN.float().sum(0)), dim=1)
        return {f"loss_sigma_{names[i]}_{names[i + 1]}": sums_N2[i] for i in range(NUM_BUCKETS)}

    def sigma_range(self) -> tuple[float, float]:
        """As of TimestepProcess: levels that are almost never drawn count as not seen."""
        reach = _TRAINED_STDS * self._std
        return math.exp(self._mean - reach), math.exp(self._mean + reach)

    def time_at(self, sigma: float) -> float:
        """As of TimestepProcess, from the level itself."""
        return float(self.time(torch.tensor(math.log(sigma) if sigma < math.inf else math.inf, dtype=torch.float64)))

    def scale_at(self, alpha_bar: float) -> float:
        """As of TimestepProcess."""
        return float(self.form_at(alpha_bar).scale)

    def x_0_at(self, prediction_BCHW: Tensor, x_t_BCHW: Tensor, alpha_bar: float) -> Tensor:
        """As of TimestepProcess."""
        form = self.form_at(alpha_bar)
        from_x_t = float(form.x0_from_x * form.scale)
        return from_x_t * x_t_BCHW + float(form.x0_from_prediction) * prediction_BCHW

    def step_predictions(self, alpha_bars: Sequence[float]) -> str | Sequence[LinearPrediction]:
        """As of TimestepProcess."""
        forms = [self.form_at(alpha_bar) for alpha_bar in alpha_bars]
        return [LinearPrediction(float(f.x0_from_x * f.scale), float(f.x0_from_prediction)) for f in forms]

    def form(self, level_B: Tensor) -> LinearForm:
        """The linear form at ln sigma, on its device."""
        log_sigma_B = level_B.double()
        return self._form((-2.0 * log_sigma_B).sigmoid().sqrt(), (2.0 * log_sigma_B).sigmoid().sqrt())

    def form_at(self, alpha_bar: float) -> LinearForm:
        """The linear form at one noise level, on the CPU."""
        a = torch.tensor(alpha_bar, dtype=torch.float64)
        return self._form(a.sqrt(), (1.0 - a).sqrt())

    def _form(self, alpha: Tensor, beta: Tensor) -> LinearForm:
        """Computed from signal and spread of the variance-preserving form, so that it is exact at both ends.

        EDM: table 1 of Karras et al. 2022, c_in (x_0 + sigma noise) and the target of its eq. 8, divided by c_out.
        """
        one = torch.ones_like(alpha)
        if self.config.objective == "flow":
            norm = alpha + beta
            return LinearForm(alpha / norm, beta / norm, 1.0 / norm, -one, one, one, -beta / norm)
        s = self.config.sigma_data
        if s is None:
            raise ValueError("sigma_data: None; measure it first (segdiff_dist.denoising.sigma_data)")
        norm = (beta.square() + (s * alpha).square()).sqrt()
        return LinearForm(
            signal=alpha / norm,
            spread=beta / norm,
            scale=1.0 / norm,
            target_from_x0=beta / (s * norm),
            target_from_noise=-s * alpha / norm,
            x0_from_x=s**2 * alpha / norm,
            x0_from_prediction=s * beta / norm,
        )


Process = TimestepProcess | SigmaProcess


def noised_by_position(process: Process, x_0_BCHW: Tensor, position_B: Tensor, seed: int) -> Noised:
    """What `noised` gives, of images of any channels that are float32 already."""
    noise_BCHW = philox.normal(seed, philox.STREAM_NOISE, position_B, x_0_BCHW.shape[1:])
    return process.with_noise(x_0_BCHW, noise_BCHW, process.drawn_levels(position_B, seed))


def make_process(config: DiffusionConfig, device: torch.device | None = None) -> Process:
    """The process that a configuration describes, with its tables on `device`."""
    return TimestepProcess(config, device) if config.objective == "ddpm" else SigmaProcess(config)
