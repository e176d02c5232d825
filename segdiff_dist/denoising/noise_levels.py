"""Which noise levels a sampler steps through: spaced timesteps, or sigmas on Karras' or the log-SNR grid.

Dimensions: S sampling steps from noise to image, T training timesteps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import torch

from segdiff_dist.denoising.config import SigmaSpacing, TimestepSpacing
from segdiff_dist.denoising.process import Process, TimestepProcess

if TYPE_CHECKING:
    from segdiff_dist.denoising.sampler_config import SamplerConfig


# 80: Karras et al. 2022. 0.01 is one grey value of 8 bits: below it there is no visible noise to remove.
_USUAL_SIGMAS = (0.01, 80.0)


class Level(NamedTuple):
    """A noise level of a sampler: its alpha_bar, and the network's timestep for it, an int or a float."""

    alpha_bar: float
    time: float

    @property
    def sigma(self) -> float:
        """Noise over signal; infinite in pure noise."""
        return math.sqrt((1.0 - self.alpha_bar) / self.alpha_bar) if self.alpha_bar > 0 else math.inf


def levels_of(sampler: SamplerConfig, process: Process) -> list[Level]:
    """The S levels of a resolved sampler, from noise to image, in float32's digits."""
    assert sampler.num_steps is not None
    assert sampler.timestep_spacing is not None
    spacing, num = sampler.timestep_spacing, sampler.num_steps
    if spacing in get_args(SigmaSpacing):
        return [level_at(sigma, process) for sigma in _sigmas(sampler, process)]
    if isinstance(process, TimestepProcess):
        timestep_S = spaced_timesteps(process.config.num_train_timesteps, num, spacing)
        a_S = process.alphas_cumprod_T.cpu()[torch.from_numpy(timestep_S.copy())]
        return [Level(a, t) for a, t in zip(a_S.tolist(), timestep_S.tolist(), strict=True)]
    # Flow: t evenly from 1 to 1 / S, shifted as in training (Esser et al. 2024, eq. 23, with snr_shift = 1 / shift).
    shift = 1.0 / process.config.snr_shift
    t_S = np.linspace(1.0, 1.0 / num, num) if spacing == "trailing" else np.linspace(1.0, 0.0, num, endpoint=False)
    t_S = shift * t_S / (1.0 + (shift - 1.0) * t_S)
    return [level_at(t / (1.0 - t) if t < 1.0 else math.inf, process) for t in t_S.tolist()]


def level_at(sigma: float, process: Process) -> Level:
    """The level of a sigma, which may be infinite."""
    alpha_bar = float(np.float32(1.0 / (1.0 + sigma**2)))
    return Level(alpha_bar, process.time_at(sigma))


def shown_level(level: Level, sampler: SamplerConfig, process: Process) -> Level:
    """The level that the network is given at this one: sigma_shift times its sigma, within sigma_shift_interval.

    The error of earlier steps is left in x as noise beyond the level's own, which a net given the true level does not
    remove (Li et al. 2024, "Alleviating exposure bias in diffusion models through sampling with shifted time steps").
    """
    low, high = sampler.sigma_shift_interval
    if sampler.sigma_shift == 1.0 or not low < level.sigma <= high:
        return level
    return level_at(min(sampler.sigma_shift * level.sigma, process.sigma_range()[1]), process)


def spaced_timesteps(num_train_timesteps: int, num_steps: int, spacing: TimestepSpacing) -> np.ndarray:
    """int64 [S] timesteps, falling. Lin et al. 2024, table 2, less 1: ours count from 0."""
    if spacing == "leading":
        return np.arange(num_steps, dtype=np.int64)[::-1] * (num_train_timesteps // num_steps)
    if spacing == "linspace":
        return np.linspace(num_train_timesteps - 1, 0, num_steps).round().astype(np.int64)
    step = num_train_timesteps / num_steps
    return (num_train_timesteps - np.arange(num_steps) * step).round().astype(np.int64) - 1


def sigma_bounds(sampler: SamplerConfig, process: Process) -> tuple[float, float]:
    """The lowest and highest sigma of a grid of sigmas: as configured, else 0.01 and 80 / snr_shift, limited to the
    levels of the training."""
    low, high = process.sigma_range()
    least = max(low, _USUAL_SIGMAS[0]) if sampler.sigma_min is None else sampler.sigma_min
    usual = _USUAL_SIGMAS[1] / process.config.snr_shift
    return least, min(high, usual) if sampler.sigma_max is None else sampler.sigma_max


def _sigmas(sampler: SamplerConfig, process: Process) -> list[float]:
    """Falling. karras: Karras et al. 2022, eq. 5; log_snr: evenly spaced logarithms (Lu et al. 2022)."""
    least, most = sigma_bounds(sampler, process)
    assert sampler.num_steps is not None
    share_S = np.linspace(0.0, 1.0, sampler.num_steps)
    if sampler.timestep_spacing == "log_snr":
        ends = math.log(most), math.log(least)
        sigma_S = np.exp(ends[0] + share_S * (ends[1] - ends[0]))
    else:
        ends = most ** (1.0 / sampler.rho), least ** (1.0 / sampler.rho)
        sigma_S = (ends[0] + share_S * (ends[1] - ends[0])) ** sampler.rho
    return [float(sigma) for sigma in sigma_S]
