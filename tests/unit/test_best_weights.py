"""Which weights a training exports: those that validation scored best, also after an interrupt or a full disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import disk_is_full_for, exported, interrupt_at, run_training

from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.task import DenoiserTask
from segdiff_dist.training.checkpoint import complete_checkpoints
from segdiff_dist.training.export import is_exported
from segdiff_dist.training.sharded_state import SavedState


@pytest.fixture(scope="module")
def shapes(small_shapes: Path) -> Path:
    return small_shapes


def score_by(scores: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the task have these scores at these counts; the list takes the counts that are scored."""
    scored: list[int] = []

    def validate(self: DenoiserTask, forward: Any, images_seen: int) -> dict[str, float]:
        scored.append(images_seen)
        return {"overlap": scores[images_seen]}

    monkeypatch.setattr(DenoiserTask, "score", "overlap")
    monkeypatch.setattr(DenoiserTask, "validate", validate)
    return scored


def exported_from(run: Path) -> int:
    """Whose weights are exported: as the note says, and as the weights are that its checkpoint holds."""
    images = json.loads((run / "weights" / "exported.json").read_text())["images_seen"]
    saved = SavedState(run / "checkpoints" / f"{images:012d}", 1).full("ema_0.05")
    weights = Denoiser.load(run / "weights" / "ema_0.05").state_dict()
    assert all(torch.equal(weights[key], saved[key]) for key in saved)
    return images


@pytest.mark.parametrize(
    ("scores", "options", "best", "kept"),
    [
        ({32: 0.5, 64: 0.6, 96: 0.4}, {"keep_checkpoints": 1}, 64, [64, 96]),
        # Judged oftener than saved, and the other way round.
        ({16: 0.9, 32: 0.1, 48: 0.1, 64: 0.1, 80: 0.1, 96: 0.1}, {"validate_every_images": 16}, 16, [16, 32, 64, 96]),
        ({64: 0.9, 96: 0.1}, {"validate_every_images": 64, "checkpoint_every_images": 16}, 64, [64, 80, 96]),
        ({32: float("nan"), 64: 0.2, 96: float("nan")}, {}, 64, [32, 64, 96]),
    ],
    ids=["together", "scored-oftener", "saved-oftener", "no-number"],
)
def test_exported_are_the_weights_that_scored_best(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: dict[int, float],
    options: dict[str, Any],
    best: int,
    kept: list[int],
) -> None:
    scored = score_by(scores, monkeypatch)
    run_training(shapes, tmp_path, **options)
    assert scored == sorted(scores)
    assert exported_from(tmp_path) == best
    newest, *before = complete_checkpoints(tmp_path / "checkpoints")
    assert [int(folder.name) for folder in (*reversed(before), newest)] == kept
    assert is_exported(newest, tmp_path)
    # Weights that were removed are exported again, by the same command, from the checkpoint that is kept for it.
    weights = exported(tmp_path)
    shutil.rmtree(tmp_path / "weights")
    assert not is_exported(newest, tmp_path)
    run_training(shapes, tmp_path, **options)
    assert scored == sorted(scores)
    assert exported(tmp_path) == weights


@pytest.mark.parametrize("stop", [64, 72, pytest.param(48, marks=pytest.mark.exhaustive)])
def test_an_interrupt_does_not_change_what_is_best(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """At 64 a validation is due, and the stop leaves it out: it is made up for, and those weights are the best."""
    scored = score_by({32: 0.5, 64: 0.6, 96: 0.4}, monkeypatch)
    interrupt_at(stop, monkeypatch, shapes, tmp_path, keep_checkpoints=1)
    assert exported_from(tmp_path) == (64 if stop > 64 else 32)
    run_training(shapes, tmp_path, keep_checkpoints=1)
    assert scored == [32, 64, 96]
    assert exported_from(tmp_path) == 64


def test_a_best_that_cannot_be_saved_is_not_waited_for(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_by({32: 0.5, 64: 0.9, 96: 0.6}, monkeypatch)
    disk_is_full_for(64, monkeypatch)
    with pytest.warns(UserWarning, match="000000000064 could not be written"):
        run_training(shapes, tmp_path)
    assert exported_from(tmp_path) == 96


def test_a_full_disk_during_the_export_costs_nothing_but_time(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_of: Callable[[int], Path]
) -> None:
    """The best weights find no room; the run ends, fails, and once there is room the same call exports them."""
    score_by({32: 0.5, 64: 0.4, 96: 0.3}, monkeypatch)
    small_disk = disk_of(1)
    (small_disk / "filler").write_bytes(bytes(1020 * 1024))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").symlink_to(small_disk)
    with (
        pytest.warns(UserWarning, match=r"0032 is whole, but what follows from it could not be written.*[Ss]pace"),
        pytest.raises(OSError, match=r"is whole, but .*[Ss]pace"),
    ):
        run_training(shapes, tmp_path / "run", keep_checkpoints=1)
    newest, best = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert (int(newest.name), int(best.name)) == (96, 32)
    assert not is_exported(newest, tmp_path / "run")
    (small_disk / "filler").unlink()
    run_training(shapes, tmp_path / "run", keep_checkpoints=1)
    assert is_exported(newest, tmp_path / "run")
    assert exported_from(tmp_path / "run") == 32
