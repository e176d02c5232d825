"""Checkpoint folders: only complete ones count, and the newest complete one is never lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from segdiff_dist import checkpoint
from segdiff_dist.engine import TrainConfig, ema_decay, learning_rate


def make(folder: Path, images: int, complete: bool = True) -> Path:
    path = folder / checkpoint.checkpoint_name(images)
    path.mkdir(parents=True)
    checkpoint.write_state(path, {"images_seen": images})
    if complete:
        checkpoint.mark_complete(path)
    return path


def test_the_newest_complete_one_is_taken(tmp_path: Path) -> None:
    assert checkpoint.newest_complete(tmp_path / "none") is None
    for images in (500, 9_000, 10_000):
        make(tmp_path, images)
    make(tmp_path, 20_000, complete=False)
    with pytest.warns(UserWarning, match="20000 is incomplete"):
        newest = checkpoint.newest_complete(tmp_path)
    assert newest is not None
    assert checkpoint.read_state(newest)["images_seen"] == 10_000


def test_pruning_keeps_the_newest_and_clears_old_ruins(tmp_path: Path) -> None:
    for images, complete in ((1, True), (2, False), (3, True), (4, True), (5, False)):
        make(tmp_path, images, complete)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [3, 4, 5]


def test_schedules_count_images() -> None:
    config = TrainConfig(num_images=1000, warmup_images=100, lr=2.0)
    assert learning_rate(0, config) < 0.05
    assert learning_rate(100, config) == pytest.approx(2.0)
    assert learning_rate(550, config) == pytest.approx(1.0)
    assert learning_rate(1000, config) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(900, TrainConfig(num_images=1000, warmup_images=100, lr=2.0, lr_decay="constant")) == 2.0
    # Two steps of 8 images decay the average as much as one of 16.
    late = TrainConfig(ema_halflife_images=100)
    assert ema_decay(10**6, 8, late) ** 2 == pytest.approx(ema_decay(10**6, 16, late))
    assert ema_decay(10**6, 100, late) == pytest.approx(0.5)
    assert ema_decay(0, 8, late) == pytest.approx(0.0)
