"""From noise to images: solvers on one grid of noise levels, with the predicted x_0 guided and bounded in one place.

A step: the network predicts, and the prediction gives an x_0; segmenter guidance moves it; clip or dynamic threshold
bounds it; the solver takes the step from it. An image does not depend on the others of its batch. docs/sampling.md
compares the solvers. Dimensions: B batch, C channels, H rows, W columns, S sampling steps from noise to image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_shards.records import Batch
from segdiff_dist.denoising.conditioning import Conditions, modality_of
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.noise_levels import Level, level_at, levels_of, shown_level
from segdiff_dist.denoising.process import Process, TimestepProcess, make_process
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.diffusers_parts import respaced
from segdiff_kernels.noising import LinearPrediction
from segdiff_kernels.sampler_step import ddim_schedule, ddim_step, dynamic_limit, multistep_schedule, multistep_step

if TYPE_CHECKING:
    from segdiff_dist.denoising.task import DiceTerm

Predict = Callable[[Tensor, Tensor], Tensor]
"""The network with its conditions bound: its prediction from its input [B, C, H, W] and its timesteps [B]."""
Guide = Callable[[Tensor, float], Tensor]
"""A corrected x_0 [B, C, H, W] from a predicted one and its step's alpha_bar."""

# diffusers' solvers of higher order use this instead of an alpha_bar of 0, which has no logarithm.
_LEAST_ALPHA_BAR = 2.0**-24


def num_evaluations(sampler: SamplerConfig, diffusion: DiffusionConfig) -> int:
    """How often an image goes through the network. A pass with classifier-free guidance counts twice."""
    own = sampler.resolved(diffusion.objective)
    levels = levels_of(own, make_process(diffusion))
    if own.solver == "heun":
        again = levels[1:]
        if starts_at_noise(levels) and len(levels) > 1:
            again = levels[2:]
        levels = levels + again
    return sum(2 if is_guided(own, level) else 1 for level in levels)


def is_guided(sampler: SamplerConfig, level: Level) -> bool:
    """Whether classifier-free guidance acts at a noise level."""
    if sampler.guidance == 1.0 or sampler.guidance_interval is None:
        return sampler.guidance != 1.0
    low, high = sampler.guidance_interval
    return low < level.sigma <= high


def starts_at_noise(levels: list[Level]) -> bool:
    """Whether the first level is pure noise, or almost."""
    return levels[0].alpha_bar <= _LEAST_ALPHA_BAR


@torch.no_grad()
def sample(
    predict: Predict,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    x_T_BCHW: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
    guide: Guide | None = None,
    *,
    unguided: Predict | None = None,
    fused: bool = False,
) -> Tensor:
    """float32 [B, C, H, W] images in [-1, 1] from noise x_T, standard normal.

    `step_noise(i)` gives step i's noise [B, C, H, W]; ValueError without it if eta or churn is above 0. `guide`: made
    by segmenter_guide. `unguided`: predicts outside guidance_interval; ValueError without it if there is an interval.
    `fused`: all of a step except the network in one kernel, for solvers with a kernel, without segmenter guidance.
    """
    own = sampler.resolved(diffusion.objective)
    if (own.eta > 0 or own.churn > 0) and step_noise is None:
        raise ValueError("step_noise: needed for eta and churn, so that noise is a function of the item")
    if own.guidance_interval is not None and own.guidance != 1.0 and unguided is None:
        raise ValueError("unguided: needed for guidance_interval")
    process = make_process(diffusion)
    levels = levels_of(own, process)
    if own.timestep_spacing in ("karras", "log_snr"):  # do not begin at pure noise
        x_T_BCHW = x_T_BCHW * math.sqrt(1.0 - levels[0].alpha_bar)

    def predicted(x_t_BCHW: Tensor, level: Level) -> Tensor:
        shown = shown_level(level, own, process)
        timestep_B = torch.full((len(x_t_BCHW),), shown.time, device=x_t_BCHW.device)
        scale = process.scale_at(shown.alpha_bar) * _from_one_to(level, shown)
        input_BCHW = x_t_BCHW if scale == 1.0 else scale * x_t_BCHW
        net = predict if unguided is None or is_guided(own, level) else unguided
        return net(input_BCHW, timestep_B)

    has_kernel = own.solver in ("ddim", "dpm_solver_pp_2m")
    has_kernel = has_kernel and (own.sigma_shift == 1.0 or not isinstance(process, TimestepProcess))
    if fused and guide is None and has_kernel:
        return _fused(predicted, process, own, levels, x_T_BCHW, step_noise)

    def x_0_at(x_t_BCHW: Tensor, level: Level) -> Tensor:
        shown = shown_level(level, own, process)
        seen_BCHW = x_t_BCHW if shown is level else _from_one_to(level, shown) * x_t_BCHW
        x0_pred_BCHW = process.x_0_at(predicted(x_t_BCHW, level), seen_BCHW, shown.alpha_bar)
        return x0_pred_BCHW if guide is None else guide(x0_pred_BCHW, level.alpha_bar)

    def thresholded_x_0_at(x_t_BCHW: Tensor, level: Level) -> Tensor:
        return thresholded(x_0_at(x_t_BCHW, level), own)

    assert own.solver is not None, "resolved() chooses one"
    of_step = x_0_at if own.solver in _BOUND_THEMSELVES else thresholded_x_0_at
    return _SOLVERS[own.solver](of_step, levels, x_T_BCHW, own, process, step_noise)


def _from_one_to(level: Level, shown: Level) -> float:
    """The factor from x in its variance-preserving form at one level to that at another with the same image and noise.
    1 if they are the same level, for pure noise too."""
    return 1.0 if shown is level else math.sqrt(shown.alpha_bar / level.alpha_bar)


def thresholded(x0_pred_BCHW: Tensor, sampler: SamplerConfig) -> Tensor:
    """x_0 clipped to [-1, 1], or dynamically thresholded, each image by itself (Saharia et al. 2022, section 2.3)."""
    if sampler.dynamic_threshold > 0:
        largest_B = x0_pred_BCHW.abs().flatten(1).quantile(sampler.dynamic_threshold, dim=1).clamp(min=1.0)
        s_B111 = largest_B[:, None, None, None]
        return x0_pred_BCHW.clamp(-s_B111, s_B111) / s_B111
    return x0_pred_BCHW.clamp(-1.0, 1.0) if sampler.clip_sample else x0_pred_BCHW


def clear_air(images_BCHW: Tensor, mask_BHW: Tensor, body_id: int) -> Tensor:
    """Images in [-1, 1] with -1, black, where neither a pixel of the mask [B, H, W] nor one of its eight neighbours has
    a label. The neighbours keep the outline of the patient, which is between pixels. Images whose mask has no `body`
    do not change: 0 may be the patient there."""
    has_body_B = (mask_BHW == body_id).flatten(1).any(dim=1)
    labelled_B1HW = (mask_BHW != 0).float()[:, None]
    is_near_B1HW = torch.nn.functional.max_pool2d(labelled_B1HW, kernel_size=3, stride=1, padding=1) > 0
    return images_BCHW.masked_fill(has_body_B[:, None, None, None] & ~is_near_B1HW, -1.0)


def segmenter_guide(dice_term: DiceTerm, conditions: Conditions, weight: float) -> Guide:
    """Moves x_0 down the gradient of L = 1 - Dice(mask, segmenter's softmax): x_0 - weight (1 - a) L g / rms(g).

    One step of the backward guidance of Bansal et al. 2023, section 3.2, which needs no gradient of the denoiser. g is
    scaled to unit root mean square, so that the weight is in grey values at any image size. The factor L does not
    change images that fit. The factor 1 - a, 1 at pure noise and 0 at the image, leaves the last steps to the denoiser.
    Masks without organs change nothing.
    """
    # The term reads masks and modalities only. They are cloned, because tensors from inference mode cannot be
    # differentiated.
    with torch.inference_mode(False):
        mask_BHW, modality_B = conditions.mask_BHW.clone(), modality_of(conditions.class_B)
    shown = Batch(mask_BHW, mask_BHW, modality_B, modality_B, modality_B)

    def guide(x0_pred_BCHW: Tensor, alpha_cumprod: float) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x_BCHW = x0_pred_BCHW.detach().clone().requires_grad_()
            loss_B, _ = dice_term(x_BCHW, shown)
            (g_BCHW,) = torch.autograd.grad(loss_B.sum(), x_BCHW)
        rms_B111 = g_BCHW.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        step_B111 = weight * (1.0 - alpha_cumprod) * loss_B.detach()[:, None, None, None]
        return x0_pred_BCHW - step_B111 * g_BCHW / rms_B111.clamp(min=torch.finfo(g_BCHW.dtype).tiny)

    return guide


def _alpha_bars(levels: list[Level]) -> Tensor:
    """float32 [S], on the CPU, which diffusers' steps need."""
    return torch.tensor([level.alpha_bar for level in levels], dtype=torch.float32)


def _above_0(a_S: Tensor) -> Tensor:
    """The alpha_bars with _LEAST_ALPHA_BAR instead of 0, or less if others are as small: a step between equal values
    would divide 0 by 0."""
    least_other = min((a for a in a_S.tolist() if a > 0), default=1.0)
    return a_S.clamp(min=min(_LEAST_ALPHA_BAR, 0.25 * least_other))


def _fused(
    predicted: Callable[[Tensor, Level], Tensor],
    process: Process,
    sampler: SamplerConfig,
    levels: list[Level],
    x_T_BCHW: Tensor,
    step_noise: Callable[[int], Tensor] | None,
) -> Tensor:
    """DDIM or DPM-Solver++(2M) by segdiff_kernels.sampler_step: one launch a step besides the network's."""
    a_S, steps, x_t_BCHW, x_0_BCHW = _alpha_bars(levels), range(len(levels)), x_T_BCHW, None
    is_ddim = sampler.solver == "ddim"
    predictions = _step_predictions(levels, sampler, process)
    if is_ddim:
        schedule = ddim_schedule(a_S, steps, predictions, sampler.eta)
    else:  # the bound changes the second step, and with it the images: the same here as without the kernel
        schedule = multistep_schedule(_above_0(a_S), steps, predictions)
    ones_B = torch.ones(len(x_T_BCHW), device=x_T_BCHW.device)
    for step, coefficients in enumerate(schedule):
        prediction_BCHW = predicted(x_t_BCHW, levels[step])
        limit_B = ones_B if sampler.clip_sample else None
        if sampler.dynamic_threshold > 0:
            limit_B = dynamic_limit(x_t_BCHW, prediction_BCHW, coefficients, sampler.dynamic_threshold)
        if is_ddim:
            noise_BCHW = step_noise(step) if step_noise is not None and coefficients.prev_from_noise else None
            x_t_BCHW = ddim_step(x_t_BCHW, prediction_BCHW, coefficients, noise_BCHW, limit_B=limit_B)
        else:
            x_t_BCHW, x_0_BCHW = multistep_step(x_t_BCHW, prediction_BCHW, x_0_BCHW, coefficients, limit_B=limit_B)
    return x_t_BCHW


def _step_predictions(
    levels: list[Level], sampler: SamplerConfig, process: Process
) -> str | Sequence[LinearPrediction]:
    """How x_0 follows from x_t and the prediction at each step, of the level that the network is given."""
    shown = [shown_level(level, sampler, process) for level in levels]
    predictions = process.step_predictions([level.alpha_bar for level in shown])
    if isinstance(predictions, str):
        return predictions
    factors = [_from_one_to(level, other) for level, other in zip(levels, shown, strict=True)]
    return [p._replace(x0_from_x=p.x0_from_x * factor) for p, factor in zip(predictions, factors, strict=True)]


def _ddim(
    x_0_at: Callable[[Tensor, Level], Tensor],
    levels: list[Level],
    x_T_BCHW: Tensor,
    sampler: SamplerConfig,
    process: Process,
    step_noise: Callable[[int], Tensor] | None,
) -> Tensor:
    """Song et al. 2020, eq. 12. As in diffusers and the paper's code, it continues with the predicted noise, not with
    the noise that follows from the bounded x_0; so the scheduler does the bounding."""
    from segdiff_dist.diffusers_parts import DDIMScheduler

    scheduler = respaced(
        DDIMScheduler,
        _alpha_bars(levels),
        clip_sample=sampler.clip_sample,
        thresholding=sampler.dynamic_threshold > 0,
        dynamic_thresholding_ratio=sampler.dynamic_threshold,
        sample_max_value=float("inf"),
        # With zero terminal SNR diffusers would use alphas_cumprod[0] instead of 1 after the last step.
        set_alpha_to_one=True,
    )
    # At eta 1 and an alpha_bar of about 0 the scheduler takes the root of 0 less a rounding error.
    eta = min(sampler.eta, 1.0 - 2.0**-16)
    x_t_BCHW = x_T_BCHW
    for step, t in enumerate(scheduler.timesteps.tolist()):
        noise_BCHW = None if step_noise is None or eta == 0 else step_noise(step)
        x_0_BCHW = x_0_at(x_t_BCHW, levels[step])
        x_t_BCHW = scheduler.step(x_0_BCHW, t, x_t_BCHW, eta=eta, variance_noise=noise_BCHW).prev_sample
    return x_t_BCHW


def _multistep(
    x_0_at: Callable[[Tensor, Level], Tensor],
    levels: list[Level],
    x_T_BCHW: Tensor,
    sampler: SamplerConfig,
    process: Process,
    step_noise: Callable[[int], Tensor] | None,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2; or UniPC, Zhao et al. 2023, with B_2(h) and order 2."""
    from segdiff_dist.diffusers_parts import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    scheduler_class = UniPCMultistepScheduler if sampler.solver == "unipc" else DPMSolverMultistepScheduler
    scheduler = respaced(scheduler_class, _above_0(_alpha_bars(levels)), solver_order=2)
    scheduler.set_begin_index(0)
    x_t_BCHW = x_T_BCHW
    for step, t in enumerate(scheduler.timesteps.tolist()):
        x_t_BCHW = scheduler.step(x_0_at(x_t_BCHW, levels[step]), t, x_t_BCHW).prev_sample
    return x_t_BCHW


def _heun(
    x_0_at: Callable[[Tensor, Level], Tensor],
    levels: list[Level],
    x_T_BCHW: Tensor,
    sampler: SamplerConfig,
    process: Process,
    step_noise: Callable[[int], Tensor] | None,
) -> Tensor:
    """Karras et al. 2022, algorithm 2, on x = x_t / sqrt(a); diffusers has it without churn.

    At pure noise x is infinite, so there the first step is DDIM's, of first order like the others' first steps.
    """
    ends = [*(level.sigma for level in levels), 0.0]
    first = 0
    if starts_at_noise(levels):
        x_BCHW = x_0_at(x_T_BCHW, levels[0]) + ends[1] * x_T_BCHW
        first = 1
    else:
        x_BCHW = x_T_BCHW / math.sqrt(levels[0].alpha_bar)
    for step in range(first, len(levels)):
        here, sigma, to = levels[step], ends[step], ends[step + 1]
        if sampler.churn > 0 and sampler.churn_interval[0] <= sigma <= sampler.churn_interval[1]:
            assert step_noise is not None
            raised = sigma * (1.0 + min(sampler.churn / len(levels), math.sqrt(2.0) - 1.0))
            x_BCHW = x_BCHW + sampler.churn_noise * math.sqrt(raised**2 - sigma**2) * step_noise(step)
            here, sigma = level_at(raised, process), raised
        slope_BCHW = (x_BCHW - x_0_at(x_BCHW * math.sqrt(here.alpha_bar), here)) / sigma
        next_BCHW = x_BCHW + (to - sigma) * slope_BCHW
        if to > 0:
            there = levels[step + 1]
            slope_there_BCHW = (next_BCHW - x_0_at(next_BCHW * math.sqrt(there.alpha_bar), there)) / to
            next_BCHW = x_BCHW + (to - sigma) * 0.5 * (slope_BCHW + slope_there_BCHW)
        x_BCHW = next_BCHW
    return x_BCHW


# All solvers have one signature. x_0_at(x_t, level) is the image that the net predicts; docs/add_a_sampler.md.
_SOLVERS = {"ddim": _ddim, "dpm_solver_pp_2m": _multistep, "heun": _heun, "unipc": _multistep}
# These clip or threshold x_0 themselves.
_BOUND_THEMSELVES = ("ddim",)
