"""Progressive distillation (Salimans and Ho 2022): a student learns to make several steps of a teacher in one.

The teacher's grid of N levels is cut into K parts of equal length. The student gets x at the first level of a part, and
its x_0 must lead, by one step of DDIM, to where the teacher's steps through the part lead. So a student is an ordinary
denoiser, which DDIM samples in K steps at those K levels. The teacher's guidance is in its steps, so the student has it
without a second pass (Meng et al. 2023).

x has its variance-preserving form here: alpha x_0 + beta noise, alpha^2 + beta^2 = 1.
Dimensions: B batch, C channels, H rows, W columns, N levels of the teacher, K steps of the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from segdiff_dist.denoising.noise_levels import Level, levels_of
from segdiff_dist.denoising.process import Process
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.samplers import is_guided

PredictX0 = Callable[[Tensor, Tensor], Tensor]
"""The teacher's x_0 [B, C, H, W] from x [B, C, H, W] and the index [B] of each sample's level."""


class Coefficients(NamedTuple):
    """Of each level, float32 [N + 1]; the last one is the image itself. `scale`: from x to the network's input; x_0 is
    from_x x + from_prediction prediction. `is_guided`: 1 where the teacher's guidance acts."""

    alpha: Tensor
    beta: Tensor
    time: Tensor
    scale: Tensor
    from_x: Tensor
    from_prediction: Tensor
    is_guided: Tensor

    def at(self, index_B: Tensor) -> Coefficients:
        """Those of some levels, [B, 1, 1, 1] each."""
        return Coefficients(*(values[index_B][:, None, None, None] for values in self))


@dataclass(frozen=True)
class Grid:
    """The teacher's levels, and the number of its steps in one of the student's."""

    levels: tuple[Level, ...]
    steps_each: int
    coefficients: Coefficients

    @classmethod
    def of(cls, teacher: SamplerConfig, num_steps: int, process: Process, device: torch.device | None = None) -> Grid:
        """Of a resolved sampler whose number of steps is a multiple of the student's."""
        levels = levels_of(teacher, process)
        assert len(levels) % num_steps == 0, (len(levels), num_steps)
        return cls(tuple(levels), len(levels) // num_steps, _coefficients(levels, teacher, process, device))

    @property
    def firsts(self) -> list[Level]:
        """The levels [K] of the student."""
        return list(self.levels[:: self.steps_each])

    def drawn_starts(self, u_B: Tensor) -> Tensor:
        """int64 [B]: the index of the first level of a part, each part equally often, from uniform numbers in
        (0, 1)."""
        num = len(self.levels) // self.steps_each
        return (u_B * num).long().clamp(max=num - 1) * self.steps_each

    def noised(self, x_0_BCHW: Tensor, noise_BCHW: Tensor, index_B: Tensor) -> Tensor:
        """x at these levels."""
        here = self.coefficients.at(index_B)
        return here.alpha * x_0_BCHW + here.beta * noise_BCHW

    def x_0_that_leads_there(
        self, x_0_at: PredictX0, x_BCHW: Tensor, start_B: Tensor, *, second_order: bool = True
    ) -> Tensor:
        """The x_0 with which one step of DDIM leads from x, at the first level of a part, to where the teacher leads.

        The teacher steps by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), whose first step in a part is DDIM's; with
        second_order False all are. The result solves z = alpha' x_0 + beta' (x - alpha x_0) / beta for x_0, where z is
        the teacher's x at the end of the part: Salimans and Ho 2022, appendix G.
        """
        z_BCHW, before_BCHW = x_BCHW, x_BCHW
        for step in range(self.steps_each):
            index_B = start_B + step
            x_0_BCHW = x_0_at(z_BCHW, index_B)
            slope_BCHW = x_0_BCHW
            if step > 0 and second_order:
                share_B111 = self._extrapolation(index_B)
                slope_BCHW = x_0_BCHW + share_B111 * (x_0_BCHW - before_BCHW)
            z_BCHW, before_BCHW = self._moved(z_BCHW, slope_BCHW, index_B, index_B + 1), x_0_BCHW
        here, end = self.coefficients.at(start_B), self.coefficients.at(start_B + self.steps_each)
        kept_B111 = end.beta / here.beta
        return (z_BCHW - kept_B111 * x_BCHW) / (end.alpha - kept_B111 * here.alpha)

    def _moved(self, x_BCHW: Tensor, x_0_BCHW: Tensor, index_B: Tensor, to_B: Tensor) -> Tensor:
        """DDIM's step (Song et al. 2020, eq. 12 with eta 0)."""
        here, to = self.coefficients.at(index_B), self.coefficients.at(to_B)
        return to.alpha * x_0_BCHW + to.beta * (x_BCHW - here.alpha * x_0_BCHW) / here.beta

    def _extrapolation(self, index_B: Tensor) -> Tensor:
        """h_i / (2 h_{i-1}), the share of the last difference that 2M adds, with h in ln(alpha / beta). It is 0 where
        one of them is infinite: behind pure noise, and in the step to the image."""
        log_snr_N = self.coefficients.alpha.log() - self.coefficients.beta.log()
        h_B, before_B = log_snr_N[index_B + 1] - log_snr_N[index_B], log_snr_N[index_B] - log_snr_N[index_B - 1]
        share_B = torch.where(h_B.isfinite() & before_B.isfinite(), 0.5 * h_B / before_B, 0.0)
        return share_B[:, None, None, None]

    def weight(self, start_B: Tensor) -> Tensor:
        """float32 [B]: the weight of a squared error of the *prediction*. On x_0 it is the truncated SNR, max(SNR, 1)
        (Salimans and Ho 2022, section 4)."""
        here = Coefficients(*(values[start_B] for values in self.coefficients))
        return (here.alpha / here.beta).square().clamp(min=1.0) * here.from_prediction.square()

    def prediction_for(self, x_0_BCHW: Tensor, x_BCHW: Tensor, index_B: Tensor) -> Tensor:
        """What the network predicts if it predicts this x_0."""
        here = self.coefficients.at(index_B)
        return (x_0_BCHW - here.from_x * x_BCHW) / here.from_prediction


def student_sampler(teacher: SamplerConfig, num_steps: int, process: Process) -> SamplerConfig:
    """The sampler that makes exactly the student's steps, of a resolved sampler of the teacher.

    Karras' grid and that of even ln sigma stay such grids if every k-th level is taken, with another lowest level; so
    do trailing timesteps.
    """
    firsts, spacing = Grid.of(teacher, num_steps, process).firsts, teacher.timestep_spacing
    has_ends = spacing in ("karras", "log_snr")
    return SamplerConfig(
        solver="ddim",
        num_steps=num_steps,
        timestep_spacing=spacing,
        sigma_min=firsts[-1].sigma if has_ends and num_steps > 1 else None,
        sigma_max=firsts[0].sigma if has_ends else None,
        rho=teacher.rho,
        clip_sample=False,
    )


def _coefficients(
    levels: list[Level], teacher: SamplerConfig, process: Process, device: torch.device | None
) -> Coefficients:
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    rows = [
        (
            math.sqrt(level.alpha_bar),
            math.sqrt(1.0 - level.alpha_bar),
            level.time,
            process.scale_at(level.alpha_bar),
            float(process.x_0_at(zero, one, level.alpha_bar)),
            float(process.x_0_at(one, zero, level.alpha_bar)),
            float(is_guided(teacher, level)),
        )
        for level in levels
    ]
    rows.append((1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0))
    return Coefficients(*torch.tensor(rows, dtype=torch.float64).T.float().to(device))
