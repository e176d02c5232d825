"""Image, noise, noised image and prediction: the one place with the equations between them.

With alpha_bar a, x_t is the variance-preserving mixture of image and noise:

    x_t = sqrt(a) x_0 + sqrt(1 - a) noise                             Ho et al. 2020, eq. 4
    v   = sqrt(a) noise - sqrt(1 - a) x_0                             Salimans and Ho 2022, section 4

A network predicts the noise, the image or v. The image follows from each of them and x_t. Other objectives (EDM,
rectified flow) mix x_0 and noise with their own shares, `mixed`, and predict another mixture, whose image is given by a
`LinearPrediction`. The kernels' references and the samplers use these functions; only a kernel repeats the equations.
Dimensions: B batch, C channels, H, W.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from torch import Tensor

PredictionType = Literal["epsilon", "v", "x0"]


class LinearPrediction(NamedTuple):
    """The image from a net's prediction p at one noise level: x_0 = x0_from_x x_t + x0_from_prediction p.

    x_t is in variance-preserving form, sqrt(a) x_0 + sqrt(1 - a) noise. The same mixture at another scale is a multiple
    of it, so the two numbers are enough for every objective that is linear in x_0 and noise:

        EDM (Karras et al. 2022, eq. 7)         a = 1 / (1 + sigma^2): c_skip / sqrt(a) and c_out
        rectified flow (Liu et al. 2022)        a = ((1 - t) / n)^2, n = sqrt((1 - t)^2 + t^2): n and -t
    """

    x0_from_x: float
    x0_from_prediction: float


Prediction = str | LinearPrediction
"""A PredictionType, or the linear map from a prediction to the image at one noise level."""


class Meaning(NamedTuple):
    """x_0 = x0_from_x x_t + x0_from_prediction p, and the noise likewise."""

    x0_from_x: float
    x0_from_prediction: float
    noise_from_x: float
    noise_from_prediction: float


def mixed(x_0_BCHW: Tensor, noise_BCHW: Tensor, x_0_share_B: Tensor, noise_share_B: Tensor) -> Tensor:
    """x_0_share x_0 + noise_share noise, with shares [B], for any two tensors [B, C, H, W]."""
    return x_0_share_B[:, None, None, None] * x_0_BCHW + noise_share_B[:, None, None, None] * noise_BCHW


def q_sample(x_0_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_B: Tensor) -> Tensor:
    """Noise clean images to their timesteps: x_t = sqrt(a) x_0 + sqrt(1 - a) noise.

    x_0 in [-1, 1]; all float, same device. Ho et al. 2020, eq. 4.
    """
    return mixed(x_0_BCHW, noise_BCHW, alphas_cumprod_B.sqrt(), (1.0 - alphas_cumprod_B).sqrt())


def prediction_target(prediction_type: str, x_0_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_B: Tensor) -> Tensor:
    """The network's target: the noise, the image, or v = sqrt(a) noise - sqrt(1 - a) x_0.

    v: Salimans and Ho 2022, section 4.
    """
    if prediction_type == "epsilon":
        return noise_BCHW
    if prediction_type == "x0":
        return x_0_BCHW
    a_B111 = alphas_cumprod_B[:, None, None, None]
    return a_B111.sqrt() * noise_BCHW - (1.0 - a_B111).sqrt() * x_0_BCHW


def predicted_x_0(prediction_type: str, prediction_BCHW: Tensor, x_t_BCHW: Tensor, alphas_cumprod_B: Tensor) -> Tensor:
    """The clean image that follows from a prediction at x_t: the inverse of prediction_target.

    With epsilon no timestep may be pure noise. Salimans and Ho 2022, section 4.
    """
    if prediction_type == "x0":
        return prediction_BCHW
    a_B111 = alphas_cumprod_B[:, None, None, None]
    if prediction_type == "epsilon":
        return (x_t_BCHW - (1.0 - a_B111).sqrt() * prediction_BCHW) / a_B111.sqrt()
    return a_B111.sqrt() * x_t_BCHW - (1.0 - a_B111).sqrt() * prediction_BCHW


def meaning(alpha_bar: float, prediction: Prediction) -> Meaning:
    """predicted_x_0 as coefficients, in float64, and those of the noise: at one noise level, of 0 <= alpha_bar < 1.

    Raises ValueError for a prediction that is not known or not finite, and for epsilon in pure noise.
    """
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
    if isinstance(prediction, LinearPrediction):
        x0_from_x, x0_from_p = map(float, prediction)
        if not (math.isfinite(x0_from_x) and math.isfinite(x0_from_p)):
            raise ValueError(f"prediction_type: {prediction}; give finite numbers")
        # noise = (x_t - alpha x0) / sigma
        return Meaning(x0_from_x, x0_from_p, (1.0 - alpha * x0_from_x) / sigma, -alpha * x0_from_p / sigma)
    if prediction == "v":
        return Meaning(alpha, -sigma, sigma, alpha)
    if prediction == "x0":
        return Meaning(0.0, 1.0, 1.0 / sigma, -alpha / sigma)
    if prediction != "epsilon":
        raise ValueError(f"prediction_type: {prediction!r}; give epsilon, v, x0 or a LinearPrediction")
    if alpha_bar == 0.0:
        raise ValueError("a_t: 0 with epsilon, which says nothing of the image there; give v or x0")
    return Meaning(1.0 / alpha, -sigma / alpha, 0.0, 1.0)
