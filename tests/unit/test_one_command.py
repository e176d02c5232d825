"""Two commands at once, folders that cannot be written and disks that are full, command by command."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_support import evaluate_here
from sampling_support import make_here, write_weights
from tests_support import bytes_of

from data_shards.locks import FOLDER_LOCK, lock_beside, locked
from data_shards.phantom import PhantomConfig, write_phantom
from data_shards.problems import OutOfSpace
from segdiff_dist import cli
from segdiff_dist.evaluation.evaluate import draw
from segdiff_dist.evaluation.measure import job as evaluation
from segdiff_dist.evaluation.measure.task_runner import EvaluationFailed
from segdiff_dist.export import job as exporting
from segdiff_dist.export.config import ExportConfig

SMOKE = ("--config", str(Path(__file__).parents[2] / "launch" / "configs" / "smoke.yaml"))
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weights, finished samples, a segmenter and an evaluation."""
    run = write_weights(tmp_path_factory.mktemp("finished") / "run")
    return evaluate_here(run, shapes)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The finished run's copy, to change."""
    return Path(shutil.copytree(finished, tmp_path / "place" / "run"))


def commands(place: Path, amos: Path, shapes: Path) -> dict[str, tuple[Path, list[str]]]:
    """Of each command that writes: its lock file, and its arguments."""
    run, new = place / "run", place / "new"
    train = ["--run", str(run), "--data", str(shapes), *SMOKE]
    segmenter = ("--evaluate.segmenter", str(run / "segmenter"))
    return {
        "phantom": (new / FOLDER_LOCK, [str(new), *SMOKE]),
        "prepare": (new / FOLDER_LOCK, [str(amos), str(new), *SMOKE]),
        "annotate": (
            new / FOLDER_LOCK,
            [str(amos), str(new), "--annotate.tool", "command", "--annotate.command", "cp {image} {mask}"],
        ),
        "convert": (new / FOLDER_LOCK, [str(shapes), str(new)]),
        "train": (run / ".train.lock", train),
        "train-segmenter": (run / "segmenter" / ".train.lock", train),
        "train-autoencoder": (run / "autoencoder" / ".train.lock", train),
        "evaluate": (run / ".evaluation.lock", ["--run", str(run), *segmenter]),
        "report": (run / ".evaluation.lock", [str(run)]),
        "export": (lock_beside(new), [str(new), "--run", str(run), "--format", "png"]),
        "demo": (run / ".demo.lock", ["--run", str(run), *SMOKE]),
    }


COMMANDS = list(commands(Path(), Path(), Path()))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_command_is_refused_and_leaves_nothing(
    name: str, run: Path, shapes: Path, archive: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file, args = commands(run.parent, archive.root, shapes)[name]
    with locked(file, file.parent, "is at it"):
        before = bytes_of(run.parent)
        assert cli.main([name, *args]) == 2
        assert bytes_of(run.parent) == before
    error = capsys.readouterr().err
    assert ": at work here: process " in error
    assert "; wait for it, or stop it" in error
    assert "1 problem; nothing was started" in error
    assert not file.exists()


def test_sampling_goes_on_beside_a_training(shapes: Path, tmp_path: Path) -> None:
    from sampling_support import arguments

    from segdiff_dist.sampling.job import sample

    make_here(write_weights(tmp_path), shapes)
    with locked(tmp_path / ".train.lock", tmp_path, "is training there"):
        assert sample(*arguments(tmp_path, shapes)).missing() == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_refuses_what_another_job_trains(
    rank: str, run: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, args = commands(run.parent, run, shapes)["train"]
    with locked(file, run, "is training there"):
        launched = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for key, value in {**launched, "MASTER_PORT": "29511"}.items():
            monkeypatch.setenv(key, value)
        assert cli.main(["train", *args]) == 2
    assert "is training there; wait for it" in capsys.readouterr().err


def test_read_only_places(
    disk_of: Callable[[int], Path],
    shapes: Path,
    run: Path,
    archive: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = disk_of(64)
    subprocess.run(["cp", "-r", str(shapes), str(disk / "set")], check=True)
    subprocess.run(["cp", "-r", str(run), str(disk / "run")], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name, (_, args) in commands(disk, archive.root, shapes).items():
        assert cli.main([name, *args]) == 2, name
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "cannot be written (Read-only file system); choose another place" in error, name
    assert cli.main(["inspect", str(disk / "set")]) == 0
    out = capsys.readouterr().out
    assert "no patient is in more than one split" in out
    assert f"no pictures: cannot write to {disk / 'set'} (Read-only file system)" in out


def test_a_full_disk_while_a_phantom_is_made(disk_of: Callable[[int], Path]) -> None:
    disk = disk_of(4)
    config = PhantomConfig(num_train=1, num_val=1, num_test=1, matrix=(64, 64), slice_thickness_mm=(6.0, 6.0))
    (disk / "ballast").write_bytes(bytes(3900 * 1024))
    with pytest.raises(OutOfSpace, match="make room and start the same command again"):
        write_phantom(disk / "amos", config)
    assert [file.name for file in (disk / "amos").rglob("*") if file.name.endswith((".unfinished", ".lock"))] == []
    (disk / "ballast").unlink()
    write_phantom(disk / "amos", config)
    assert (disk / "amos" / "dataset.json").is_file()


def test_a_full_disk_while_samples_are_exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, *_: Any) -> None:
        (folder / "images").mkdir()
        raise NO_SPACE

    before = bytes_of(run)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_pairs", full)
        with pytest.raises(OutOfSpace, match=r"out: no space left"):
            exporting.export_samples(run, tmp_path / "out", ExportConfig(format="png"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["place"]
    exporting.export_samples(run, tmp_path / "out", ExportConfig(format="png"))
    assert bytes_of(run) == before


def test_a_full_disk_while_figures_are_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from segdiff_dist.evaluation.report import figures

    def full(canvas: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise NO_SPACE

    draw(run, progress=False)
    before = bytes_of(run)
    with monkeypatch.context() as patch:
        patch.setattr(figures, "save", full)
        with pytest.raises(OutOfSpace, match="evaluation: no space left"):
            draw(run, progress=False)
    assert bytes_of(run) == before
    assert json.loads((run / "evaluation" / "figures" / "index.json").read_text())


def test_a_full_disk_while_samples_are_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(inputs: Any, pool: Any, config: Any, subject: Any, rows: Path, *_: Any) -> Any:
        rows.write_text("half")
        inputs.predictions.mkdir()
        raise EvaluationFailed(f"could not be measured: items 0 to 9: OSError: {NO_SPACE}")

    before = bytes_of(run / "evaluation")
    monkeypatch.setattr(evaluation, "measure_items", full)
    monkeypatch.setattr(evaluation, "check", lambda *_: pytest.fail("the run was checked by the stage already"))
    args = ["--run", str(run), "--evaluate.segmenter", str(run / "segmenter"), "--tracking.no-enabled"]
    assert cli.main(["evaluate", *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run / 'evaluation'}: no space left (could not be measured: items 0 to 9: ")
    assert "make room and start the same command again" in error
    assert error.count("\n") == 1
    assert bytes_of(run / "evaluation") == before
