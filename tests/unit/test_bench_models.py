"""benchmarks/models.py: that its models are trainings that start, of equal compute, and differ in nothing else."""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.config import flatten, to_yaml
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.task import find_problems
from segdiff_dist.experiment import load_experiment

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
arms: Any = importlib.import_module("support.models_arms")
models: Any = importlib.import_module("models")
small_runs: Any = importlib.import_module("support.small_runs")


@pytest.fixture
def args(tmp_path: Path, shapes: Path) -> Any:
    (tmp_path / "shards").symlink_to(shapes)
    return models.parse(["--out", str(tmp_path), "--tflops", "0.5", "--masks", "4"])


def test_parts_take_their_shares_of_the_flops(args: Any) -> None:
    assert all(sum(part.share for part in parts) == pytest.approx(1.0) for parts in arms.ALL.values())
    for model in ("spade", "latent", "cascade"):
        part = arms.ALL[model][0]  # the others begin from its weights
        settings = arms.Training(args, model, 0, 1e-3).settings(part)
        took, of_a_step = (
            arms.part_flops(part, settings),
            arms.part_flops(part, settings) / arms.images_in(settings) * 16,
        )
        assert abs(took - part.share * 0.5e12) <= 0.51 * of_a_step


def test_models_differ_from_concat_in_what_they_are_named_for(args: Any, tmp_path: Path) -> None:
    shards, by_model = ShardSet.open(tmp_path / "shards"), {}
    for model, parts in arms.ALL.items():
        settings = arms.Training(args, model, 0, 1e-3).settings_for(parts[0], 32)
        (tmp_path / "config.yaml").write_text(to_yaml(settings))
        experiment = load_experiment(tmp_path / "config.yaml", None)
        side = experiment.denoiser.low_resolution or 32
        assert experiment.autoencoder.problems(32) == []
        assert find_problems(shards, side, experiment.denoiser, experiment.diffusion) == []
        by_model[model] = flatten(settings)
    for model, settings in by_model.items():
        changed = {k.split(".")[0] for k in settings if settings[k] != by_model["concat"].get(k)} - {"run"}
        assert changed <= {"denoiser", "diffusion", "sample", "autoencoder"}, model


def test_a_model_counts_when_all_its_learning_rates_are_trained(args: Any) -> None:
    args.models, args.lrs = ["concat"], [1e-3, 2e-3]
    for lr in args.lrs:
        training = arms.Training(args, "concat", 0, lr)
        assert models.finished(args, "flops") == {}
        training.last.mkdir(parents=True)
        assert not training.is_trained
        (training.folder / "net.trained").touch()
        (training.folder / "net.loss").write_text(f"{lr}\n")
    assert models.best_lr(args, "concat") == 1e-3


def test_the_loss_of_weights_that_predict_nothing_is_the_power_of_what_they_should(args: Any, tmp_path: Path) -> None:
    training = arms.Training(args, "concat", 0, 1e-3)
    settings = training.settings_for(arms.ALL["concat"][0], 32)
    training.last.mkdir(parents=True)
    (training.last / "config.yaml").write_text(to_yaml(settings))
    experiment, shards = load_experiment(None, training.last), ShardSet.open([str(tmp_path / "shards")])
    model = Denoiser(experiment.denoiser, shards.label_table, 32)
    for parameter in model.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    measured = {"diffusion": asdict(experiment.diffusion) | {"sigma_data": 0.5}}
    model.save(training.last / "weights" / experiment.train.averages[0], model.state_dict(), measured)
    assert training.validation_loss() == pytest.approx(1.0, abs=0.6)  # EDM's target has about variance 1
    assert training.validation_loss() == float((training.folder / "net.loss").read_text())


def test_slices_of_another_side_or_set_are_refused(args: Any, small_shapes: Path, tmp_path: Path) -> None:
    for name, value, match in (
        ("side", 64, "give --side 32"),
        ("archive", small_shapes, "has other slices"),
        ("archive", tmp_path / "none", "no folder"),
    ):
        setattr(args, name, value)
        with pytest.raises(InputProblems, match=match):
            models.refuse_another_data(args)


def test_the_mean_of_seeds_keeps_the_interval_over_patients_of_the_first() -> None:
    def summary(value: float | None, low: float) -> dict[str, Any]:
        return {"metrics": {"psnr_db": {"value": value, "ci95": [low, 30.0], "n": 4, "num_patients": 2}}}

    found = small_runs.over_seeds([summary(20.0, 1.0), summary(22.0, 2.0)], ("psnr_db", "ssim"))
    assert found == {
        "psnr_db": {"value": 21.0, "of_seeds": [20.0, 22.0], "ci95": [1.0, 30.0], "n": 4, "num_patients": 2}
    }
    assert small_runs.over_seeds([summary(20.0, 1.0), summary(None, 2.0)], ("psnr_db",)) == {}
