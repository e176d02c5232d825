"""benchmarks/recipes.py: that the comparison is fair, and that the targets reached follow from its numbers."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests_support import write_shapes

from data_shards.store.shards import ShardSet
from segdiff_dist.config import flatten, to_yaml
from segdiff_dist.denoising.task import find_problems
from segdiff_dist.experiment import load_experiment

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
runs: Any = importlib.import_module("support.recipes_runs")
comparison: Any = importlib.import_module("support.recipes_comparison")
targets: Any = importlib.import_module("support.recipes_targets")
measurements: Any = importlib.import_module("support.recipes_measure")
objectives: Any = importlib.import_module("objectives")

# All that may set two recipes apart.
RECIPE = {
    "denoiser.mask_encoding",
    "denoiser.soft_masks",
    "diffusion.prediction_type",
    "diffusion.beta_schedule",
    "diffusion.zero_terminal_snr",
    "diffusion.loss_weighting",
    "diffusion.min_snr_gamma",
    "train.lr",
}


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set that keeps soft edges, as the comparison's do."""
    return write_shapes(tmp_path_factory.mktemp("soft") / "shards", num_patients=1, slices=2, soft_edge=True)


def test_only_the_recipe_differs() -> None:
    scale = runs.Scale()
    recipes = [*map(runs.paper, scale.paper_lrs), *runs.ABLATIONS]
    ours = flatten(runs.Run(Path("data"), runs.OURS, 0).settings(scale))
    for recipe in recipes:
        theirs = flatten(runs.Run(Path("data"), recipe, 0).settings(scale))
        apart = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert apart <= RECIPE | {"run"} | ({"data"} if not recipe.has_body else set()), recipe.name


def test_every_run_is_one_that_training_takes(tmp_path: Path, soft: Path) -> None:
    shards = ShardSet.open([str(soft)])
    for scale in (runs.Scale(), runs.QUICK):
        for run in comparison.Comparison(tmp_path, scale, 2, 1, runs.ABLATIONS).first_round():
            (tmp_path / "config.yaml").write_text(to_yaml(run.settings(scale)))
            experiment = load_experiment(tmp_path / "config.yaml", None)
            found = find_problems(shards, scale.side, experiment.denoiser, experiment.diffusion)
            found += experiment.train.problems("train", 1)
            found += experiment.validation.problems(experiment.diffusion)
            assert found == []
            # Each point is a checkpoint, and one that is kept.
            every = experiment.train.keep_every_images
            assert all(n % every == 0 and n % scale.batch_size == 0 for n in run.points(scale))
            assert run.points(scale)[-1] == experiment.train.num_images


def test_blur_is_measured_beside_dice(soft: Path) -> None:
    shards = ShardSet.open([str(soft)])
    records = [shards.read(row) for row in range(len(shards))]
    real, mask = (np.stack(of) for of in zip(*((r.image_uint8(), r.mask_HW) for r in records), strict=True))
    soft_images = sum(np.roll(real.astype(float), shift, axis) for axis in (1, 2) for shift in (-1, 0, 1)) / 6
    patients = np.array([r.meta.case_id for r in records])
    found = measurements.sharpness_of(real, soft_images.astype(np.uint8), mask, shards.label_table, patients)
    assert set(found) < set(measurements.METRICS)
    assert found["sharpness_75_100"]["value"] < 0.3 < found["sharpness_3_12"]["value"]
    # Without organs there is no texture, and a curve may hold what is none.
    found = measurements.sharpness_of(real, real, np.zeros_like(mask), shards.label_table, patients)
    assert np.isnan(found["texture"]["value"])


def test_measured_without_sharpness_is_measured_again(tmp_path: Path) -> None:
    scored = measurements.Scored(runs.Run(tmp_path, runs.OURS, 0), 320, "online", "ours", "val")
    assert not scored.is_done
    scored.file.parent.mkdir(parents=True)
    before = {key: {"value": 1.0, "ci95": None} for key in ("dice", "distance", "psnr_db")}
    scored.file.write_text(json.dumps(before))
    assert not scored.is_done
    scored.file.write_text(json.dumps(before | {key: {"value": 1.0, "ci95": None} for key in measurements.METRICS}))
    assert scored.is_done


def test_objectives_differ_in_the_objective_alone(tmp_path: Path, soft: Path) -> None:
    args = Namespace(archive=tmp_path / "archive", out=tmp_path, images=None, masks=None)
    shipped = flatten(objectives.settings_of("edm", args))
    for name in objectives.OBJECTIVES:
        settings = objectives.settings_of(name, args)
        theirs = flatten(settings)
        apart = {key for key in shipped.keys() | theirs.keys() if shipped.get(key) != theirs.get(key)}
        besides = {"denoiser.net", "denoiser.block_out_channels", "denoiser.layers_per_block", "train.optimizer", "run"}
        assert {key for key in apart if not key.startswith(("diffusion.", "sample.sampler."))} <= besides
        (tmp_path / "config.yaml").write_text(to_yaml(settings))
        experiment = load_experiment(tmp_path / "config.yaml", None)
        assert find_problems(ShardSet.open([str(soft)]), 64, experiment.denoiser, experiment.diffusion) == []
    again = flatten(objectives.settings_of("edm", args, seed=2))
    assert {key for key in shipped if shipped[key] != again[key]} == {"run", "train.seed", "sample.seed"}


def test_forgetting_the_body_changes_nothing_else(tmp_path: Path, soft: Path) -> None:
    runs.forget_body(soft, tmp_path / "without")
    before, after = ShardSet.open([str(soft)]), ShardSet.open([str(tmp_path / "without")])
    body = before.label_table.body_id
    assert (after.label_table, len(after)) == (before.label_table, len(before))
    assert any((before.read(row).mask_HW == body).any() for row in range(len(before)))
    for row in range(len(before)):
        old, new = before.read(row), after.read(row)
        assert (new.meta.key, new.meta.split) == (old.meta.key, old.meta.split)
        np.testing.assert_array_equal(new.image_HW, old.image_HW)
        np.testing.assert_array_equal(new.mask_HW, np.where(old.mask_HW == body, 0, old.mask_HW))
        assert old.edge_2HW is not None
        assert new.edge_2HW is not None
        np.testing.assert_array_equal(new.edge_2HW[0], np.where(old.edge_2HW[0] == body, 0, old.edge_2HW[0]))
        np.testing.assert_array_equal(new.edge_2HW[1], old.edge_2HW[1])


def test_seconds_are_those_of_steps_alone(tmp_path: Path) -> None:
    rows = [{"images_seen": 40, "images_per_s": 10.0}, {"images_seen": 80, "images_per_s": 20.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.seconds_at(tmp_path / "log.jsonl", (20, 40, 80)) == {20: 2.0, 40: 4.0, 80: 6.0}


@pytest.mark.parametrize(
    ("values", "target", "higher", "at"),
    [
        ((0.1, 0.3, 0.5), 0.4, True, 30.0),
        ((0.1, 0.3, 0.5), 0.05, True, 10.0),
        ((0.1, 0.3, 0.5), 0.6, True, None),
        ((8.0, 4.0, 5.0), 6.0, False, 15.0),
        ((8.0, 4.0, 3.0), 4.0, False, 20.0),
    ],
)
def test_where_a_curve_reaches_a_value(
    values: tuple[float, ...], target: float, higher: bool, at: float | None
) -> None:
    assert targets.reached_at((10, 20, 40), values, target, higher) == at


def test_the_papers_best_is_best_by_both() -> None:
    candidates = {
        "good Dice": {"dice": 0.9, "distance": 5.0},
        "good at both": {"dice": 0.8, "distance": 2.0},
        "good distance": {"dice": 0.0, "distance": 1.9},
        "bad": {"dice": 0.1, "distance": 9.0},
    }
    assert targets.choose(candidates) == "good at both"


def test_targets_are_checked() -> None:
    points = (25, 50, 100)
    paper = [{"dice": (0.1, 0.2, 0.4), "distance": (9.0, 6.0, 4.0)}] * 2
    ours = [
        {"dice": (0.3, 0.5, 0.6), "distance": (5.0, 3.0, 2.0)},
        {"dice": (0.3, 0.5, 0.6), "distance": (5.0, 3.0, 3.0)},
    ]
    third = [{"dice": 0.5, "distance": 4.5}, {"dice": 0.5, "distance": 4.7}]
    # Our steps take twice as long.
    found = targets.check_targets(points, ours, paper, [(5.0, 10.0, 20.0)] * 2, [(2.5, 5.0, 10.0)] * 2, third)
    for metric in ("dice", "distance"):
        assert found[metric]["reached_at_part_of_images"] == pytest.approx(0.375)
        assert found[metric]["reached_at_part_of_seconds"] == pytest.approx(0.75)
        assert not found[metric]["is_upper_bound"]
    assert found["dice"]["planned_for_a_third"]["as_good"]
    assert not found["distance"]["planned_for_a_third"]["as_good"]
    assert found["distance_reduction"] == {"value": pytest.approx(0.375), "low": 0.25, "high": 0.5}
    assert found["reached"] == {"compute": False, "reduction": True}
    assert "NOT reached" in "\n".join(targets.target_lines(found))
