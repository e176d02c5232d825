"""How much each timestep's error counts, and how often it is drawn: uniform, min-SNR, and EDM's.

Dimensions: B batch, T training timesteps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from segdiff_dist.denoising.config import LossWeighting, PredictionType
from segdiff_kernels import philox

# Enough to see whether the layout or the detail is not learned, few enough for one picture.
NUM_BUCKETS = 4


def prediction_error_per_x0_error(prediction_type: PredictionType, alphas_cumprod_T: Tensor) -> Tensor:
    """float64 [T]: the squared error of a prediction for one unit of squared error of the x_0 that follows from it.

    From x_t = sqrt(a) x_0 + sqrt(1 - a) noise: SNR for epsilon, SNR + 1 for v, 1 for x0, with SNR = a / (1 - a).
    Salimans and Ho 2022, section 4.
    """
    snr_T = signal_to_noise(alphas_cumprod_T)
    return {"epsilon": snr_T, "v": snr_T + 1.0, "x0": torch.ones_like(snr_T)}[prediction_type]


def loss_weights(
    weighting: LossWeighting,
    prediction_type: PredictionType,
    alphas_cumprod_T: Tensor,
    *,
    min_snr_gamma: float,
    edm_sigma_data: float,
) -> Tensor:
    """float32 [T]: the factor of each timestep's mean squared error of the prediction.

    none     1, whatever is predicted
    min_snr  min(SNR, gamma) on the error of x_0 (Hang et al. 2023)
    edm      lambda(sigma) = (sigma^2 + s^2) / (sigma s)^2 on the error of x_0 (Karras et al. 2022, table 1), which with
             sigma^2 = 1 / SNR is SNR + 1 / s^2; s is the standard deviation of the data

    The last two are converted from x_0 to the prediction type, so the same x_0 error costs the same for each type.
    """
    snr_T = signal_to_noise(alphas_cumprod_T)
    if weighting == "none":
        return torch.ones_like(snr_T, dtype=torch.float32)
    wanted_T = weight_of_x0_error(weighting, snr_T, min_snr_gamma=min_snr_gamma, edm_sigma_data=edm_sigma_data)
    return (wanted_T / prediction_error_per_x0_error(prediction_type, alphas_cumprod_T)).float()


def weight_of_x0_error(
    weighting: Literal["min_snr", "edm"], snr: Tensor, *, min_snr_gamma: float, edm_sigma_data: float
) -> Tensor:
    """The weight of the squared error of x_0 at these signal-to-noise ratios; see loss_weights."""
    return snr.clamp(max=min_snr_gamma) if weighting == "min_snr" else snr + edm_sigma_data**-2


def lognormal_timesteps(seed: int, position_B: Tensor, alphas_cumprod_T: Tensor, mean: float, std: float) -> Tensor:
    """int64 [B]: the timesteps whose ln sigma is nearest to draws from N(mean, std^2), sigma^2 = 1 / SNR.

    Drawn by (seed, position). Karras et al. 2022, table 1 (P_mean, P_std).
    """
    log_sigma_T = -0.5 * signal_to_noise(alphas_cumprod_T).log()
    halfway = (0.5 * (log_sigma_T[1:] + log_sigma_T[:-1])).float()
    z_B = philox.normal(seed, philox.STREAM_TIMESTEP, position_B, (1,))[:, 0]
    return torch.bucketize(mean + std * z_B, halfway)


def signal_to_noise(alphas_cumprod_T: Tensor) -> Tensor:
    """float64 [T]: a / (1 - a). Kingma et al. 2021, eq. 2."""
    a_T = alphas_cumprod_T.double()
    return a_T / (1.0 - a_T)


def sums_by_timestep(error_B: Tensor, timestep_B: Tensor, num_train_timesteps: int) -> dict[str, Tensor]:
    """loss_t_FROM_TO -> float32 [2], sum and count of the errors of timesteps FROM <= t < TO, for quarters of them.

    Detached, and the host does not wait for the device.
    """
    ids_4 = torch.arange(NUM_BUCKETS, device=error_B.device)
    inside_B4 = (timestep_B * NUM_BUCKETS // num_train_timesteps)[:, None] == ids_4
    sums_42 = torch.stack(((error_B.detach().float()[:, None] * inside_B4).sum(0), inside_B4.float().sum(0)), dim=1)
    edges = [-(-i * num_train_timesteps // NUM_BUCKETS) for i in range(NUM_BUCKETS + 1)]
    return {f"loss_t_{edges[i]}_{edges[i + 1]}": sums_42[i] for i in range(NUM_BUCKETS)}
