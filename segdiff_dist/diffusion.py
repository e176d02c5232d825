"""The diffusion process: noising, targets and DDIM sampling, on diffusers' DDIMScheduler.

Dimensions: B batch, C channels, H rows, W columns, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data_shards.problems import Problem


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule and what the network predicts. The defaults are the paper's: N = 1000, linear, epsilon."""

    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "v", "x0"] = "epsilon"
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2024)."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        found = []
        if self.num_train_timesteps < 2:
            found.append(
                Problem("config", "diffusion.num_train_timesteps", str(self.num_train_timesteps), "give at least 2")
            )
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            found.append(
                Problem(
                    "config",
                    "diffusion.zero_terminal_snr",
                    "true",
                    "with epsilon the last step says nothing of the image; use prediction_type v or x0",
                )
            )
        return found


@dataclass(frozen=True)
class SamplerConfig:
    """DDIM. The defaults are the paper's code: 50 leading steps, eta 0, x_0 clipped to [-1, 1]."""

    num_steps: int = 50
    eta: float = 0.0
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    clip_sample: bool = True


def make_scheduler(config: DiffusionConfig, sampler: SamplerConfig | None = None) -> Any:
    """diffusers' DDIMScheduler for this schedule."""
    from diffusers import DDIMScheduler

    sampler = sampler or SamplerConfig()
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[config.prediction_type],
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing=sampler.timestep_spacing,
        clip_sample=sampler.clip_sample,
        # With zero terminal SNR diffusers' own fallback would put alphas_cumprod[0] in place of 1 after the last step.
        set_alpha_to_one=True,
    )


def to_model_range(image_BHW: Tensor) -> Tensor:
    """Grey values [B, H, W], uint8 or uint16, to float32 [B, 1, H, W] in [-1, 1]: the depth's whole range."""
    assert image_BHW.dtype in (torch.uint8, torch.uint16), image_BHW.dtype
    return image_BHW[:, None].to(torch.float32) / (torch.iinfo(image_BHW.dtype).max / 2.0) - 1.0


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """The inverse of to_model_range for uint8, clipped and rounded."""
    return ((x_BCHW[:, 0].clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


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


@torch.no_grad()
def ddim_sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    x_T_BCHW: Tensor,
    sampler: SamplerConfig,
    step_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Run DDIM (Song et al. 2020, eq. 12) from noise to images in [-1, 1].

    `predict(x_t, timestep_B)` is the network with its conditions bound; `step_noise(i)` gives step i's noise
    [B, C, H, W] and is needed for eta > 0 only.
    """
    scheduler.set_timesteps(sampler.num_steps, device=x_T_BCHW.device)
    x_t_BCHW = x_T_BCHW
    for i, timestep in enumerate(scheduler.timesteps):
        prediction_BCHW = predict(x_t_BCHW, timestep.expand(x_t_BCHW.shape[0]))
        noise = step_noise(i) if sampler.eta > 0 and step_noise is not None else None
        x_t_BCHW = scheduler.step(
            prediction_BCHW, timestep, x_t_BCHW, eta=sampler.eta, variance_noise=noise
        ).prev_sample
    return x_t_BCHW
