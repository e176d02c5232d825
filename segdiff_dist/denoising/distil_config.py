"""The section `distil`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from data_shards.problems import Problem
from data_shards.ranges import Count, SettingChecks, names_of, range_problems
from data_shards.settings import Result, Resumable
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.training.config import TrainConfig

_USUAL_STEPS = 20


@dataclass(frozen=True)
class DistilConfig:
    """A student that makes a trained denoiser's images in few steps (Salimans and Ho 2022)."""

    teacher: Resumable[str | None] = None
    """The run folder of the trained denoiser."""
    weights: Result[str] = "ema"
    """The teacher's folder under TEACHER/weights; ema is the first of its averages."""
    num_steps: Result[Count] = 4
    """Steps of the student."""
    teacher_steps: Result[Count | None] = None
    """Steps of the teacher from noise to image: a multiple of num_steps. null: the multiple that is nearest to its own
    number of steps, or next to 20 if it takes more."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the teacher makes images, with its guidance, which the student learns. Values at their default are those of
    TEACHER/config.yaml, with which it was last sampled."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            num_images=1_280_000,
            warmup_images=12_800,
            ema_lengths=(0.05,),
            checkpoint_every_images=64_000,
        )
    )

    def problems(self, ranks: int = 1) -> list[Problem]:
        """Values out of range, and values that do not go together."""
        problems = range_problems(self, "config", "distil.")
        if self.teacher_steps is not None and not names_of(problems) and self.teacher_steps % self.num_steps:
            remedy = f"give a multiple of distil.num_steps ({self.num_steps})"
            problems.append(Problem("config", "distil.teacher_steps", str(self.teacher_steps), remedy))
        return problems + self.train.problems("distil.train", ranks)

    def filled_in(self, of_teacher: SamplerConfig, diffusion: DiffusionConfig) -> DistilConfig:
        """The same with the teacher's sampler in full, and the number of its steps."""
        defaults = SamplerConfig()
        given = {
            one.name: value
            for one in fields(SamplerConfig)
            if (value := getattr(self.sampler, one.name)) != getattr(defaults, one.name)
        }
        # The coefficients of a student's steps are those of its levels, so its teacher uses them too.
        sampler = replace(replace(of_teacher, sigma_shift=1.0), **given).resolved(diffusion.objective)
        if sampler.timestep_spacing == "leading" and diffusion.objective == "ddpm":
            sampler = replace(sampler, timestep_spacing="trailing")
        assert sampler.num_steps is not None
        steps = self.teacher_steps
        if steps is None:
            own = sampler.num_steps if diffusion.distilled_levels else min(sampler.num_steps, _USUAL_STEPS)
            steps = max(1, round(own / self.num_steps)) * self.num_steps
        return replace(self, teacher_steps=steps, sampler=replace(sampler, num_steps=steps))

    def teacher_problems(self, diffusion: DiffusionConfig) -> list[Problem]:
        """Settings of the teacher's sampler that a student cannot learn. Call it after filled_in."""
        sampler, checks = self.sampler, SettingChecks(self.sampler, "config", "distil.sampler.")
        must_be_default = {
            "eta": "a student learns where the teacher leads without noise",
            "churn": "a student learns where the teacher leads without noise",
            "sigma_shift": "a student learns its teacher's steps at the levels that they have",
            "guidance_weights": "the training has no second teacher",
            "segmenter_guidance": "the training has no segmenter",
        }
        for name, reason in must_be_default.items():
            default = getattr(SamplerConfig(), name)
            checks.require(name, getattr(sampler, name) == default, f"{reason}: give {default}")
        named = sampler.timestep_spacing in ("trailing", "karras", "log_snr")
        remedy = "every k-th of its steps is no such grid: give trailing, or karras"
        checks.require("timestep_spacing", named, remedy)
        needed = sampler.needed_dropout
        remedy = f"the teacher was trained without diffusion.{needed}: give 1"
        checks.require("guidance", needed is None or getattr(diffusion, needed) > 0, remedy)
        own = [replace(one, field=one.field.replace("sample.", "distil.")) for one in sampler.problems(diffusion)]
        return checks.problems or own
