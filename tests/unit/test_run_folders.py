"""Run folders that were partly deleted, or that meet another shard set: what is trained, kept or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sampling_support import write_weights
from tests_support import bytes_of, write_shapes

from data_shards.problems import InputProblems
from segdiff_dist.cli import main
from segdiff_dist.stages.sample import Sample
from segdiff_dist.stages.train import Train
from segdiff_dist.stages.train_autoencoder import TrainAutoencoder
from segdiff_dist.stages.train_segmenter import TrainSegmenter

_SHORT = [
    *("--config", "smoke", "--train.num-images", "16", "--train.warmup-images", "8", "--tracking.no-enabled"),
    *("--train.checkpoint-every-images", "16", "--train.snapshot-every-images", "16", "--train.log-every-images", "16"),
]


@pytest.fixture(scope="module")
def trained(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--run", str(run), "--data", str(small_shapes), *_SHORT]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_finished_training_is_not_that_of_another_set(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_shapes(tmp_path / "other", num_patients=1, size=16)
    assert main(["train", "--run", str(run), "--data", str(other), *_SHORT]) == 2
    assert f"shards_digest: not that of {other}" in capsys.readouterr().err


def test_a_set_that_is_not_where_the_run_folder_says_is_named_with_file_and_flag(
    run: Path, small_shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(small_shapes), "sets/gone"))
    assert main(["train", "--run", str(run)]) == 2
    assert f"{config} names it: give --data SHARDS" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [lambda file: shutil.rmtree(file.parent), lambda file: file.write_bytes(b"half")])
def test_weights_that_are_gone_or_damaged_are_exported_again(
    run: Path, capsys: pytest.CaptureFixture[str], spoil
) -> None:
    before = bytes_of(run / "weights")
    spoil(run / "weights" / "ema_0.05" / "diffusion_pytorch_model.safetensors")
    for said in ("weights in", "nothing to do"):
        assert main(["train", "--run", str(run), *_SHORT]) == 0
        assert said in capsys.readouterr().out
        assert bytes_of(run / "weights") == before


def test_a_new_training_does_not_replace_weights_without_checkpoints(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(run / "weights")
    shutil.rmtree(run / "checkpoints")
    assert main(["train", "--run", str(run), *_SHORT]) == 2
    assert "no checkpoint is left; a new training would replace them" in capsys.readouterr().err
    assert bytes_of(run / "weights") == before


def test_an_average_says_where_it_ends_and_replaces_none_of_the_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(run / "weights")
    average = ["average", "--run", str(run), "--length"]
    assert main([*average, "0.05"]) == 2
    assert "the training wrote it" in capsys.readouterr().err
    assert main([*average, "0.07", "--average.images-seen", "0"]) == 2
    assert bytes_of(run / "weights") == before
    assert main([*average, "0.07"]) == 0
    assert "which ends at 16 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind", "length", "other"),
    [
        ("train", Train, "--train.num-images", "--train.lr"),
        ("train-segmenter", TrainSegmenter, "--segmenter.train.num-images", "--segmenter.train.lr"),
        ("train-autoencoder", TrainAutoencoder, "--autoencoder.train.num-images", "--autoencoder.train.lr"),
    ],
)
def test_a_training_that_another_command_began_after_the_check_is_not_continued_with_other_settings(
    small_shapes: Path, tmp_path: Path, name: str, kind: type[Train], length: str, other: str
) -> None:
    run = tmp_path / "run"
    args = ["--run", str(run), "--data", str(small_shapes), "--config", "smoke", length, "16", "--tracking.no-enabled"]
    late, same = (kind.parse(name, [*args, *more]).check() for more in ((other, "0.5"), ()))
    assert main([name, *args]) == 0
    before = bytes_of(run)
    with pytest.raises(InputProblems, match=f"{other.removeprefix('--')}: .* there, 0.5 now"):
        late.start()
    assert bytes_of(run) == before
    assert same.start().exit_code == 0  # the same command: it goes on


def test_images_that_another_command_began_after_the_check_are_not_mixed_with_others(
    shapes: Path, tmp_path: Path
) -> None:
    run = write_weights(tmp_path / "run", average="ema_0.05")
    args = ["--run", str(run), "--data", str(shapes), "--config", "smoke", "--num", "2", "--tracking.no-enabled"]
    late = Sample.parse("sample", [*args, "--sample.seed", "7"]).check()
    assert main(["sample", *args]) == 0
    before = bytes_of(run)
    with pytest.raises(InputProblems, match="seed"):
        late.start()
    assert bytes_of(run) == before
