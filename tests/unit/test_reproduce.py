"""`segdiff reproduce table1`: what it plans, what it resolves, and a table that claims no more than was run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sampling_support import make_here, write_weights

from data_shards.labels import AMOS
from data_shards.phantom import PhantomConfig, write_phantom
from data_shards.problems import InputProblems
from segdiff_dist.cli import main
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.job import measure
from segdiff_dist.experiment import Experiment
from segdiff_dist.reproduce import plan, table
from segdiff_dist.reproduce.settings import COLUMN_NAMES, Experiments, Table1Settings, resolve, sampled_splits
from segdiff_dist.stages.chain import evaluate_once
from segdiff_dist.tracking.config import TrackingConfig

AMOS_PATIENTS = {"train": 240, "val": 120, "test": 240}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reproduce") / "amos"
    small = PhantomConfig(num_train=1, num_val=1, num_test=1, matrix=(64, 64), slice_thickness_mm=(6.0, 6.0))
    write_phantom(root, replace(small, wholebody=True))
    return root


def settings(root: Path, **given: Any) -> Table1Settings:
    return Table1Settings("table1", root, root.parent / "out", **given)


def without_test_masks(root: Path, tmp_path: Path) -> Path:
    """The archive as AMOS publishes it: no labels of test cases."""
    bare = tmp_path / "amos"
    bare.mkdir()
    for entry in root.iterdir():
        if entry.name not in ("labelsTs", "wholebody"):
            (bare / entry.name).symlink_to(entry)
    return bare


def summary_of(num_samples: int = 1024, psnr: float = 19.5) -> dict[str, Any]:
    entry = {"value": psnr, "ci95": [19.0, 20.0], "n": num_samples}
    return {
        "num_samples": num_samples,
        "num_patients": 9,
        "metrics": {"psnr_db": entry, "dice_mask_gen": {"value": 0.61, "ci95": None, "n": num_samples}},
        "not_available": {"fid": "no Inception <weights> were given", "lpips": "nobody asked"},
    }


def built(found: Experiments, patients: dict[str, int] = AMOS_PATIENTS, **summary: Any) -> dict[str, Any]:
    columns = [
        table.Measured(name, found.recipes[name], column, summary_of(**summary))
        for name, column in found.columns.items()
    ]
    return table.build(columns, patients)


@pytest.fixture(scope="module")
def as_published(phantom: Path) -> Experiments:
    return resolve(settings(phantom, wholebody=phantom / "wholebody"))


def test_columns_share_the_slices_and_one_segmenter(phantom: Path) -> None:
    found = resolve(settings(phantom))
    assert tuple(found.columns) == COLUMN_NAMES
    assert {c.data for c in found.columns.values()} == {found.prepare.data}
    assert {c.evaluate.segmenter for c in found.columns.values()} == {
        phantom.parent / "out" / "segmenter" / "segmenter" / "weights"
    }
    assert found.segmenter.loader.modalities == ("CT", "MR")
    assert found.columns["mri_axial"].loader.axes == ("axial",)
    assert found.prepare.prepare.axes == ("axial", "coronal", "sagittal")
    only = resolve(settings(phantom, columns=("mri_axial",)))
    assert (only.prepare.prepare.modalities, only.prepare.prepare.axes) == (("MR",), ("axial",))


def test_more_gpus_train_on_the_same_batches(phantom: Path) -> None:
    given = settings(phantom, columns=("ct_all",), gpus=4)
    train = resolve(given).columns["ct_all"].train
    assert (train.global_batch_size, train.micro_batch_size) == (16, 4)
    with pytest.raises(InputProblems, match=r"train\.global_batch_size"):
        resolve(replace(given, gpus=5))


def test_masks_come_from_the_test_split_where_it_has_any(phantom: Path, tmp_path: Path) -> None:
    given = settings(phantom)
    assert set(sampled_splits(given, resolve(given)).values()) == {"test"}
    bare = settings(without_test_masks(phantom, tmp_path))
    assert set(sampled_splits(bare, resolve(bare)).values()) == {"val"}
    whole = replace(bare, wholebody=phantom / "wholebody")
    assert resolve(whole).columns["ct_all"].prepare.label_set == "wholebody"
    assert set(sampled_splits(whole, resolve(whole)).values()) == {"test"}


def test_the_plan_counts_what_prepare_would_cut(phantom: Path, tmp_path: Path) -> None:
    from data_shards.ingest.archive import read_archive
    from data_shards.ingest.case_slices import slices_of

    file = tmp_path / "few.yaml"
    file.write_text("prepare: {slice_stride: 37, size: 32, spacing_mm: 1.3}")
    given = settings(phantom, columns=("ct_all",), scale="small", config=file)
    found = resolve(given)
    cut = [len(list(slices_of(c, found.prepare.prepare, None))) for c in read_archive(phantom, ("CT",))]
    steps = plan.steps(given, found)
    assert steps[0].what == f"{sum(cut):,} slices of {len(cut)} volumes"
    assert [step.name for step in steps[2:]] == ["CT all axes: train", "CT all axes: sample", "CT all axes: evaluate"]


def test_dry_run_prints_time_and_disk_and_starts_nothing(phantom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = phantom.parent / "dry"
    flags = ["--amos", str(phantom), "--out", str(out), "--columns", "ct_axial"]
    assert main(["reproduce", "table1", *flags, "--dry-run", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "predicted for 8 H100s" in said
    [train] = [line for line in said.splitlines() if line.startswith("CT axial: train")]
    assert "3,200,000 images" in train
    assert train.split()[-3] in ("min", "h")
    assert not out.exists()


def test_what_cannot_be_used_is_said_before_work(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "over.yaml"
    file.write_text("loader: {axes: [axial]}\nrun: elsewhere\n")
    flags = ["--amos", str(phantom), "--out", str(tmp_path / "out")]
    assert main(["reproduce", "table1", *flags, "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "loader.axes" in said
    assert "run: not of the columns" in said
    assert main(["reproduce", "table1", "--amos", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "data folder: there is nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_published_values_stand_beside_ours(as_published: Experiments) -> None:
    lines = table.markdown(built(as_published)).splitlines()
    [head] = [line for line in lines if "CT axial, published" in line]
    assert "| MRI axial, published | MRI axial, later | MRI axial, here |" in head
    assert "CT axial, later" not in head
    ours = "19.50 (19.00 to 20.00)"
    assert f"| PSNR, dB | 19.06 | {ours} | 20.26 | {ours} | 9.49 | 13.07 | {ours} | 9.80 | 12.44 | {ours} |" in lines
    none = "\u2013"
    assert f"| FID | 47.66 | {none} | 61.50 | {none} | 200.31 | 75.3 | {none} | 202.26 | 100.4 | {none} |" in lines
    assert "- FID: no Inception <weights> were given" in lines
    assert "| Dice (mask, pred. gen.) | 0.610 | 0.610 | 0.610 | 0.610 |" in lines


def test_the_unchanged_recipe_alone_is_not_called_scaled_down(as_published: Experiments) -> None:
    unchanged = built(as_published)
    assert unchanged["not_a_reproduction"] == unchanged["differences"] == []
    one = replace(as_published, columns={"ct_all": as_published.columns["ct_all"]})
    organs = {n: replace(c, prepare=replace(c.prepare, label_set="amos")) for n, c in as_published.columns.items()}
    for changed, words in (
        (built(as_published, num_samples=1000), "1,000 triples"),
        (built(as_published, {"train": 12, "val": 3, "test": 2}), "12/3/2 patients"),
        (built(one), "left out: CT axial, MRI axial, MRI all axes"),
        (built(replace(as_published, columns=organs)), "71 whole-body classes"),
        (built(as_published.sampled_from(dict.fromkeys(COLUMN_NAMES, "val"))), "split val"),
    ):
        [reason] = changed["not_a_reproduction"]
        assert words in reason
        assert table.comparability(changed).startswith("Not a reproduction")


def test_every_changed_setting_is_on_the_page(phantom: Path, tmp_path: Path) -> None:
    small = built(resolve(settings(phantom, scale="small")), num_samples=90)
    changed = {key: (before, after) for key, before, after in small["differences"]}
    assert changed["train.num_images"] == (3_200_000, 9_600)
    assert changed["diffusion.objective"] == ("ddpm", "edm")
    assert table.write(tmp_path, small) == tmp_path / "table1.html"
    assert json.loads((tmp_path / "table1.json").read_text()) == small
    page = (tmp_path / "table1.html").read_text()
    for words in ("Not a reproduction", "slices of 64 pixels", "as few as 90 triples", "train.num_images", "9,600"):
        assert words in page
    assert "&lt;weights&gt;" in page
    assert "http" not in page


@pytest.fixture(scope="module")
def measurable(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Experiment:
    """A column of which everything is there but the evaluation."""
    import torch

    from segdiff_dist.segmentation.config import SegmenterConfig
    from segdiff_dist.segmentation.network import SegmenterNet
    from segdiff_dist.segmentation.segmenter import save_segmenter

    run = write_weights(tmp_path_factory.mktemp("column"))
    make_here(run, shapes, num=2, samples_per_mask=1, cross_modality_masks=0)
    config = SegmenterConfig(channels=(8, 8))
    for name in ("segmenter_a", "other"):
        save_segmenter(run / name, SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
        torch.manual_seed(1)
    evaluate = EvaluateConfig(segmenter=run / "segmenter_a", device="cpu", num_workers=1, bootstrap_samples=10)
    return Experiment(run=run, evaluate=evaluate, tracking=TrackingConfig(enabled=False))


def test_figures_that_another_command_put_there_are_not_the_tables(
    measurable: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = measurable.path("run") / "evaluation"

    def measured() -> tuple[bool, str]:
        """Whether the step did something, and the segmenter of the figures that it leaves."""
        capsys.readouterr()
        evaluate_once(measurable)
        measured_by = json.loads((folder / "summary.json").read_text())["provenance"]["segmenter_sha256"]
        return "nothing to do" not in capsys.readouterr().out, measured_by

    did, measured_by = measured()
    assert did
    assert measured() == (False, measured_by)
    other = replace(measurable.evaluate, segmenter=measurable.path("run") / "other")
    by_hand = measure(measurable.path("run"), other, progress=False)
    assert by_hand["provenance"]["segmenter_sha256"] != measured_by
    assert measured() == (True, measured_by)

    # A moved set is the same set; an evaluation that breaks off vouches for nothing.
    file = measurable.path("run") / "samples" / "job.json"
    job = json.loads(file.read_text())
    moved = shutil.copytree(job["shards"], measurable.path("run") / "moved")
    file.write_text(json.dumps(job | {"shards": str(moved)}))
    assert measured() == (False, measured_by)
    shutil.rmtree(moved)
    with pytest.raises(InputProblems):
        evaluate_once(replace(measurable, evaluate=replace(measurable.evaluate, seed=1)))
    assert not (folder / "measured.json").exists()
