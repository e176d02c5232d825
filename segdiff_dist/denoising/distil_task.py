"""The training task of a student (distillation.py), and its teacher.

Dimensions: B batch, C channels, H rows, W columns, K steps of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_shards.documents import read_json, reading
from data_shards.problems import Problem, problem
from data_shards.records import Batch
from segdiff_dist.config import validate
from segdiff_dist.denoising.conditioning import Conditions, without
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.denoiser import TRAINED_ON, Denoiser
from segdiff_dist.denoising.distil_config import DistilConfig
from segdiff_dist.denoising.distillation import Grid, PredictX0, student_sampler
from segdiff_dist.denoising.process import make_process
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.samplers import num_evaluations, thresholded
from segdiff_dist.denoising.schedule import as_trained
from segdiff_dist.denoising.task import DenoiserTask
from segdiff_dist.pixels import to_model_range
from segdiff_dist.weight_files import DESCRIPTION
from segdiff_kernels import philox
from segdiff_kernels.weighted_mse import weighted_mse, weighted_mse_reference

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

_TEACHER_DIGEST = "teacher_sha256"
_REMEDY = "copy the run again from where it was trained"


@dataclass(frozen=True)
class Teacher:
    """A trained denoiser, how it was trained, and how it makes images. `sha256`: of its weights."""

    folder: Path
    model: Denoiser
    diffusion: DiffusionConfig
    sha256: str

    @classmethod
    def load(cls, folder: Path, otherwise: DiffusionConfig, sha256: str) -> Teacher:
        """From a folder of weights; `otherwise` has what old weights do not say. Raises InputProblems."""
        return cls(folder, Denoiser.load(folder), trained_diffusion(folder, otherwise), sha256)

    def problems(self, shards: ShardSet, side: int, seen: tuple[str, ...]) -> list[Problem]:
        """Why it cannot teach on slices of `side` pixels of a set; `seen`: the modalities of these slices."""
        found, model = list[Problem](), self.model

        def check(good: bool, value: str, remedy: str) -> None:
            if not good:
                found.append(Problem(str(self.folder), "distil.teacher", value, remedy))

        names = f"{model.label_table.name!r} there, {shards.label_table.name!r} in {shards.root}"
        check(model.label_table == shards.label_table, f"another label table: {names}", "give the teacher's set")
        check(model.size == side, f"trained at {model.size} pixels, not {side}", "give the teacher's set")
        known = f"it knows {', '.join(model.trained_on)}, and the slices are {', '.join(seen)}"
        check(
            model.modalities == shards.modalities and set(seen) <= set(model.trained_on),
            known,
            "give the teacher's set",
        )
        check(model.space is None, "a denoiser of latents or of shrunk slices", "give one of slices as they are")
        check(model.lower is None, "the super-resolution of a cascade", "give a denoiser without a lower stage")
        check(model.base is None, "a ControlNet", "give a denoiser without a frozen base")
        return found

    def x_0_at(self, grid: Grid, sampler: SamplerConfig, conditions: Conditions) -> PredictX0:
        """Its guided and bounded x_0; guidance takes a second pass of those samples at whose level it acts."""
        yes_B = torch.ones_like(conditions.class_B, dtype=torch.bool)
        removes = sampler.guidance_removes
        null = without(conditions, yes_B & (removes != "class"), yes_B & (removes != "mask"))

        def x_0_at(x_BCHW: Tensor, index_B: Tensor) -> Tensor:
            here = grid.coefficients.at(index_B)
            input_BCHW, time_B = here.scale * x_BCHW, here.time[:, 0, 0, 0]
            prediction_BCHW = self.model(input_BCHW, time_B, *conditions)
            (chosen_G,) = here.is_guided[:, 0, 0, 0].nonzero(as_tuple=True)
            if len(chosen_G):
                of_null = [None if part is None else part[chosen_G] for part in null]
                p0_GCHW = self.model(input_BCHW[chosen_G], time_B[chosen_G], *of_null)
                p1_GCHW = prediction_BCHW[chosen_G]
                prediction_BCHW[chosen_G] = p0_GCHW + sampler.guidance * (p1_GCHW - p0_GCHW)
            return thresholded(here.from_x * x_BCHW + here.from_prediction * prediction_BCHW, sampler)

        return x_0_at


def trained_diffusion(folder: Path, otherwise: DiffusionConfig) -> DiffusionConfig:
    """How the weights in a folder were trained: their process, and what was dropped; the rest is of `otherwise`."""
    file = folder / DESCRIPTION
    with reading(file, "the description of a denoiser", _REMEDY):
        said = read_json(file, _REMEDY).get("diffusion", {})
        dropped = {name: said.get(name, 0.0) for name in ("mask_dropout", "class_dropout", "joint_dropout")}
        return validate(DiffusionConfig, asdict(replace(as_trained(otherwise, said)[0], **dropped)), file)


def as_student(teacher: DiffusionConfig, distil: DistilConfig) -> tuple[DiffusionConfig, SamplerConfig]:
    """How a student of this teacher is described, and its sampler. `distil` is filled in."""
    plain = replace(teacher, distilled_levels=None)
    sampler = student_sampler(distil.sampler, distil.num_steps, make_process(plain))
    levels = Grid.of(distil.sampler, distil.num_steps, make_process(plain)).firsts
    student = replace(
        plain,
        distilled_levels=tuple(level.alpha_bar for level in levels),
        mask_dropout=0.0,
        class_dropout=0.0,
        joint_dropout=0.0,
        dice_weight=0.0,
        dice_segmenter=None,
        contrastive_weight=0.0,
        consistency_weight=0.0,
        consistency_ramp_images=None,
    )
    return student, sampler


def teacher_passes(teacher: DiffusionConfig, distil: DistilConfig) -> int:
    """Images that the teacher computes for one of a batch, rounded up. `distil` is filled in."""
    sampler = replace(distil.sampler, solver="ddim", clip_sample=False, dynamic_threshold=0.0)
    return -(-num_evaluations(sampler, replace(teacher, distilled_levels=None)) // distil.num_steps)


class DistilTask(DenoiserTask):
    """A student learns to lead, in one step, where its teacher leads in several. It begins with the teacher's weights.

    `find_problems` of the teacher and of `distil`, which is filled in, come before.
    """

    name = "distil"

    def __init__(
        self,
        shards: ShardSet,
        teacher: Teacher,
        distil: DistilConfig,
        weights: Path,
        device: torch.device,
        validation: Callable[[Callable[..., Any], int], dict[str, float]] | None = None,
    ) -> None:
        student, self.sampler = as_student(teacher.diffusion, distil)
        config, size = teacher.model.config, teacher.model.size
        super().__init__(shards, size, config, student, distil.train.seed, weights, device, validation)
        refuse_another_teacher(weights, teacher)
        self.model.load_state_dict(teacher.model.state_dict())
        self.model.trained_on = teacher.model.trained_on
        precision = torch.bfloat16 if distil.train.precision == "bf16" else torch.float32
        model = teacher.model.prepare_for(device).requires_grad_(False).eval().to(precision)
        self.teacher, self.distil = replace(teacher, model=model), distil
        self.grid = Grid.of(distil.sampler, distil.num_steps, self.process, device)
        # A pass of the teacher has no backward pass, which is twice the work.
        self.passes = 1 + round(teacher_passes(teacher.diffusion, distil) / 3)

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted squared error of the student's x_0 at the first levels of the parts. Metrics: the error of each
        of its K steps, in the network's prediction."""
        grid, seed = self.grid, self.seed
        x_0_BCHW = to_model_range(batch.image_BHW)
        noise_BCHW = philox.normal(seed, philox.STREAM_NOISE, batch.position_B, x_0_BCHW.shape[1:])
        start_B = grid.drawn_starts(philox.uniform(seed, philox.STREAM_TIMESTEP, batch.position_B, 1)[:, 0])
        x_BCHW, shown = grid.noised(x_0_BCHW, noise_BCHW, start_B), self.conditions(batch)
        with torch.no_grad():
            target_BCHW = grid.x_0_that_leads_there(
                self.teacher.x_0_at(grid, self.distil.sampler, shown),
                x_BCHW,
                start_B,
                second_order=self.distil.sampler.solver != "ddim",
            )
            target_BCHW = grid.prediction_for(target_BCHW, x_BCHW, start_B)
        here = grid.coefficients.at(start_B)
        prediction_BCHW = forward(here.scale * x_BCHW, here.time[:, 0, 0, 0], *shown)
        mean_squares = weighted_mse if self.model.uses_kernels else weighted_mse_reference
        loss, error_B = mean_squares(prediction_BCHW, target_BCHW, grid.weight(start_B))
        return loss, self._sums(error_B, start_B // grid.steps_each)

    def export(self, average: str, weights: dict[str, Tensor]) -> None:
        """As the denoiser's; the description says whose student it is."""
        training: dict[str, Any] = {"diffusion": asdict(self.diffusion), _TEACHER_DIGEST: self.teacher.sha256}
        if self.model.trained_on != self.model.modalities:
            training[TRAINED_ON] = list(self.model.trained_on)
        self.model.save(self.weights / average, weights, training)

    def _sums(self, error_B: Tensor, step_B: Tensor) -> dict[str, Tensor]:
        """Sum and count, float32 [2], of the errors of each step."""
        inside_BK = (step_B[:, None] == torch.arange(self.distil.num_steps, device=step_B.device)).float()
        sums_K = (error_B.detach().float()[:, None] * inside_BK).sum(0)
        pairs_K2 = torch.stack((sums_K, inside_BK.sum(0)), dim=1)
        return {f"loss_step_{k + 1}": pair_2 for k, pair_2 in enumerate(pairs_K2)}


def refuse_another_teacher(weights: Path, teacher: Teacher) -> None:
    """A resumed training must have the teacher that it was started with, which the exported weights name."""
    for file in sorted(weights.glob(f"[!.]*/{DESCRIPTION}")):
        before = read_json(file, _REMEDY).get(_TEACHER_DIGEST)
        if before is None:
            raise problem(file.parent, "weights", "not those of a student", "give another run folder")
        if before != teacher.sha256:
            value = f"not the weights that the training began with (sha256 {before[:12]}...)"
            raise problem(teacher.folder, "distil.teacher", value, "restore them, or give another run folder")


def teacher_weights(distil: DistilConfig, average: str) -> Path:
    """The folder of the teacher's weights; `average`: its first one. Raises InputProblems."""
    remedy = "give the run folder of a trained denoiser"
    if distil.teacher is None:
        raise problem("command line", "--distil.teacher", "not given", remedy)
    folder = Path(distil.teacher) / "weights" / (average if distil.weights == "ema" else distil.weights)
    if not (folder / DESCRIPTION).is_file():
        raise problem(folder, "distil.teacher", "no weights there", remedy)
    return folder
