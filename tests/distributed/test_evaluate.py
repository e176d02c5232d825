"""`evaluate` on real engines: Ray, MONAI's U-Net, Zarr, Parquet, matplotlib; and what it refuses before it starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_support import NUM_MASKS, write_samples, write_segmenter
from tests_support import write_shapes

from data_shards.fan_out import Workers, ray_session
from data_shards.labels import LabelTable
from data_shards.problems import InputProblems
from segdiff_dist.cli import main
from segdiff_dist.evaluation.evaluate import evaluate
from segdiff_dist.evaluation.measure import trust
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.job import measure
from segdiff_dist.evaluation.measure.partial_results import PartialResults
from segdiff_dist.evaluation.measure.result_files import read_rows, read_summary
from segdiff_dist.evaluation.measure.task_runner import EvaluationFailed, TaskRunner
from segdiff_dist.evaluation.measure.worker import Chunk, ChunkResult
from segdiff_dist.evaluation.metrics import inception, perceptual

QUICK: dict[str, Any] = {"bootstrap_samples": 50, "batch_size": 7, "device": "cpu"}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_segmenter(run / "segmenter" / "weights")
    write_samples(run, shapes)
    return run


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """Ray, started once for all that evaluates."""
    with ray_session(num_cpus=2):
        yield


@pytest.fixture
def run(sampled: Path, tmp_path: Path) -> Path:
    """A run of one's own, to spoil."""
    return Path(shutil.copytree(sampled, tmp_path / "run"))


@pytest.mark.usefixtures("ray")
def test_one_and_two_workers_give_the_same_evaluation(run: Path, shapes: Path) -> None:
    import pyarrow.parquet as pq
    import zarr

    from data_shards.store.shards import ShardSet
    from segdiff_dist.segmentation.segmenter import Segmenter

    folder = run / "evaluation"
    outcomes = []
    for num_workers, stage in ((1, measure), (2, evaluate)):
        config = EvaluateConfig(num_workers=num_workers, memorisation=True, **QUICK)
        summary = stage(run, config, progress=False)
        assert json.loads((folder / "summary.json").read_text()) == summary
        predictions = zarr.open_group(folder / "predictions.zarr", mode="r")
        outcomes.append((summary, np.asarray(predictions["gen"]), np.asarray(predictions["real"])))
    (again, *maps), (summary, generated, real) = outcomes
    assert summary == again
    np.testing.assert_array_equal(generated, maps[0])
    np.testing.assert_array_equal(real, maps[1])

    rows = pq.read_table(folder / "samples.parquet").to_pydict()
    headline = np.array(rows["headline"])
    assert headline.sum() == summary["num_samples"] == NUM_MASKS
    assert np.isnan(np.array(rows["psnr_db"])[~headline]).all()
    assert summary["metrics"]["psnr_db"]["value"] == pytest.approx(np.array(rows["psnr_db"])[headline].mean())
    assert summary["diversity"]["num_masks"] == NUM_MASKS
    assert set(summary["cross_modality"]) == {"CT_to_MR", "MR_to_CT"}
    # The images are too small for MS-SSIM, and nothing that needs weights or time was asked for.
    assert set(summary["not_available"]) == {"fid", "lpips", "frd", "ms_ssim", "imagenet_lite_frechet"}
    assert {"segmenter_kernel_distance", "segmenter_precision", "segmenter_coverage"} < set(summary["metrics"])
    _check_organs(summary, rows, headline)
    assert summary["trust"]["memorisation"]["num_images"] == NUM_MASKS
    assert summary["trust"]["leakage"]["patients"] == []
    # Noise of 15 grey values, less what clipping takes away.
    assert 10 < summary["diversity"]["metrics"]["pixel_std"]["value"] < 15

    # The stored label maps are the segmenter's, for the modality that the image was made in.
    import torch

    from data_shards.records import MODALITIES
    from segdiff_dist.sampling.store import SampleStore

    segmenter = Segmenter.load(run / "segmenter" / "weights")
    assert summary["provenance"]["segmenter_sha256"] == segmenter.weights_sha256
    assert summary["provenance"]["shards_digest"] == ShardSet.open(shapes).digest
    images = torch.from_numpy(np.asarray(SampleStore.open(run / "samples").image[:4]))
    modality = torch.tensor([MODALITIES.index(m) for m in rows["target_modality"][:4]])
    np.testing.assert_array_equal(generated[:4], segmenter.predict(images, modality).numpy())
    _check_pages(folder)


def _check_organs(summary: dict[str, Any], rows: dict[str, list[Any]], headline: np.ndarray) -> None:
    """Liver, by the rows: n, area error, and volume error from the sums of areas of a patient's slices."""
    liver = summary["by_organ"]["liver"]
    areas = {name: np.array(rows[f"area_mm2_{name}/liver"])[headline] for name in ("mask", "gen")}
    has = areas["mask"] > 0
    assert liver["area_error_mask_gen"]["n"] == liver["surface_dice_mask_gen"]["n"] == has.sum()
    errors = np.abs(areas["gen"] - areas["mask"])[has] / areas["mask"][has]
    assert liver["area_error_mask_gen"]["value"] == pytest.approx(errors.mean())
    patients = np.array(rows["case_id"])[headline]
    sums = [{name: values[patients == p].sum() for name, values in areas.items()} for p in np.unique(patients)]
    volumes = [abs(s["gen"] - s["mask"]) / s["mask"] for s in sums]
    assert liver["volume_error_mask_gen"]["value"] == pytest.approx(np.mean(volumes))
    assert liver["volume_error_mask_gen"]["num_patients"] == len(volumes) == 4
    # Noise about the real image: HU of CT, in the mean near it and more spread; 2 HU a grey value.
    assert liver["hu_mean_error"]["num_patients"] == 2
    assert liver["hu_mean_gen"]["value"] == pytest.approx(liver["hu_mean_real"]["value"], abs=6)
    assert liver["hu_mean_real"]["value"] == pytest.approx(2 * 150 - 256, abs=6)
    assert liver["hu_std_gen"]["value"] > 2 * liver["hu_std_real"]["value"] > 0


def _check_pages(folder: Path) -> None:
    figures = json.loads((folder / "figures" / "index.json").read_text())
    names = {Path(figure["file"]).stem for figure in figures}
    assert {
        "gallery_ct",
        "gallery_mr",
        "diversity",
        "cross_modality",
        "modalities_from_ct",
        "modalities_from_mr",
    } < names
    assert {"dice_by_organ", "grey_values", "clipping", "nearest_training"} < names
    html = (folder / "report.html").read_text()
    assert all(figure["title"] in html for figure in figures)
    assert not list(folder.glob("*.partial"))


def refused(run: Path, config: EvaluateConfig) -> str:
    with pytest.raises(InputProblems) as caught:
        evaluate(run, config, progress=False)
    assert not (run / "evaluation").exists()
    return str(caught.value)


def test_everything_wrong_is_said_at_once(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "segmenter")
    done = run / "samples" / "done" / "000001"
    done.unlink()
    config = EvaluateConfig(num_workers=0, distribution_images=1, frd_images=1, fid_weights=tmp_path / "no.pth")
    text = refused(run, config)
    for field in ("num_workers: 0", "distribution_images: 1", "frd_images: 1"):
        assert f"evaluate.{field}" in text
    assert "no.pth: no such file" in text
    assert "segdiff train-segmenter" in text
    assert "10 of 96 not made yet" in text


def test_a_segmenter_of_another_label_table_is_refused(run: Path) -> None:
    write_segmenter(run / "segmenter" / "weights", LabelTable("other", ("background", "liver")))
    assert "segmenter 'other', masks 'amos'" in refused(run, EvaluateConfig(**QUICK))


def test_a_segmenter_that_is_not_a_number_is_refused(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = run / "segmenter" / "weights" / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, file)
    file.with_name("digests.json").unlink()  # as if training had written these
    assert "segmenter: not finite" in refused(run, EvaluateConfig(**QUICK))


def test_samples_of_a_mask_folder_whose_labels_nobody_wrote_down_are_refused(run: Path) -> None:
    job = json.loads((run / "samples" / "job.json").read_text())
    del job["shards"], job["shards_digest"]
    (run / "samples" / "job.json").write_text(json.dumps(job | {"weights": "weights", "weights_digest": "1" * 64}))
    assert "label_table: not there; start the same `segdiff sample` again" in refused(run, EvaluateConfig(**QUICK))


def test_other_shards_than_sampled_from_are_refused(run: Path) -> None:
    job = json.loads((run / "samples" / "job.json").read_text())
    (run / "samples" / "job.json").write_text(json.dumps(job | {"shards_digest": "1" * 64}))
    assert "not the shard set of the samples" in refused(run, EvaluateConfig(**QUICK))


def test_a_damaged_image_is_refused_and_named(run: Path) -> None:
    [first, *_] = sorted(
        path for path in (run / "samples" / "images.zarr" / "image" / "c").rglob("*") if path.is_file()
    )
    first.write_bytes(first.read_bytes()[:-40] + bytes(40))
    assert "damaged (items 0, 1, 2" in refused(run, EvaluateConfig(**QUICK))


@pytest.mark.parametrize("harm", ["cut", "other net", "not json"])
def test_a_segmenter_that_cannot_be_read_is_refused(run: Path, harm: str) -> None:
    weights = run / "segmenter" / "weights"
    if harm == "cut":
        file = weights / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "other net":
        about = json.loads((weights / "segdiff.json").read_text())
        (weights / "segdiff.json").write_text(json.dumps(about | {"channels": [8, 16]}))
    else:
        (weights / "segdiff.json").write_text("{")
    done = run / "samples" / "done" / "000001"
    done.unlink()
    text = refused(run, EvaluateConfig(**QUICK))
    assert re.search(f"{re.escape(str(weights))}/.*: segmenter: its bytes are not those that were written", text)
    assert "10 of 96 not made yet" in text, "all at once"


def test_a_segmenter_for_larger_images_is_refused(tmp_path: Path) -> None:
    write_samples(tmp_path, write_shapes(tmp_path / "set", slices=1, size=36))
    write_segmenter(tmp_path / "segmenter" / "weights", num_levels=4)
    assert "do not halve the images' 36 pixels evenly" in refused(tmp_path, EvaluateConfig(**QUICK))


def test_weights_of_a_metric_that_cannot_be_read_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the packages are there; here they may not be, and what reads the file stands in for all of them."""
    import torch

    file = tmp_path / "weights.pth"
    file.write_bytes(b"half a download")
    for module in (inception, perceptual):
        monkeypatch.setattr(module, "find_spec", lambda _: True)
    monkeypatch.setattr(inception, "load_inception", lambda path, device: torch.load(path, weights_only=True))
    text = refused(run, EvaluateConfig(fid_weights=file, lpips_weights=file, **QUICK))
    for name in ("fid_weights", "lpips_weights"):
        assert f"evaluate.{name}: {file}: cannot be read" in text


@pytest.mark.usefixtures("ray")
def test_nothing_is_lost_where_copies_cannot_be_identified(tmp_path: Path, shapes: Path) -> None:
    write_segmenter(tmp_path / "segmenter" / "weights")
    write_samples(tmp_path, shapes, across_only=True)
    summary = evaluate(tmp_path, EvaluateConfig(num_workers=1, memorisation=True, **QUICK), progress=False)
    assert summary["cross_modality"]["CT_to_MR"]["dice_mask_gen"]["n"] == NUM_MASKS / 2
    memorised = summary["trust"]["memorisation"]
    assert memorised["passed"] is None
    assert "no sample is the first of its mask" in memorised["reason"]
    assert "is not known" in trust.warnings(summary)[-1]
    assert "Not passed." in (tmp_path / "evaluation" / "report.html").read_text()


@pytest.mark.usefixtures("ray")
def test_a_model_that_copies_fails_where_its_masks_are_those_of_training(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_segmenter(tmp_path / "segmenter" / "weights")
    write_samples(tmp_path, shapes, split="train", noise=0)
    command = ["evaluate", "--run", str(tmp_path), "--evaluate.memorisation", "--evaluate.num-workers", "1"]
    assert main([*command, "--evaluate.device", "cpu", "--tracking.no-enabled"]) == 1
    assert "100.0% of the images look like training images" in capsys.readouterr().err
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["trust"]["memorisation"]["passed"] is False
    assert summary["trust"]["leakage"]["num_leaked"] > 0


def stumbling(folder: Path, bad: int) -> Any:
    """A worker that fails at item `bad` and leaves a file for every other task."""

    def make() -> Any:
        def run(chunk: Chunk) -> int:
            time.sleep(0.05)
            if chunk.start == bad:
                raise ValueError(f"slice {bad} cannot be read")
            (folder / str(chunk.start)).touch()
            return chunk.start

        return run

    return make


@pytest.mark.usefixtures("ray")
def test_after_a_failure_no_more_is_measured(tmp_path: Path) -> None:
    chunks = [Chunk(start, start + 1) for start in range(60)]
    with Workers(stumbling(tmp_path, 4), num_workers=2) as workers:
        with pytest.raises(EvaluationFailed, match=r"measured: items 4 to 4: ValueError: slice 4 cannot be read$"):
            list(TaskRunner(workers).in_order(chunks))
        assert len(list(tmp_path.iterdir())) < 30
        # The workers are free for what comes next.
        assert [task.start for task, _ in TaskRunner(workers).in_order(chunks[10:14])] == [10, 11, 12, 13]


@pytest.mark.usefixtures("ray")
def test_items_that_cannot_be_measured_are_named_and_nothing_is_written(
    run: Path, shapes: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    for tar in copy.rglob("*.tar"):
        content = tar.read_bytes()
        tar.write_bytes(content[:2000] + bytes(b ^ 1 for b in content[2000:]))
    job = json.loads((run / "samples" / "job.json").read_text())
    (run / "samples" / "job.json").write_text(json.dumps(job | {"shards": str(copy)}))
    with pytest.raises(EvaluationFailed, match="items 0 to 63"):
        measure(run, EvaluateConfig(num_workers=1, **QUICK), progress=False)
    assert not [file.name for file in (run / "evaluation").iterdir() if file.suffix in (".json", ".parquet")]


def _killed_in_the_middle(run: Path, num_kept: int) -> int:
    """`measure` in a process of its own, killed once so many results are kept; how many chunks are kept then."""
    program = f"""
from pathlib import Path
from data_shards import lean_imports
lean_imports.begin()  # as a command's process does
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.job import measure
measure(Path({str(run)!r}), EvaluateConfig(num_workers=1, **{QUICK!r}), progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    kept: list[Path] = []
    try:
        while len(kept) < num_kept:
            assert process.poll() is None, "it ended before it could be killed"
            kept = list((run / "evaluation").glob(".kept-*/Chunk-*.npz"))
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return len(kept)


@pytest.mark.usefixtures("ray")
def test_a_killed_evaluation_goes_on_and_gives_the_same_bytes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(num_workers=1, **QUICK)
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    summary = measure(whole, config, progress=False)
    assert _killed_in_the_middle(run, 1) < 2
    assert not (run / "evaluation" / "summary.json").exists()
    assert measure(run, config) == summary
    assert "64 of 96 images were measured before" in capsys.readouterr().out
    for name in ("summary.json", "samples.parquet"):
        assert (run / "evaluation" / name).read_bytes() == (whole / "evaluation" / name).read_bytes()
    assert {file.name for file in (run / "evaluation").iterdir()} == {
        file.name for file in (whole / "evaluation").iterdir()
    }

    # Rows of another evaluation than the summary's are not read beside it.
    (run / "evaluation" / "samples.parquet").write_bytes(b"of another evaluation")
    with pytest.raises(InputProblems, match="not of the same evaluation"):
        read_rows(run, ["row"], read_summary(run))


def test_what_is_kept_depends_on_what_it_was_made_from(tmp_path: Path) -> None:
    task, result = Chunk(0, 2), ChunkResult({"ssim": np.array([0.1, np.nan])}, {("segmenter", "gen"): np.eye(2)})
    first = PartialResults(tmp_path, {"segmenter": "a"})
    first.predictions.mkdir()
    first.write(task, result)
    again = PartialResults(tmp_path, {"segmenter": "a"})
    assert task in again
    assert Chunk(0, 3) not in again
    read = again.read(task)
    np.testing.assert_array_equal(read.columns["ssim"], result.columns["ssim"])
    np.testing.assert_array_equal(read.features["segmenter", "gen"], np.eye(2))
    file = next(again.path.glob("Chunk-*"))
    file.write_bytes(file.read_bytes()[:-20])  # damaged
    assert task not in PartialResults(tmp_path, {"segmenter": "a"})
    other = PartialResults(tmp_path, {"segmenter": "b"})
    assert not first.path.exists()
    assert other.path.exists()
