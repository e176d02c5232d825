"""How noise becomes an image: the `sample.sampler` section, and what does not go with how a net was trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_shards.documents import read_json, reading
from data_shards.problems import InputProblems, Problem
from data_shards.settings import RecordedOtherwise, Result, ResultWhereSet
from segdiff_dist.denoising.config import DiffusionConfig, GuidanceRemoves, Objective, TimestepSpacing

if TYPE_CHECKING:
    from data_shards.labels import LabelTable

Solver = Literal["ddim", "dpm_solver_pp_2m", "unipc", "heun"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"solver": "ddim", "num_steps": 50, "timestep_spacing": "leading"},
    # The fewest passes that were as good as 50 DDIM steps in benchmarks/samplers.py; docs/sampling.md has the table.
    "fast": {"solver": "ddim", "num_steps": 16, "timestep_spacing": "trailing"},
    "best": {"solver": "unipc", "num_steps": 50, "timestep_spacing": "trailing"},
}


@dataclass(frozen=True)
class SamplerConfig:
    """How noise becomes an image. The defaults are the paper's code: 50 leading DDIM steps, x_0 clipped to [-1, 1]."""

    preset: RecordedOtherwise[Literal["paper", "fast", "best"]] = "paper"
    """What solver, num_steps and timestep_spacing are where they are null: the paper's; the cheapest as good as 50 DDIM
    steps; the one that errs least. Where the net has no timesteps, the spacing is karras for edm, trailing for flow."""
    solver: Result[Solver | None] = None
    """DDIM (Song et al. 2020), DPM-Solver++(2M) (Lu et al. 2022), UniPC (Zhao et al. 2023), or
    Heun (Karras et al. 2022), which goes through the net twice a step."""
    num_steps: Result[int | None] = None
    timestep_spacing: Result[TimestepSpacing | None] = None
    """leading, trailing, linspace: timesteps (Lin et al. 2024), or the t of flow. karras, log_snr: noise levels from
    sigma_max to sigma_min (Karras et al. 2022, eq. 5; evenly spaced logarithms)."""
    sigma_min: ResultWhereSet[float | None] = None
    """Of karras and log_snr; null: 0.01, one grey value, or the lowest level of training."""
    sigma_max: ResultWhereSet[float | None] = None
    """Likewise; null: 80 / diffusion.snr_shift, or the highest level of training."""
    rho: ResultWhereSet[float] = 7.0
    """Of karras: more gives more of the steps to low noise."""
    eta: Result[float] = 0.0
    """DDIM alone: 0 adds no noise on the way, 1 as much as DDPM."""
    churn: ResultWhereSet[float] = 0.0
    """Heun alone: S_churn of Karras et al. 2022, algorithm 2; how much noise is put back, over all steps. 0 is none."""
    churn_interval: ResultWhereSet[tuple[float, float]] = (0.05, 50.0)
    """The noise levels at which it is (S_tmin, S_tmax)."""
    churn_noise: ResultWhereSet[float] = 1.0
    """Its standard deviation (S_noise)."""
    clip_sample: Result[bool] = True
    """Bound each predicted x_0 to [-1, 1]."""
    dynamic_threshold: Result[float] = 0.0
    """Or to this quantile of its absolute values where that is above 1, and divide by it (Saharia et al. 2022), for
    strong guidance: 0.995, say. 0 is off."""
    guidance: Result[float] = 1.0
    """Classifier-free guidance (Ho and Salimans 2022); 1 is none, and more follows the conditions more closely."""
    guidance_removes: Result[GuidanceRemoves] = "mask"
    """What the prediction that guidance moves away from does not read. Training must have dropped the same."""
    guidance_weights: ResultWhereSet[str | None] = None
    """Autoguidance (Karras et al. 2024): moved away from is the prediction of a weaker version of the net with the same
    conditions, in place of guidance_removes. A folder beside the weights: one of `segdiff average` early in the run."""
    guidance_interval: ResultWhereSet[tuple[float, float] | None] = None
    """The noise levels sigma above the first and up to the second at which guidance acts (Kynkaanniemi et al. 2024);
    null: all. Elsewhere a step costs one pass."""
    segmenter_guidance: Result[float] = 0.0
    """How far each predicted x_0 is moved to where a segmenter finds the mask in it, in grey values of [-1, 1]; 0 is
    off."""
    guidance_segmenter: Result[str | None] = None
    """The segmenter's weights: the folder RUN/segmenter/weights. Judge the images by another one."""

    def resolved(self, objective: Objective = "ddpm") -> SamplerConfig:
        """The same with nothing left to the preset, for a net of this objective."""
        values = asdict(self)
        preset = dict(PRESETS[self.preset])
        if objective != "ddpm":
            preset["timestep_spacing"] = "karras" if objective == "edm" else "trailing"
        return replace(self, **{name: value for name, value in preset.items() if values[name] is None})

    def problems(self, diffusion: DiffusionConfig | None = None) -> list[Problem]:
        """What is out of range; and, given the process that the net was trained on, what does not go with it."""
        found: list[Problem] = []
        own = self.resolved("ddpm" if diffusion is None else diffusion.objective)
        assert own.num_steps is not None

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                found.append(Problem("config", f"sample.sampler.{name}", str(getattr(own, name)), remedy))

        check("num_steps", own.num_steps >= 1, "give at least 1")
        check("eta", 0 <= own.eta <= 1, "give 0 to 1")
        check("eta", own.solver == "ddim" or own.eta == 0, f"{own.solver} adds no noise: give 0, or use solver ddim")
        check("churn", own.churn >= 0, "give at least 0")
        check("churn", own.solver == "heun" or own.churn == 0, f"{own.solver} has none: give 0, or use solver heun")
        remedy = "it acts with guidance alone: give that another value than 1"
        check("guidance_weights", own.guidance_weights is None or own.guidance != 1.0, remedy)
        for name in ("churn_interval", "guidance_interval"):
            ends = getattr(own, name)
            check(name, ends is None or 0 <= ends[0] < ends[1], "give two noise levels, the lower one first")
        check("churn_noise", own.churn_noise > 0, "give more than 0; 1 is usual")
        check("rho", own.rho > 0, "give more than 0; 7 is usual")
        for name in ("sigma_min", "sigma_max"):
            # Below it alpha_bar is 1 in the digits that solvers have.
            check(name, getattr(own, name) is None or getattr(own, name) >= 0.002, "give at least 0.002, or null")
        check("dynamic_threshold", 0 <= own.dynamic_threshold <= 1, "give a quantile from 0 to 1")
        check("guidance", own.guidance >= 0, "give at least 0")
        check("segmenter_guidance", own.segmenter_guidance >= 0, "give at least 0")
        if own.segmenter_guidance > 0:
            remedy = "give the folder of a segmenter's weights; `segdiff train-segmenter --help` says how to train one"
            weights = None if own.guidance_segmenter is None else Path(own.guidance_segmenter)
            check("guidance_segmenter", weights is not None and (weights / "segdiff.json").is_file(), remedy)
        return found if diffusion is None or found else _grid_problems(own, diffusion)


def _grid_problems(own: SamplerConfig, diffusion: DiffusionConfig) -> list[Problem]:
    """What of a resolved sampler's grid does not go with how the net was trained."""
    found: list[Problem] = []

    def check(name: str, good: bool, remedy: str) -> None:
        if not good:
            found.append(Problem("config", f"sample.sampler.{name}", str(getattr(own, name)), remedy))

    assert own.num_steps is not None
    of_timesteps = own.timestep_spacing in ("leading", "trailing", "linspace")
    leading = own.timestep_spacing == "leading"
    if of_timesteps and diffusion.objective == "ddpm":
        most = diffusion.num_train_timesteps
        check("num_steps", own.num_steps <= most, f"the net knows {most} timesteps: give at most that many")
        check("num_steps", own.num_steps > 1 or not leading, "one leading step starts at the image: use trailing")
        check(
            "timestep_spacing",
            not (leading and diffusion.zero_terminal_snr),
            "never starts at pure noise, as zero_terminal_snr trains for: use trailing, or the preset fast or best",
        )
    elif of_timesteps:
        remedy = f"{diffusion.objective} has no timesteps: use karras or log_snr"
        remedy += ", or trailing" if diffusion.objective == "flow" else ""
        check("timestep_spacing", diffusion.objective == "flow" and not leading, remedy)
    else:
        from segdiff_dist.denoising.grids import sigma_bounds
        from segdiff_dist.denoising.process import make_process

        process = make_process(diffusion)
        (low, high), (least, most_sigma) = process.sigma_range(), sigma_bounds(own, process)
        trained = f"training saw noise levels from {low:.3g} to {high:.3g}: give one of them"
        check("sigma_min", own.sigma_min is None or low <= own.sigma_min * (1 + 1e-6), trained)
        check("sigma_max", own.sigma_max is None or own.sigma_max <= high * (1 + 1e-6), trained)
        check("sigma_min", least < most_sigma, f"give less than sigma_max ({most_sigma:.3g})")
    return found


def guidance_problems(sampler: SamplerConfig, table: LabelTable) -> list[Problem]:
    """Whether the segmenter that guides knows the masks' labels. That there is one, SamplerConfig.problems sees."""
    file = Path(sampler.guidance_segmenter or "") / "segdiff.json"
    if sampler.segmenter_guidance == 0 or not file.is_file():
        return []
    from data_shards.labels import LabelTable

    try:
        with reading(file, "a segmenter's description", "copy the folder again, or train again"):
            description = read_json(file, "copy the folder again, or train again")["label_table"]
            found = LabelTable(description["name"], tuple(description["names"]))
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
