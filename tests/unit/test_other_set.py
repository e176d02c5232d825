"""A model beside data that it was not trained on: another set, axis or field. Nothing is made of it without a word."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from sampling_support import DIFFUSION, QUICK, make_here, write_weights
from tests_support import bytes_of, write_shapes

from data_shards.labels import AMOS
from data_shards.store.codecs import crc32c
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.experiment import Experiment, save_experiment
from segdiff_dist.export.config import VolumeConfig
from segdiff_dist.export.model_set import unseen_axis
from segdiff_dist.export.volume import make_volume
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.stages.evaluate import Evaluate
from segdiff_dist.tracking.config import TrackingConfig


def _other(shapes: Path, folder: Path, **preprocessing: object) -> Path:
    """The same set, as if it had been prepared in another way."""
    shutil.copytree(shapes, folder)
    index = json.loads((folder / "index.json").read_text())
    index["preprocessing"] |= preprocessing
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def _trained_run(folder: Path, shapes: Path) -> Path:
    """An untrained net with a checkpoint that says that `shapes` was used."""
    run = write_weights(folder, average="ema_0.05")
    checkpoint = run / "checkpoints" / "000000000064"
    checkpoint.mkdir(parents=True)
    state = json.dumps({"images_seen": 64, "ranks": 1, "shards_digest": ShardSet.open(shapes).digest}).encode()
    (checkpoint / "state.json").write_bytes(state)
    (checkpoint / "COMPLETE").write_text(str(crc32c(state)))
    (checkpoint / "config.yaml").write_text(json.dumps({"data": str(shapes), "more_data": []}))
    return run


def test_a_set_of_other_grey_values_is_refused(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HU would be those of the other set's window."""
    trained = _other(shapes, tmp_path / "trained")
    run, other = _trained_run(tmp_path / "run", trained), _other(shapes, tmp_path / "wide", hu_window=[-1000, 1000])
    nib.save(nib.Nifti1Image(np.full((16, 16, 4), AMOS.body_id, np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    volume = ["volume", str(tmp_path / "mask.nii.gz"), str(tmp_path / "image.nii.gz"), "--run", str(run)]
    pipeline = ["export", str(tmp_path / "pipeline"), "--run", str(run), "--format", "pipeline"]
    student = ["distil", "--run", str(tmp_path / "student"), "--distil.teacher", str(run), "--config", "smoke"]
    for command in (volume, pipeline, student):
        assert main([*command, "--data", str(trained), "--dry-run"]) == 0
        capsys.readouterr()
        assert main([*command, "--data", str(other), "--dry-run"]) == 2
        assert "hu_window is [-1000, 1000], and the model was trained with None" in capsys.readouterr().err
    shutil.rmtree(trained)
    with pytest.warns(UserWarning, match="not the set that .* was trained on; .*HU"):
        assert main([*volume, "--data", str(other), "--dry-run"]) == 0


def test_a_mask_of_a_part_of_the_body_is_said_to_be_another_size(shapes: Path, tmp_path: Path) -> None:
    shards, mask = ShardSet.open(shapes), np.full((16, 16, 4), AMOS.body_id, np.uint8)
    usual_mm = float(np.max(shards.samples["spacing_mm"].to_pylist())) * shards.size

    def made(name: str, side_mm: float) -> None:
        nib.save(nib.Nifti1Image(mask, np.diag([*[side_mm / 16] * 3, 1.0])), tmp_path / f"{name}.nii.gz")
        files = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}-image.nii.gz"
        make_volume(*files, lambda mask_SHW, *_: mask_SHW, 32, shards, VolumeConfig("CT"))

    made("usual", usual_mm)
    with pytest.warns(UserWarning, match="organs are in another size than it knows"):
        made("part", usual_mm / 3)


def test_an_axis_that_a_model_has_never_seen_is_named() -> None:
    assert unseen_axis("axial", ["axial"]) is None
    assert "has seen no coronal one" in (unseen_axis("coronal", ["axial", "sagittal"]) or "")


def test_an_empty_split_names_those_with_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shapes(tmp_path / "set", num_patients=1, slices=2, held_out=0)
    run = write_weights(tmp_path / "run", average="ema_0.05")
    sample = ["sample", "--run", str(run), "--data", str(data), "--dry-run"]
    assert main([*sample, "--split", "val"]) == 2
    assert "masks are in other splits: --split train;" in capsys.readouterr().err
    assert main([*sample, "--split", "train", "--loader.axes", "coronal"]) == 2
    assert "loader.axes leaves out all of it" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["sample"], ["volume", "mask.nii.gz", "image.nii.gz"]])
def test_seeds_below_0_are_refused(command: list[str], shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--run", "run", "--data", str(shapes), "--sample.seed", "-1"]) == 2
    assert "sample.seed: -1; give a whole number from 0" in capsys.readouterr().err


def test_a_run_of_an_early_version_with_a_seed_below_0_goes_on(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_weights(tmp_path / "run", average="ema_0.05")
    store = make_here(run, shapes, num=4, seed=-1, weights="ema_0.05")
    sample = replace(SampleConfig(**QUICK), num=4, seed=-1)
    save_experiment(
        Experiment(
            run=run, data=str(shapes), sample=sample, diffusion=DIFFUSION, tracking=TrackingConfig(enabled=False)
        ),
        (),
    )
    before = bytes_of(run / "samples")
    store.unmark(0)
    assert main(["sample", "--run", str(run), "--data", str(shapes)]) == 0
    assert {**bytes_of(run / "samples"), "done/000000": b""} == {**before, "done/000000": b""}  # which has the seconds
    assert main(["export", str(tmp_path / "png"), "--run", str(run), "--format", "png"]) == 0
    assert Evaluate.parse("evaluate", ["--run", str(run)]).experiment.sample.seed == -1
    capsys.readouterr()
    new = ["sample", "--run", str(run), "--data", str(shapes), "--out", str(tmp_path / "new")]
    assert main(new) == 2
    assert "sample.seed: -1; give a whole number from 0" in capsys.readouterr().err
    assert main([*new, "--sample.seed", "1", "--dry-run"]) == 0


def test_a_plan_of_a_seed_below_0_is_refused_before_anything_is_trained(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.yaml").write_text("sample: {seed: -1}\n")
    assert main(["run", str(shapes), "--config", str(tmp_path / "kept.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "sample.seed: -1; give a whole number from 0" in capsys.readouterr().err
