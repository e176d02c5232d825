"""The whole line through the command line, on every real engine, smaller than the demo: volumes to a tracked report."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from segdiff_dist.cli import main
from segdiff_dist.ranks import precision

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "launch" / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment that has gone through all stages once; what the last of them printed is in evaluate.txt."""
    folder = tmp_path_factory.mktemp("e2e")
    config = yaml.safe_load(CONFIG.read_text())
    config |= {name: str(folder / name) for name in ("amos_root", "data", "run")}
    # One worker, since each takes seconds to load its libraries, on a core that another test has.
    for stage in ("sample", "evaluate"):
        config[stage] |= {"num_workers": 1}
    # Half of the smoke configuration's images, at as many points.
    config["train"] |= {"num_images": 64, "checkpoint_every_images": 32, "snapshot_every_images": 32}
    config["train"] |= {"log_every_images": 16}
    config["segmenter"]["train"] |= {"num_images": 128, "checkpoint_every_images": 64}
    config["downstream"] = {"real_fractions": [1.0], "seeds": [0], "num_masks": 4, "num_images": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for command in ("phantom", "prepare", "inspect", "train-segmenter", "train", "sample", "evaluate"):
        more = ["--downstream"] if command == "evaluate" else []
        with redirect_stdout(io.StringIO()) as printed:
            assert main([command, "--config", str(folder / "config.yaml"), *more]) == 0, command
        (folder / f"{command}.txt").write_text(printed.getvalue())
    return folder


def test_the_next_command_that_each_prints_can_be_pasted(folder: Path) -> None:
    found = {
        file.stem: re.findall("^next: segdiff (.*)$", file.read_text(), re.MULTILINE) for file in folder.glob("*.txt")
    }
    assert {name: shlex.split(line)[0] for name, [line] in found.items()} == {
        "phantom": "prepare",
        "prepare": "train-segmenter",
        "inspect": "train-segmenter",
        "train-segmenter": "train",
        "train": "sample",
        "sample": "evaluate",
        "evaluate": "export",
    }
    for [line] in found.values():
        assert main([*shlex.split(line), "--dry-run"]) == 0, line
    assert str(folder / "run" / "weights") in (folder / "train.txt").read_text()


def test_the_demo_trains_both_networks_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same set, into another run folder. What the commands make one after the other is what the demo makes."""
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"run": str(tmp_path / "run")}
    config["sample"] |= {"num": 2, "samples_per_mask": 1, "diverse_masks": 0, "cross_modality_masks": 0}
    # A CPU without bf16 arithmetic trains one after the other.
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    config["train"] |= {"precision": yaml.safe_load((folder / "run" / "config.yaml").read_text())["train"]["precision"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["demo", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "train-segmenter, train" in printed.getvalue()
    assert "weights in" in (tmp_path / "run" / "train-segmenter.log").read_text()
    for weights in ("weights/ema_0.05/diffusion_pytorch_model.safetensors", "segmenter/weights/model.safetensors"):
        assert (tmp_path / "run" / weights).read_bytes() == (folder / "run" / weights).read_bytes()


def summary(folder: Path) -> dict:
    return json.loads((folder / "run" / "evaluation" / "summary.json").read_text())


def test_metrics_of_both_modalities(folder: Path) -> None:
    found = summary(folder)
    assert set(found["by_modality"]) == {"CT", "MR"}
    assert found["num_samples"] == 12
    for name in ("psnr_db", "ssim", "dice_mask_real", "dice_real_gen", "dice_mask_gen", "segmenter_frechet"):
        assert name in found["metrics"]
    assert "fid" in found["not_available"]
    assert set(found["cross_modality"]) == {"CT_to_MR", "MR_to_CT"}
    assert found["diversity"]["num_masks"] == 2


def test_the_report_needs_no_other_file(folder: Path) -> None:
    page = (folder / "run" / "evaluation" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 8
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_mlflow_holds_every_stage(folder: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    found = summary(folder)
    assert run.data.metrics["dice_mask_gen"] == pytest.approx(found["metrics"]["dice_mask_gen"]["value"])
    assert run.data.metrics["CT/sharpness"] == pytest.approx(found["by_modality"]["CT"]["sharpness"]["value"])
    assert "CT/psnr_db" not in run.data.metrics
    rows = json.loads((folder / "mlartifacts" / run.info.run_id / "artifacts/evaluation/metrics.json").read_text())
    table = {name: value for name, value, *_ in rows["data"]}
    assert table["CT/psnr_db"] == pytest.approx(found["by_modality"]["CT"]["psnr_db"]["value"], rel=1e-5)
    assert run.info.run_name == "run (config)"
    assert {"training", "evaluation"} <= {tag.value for one in run.inputs.dataset_inputs for tag in one.tags}
    for stage in ("phantom", "prepare", "segmenter", "train", "sample", "evaluate"):
        assert run.data.tags[f"stage.{stage}"] == "finished"
    assert run.data.params["train.lr"] == "0.001"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [16, 32, 48, 64]
    names = {a.path for a in client.list_artifacts(run.info.run_id, "evaluation")}
    assert {"evaluation/report.html", "evaluation/summary.json"} <= names


def test_the_evaluated_model_comes_out_of_mlflows_registry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    import numpy as np

    from segdiff_dist.pipeline import SegGuidedPipeline

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    [version] = mlflow.MlflowClient().search_model_versions("name = 'segdiff'")
    found = summary(folder)["metrics"]["dice_mask_gen"]["value"]
    assert float(version.tags["dice_mask_gen"]) == pytest.approx(found, rel=1e-5)
    pipeline = SegGuidedPipeline.from_pretrained(mlflow.artifacts.download_artifacts("models:/segdiff/1"), device="cpu")
    assert pipeline(np.zeros((pipeline.size, pipeline.size), np.uint8)).size == (pipeline.size, pipeline.size)


def test_the_card_of_the_exported_model_says_what_was_measured(folder: Path, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    arguments = ["--config", str(folder / "config.yaml"), "--format", "pipeline", "--export.data-licence", "CC0-1.0"]
    assert main(["export", str(tmp_path / "model"), *arguments]) == 0
    card, found = (tmp_path / "model" / "README.md").read_text(), summary(folder)
    dice = found["metrics"]["dice_either_mask_gen"]
    low, high = dice["ci95"]
    assert f"{dice['value']:.3f}" in card
    assert f"({low:.3f} to {high:.3f}; n {dice['n']})" in card
    assert "Licence: CC0-1.0." in card
    assert found["provenance"]["shards_digest"] in card
    picture = np.asarray(Image.open(tmp_path / "model" / "gallery.png"))
    assert picture.std() > 10
    assert main(["export", str(tmp_path / "plain"), *arguments, "--export.no-picture"]) == 0
    assert not (tmp_path / "plain" / "gallery.png").exists()


def test_two_runs_can_be_compared_in_one_store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        run = tmp_path / f"run{seed}"
        flags = ["--config", str(folder / "config.yaml"), "--run", str(run), "--train.num-images", "32"]
        assert main(["train", *flags, "--train.seed", str(seed)]) == 0
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("segdiff")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], filter_string="metrics.`train/loss` > 0")
    assert {run.data.params["train.seed"] for run in runs} == {"0", "1"}
    assert len({run.data.metrics["train/loss"] for run in runs}) == 2


def test_what_is_done_is_not_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = [p for p in folder.rglob("*") if p.suffix in (".tar", ".safetensors") or p.parent.name == "done"]
    before = {path: path.stat().st_mtime_ns for path in watched}
    assert len(before) > 8
    for command in ("phantom", "prepare", "train-segmenter", "train", "sample"):
        assert main([command, "--config", str(folder / "config.yaml")]) == 0, command
    assert before == {path: path.stat().st_mtime_ns for path in watched}
    assert capsys.readouterr().out.count("nothing to do") == 3


def test_going_on_with_other_settings_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(folder / "config.yaml")]
    assert main(["train", *config, "--train.lr", "0.5"]) == 2
    assert "train.lr: 0.001 there, 0.5 now" in capsys.readouterr().err
    assert main(["sample", *config, "--num", "5"]) == 2
    assert "sample.num" in capsys.readouterr().err
    assert main(["prepare", *config, "--prepare.slice-stride", "3"]) == 2
    assert "slice_stride" in capsys.readouterr().err


def test_a_missing_shard_is_named_before_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((folder / "data" / "shards").glob("test-*.tar"))
    hidden = shard.with_suffix(".hidden")
    shard.rename(hidden)
    try:
        assert main(["train", "--config", str(folder / "config.yaml"), "--run", str(folder / "other")]) == 2
        assert f"{shard}: file: missing" in capsys.readouterr().err
    finally:
        hidden.rename(shard)


def test_help_and_import_are_quick_and_light() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'deepspeed', 'monai', 'nvidia', 'diffusers', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, segdiff_dist, data_shards; from segdiff_dist.cli import main; main(['--help']); print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "usage: segdiff COMMAND" in out
    assert out.strip().endswith("set()")


def test_another_average_is_made_after_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from segdiff_dist.denoising.denoiser import Denoiser

    assert main(["average", "--run", str(folder / "run"), "--length", "0.08"]) == 0
    assert "ema_0.08: its profile differs by" in capsys.readouterr().out
    made, kept = (Denoiser.load(folder / "run" / "weights" / name).state_dict() for name in ("ema_0.08", "ema_0.1"))
    assert made.keys() == kept.keys()
    assert main(["average", "--run", str(folder / "run"), "--length", "0.5"]) == 2


def test_training_left_pictures_and_a_validation_loss(folder: Path) -> None:
    from PIL import Image

    pictures = sorted((folder / "run" / "pictures").glob("samples_*.png"))
    assert len(pictures) == 2
    assert Image.open(pictures[-1]).width > 100


def test_nothing_waits_for_the_tracker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", str(folder / "run")]) == 0
    assert capsys.readouterr().out.startswith("0 records")


def test_what_generated_images_are_worth_is_in_the_report(folder: Path) -> None:
    printed = (folder / "evaluate.txt").read_text()
    assert "all real + generated" in printed
    assert "weights are chosen on the whole validation split" in printed
    page = (folder / "run" / "evaluation" / "report.html").read_text()
    assert "What generated images bring a segmenter" in page
    assert "weights are chosen on the whole validation split" in page
    found = json.loads((folder / "run" / "downstream" / "summary.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["real_100", "real_100_and_generated", "generated"]

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.metrics["downstream/generated/dice"] == pytest.approx(found["arms"][2]["dice"]["value"])
