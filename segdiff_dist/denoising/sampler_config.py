"""How noise becomes an image: the `sample.sampler` section, and its conflicts with a net's training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from data_shards.documents import read_json, reading
from data_shards.problems import InputProblems, Problem
from data_shards.ranges import RISING, Count, NonNegative, Positive, SettingChecks, Share, range_problems
from data_shards.settings import RecordedOtherwise, Result, ResultWhereSet
from segdiff_dist.denoising.config import DiffusionConfig, GuidanceRemoves, Objective, TimestepSpacing
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from data_shards.labels import LabelTable

Solver = Literal["ddim", "dpm_solver_pp_2m", "unipc", "heun"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"solver": "ddim", "num_steps": 50, "timestep_spacing": "leading"},
    # The fewest passes that were as good as 50 DDIM steps in benchmarks/samplers.py; docs/sampling.md has the table.
    "fast": {"solver": "ddim", "num_steps": 16, "timestep_spacing": "trailing"},
    "best": {"solver": "unipc", "num_steps": 50, "timestep_spacing": "trailing"},
}

_PREFIX = "sample.sampler."
# Below this sigma, alpha_bar is 1 in the solvers' precision.
_Sigma = Annotated[float, Ge(0.002)]


@dataclass(frozen=True)
class SamplerConfig:
    """How noise becomes an image. The defaults are the paper's code: 50 leading DDIM steps, x_0 clipped to [-1, 1]."""

    preset: RecordedOtherwise[Literal["paper", "fast", "best"]] = "paper"
    """Sets solver, num_steps and timestep_spacing if they are null. paper: as published. fast: the fewest steps that
    are as good as 50 DDIM steps. best: the smallest error. For a net without timesteps, the spacing is karras for edm
    and trailing for flow."""
    solver: Result[Solver | None] = None
    """ddim: DDIM (Song et al. 2020). dpm_solver_pp_2m: DPM-Solver++(2M) (Lu et al. 2022). unipc: UniPC (Zhao et al.
    2023). heun: Heun (Karras et al. 2022), which needs two passes through the net for each step."""
    num_steps: Result[Count | None] = None
    """Steps from noise to image. null: the preset's."""
    timestep_spacing: Result[TimestepSpacing | None] = None
    """leading, trailing, linspace: timesteps (Lin et al. 2024), or the t of flow. karras: noise levels from sigma_max
    to sigma_min (Karras et al. 2022, eq. 5). log_snr: the same with evenly spaced logarithms. null: the preset's."""
    sigma_min: ResultWhereSet[_Sigma | None] = None
    """Lowest noise level of karras and log_snr. null: 0.01, which is one grey value, or the lowest level of
    training."""
    sigma_max: ResultWhereSet[_Sigma | None] = None
    """Highest noise level of karras and log_snr. null: 80 / diffusion.snr_shift, or the highest level of training."""
    rho: ResultWhereSet[Positive] = 7.0
    """For karras: a higher value puts more of the steps at low noise. 7 is usual."""
    eta: Result[Share] = 0.0
    """DDIM only: how much noise each step adds. 0 adds none; 1 adds as much as DDPM."""
    churn: ResultWhereSet[NonNegative] = 0.0
    """Heun only: how much noise is added back, over all steps. 0 adds none. S_churn of Karras et al. 2022, algorithm
    2."""
    churn_interval: ResultWhereSet[Annotated[tuple[NonNegative, NonNegative], RISING]] = (0.05, 50.0)
    """Noise levels between which churn adds noise (S_tmin, S_tmax)."""
    churn_noise: ResultWhereSet[Positive] = 1.0
    """Standard deviation of the noise that churn adds (S_noise). 1 is usual."""
    sigma_shift: ResultWhereSet[Annotated[float, Ge(1), Le(2)]] = 1.0
    """The network is given this multiple of the noise level sigma, so that it removes more noise (Li et al. 2024). 1.2
    takes grain from the images of a short training, and some of the finest detail. 1 is off."""
    sigma_shift_interval: ResultWhereSet[Annotated[tuple[NonNegative, NonNegative], RISING]] = (0.0, 1.0)
    """The noise levels above the first and up to the second at which sigma_shift acts."""
    clip_sample: Result[bool] = True
    """Limit each predicted x_0 to [-1, 1]."""
    dynamic_threshold: Result[Share] = 0.0
    """A quantile of the absolute values of the predicted x_0. If its value is above 1, x_0 is limited to it and divided
    by it (Saharia et al. 2022). For strong guidance, 0.995 for example. 0 is off."""
    guidance: Result[NonNegative] = 1.0
    """Scale of classifier-free guidance (Ho and Salimans 2022). 1 is none. Above 1, images follow the conditions more
    closely."""
    guidance_removes: Result[GuidanceRemoves] = "mask"
    """The condition that the second prediction of guidance is made without. Training must have dropped the same."""
    guidance_weights: ResultWhereSet[str | None] = None
    """Autoguidance (Karras et al. 2024): the second prediction is that of a weaker version of the net with the same
    conditions, in place of guidance_removes. A folder beside the weights, made by `segdiff average` early in the
    run."""
    guidance_interval: ResultWhereSet[Annotated[tuple[NonNegative, NonNegative], RISING] | None] = None
    """The noise levels sigma above the first and up to the second at which guidance acts (Kynkaanniemi et al. 2024).
    null: all. At other levels a step costs one pass."""
    segmenter_guidance: Result[NonNegative] = 0.0
    """How far each predicted x_0 is moved towards an image in which a segmenter finds the mask, in grey values of [-1,
    1]. 0 is off."""
    guidance_segmenter: Result[str | None] = None
    """The segmenter that guides: the folder RUN/segmenter/weights. Evaluate the images with another one."""
    clear_air: ResultWhereSet[bool] = False
    """Make the finished image black where the mask has air: more than one pixel away from `body` and organs. A model
    that has seen patient tables, which no mask names, may draw parts of one. Images of masks without `body` stay."""
    augmentation: ResultWhereSet[Share] = 0.1
    """How much noise the images of a cascade's lower stage get before super-resolution reads them. 0: none. 1: nothing
    of them is left. More hides more of their errors. The authors of Imagen try 0.1 to 0.3."""

    def resolved(self, objective: Objective = "ddpm") -> SamplerConfig:
        """The same with the preset's values filled in, for a net of this objective."""
        values = asdict(self)
        preset = dict(PRESETS[self.preset])
        if objective != "ddpm":
            preset["timestep_spacing"] = "karras" if objective == "edm" else "trailing"
        return replace(self, **{name: value for name, value in preset.items() if values[name] is None})

    @property
    def alone(self) -> SamplerConfig:
        """The same without segmenter guidance and autoguidance, which need another network."""
        guidance = self.guidance if self.guidance_weights is None else 1.0
        return replace(self, segmenter_guidance=0.0, guidance_segmenter=None, guidance=guidance, guidance_weights=None)

    @property
    def needed_dropout(self) -> str | None:
        """The setting of `diffusion` that guidance needs; None for none, and for autoguidance."""
        if self.guidance == 1.0 or self.guidance_weights is not None:
            return None
        return {"mask": "mask_dropout", "class": "class_dropout", "both": "joint_dropout"}[self.guidance_removes]

    def problems(self, diffusion: DiffusionConfig | None = None) -> list[Problem]:
        """Values out of range, and values that do not go together; with `diffusion`, also values that do not go with
        the process that the net was trained on."""
        if out_of_range := range_problems(self, "config", _PREFIX):
            return out_of_range
        own = self.resolved("ddpm" if diffusion is None else diffusion.objective)
        checks = SettingChecks(own, "config", _PREFIX)
        remedy = f"{own.solver} adds no noise: give 0, or use solver ddim"
        checks.require("eta", own.solver == "ddim" or own.eta == 0, remedy)
        remedy = f"{own.solver} has none: give 0, or use solver heun"
        checks.require("churn", own.solver == "heun" or own.churn == 0, remedy)
        remedy = "it acts only with guidance: give that another value than 1"
        checks.require("guidance_weights", own.guidance_weights is None or own.guidance != 1.0, remedy)
        if own.segmenter_guidance > 0:
            remedy = "give the folder of a segmenter's weights; `segdiff train-segmenter --help` says how to train one"
            weights = None if own.guidance_segmenter is None else Path(own.guidance_segmenter)
            checks.require("guidance_segmenter", weights is not None and (weights / DESCRIPTION).is_file(), remedy)
        if diffusion is None or checks.problems:
            return checks.problems
        return _student_problems(own, diffusion) or _grid_problems(own, diffusion)


def _grid_problems(own: SamplerConfig, diffusion: DiffusionConfig) -> list[Problem]:
    """Problems of a resolved sampler's grid with the net's training."""
    checks = SettingChecks(own, "config", _PREFIX)
    assert own.num_steps is not None
    of_timesteps = own.timestep_spacing in ("leading", "trailing", "linspace")
    leading = own.timestep_spacing == "leading"
    if of_timesteps and diffusion.objective == "ddpm":
        most = diffusion.num_train_timesteps
        checks.require("num_steps", own.num_steps <= most, f"the net knows {most} timesteps: give at most that many")
        checks.require(
            "num_steps", own.num_steps > 1 or not leading, "one leading step starts at the image: use trailing"
        )
        checks.require(
            "timestep_spacing",
            not (leading and diffusion.zero_terminal_snr),
            "never starts at pure noise, as zero_terminal_snr trains for: use trailing, or the preset fast or best",
        )
    elif of_timesteps:
        remedy = f"{diffusion.objective} has no timesteps: use karras or log_snr"
        remedy += ", or trailing" if diffusion.objective == "flow" else ""
        checks.require("timestep_spacing", diffusion.objective == "flow" and not leading, remedy)
    else:
        from segdiff_dist.denoising.noise_levels import sigma_bounds
        from segdiff_dist.denoising.process import make_process

        process = make_process(diffusion)
        (low, high), (least, most_sigma) = process.sigma_range(), sigma_bounds(own, process)
        trained = f"training saw noise levels from {low:.3g} to {high:.3g}: give one of them"
        checks.require("sigma_min", own.sigma_min is None or low <= own.sigma_min * (1 + 1e-6), trained)
        checks.require("sigma_max", own.sigma_max is None or own.sigma_max <= high * (1 + 1e-6), trained)
        checks.require("sigma_min", least < most_sigma, f"give less than sigma_max ({most_sigma:.3g})")
    return checks.problems


def _student_problems(own: SamplerConfig, diffusion: DiffusionConfig) -> list[Problem]:
    """Settings of a resolved sampler with which the net of `segdiff distil` was not trained."""
    if diffusion.distilled_levels is None:
        return []
    alpha_bars = diffusion.distilled_levels
    num = len(alpha_bars)
    checks = SettingChecks(own, "config", _PREFIX)
    steps = f"the net was distilled to {num} step{'s' if num > 1 else ''} of ddim"
    checks.require("num_steps", own.num_steps == num, f"{steps}: give {num}, or sample its teacher")
    checks.require("solver", own.solver == "ddim", f"{steps}: give that")
    checks.require("guidance", own.guidance == 1.0, "the net was distilled with its teacher's guidance: give 1")
    checks.require("eta", own.eta == 0.0, f"{steps} without noise: give 0")
    checks.require("sigma_shift", own.sigma_shift == 1.0, "the net was distilled without: give 1")
    if checks.problems:
        return checks.problems
    from segdiff_dist.denoising.noise_levels import levels_of
    from segdiff_dist.denoising.process import make_process

    levels = levels_of(own, make_process(diffusion))
    if all(math.isclose(a, b.alpha_bar, rel_tol=1e-3, abs_tol=1e-7) for a, b in zip(alpha_bars, levels, strict=True)):
        return []
    sigmas = ", ".join(f"{math.sqrt(1.0 / a - 1.0):.3g}" if a > 0 else "pure noise" for a in alpha_bars)
    remedy = f"the net was distilled to the noise levels {sigmas}: give spacing, sigma_min and sigma_max of its run"
    return [Problem("config", "sample.sampler.timestep_spacing", str(own.timestep_spacing), remedy)]


def guidance_problems(sampler: SamplerConfig, table: LabelTable) -> list[Problem]:
    """Whether the guiding segmenter knows the masks' labels. SamplerConfig.problems checks that there is one."""
    file = Path(sampler.guidance_segmenter or "") / DESCRIPTION
    if sampler.segmenter_guidance == 0 or not file.is_file():
        return []
    from data_shards.labels import LabelTable

    try:
        with reading(file, "a segmenter's description", "copy the folder again, or train again"):
            description = read_json(file, "copy the folder again, or train again")["label_table"]
            found = LabelTable.of(description)
    except InputProblems as error:
        return list(error.problems)
    if found == table:
        return []
    remedy = f"its labels are {found.name!r}, the masks' {table.name!r}: train a segmenter on these"
    return [Problem("config", "sample.sampler.guidance_segmenter", str(sampler.guidance_segmenter), remedy)]


def guidance_digest(sampler: SamplerConfig) -> str | None:
    """sha256 of the guiding segmenter's weights, which images depend on; None without a guiding segmenter."""
    if sampler.segmenter_guidance == 0:
        return None
    from segdiff_dist.segmentation.segmenter import Segmenter

    return Segmenter.load(Path(str(sampler.guidance_segmenter))).weights_sha256
