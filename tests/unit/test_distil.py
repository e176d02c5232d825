"""`segdiff distil`: the target against the exact solution on a Gaussian, and a student from training to images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from segdiff_dist.cli import main
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.distil_config import DistilConfig
from segdiff_dist.denoising.distillation import Grid, student_sampler
from segdiff_dist.denoising.process import make_process
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.samplers import sample
from segdiff_dist.sampling.store import SampleStore

MEAN, STD = 0.3, 0.5
EDM = DiffusionConfig(objective="edm", sigma_data=0.4, lognormal=(-0.4, 1.4))
PROCESSES = {
    "edm-karras": EDM,
    "edm-log_snr": EDM,
    "flow-trailing": DiffusionConfig(objective="flow", lognormal=(0.0, 1.0)),
    "v-trailing": DiffusionConfig(prediction_type="v", zero_terminal_snr=True),
    "epsilon-karras": DiffusionConfig(),
}


def setting_of(name: str, num_steps: int) -> tuple[SamplerConfig, DiffusionConfig]:
    spacing = name.split("-")[1]
    sampler = SamplerConfig(
        solver="dpm_solver_pp_2m",
        num_steps=num_steps,
        timestep_spacing=spacing,
        clip_sample=False,  # type: ignore[arg-type]
    )
    return sampler, PROCESSES[name]


def std_at(grid: Grid, index_B: Tensor) -> Tensor:
    here = grid.coefficients.at(index_B)
    return (here.alpha**2 * STD**2 + here.beta**2).sqrt()


def ideal_x_0(grid: Grid, x_BCHW: Tensor, index_B: Tensor) -> Tensor:
    """The mean of images given x, if pixels are independent and N(MEAN, STD^2)."""
    here = grid.coefficients.at(index_B)
    gain = here.alpha * STD**2 / std_at(grid, index_B) ** 2
    return MEAN + gain * (x_BCHW - here.alpha * MEAN)


def exact_end(grid: Grid, x_BCHW: Tensor, index_B: Tensor, end_B: Tensor) -> Tensor:
    """Gaussians flow into Gaussians: a pixel stays as many deviations from the mean as it was."""
    here, end = grid.coefficients.at(index_B), grid.coefficients.at(end_B)
    return end.alpha * MEAN + (x_BCHW - here.alpha * MEAN) * std_at(grid, end_B) / std_at(grid, index_B)


def exact_x_0(grid: Grid, x_BCHW: Tensor, start_B: Tensor) -> Tensor:
    """The x_0 with which DDIM's step leads there."""
    here, end = grid.coefficients.at(start_B), grid.coefficients.at(start_B + grid.steps_each)
    z_BCHW = exact_end(grid, x_BCHW, start_B, start_B + grid.steps_each)
    return (z_BCHW - end.beta / here.beta * x_BCHW) / (end.alpha - end.beta / here.beta * here.alpha)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_target_is_where_the_teachers_path_leads(name: str) -> None:
    """The error is that of a method of second order: four times the steps, a fifth of it or less, also with a
    step to the image, which is of first order."""
    torch.manual_seed(0)
    errors = []
    for teacher_steps in (16, 64):
        sampler, diffusion = setting_of(name, teacher_steps)
        grid = Grid.of(sampler, 4, make_process(diffusion))
        start_B = grid.drawn_starts(torch.tensor([0.1, 0.3, 0.6, 0.9]))
        assert start_B.tolist() == [k * grid.steps_each for k in range(4)]
        x_0, noise = MEAN + STD * torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4)
        x = grid.noised(x_0, noise, start_B)
        found = grid.x_0_that_leads_there(lambda x, i, grid=grid: ideal_x_0(grid, x, i), x, start_B)  # type: ignore[misc]
        errors.append(float((found - exact_x_0(grid, x, start_B)).abs().max()))
    assert errors[0] < 0.2
    assert errors[1] < 0.2 * errors[0] + 1e-4


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_student_without_error_makes_the_exact_image_in_its_steps(name: str, num_steps: int) -> None:
    sampler, diffusion = setting_of(name, 16)
    process = make_process(diffusion)
    grid, own = Grid.of(sampler, num_steps, process), student_sampler(sampler, num_steps, process)
    times = [level.time for level in grid.firsts]

    def predict(input_BCHW: Tensor, time_B: Tensor) -> Tensor:
        nearest = int(np.abs(np.array(times) - float(time_B[0])).argmin())
        start_B = torch.full((len(time_B),), nearest * grid.steps_each)
        x_BCHW = input_BCHW / grid.coefficients.at(start_B).scale
        return grid.prediction_for(exact_x_0(grid, x_BCHW, start_B), x_BCHW, start_B)

    x_T = torch.randn(3, 1, 4, 4, dtype=torch.float32)
    of_student = replace(diffusion, distilled_levels=tuple(level.alpha_bar for level in grid.firsts))
    assert own.problems(of_student) == []
    start_B = torch.zeros(3, dtype=torch.int64)
    begun = x_T * float(grid.coefficients.beta[0])
    expected = exact_end(grid, begun, start_B, start_B + len(grid.levels))
    torch.testing.assert_close(sample(predict, of_student, own, x_T), expected, rtol=2e-3, atol=2e-3)


def test_a_students_steps_are_the_only_ones() -> None:
    sampler, diffusion = setting_of("edm-karras", 16)
    own, process = student_sampler(sampler, 4, make_process(diffusion)), make_process(diffusion)
    levels = tuple(level.alpha_bar for level in Grid.of(sampler, 4, process).firsts)
    student = replace(diffusion, distilled_levels=levels)
    for changes, field in (
        ({"num_steps": 8}, "num_steps"),
        ({"solver": "unipc"}, "solver"),
        ({"guidance": 2.0}, "guidance"),
        ({"eta": 0.5}, "eta"),
        ({"sigma_min": 0.5}, "timestep_spacing"),
    ):
        [found] = replace(own, **changes).problems(student)  # type: ignore[arg-type]
        assert found.field == f"sample.sampler.{field}", changes
        assert "distilled" in found.remedy


def test_what_a_student_cannot_learn_is_named() -> None:
    own = SamplerConfig(guidance=2.0, eta=0.5)
    distil = DistilConfig(num_steps=3, teacher_steps=8)
    assert [one.field for one in distil.problems()] == ["distil.teacher_steps"]
    filled = DistilConfig(num_steps=3).filled_in(own, PROCESSES["v-trailing"])
    assert filled.teacher_steps == 21
    fields = {one.field for one in filled.teacher_problems(PROCESSES["v-trailing"])}
    assert fields == {"distil.sampler.guidance", "distil.sampler.eta"}


@pytest.fixture(scope="module")
def teacher(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with guidance on an interval, and two parts of its interval at which it acts."""
    run = tmp_path_factory.mktemp("taught") / "teacher"
    config = run.parent / "teacher.yaml"
    guided = {"guidance": 2.0, "guidance_interval": [0.3, 5.0], "num_steps": 8, "timestep_spacing": "karras"}
    settings = {
        "diffusion": {
            "objective": "edm",
            "prediction_type": "epsilon",
            "zero_terminal_snr": False,
            "mask_dropout": 0.1,
        },
        "train": {"num_images": 16},
        "sample": {"sampler": {**guided, "solver": "dpm_solver_pp_2m", "clip_sample": False}, "num_workers": 1},
    }
    smoke = yaml.safe_load((Path(__file__).parents[2] / "launch" / "configs" / "smoke.yaml").read_text())
    for section, values in settings.items():
        smoke[section] = {**smoke[section], **values}
    config.write_text(yaml.safe_dump(smoke))
    flags = ["--data", str(small_shapes), "--run", str(run), "--tracking.no-enabled"]
    assert main(["train", "--config", str(config), *flags]) == 0
    return run


def test_a_student_is_an_ordinary_run(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tmp_path / "student"
    flags = [
        "--distil.teacher",
        str(teacher),
        "--run",
        str(student),
        "--distil.num-steps",
        "2",
        "--tracking.no-enabled",
    ]
    flags += ["--distil.train.global-batch-size", "8", "--distil.train.num-images", "32"]
    flags += ["--distil.train.micro-batch-size", "4", "--distil.train.checkpoint-every-images", "16"]
    flags += ["--distil.train.warmup-images", "8", "--distil.train.log-every-images", "8"]

    assert main(["distil", *flags, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "# time: " in said
    assert yaml.safe_load(said)["sample"]["sampler"]["num_steps"] == 2
    assert not student.exists()

    def made() -> tuple[list[list[float]], bytes]:
        assert main(["distil", *flags]) == 0
        lines = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
        names = ("loss", "loss_step_1", "loss_step_2", "grad_norm")
        weights = student / "weights" / "ema_0.05" / "diffusion_pytorch_model.safetensors"
        return [[line[name] for name in names] for line in lines], weights.read_bytes()

    whole = made()
    assert "guidance 2" in (said := capsys.readouterr().out)
    assert f"next: segdiff sample --run {student}" in said
    shutil.rmtree(student / "checkpoints" / f"{32:012d}")
    shutil.rmtree(student / "weights")
    assert made() == whole

    assert main(["sample", "--run", str(student), "--num", "4", "--tracking.no-enabled"]) == 0
    store = SampleStore.open(student / "samples")
    assert np.asarray(store.image[:]).std() > 0
    assert store.job["sample"]["sampler"]["num_steps"] == 2

    assert main(["export", str(tmp_path / "pipeline"), "--run", str(student), "--format", "pipeline"]) == 0
    capsys.readouterr()
    steps = ["--mask", str(tmp_path / "mask.png"), "--out", str(tmp_path / "image.png"), "--steps", "8"]
    assert main(["paint", "--example", "--mask", str(tmp_path / "mask.png")]) == 0
    for model in (student, tmp_path / "pipeline"):
        assert main(["paint", "--model", str(model), *steps, "--modality", "CT"]) == 2
        assert "--steps: 8; the net was distilled to 2 steps of ddim: give 2" in capsys.readouterr().err
    assert main(["sample", "--run", str(student), "--config", "demo", "--data", "x"]) == 2
    capsys.readouterr()

    # Other runs and other teachers are refused, and no ordinary training goes on with a student.
    assert main(["train", "--run", str(student), "--tracking.no-enabled"]) == 2
    assert "go on with `segdiff distil`" in capsys.readouterr().err
    assert main(["distil", *flags, "--run", str(teacher)]) == 2
    assert "the teacher's own: give another run folder" in capsys.readouterr().err
    assert main(["distil", "--run", str(student / "new"), "--distil.teacher", str(tmp_path)]) == 2
    assert "no weights there" in capsys.readouterr().err
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    shutil.copytree(other / "weights" / "online", other / "weights" / "ema_0.05", dirs_exist_ok=True)
    assert main(["distil", *flags, "--distil.teacher", str(other)]) == 2
    assert "not the weights that the training began with" in capsys.readouterr().err
