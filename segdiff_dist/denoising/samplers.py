"""From noise to images: diffusers' solvers on one grid of timesteps, with the predicted x_0 looked after in one place.

A step: the network predicts, which means an x_0; segmenter guidance moves it, clip or dynamic threshold bounds it, and
the solver goes on from there. Nothing depends on the other images of a batch. docs/sampling.md compares the solvers.
Dimensions: B batch, C channels, H rows, W columns, S sampling steps from noise to image, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_shards.documents import read_json, reading
from data_shards.problems import InputProblems, Problem
from data_shards.records import AXES, Batch
from segdiff_dist.denoising.conditioning import Conditions, GuidanceRemoves
from segdiff_dist.denoising.diffusion import DiffusionConfig, make_scheduler, predicted_x_0
from segdiff_kernels.sampler_step import ddim_schedule, ddim_step, dynamic_limit, multistep_schedule, multistep_step

if TYPE_CHECKING:
    from data_shards.labels import LabelTable
    from segdiff_dist.denoising.task import DiceTerm

Solver = Literal["ddim", "dpm_solver_pp_2m", "unipc", "heun"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""The network with its conditions bound: its prediction from x_t [B, C, H, W] and timesteps int64 [B]."""
Guide = Callable[[Tensor, float], Tensor]
"""A better x_0 [B, C, H, W] from a predicted one and its step's alpha_bar."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"solver": "ddim", "num_steps": 50, "timestep_spacing": "leading"},
    # The fewest passes that were as good as 50 DDIM steps in benchmarks/samplers.py; docs/sampling.md has the table.
    "fast": {"solver": "ddim", "num_steps": 16, "timestep_spacing": "trailing"},
    "best": {"solver": "unipc", "num_steps": 50, "timestep_spacing": "trailing"},
}
# What diffusers' solvers of higher order put in place of an alpha_bar of 0, whose logarithm they could not take.
_LEAST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True)
class SamplerConfig:
    """How noise becomes an image. The defaults are the paper's code: 50 leading DDIM steps, x_0 clipped to [-1, 1]."""

    preset: Literal["paper", "fast", "best"] = "paper"
    """What solver, num_steps and timestep_spacing are where they are null: the paper's; the cheapest as good as 50 DDIM
    steps; the one that errs least."""
    solver: Solver | None = None
    """DDIM (Song et al. 2020), DPM-Solver++(2M) (Lu et al. 2022), UniPC (Zhao et al. 2023), or
    Heun (Karras et al. 2022), which goes through the net twice a step."""
    num_steps: int | None = None
    timestep_spacing: TimestepSpacing | None = None
    eta: float = 0.0
    """DDIM alone: 0 adds no noise on the way, 1 as much as DDPM."""
    clip_sample: bool = True
    """Bound each predicted x_0 to [-1, 1]."""
    dynamic_threshold: float = 0.0
    """Or to this quantile of its absolute values where that is above 1, and divide by it (Saharia et al. 2022), for
    strong guidance: 0.995, say. 0 is off."""
    guidance: float = 1.0
    """Classifier-free guidance (Ho and Salimans 2022); 1 is none, and more follows the conditions more closely."""
    guidance_removes: GuidanceRemoves = "mask"
    """What the prediction that is moved away from is not told. Training must have dropped the same."""
    segmenter_guidance: float = 0.0
    """How far each predicted x_0 is moved to where a segmenter finds the mask in it, in grey values of [-1, 1]; 0 is
    off."""
    guidance_segmenter: str | None = None
    """The segmenter's weights: the folder RUN/segmenter/weights. Judge the images by another one."""

    def resolved(self) -> SamplerConfig:
        """The same with nothing left to the preset."""
        values = asdict(self)
        return replace(self, **{name: value for name, value in PRESETS[self.preset].items() if values[name] is None})

    def problems(self, diffusion: DiffusionConfig | None = None) -> list[Problem]:
        """What is out of range; and, given the process that the net was trained on, what does not go with it."""
        found: list[Problem] = []
        own = self.resolved()
        assert own.num_steps is not None

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                found.append(Problem("config", f"sample.sampler.{name}", str(getattr(own, name)), remedy))

        check("num_steps", own.num_steps >= 1, "give at least 1")
        check("eta", 0 <= own.eta <= 1, "give 0 to 1")
        check("eta", own.solver == "ddim" or own.eta == 0, f"{own.solver} adds no noise: give 0, or use solver ddim")
        check("dynamic_threshold", 0 <= own.dynamic_threshold <= 1, "give a quantile from 0 to 1")
        check("guidance", own.guidance >= 0, "give at least 0")
        check("segmenter_guidance", own.segmenter_guidance >= 0, "give at least 0")
        if own.segmenter_guidance > 0:
            remedy = "give the folder of a segmenter's weights; `segdiff train-segmenter --help` says how to train one"
            weights = None if own.guidance_segmenter is None else Path(own.guidance_segmenter)
            check("guidance_segmenter", weights is not None and (weights / "segdiff.json").is_file(), remedy)
        if diffusion is None:
            return found
        most = diffusion.num_train_timesteps
        check("num_steps", own.num_steps <= most, f"the net knows {most} timesteps: give at most that many")
        leading = own.timestep_spacing == "leading"
        check("num_steps", own.num_steps > 1 or not leading, "one leading step starts at the image: use trailing")
        check(
            "timestep_spacing",
            not (leading and diffusion.zero_terminal_snr),
            "never starts at pure noise, as zero_terminal_snr trains for: use trailing, or the preset fast or best",
        )
        return found


def guidance_problems(sampler: SamplerConfig, table: LabelTable) -> list[Problem]:
    """Whether the segmenter that guides knows the masks' labels. That there is one, SamplerConfig.problems sees."""
    file = Path(sampler.guidance_segmenter or "") / "segdiff.json"
    if sampler.segmenter_guidance == 0 or not file.is_file():
        return []
    from data_shards.labels import LabelTable

    try:
        with reading(file, "a segmenter's description", "copy the folder again, or train again"):
            about = read_json(file, "copy the folder again, or train again")["label_table"]
            found = LabelTable(about["name"], tuple(about["names"]))
    except InputProblems as error:
        return list(error.problems)
    if found == table:
        return []
    remedy = f"its labels are {found.name!r}, the masks' {table.name!r}: train a segmenter on these"
    return [Problem("config", "sample.sampler.guidance_segmenter", str(sampler.guidance_segmenter), remedy)]


def guidance_digest(sampler: SamplerConfig) -> str | None:
    """sha256 of the guiding segmenter's weights, which images depend on; None where none guides."""
    if sampler.segmenter_guidance == 0:
        return None
    from segdiff_dist.segmentation import Segmenter

    return Segmenter.load(Path(str(sampler.guidance_segmenter))).weights_sha256


def num_evaluations(sampler: SamplerConfig, diffusion: DiffusionConfig) -> int:
    """How often an image goes through the network. Classifier-free guidance counts twice."""
    own = sampler.resolved()
    assert own.num_steps is not None
    once = own.num_steps
    if own.solver == "heun":
        starts_at_noise = float(_alphas_cumprod(own, diffusion)[1][0]) <= _LEAST_ALPHA_BAR
        once = 2 * own.num_steps - (2 if starts_at_noise and own.num_steps > 1 else 1)
    return once if own.guidance == 1.0 else 2 * once


def spaced_timesteps(num_train_timesteps: int, num_steps: int, spacing: TimestepSpacing) -> np.ndarray:
    """int64 [S] timesteps, falling. Lin et al. 2024, table 2, less 1: ours count from 0."""
    if spacing == "leading":
        return np.arange(num_steps, dtype=np.int64)[::-1] * (num_train_timesteps // num_steps)
    if spacing == "linspace":
        return np.linspace(num_train_timesteps - 1, 0, num_steps).round().astype(np.int64)
    step = num_train_timesteps / num_steps
    return (num_train_timesteps - np.arange(num_steps) * step).round().astype(np.int64) - 1


@torch.no_grad()
def sample(
    predict: Predict,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    x_T_BCHW: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
    guide: Guide | None = None,
    *,
    fused: bool = False,
) -> Tensor:
    """float32 [B, C, H, W] images in [-1, 1] from noise x_T, standard normal.

    `step_noise(i)` gives step i's noise [B, C, H, W]; without it ValueError where eta > 0. `guide`: segmenter_guide's.
    `fused`: all of a step but the network in one kernel, of the solvers that there is one for, where nothing guides.
    """
    own = sampler.resolved()
    if own.eta > 0 and step_noise is None:
        raise ValueError(f"step_noise: needed for eta {own.eta}, so that noise is a function of the item")
    timestep_S, a_S = _alphas_cumprod(own, diffusion)
    if fused and guide is None and own.solver in ("ddim", "dpm_solver_pp_2m"):
        return _fused(predict, diffusion.prediction_type, own, timestep_S, a_S, x_T_BCHW, step_noise)

    def x_0_at(x_t_BCHW: Tensor, step: int) -> Tensor:
        a, batch = float(a_S[step]), len(x_t_BCHW)
        timestep_B = torch.full((batch,), int(timestep_S[step]), device=x_t_BCHW.device)
        prediction_BCHW = predict(x_t_BCHW, timestep_B)
        a_B = torch.full((batch,), a, device=x_t_BCHW.device)
        x0_pred_BCHW = predicted_x_0(diffusion.prediction_type, prediction_BCHW, x_t_BCHW, a_B)
        return x0_pred_BCHW if guide is None else guide(x0_pred_BCHW, a)

    if own.solver == "ddim":
        return _ddim(x_0_at, a_S, x_T_BCHW, own, step_noise)
    solve = _heun if own.solver == "heun" else _multistep
    return solve(lambda x_t, step: bounded(x_0_at(x_t, step), own), a_S, x_T_BCHW, own)


def bounded(x0_pred_BCHW: Tensor, sampler: SamplerConfig) -> Tensor:
    """x_0 clipped to [-1, 1], or dynamically thresholded, each image by itself (Saharia et al. 2022, section 2.3)."""
    if sampler.dynamic_threshold > 0:
        largest_B = x0_pred_BCHW.abs().flatten(1).quantile(sampler.dynamic_threshold, dim=1).clamp(min=1.0)
        s_B111 = largest_B[:, None, None, None]
        return x0_pred_BCHW.clamp(-s_B111, s_B111) / s_B111
    return x0_pred_BCHW.clamp(-1.0, 1.0) if sampler.clip_sample else x0_pred_BCHW


def segmenter_guide(dice_term: DiceTerm, conditions: Conditions, weight: float) -> Guide:
    """Moves x_0 down the gradient of L = 1 - Dice(mask, segmenter's softmax): x_0 - weight (1 - a) L g / rms(g).

    One step of the backward guidance of Bansal et al. 2023, section 3.2, which needs no gradient of the denoiser. g is
    taken to unit root mean square, so that the weight is in grey values at any image size; L leaves alone what fits;
    1 - a, 1 at pure noise and 0 at the image, lets the denoiser have the last word. Masks without organs move nothing.
    """
    # The term reads masks and modalities only. Clones: what comes out of inference mode cannot be differentiated.
    with torch.inference_mode(False):
        mask_BHW, modality_B = conditions.mask_BHW.clone(), conditions.class_B.clone() // len(AXES)
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


def _alphas_cumprod(sampler: SamplerConfig, diffusion: DiffusionConfig) -> tuple[np.ndarray, Tensor]:
    """int64 [S] timesteps and float32 [S] alpha_bar, from noise to image; on the CPU, where diffusers steps from."""
    assert sampler.num_steps is not None
    assert sampler.timestep_spacing is not None
    timestep_S = spaced_timesteps(diffusion.num_train_timesteps, sampler.num_steps, sampler.timestep_spacing)
    return timestep_S, make_scheduler(diffusion).alphas_cumprod[torch.from_numpy(timestep_S.copy())]


def _respaced(scheduler_class: Any, a_S: Tensor, **settings: Any) -> Any:
    """A scheduler of diffusers' for predicted x_0, whose only timesteps, S - 1 down to 0, are the grid's.

    So all solvers walk one grid, of any S: DDIMScheduler's own strides miss the next timestep where S does not divide
    T, and the others' leading and linspace are not its. Respacing: Nichol and Dhariwal 2021, section 4.
    """
    a_up_S = a_S.flip(0)
    betas_S = 1.0 - a_up_S / torch.cat((a_up_S.new_ones(1), a_up_S[:-1]))
    spacing = {"timestep_spacing": "trailing", "prediction_type": "sample"}
    scheduler = scheduler_class(num_train_timesteps=len(a_S), trained_betas=betas_S.tolist(), **spacing, **settings)
    scheduler.alphas_cumprod = a_up_S  # to the bit; by way of float32 betas small ones lose digits
    scheduler.set_timesteps(len(a_S))
    return scheduler


def _above_0(a_S: Tensor) -> Tensor:
    """The alpha_bars with _LEAST_ALPHA_BAR in place of 0, or less where others are as small: a step from one to its
    equal would divide 0 by 0."""
    least_other = min((a for a in a_S.tolist() if a > 0), default=1.0)
    return a_S.clamp(min=min(_LEAST_ALPHA_BAR, 0.25 * least_other))


def _fused(
    predict: Predict,
    prediction_type: str,
    sampler: SamplerConfig,
    timestep_S: np.ndarray,
    a_S: Tensor,
    x_T_BCHW: Tensor,
    step_noise: Callable[[int], Tensor] | None,
) -> Tensor:
    """DDIM or DPM-Solver++(2M) by segdiff_kernels.sampler_step: a launch a step beside the network's."""
    steps, x_t_BCHW, x_0_BCHW = range(len(a_S)), x_T_BCHW, None
    is_ddim = sampler.solver == "ddim"
    if is_ddim:
        schedule = ddim_schedule(a_S, steps, prediction_type, sampler.eta)
    else:  # the bound changes the second step, and with it the images: the same here as without the kernel
        schedule = multistep_schedule(_above_0(a_S), steps, prediction_type)
    ones_B = torch.ones(len(x_T_BCHW), device=x_T_BCHW.device)
    for step, coefficients in enumerate(schedule):
        timestep_B = torch.full((len(x_t_BCHW),), int(timestep_S[step]), device=x_t_BCHW.device)
        prediction_BCHW = predict(x_t_BCHW, timestep_B)
        limit_B = ones_B if sampler.clip_sample else None
        if sampler.dynamic_threshold > 0:
            limit_B = dynamic_limit(x_t_BCHW, prediction_BCHW, coefficients, sampler.dynamic_threshold)
        if is_ddim:
            noise_BCHW = step_noise(step) if step_noise is not None and coefficients.prev_from_noise else None
            x_t_BCHW = ddim_step(x_t_BCHW, prediction_BCHW, coefficients, noise_BCHW, limit_B=limit_B)
        else:
            x_t_BCHW, x_0_BCHW = multistep_step(x_t_BCHW, prediction_BCHW, x_0_BCHW, coefficients, limit_B=limit_B)
    return x_t_BCHW


def _ddim(
    x_0_at: Callable[[Tensor, int], Tensor],
    a_S: Tensor,
    x_T_BCHW: Tensor,
    sampler: SamplerConfig,
    step_noise: Callable[[int], Tensor] | None,
) -> Tensor:
    """Song et al. 2020, eq. 12. As in diffusers and the paper's code, the noise that it goes on with is what was
    predicted, not what the bounded x_0 would mean; so the scheduler does the bounding."""
    from diffusers import DDIMScheduler

    scheduler = _respaced(
        DDIMScheduler,
        a_S,
        clip_sample=sampler.clip_sample,
        thresholding=sampler.dynamic_threshold > 0,
        dynamic_thresholding_ratio=sampler.dynamic_threshold,
        sample_max_value=float("inf"),
        # With zero terminal SNR diffusers' own fallback would put alphas_cumprod[0] in place of 1 after the last step.
        set_alpha_to_one=True,
    )
    # At eta 1 and an alpha_bar of about 0 the scheduler takes the root of 0 less a rounding error.
    eta = min(sampler.eta, 1.0 - 2.0**-16)
    x_t_BCHW = x_T_BCHW
    for step, t in enumerate(scheduler.timesteps.tolist()):
        noise_BCHW = None if step_noise is None or eta == 0 else step_noise(step)
        x_0_BCHW = x_0_at(x_t_BCHW, step)
        x_t_BCHW = scheduler.step(x_0_BCHW, t, x_t_BCHW, eta=eta, variance_noise=noise_BCHW).prev_sample
    return x_t_BCHW


def _multistep(
    x_0_at: Callable[[Tensor, int], Tensor], a_S: Tensor, x_T_BCHW: Tensor, sampler: SamplerConfig
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2; or UniPC, Zhao et al. 2023, with B_2(h) and order 2."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    scheduler_class = UniPCMultistepScheduler if sampler.solver == "unipc" else DPMSolverMultistepScheduler
    scheduler = _respaced(scheduler_class, _above_0(a_S), solver_order=2)
    scheduler.set_begin_index(0)
    x_t_BCHW = x_T_BCHW
    for step, t in enumerate(scheduler.timesteps.tolist()):
        x_t_BCHW = scheduler.step(x_0_at(x_t_BCHW, step), t, x_t_BCHW).prev_sample
    return x_t_BCHW


def _heun(x_0_at: Callable[[Tensor, int], Tensor], a_S: Tensor, x_T_BCHW: Tensor, sampler: SamplerConfig) -> Tensor:
    """Karras et al. 2022, algorithm 1, which walks x_t / sqrt(a); diffusers has it without churn.

    From pure noise, where that is infinite, the first step is DDIM's, of first order like the others' first steps.
    """
    from diffusers import HeunDiscreteScheduler

    scheduler = _respaced(HeunDiscreteScheduler, _above_0(a_S))
    steps = [len(a_S) - 1 - int(t) for t in scheduler.timesteps]  # 0, 1, 1, 2, 2, ...
    begin = 0
    x_BCHW = x_T_BCHW / _above_0(a_S)[0].sqrt()
    if a_S[0] <= _LEAST_ALPHA_BAR:
        x_0_BCHW = x_0_at(x_T_BCHW, 0)
        if len(a_S) == 1:
            return x_0_BCHW
        begin = 2
        x_BCHW = x_0_BCHW + ((1.0 - a_S[1]) / a_S[1]).sqrt() * x_T_BCHW
    scheduler.set_begin_index(begin)
    for index in range(begin, len(steps)):
        x_0_BCHW = x_0_at(x_BCHW * a_S[steps[index]].sqrt(), steps[index])
        x_BCHW = scheduler.step(x_0_BCHW, scheduler.timesteps[index], x_BCHW).prev_sample
    return x_BCHW
