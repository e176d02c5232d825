"""DDPM's schedules, and the process that weights were trained on. All objectives: process.py.

Dimensions: B batch, C channels, H rows, W columns, T training timesteps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from segdiff_dist.denoising.config import DDPM_FIELDS, LEVELS_FIELD, SIGMA_FIELDS, DiffusionConfig


def as_trained(config: DiffusionConfig, trained: dict[str, Any]) -> tuple[DiffusionConfig, dict[str, tuple[Any, Any]]]:
    """`config` with the process of the weights' segdiff.json, and the differences between the two: name -> (trained,
    config's). Old weights do not have every field, and the config need not have values that training measures
    (sigma_data)."""
    objective = trained.get("objective", "ddpm")
    names = (*(DDPM_FIELDS if objective == "ddpm" else SIGMA_FIELDS), LEVELS_FIELD)
    said = {name: trained[name] for name in names if name in trained} | {"objective": objective}
    said = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    differ = {name: (value, getattr(config, name)) for name, value in said.items() if getattr(config, name) != value}
    for measured in ("sigma_data", LEVELS_FIELD):
        if getattr(config, measured) is None:
            differ.pop(measured, None)
    own = {} if objective == config.objective else {name: getattr(DiffusionConfig(), name) for name in DDPM_FIELDS}
    return replace(config, **{**own, "sigma_data": None, LEVELS_FIELD: None, **said}), differ


def make_scheduler(config: DiffusionConfig) -> Any:
    """diffusers' DDIMScheduler for this schedule: training and sampling both use its alphas_cumprod."""
    from segdiff_dist.diffusers_parts import DDIMScheduler

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
