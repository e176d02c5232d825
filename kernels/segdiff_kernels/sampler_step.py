"""One step of a sampler in one pass: predicted image, clipping, and the update, DDIM's or DPM-Solver++'s.

Both are, with numbers known before sampling begins,

    x0     = threshold(A x_t + B p)
    x_prev = C x_t + D p + E x0 + F x0 of the step before + G noise

so one kernel reads each tensor once and writes x_prev, and x0 if the next step needs it. Prediction type and solver
only change A to G, which are derived here in float64 from noising.py's equations. With guidance, p is the guided
prediction. It may be any combination of x_t and x_0 (LinearPrediction), also that of EDM and of rectified flow.

a is alphas_cumprod, alpha = sqrt(a), sigma = sqrt(1 - a). Dimensions: B batch, C channels, H rows, W columns, T
training timesteps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segdiff_kernels.checks import FLOATS, check_dtype, check_same_device, check_shape, refuse
from segdiff_kernels.dense import check_can_run, check_same_dense
from segdiff_kernels.noising import LinearPrediction, Meaning, Prediction, meaning

_NAME = "sampler_step"
# A program's elements: 16 a thread.
BLOCK = 2048
_PREDICTIONS = "epsilon, v, x0 or a LinearPrediction"


class StepCoefficients(NamedTuple):
    """A to G of one step; `ddim_coefficients` and `multistep_coefficients` make them."""

    x0_from_x: float
    x0_from_prediction: float
    prev_from_x: float
    prev_from_prediction: float
    prev_from_x0: float
    prev_from_previous_x0: float
    prev_from_noise: float


def ddim_coefficients(a_t: float, a_prev: float, prediction_type: Prediction, eta: float = 0.0) -> StepCoefficients:
    """DDIM from a_t to a_prev. Song et al. 2020, eq. 12, with sigma of eq. 16.

    The noise that is added again is the predicted noise, also if x0 was clipped. a_prev is 1 after the last step.
    Raises ValueError unless 0 <= a_t < a_prev <= 1 and eta in [0, 1].
    """
    x0_from_x, x0_from_p, noise_from_x, noise_from_p = _meaning(a_t, a_prev, prediction_type)
    if not 0.0 <= eta <= 1.0:
        raise refuse(_NAME, "eta", eta, "0 (DDIM) to 1 (DDPM)")
    std = eta * math.sqrt((1.0 - a_prev) / (1.0 - a_t) * (1.0 - a_t / a_prev))
    direction = math.sqrt(max(1.0 - a_prev - std**2, 0.0))
    return StepCoefficients(
        x0_from_x, x0_from_p, direction * noise_from_x, direction * noise_from_p, math.sqrt(a_prev), 0.0, std
    )


def multistep_coefficients(
    a_t: float, a_prev: float, a_before: float | None, prediction_type: Prediction
) -> StepCoefficients:
    """DPM-Solver++(2M) from a_t to a_prev, after a step from a_before. Lu et al. 2022, algorithm 2.

    First order if a_before is None, as in the first step, and if a_prev is 1, since log SNR is then infinite. Written
    with (1 - exp(-h)) alpha_prev = alpha_prev - alpha_t sigma_prev / sigma_t, which holds at both ends. Raises
    ValueError unless 0 <= a_before < a_t < a_prev <= 1.
    """
    x0_from_x, x0_from_p, _, _ = _meaning(a_t, a_prev, prediction_type)
    ratio = math.sqrt((1.0 - a_prev) / (1.0 - a_t))
    from_x0, share = math.sqrt(a_prev) - math.sqrt(a_t) * ratio, 0.0
    if a_before is not None and a_prev < 1.0:
        if not 0.0 <= a_before < a_t:
            raise refuse(_NAME, "a_before", a_before, f"at least 0 and less than a_t = {a_t}")
        # 1 / (2 r) with r = h_before / h, the steps in lambda = log(alpha / sigma); 0 where a_before is pure noise.
        share = 0.5 * (_lambda(a_prev) - _lambda(a_t)) / (_lambda(a_t) - _lambda(a_before))
    return StepCoefficients(x0_from_x, x0_from_p, ratio, 0.0, from_x0 * (1.0 + share), -from_x0 * share, 0.0)


def ddim_schedule(
    alphas_cumprod_T: Tensor,
    timesteps: Sequence[int],
    prediction_type: Prediction | Sequence[Prediction],
    eta: float = 0.0,
) -> list[StepCoefficients]:
    """DDIM's steps along falling timesteps, and from the last of them to the image.

    prediction_type: of all steps, or one for each. Levels of little noise need alphas_cumprod in float64: at sigma =
    0.002 float32 has 1 - a to 1 % only. Raises ValueError as the coefficients do.
    """
    path = _path(alphas_cumprod_T, timesteps)
    steps = zip(itertools.pairwise(path), _by_step(prediction_type, len(timesteps)), strict=True)
    return [ddim_coefficients(a_t, a_prev, predicted, eta) for (a_t, a_prev), predicted in steps]


def multistep_schedule(
    alphas_cumprod_T: Tensor, timesteps: Sequence[int], prediction_type: Prediction | Sequence[Prediction]
) -> list[StepCoefficients]:
    """DPM-Solver++(2M)'s steps along falling timesteps, and from the last of them to the image; as ddim_schedule."""
    path = _path(alphas_cumprod_T, timesteps)
    before = [None, *path[:-2]]
    steps = zip(itertools.pairwise(path), before, _by_step(prediction_type, len(timesteps)), strict=True)
    return [multistep_coefficients(a_t, a_prev, a_before, predicted) for (a_t, a_prev), a_before, predicted in steps]


def ddim_step(
    x_t_BCHW: Tensor,
    prediction_BCHW: Tensor,
    coefficients: StepCoefficients,
    noise_BCHW: Tensor | None = None,
    limit_B: Tensor | None = None,
) -> Tensor:
    """x_prev, in the dtype of x_t; computed in float32.

    noise is needed if eta > 0. limit, float32 and positive: the predicted image is clamped to [-limit, limit] and
    divided by it (dynamic_limit); ones are plain clipping, None is neither. The tensors are float32, bfloat16 or
    float16 and have one memory order (contiguous or channels-last). No gradient. Raises ValueError for anything else,
    and if Triton cannot run.
    """
    if (noise_BCHW is None) != (coefficients.prev_from_noise == 0.0):
        wanted = "None, as eta is 0" if noise_BCHW is not None else "a tensor, as eta is above 0"
        raise refuse(_NAME, "noise", "None" if noise_BCHW is None else "a tensor", wanted)
    if coefficients.prev_from_previous_x0 != 0.0:
        raise refuse(_NAME, "coefficients", "those of a second-order step", "them to multistep_step")
    operands = {"noise": noise_BCHW, "previous_x0": None}
    return _step(x_t_BCHW, prediction_BCHW, coefficients, operands, limit_B, want_x0=False)[0]


def multistep_step(
    x_t_BCHW: Tensor,
    prediction_BCHW: Tensor,
    previous_x0_BCHW: Tensor | None,
    coefficients: StepCoefficients,
    limit_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_prev and the predicted image, which is the next call's previous_x0; the rest as ddim_step.

    A step of the first order does not read previous_x0, which may be None.
    """
    first_order = coefficients.prev_from_previous_x0 == 0.0
    if previous_x0_BCHW is None and not first_order:
        raise refuse(_NAME, "previous_x0", "None", "the image predicted by the step before")
    if coefficients.prev_from_noise != 0.0:
        raise refuse(_NAME, "coefficients", "those of a step with noise", "them to ddim_step")
    previous = None if first_order else previous_x0_BCHW
    operands = {"noise": None, "previous_x0": previous}
    return _step(x_t_BCHW, prediction_BCHW, coefficients, operands, limit_B, want_x0=True)


def sampler_step_reference(
    x_t_BCHW: Tensor,
    prediction_BCHW: Tensor,
    coefficients: StepCoefficients,
    previous_x0_BCHW: Tensor | None = None,
    noise_BCHW: Tensor | None = None,
    limit_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_prev and x0 of either step in torch, in the widest dtype given."""
    c, p = coefficients, prediction_BCHW
    x0 = c.x0_from_x * x_t_BCHW + c.x0_from_prediction * p
    if limit_B is not None:
        s_B111 = limit_B[:, None, None, None]
        x0 = x0.clamp(-s_B111, s_B111) / s_B111
    x_prev = c.prev_from_x * x_t_BCHW + c.prev_from_prediction * p + c.prev_from_x0 * x0
    if previous_x0_BCHW is not None:
        x_prev = x_prev + c.prev_from_previous_x0 * previous_x0_BCHW
    if noise_BCHW is not None:
        x_prev = x_prev + c.prev_from_noise * noise_BCHW
    return x_prev, x0


def dynamic_limit(
    x_t_BCHW: Tensor, prediction_BCHW: Tensor, coefficients: StepCoefficients, percentile: float
) -> Tensor:
    """limit_B for a step: this percentile, in (0, 1], of a sample's |x0|, and at least 1. Saharia et al. 2022, 2.3.

    In torch, as it must sort: a second pass over the prediction.
    """
    if not 0.0 < percentile <= 1.0:
        raise refuse(_NAME, "percentile", percentile, "more than 0 and at most 1")
    _, x0_BCHW = sampler_step_reference(x_t_BCHW.float(), prediction_BCHW.float(), coefficients)
    sorted_BN = x0_BCHW.abs().flatten(1).sort(dim=1).values  # torch.quantile refuses more than 2^24 elements
    rank = percentile * (sorted_BN.shape[1] - 1)
    low, high = math.floor(rank), math.ceil(rank)
    return torch.lerp(sorted_BN[:, low], sorted_BN[:, high], rank - low).clamp(min=1.0)


def _step(
    x_t_BCHW: Tensor,
    prediction_BCHW: Tensor,
    coefficients: StepCoefficients,
    operands: dict[str, Tensor | None],
    limit_B: Tensor | None,
    want_x0: bool,
) -> tuple[Tensor, Tensor]:
    tensors = {"x_t": x_t_BCHW, "prediction": prediction_BCHW, **operands}
    check_same_dense(_NAME, **tensors)
    for argument, tensor in tensors.items():
        if tensor is not None:
            check_dtype(_NAME, argument, tensor, FLOATS)
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise refuse(_NAME, argument, "requires a gradient, and there is none", "it under torch.no_grad()")
    if limit_B is not None:
        check_dtype(_NAME, "limit", limit_B, (torch.float32,))
        check_shape(_NAME, "limit", limit_B, x_t_BCHW.shape[:1])
        check_same_device(_NAME, x_t=x_t_BCHW, limit=limit_B)
    check_can_run(_NAME, x_t_BCHW.device)
    x_prev, x0 = torch.ops.segdiff.sampler_step(
        x_t_BCHW, prediction_BCHW, *operands.values(), limit_B, list(coefficients), want_x0
    )
    return x_prev, x0


@torch.library.custom_op("segdiff::sampler_step", mutates_args=())
def _sampler_step(
    x_t: Tensor,
    prediction: Tensor,
    noise: Tensor | None,
    previous_x0: Tensor | None,
    limit: Tensor | None,
    coefficients: list[float],
    want_x0: bool,
) -> tuple[Tensor, Tensor]:
    """x_prev, and x0 (of no elements unless want_x0)."""
    from segdiff_kernels._sampler_step_triton import launch

    outputs = _outputs(x_t, want_x0)
    with torch.cuda.device_of(x_t):
        launch((x_t, prediction, noise, previous_x0, limit), coefficients, outputs)
    return outputs


@_sampler_step.register_fake
def _(
    x_t: Tensor,
    prediction: Tensor,
    noise: Tensor | None,
    previous_x0: Tensor | None,
    limit: Tensor | None,
    coefficients: list[float],
    want_x0: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(x_t, want_x0)


def _outputs(x_t: Tensor, want_x0: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_t), torch.empty_like(x_t) if want_x0 else x_t.new_empty(0)


def _meaning(a_t: float, a_prev: float, prediction: Prediction) -> Meaning:
    if not 0.0 <= a_t < a_prev <= 1.0:
        raise refuse(_NAME, "a_t, a_prev", f"{a_t}, {a_prev}", "0 <= a_t < a_prev <= 1")
    return meaning(a_t, prediction)


def _by_step(prediction_type: Prediction | Sequence[Prediction], num_steps: int) -> Sequence[Prediction]:
    """A list with one for each step. A single string or LinearPrediction, although a sequence, holds for all steps."""
    if isinstance(prediction_type, str | LinearPrediction):
        return [prediction_type] * num_steps
    try:
        num_given = len(prediction_type)
    except TypeError:
        raise refuse(_NAME, "prediction_type", repr(prediction_type), _PREDICTIONS) from None
    if num_given != num_steps:
        raise refuse(_NAME, "prediction_type", f"{num_given} for {num_steps} steps", "one a step")
    return prediction_type


def _lambda(a: float) -> float:
    """Half the log SNR; minus infinity for pure noise. Lu et al. 2022, section 2.2."""
    return -math.inf if a == 0.0 else 0.5 * math.log(a / (1.0 - a))


def _path(alphas_cumprod_T: Tensor, timesteps: Sequence[int]) -> list[float]:
    """a along the timesteps, and 1 after them."""
    a_T = alphas_cumprod_T.double().tolist()
    if not timesteps or not all(0 <= t < len(a_T) for t in timesteps):
        raise refuse(_NAME, "timesteps", list(timesteps), f"at least one, each 0 to {len(a_T) - 1}")
    return [*(a_T[t] for t in timesteps), 1.0]
