"""Checkpoint folders: only complete ones count, the newest is never lost, and writing one holds nothing up."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from segdiff_dist.config import write_text_atomically
from segdiff_dist.ranks.distributed import Agreement
from segdiff_dist.training import checkpoint, sharded_state
from segdiff_dist.training.checkpoint import CheckpointWriter
from segdiff_dist.training.config import TrainConfig, learning_rate
from segdiff_dist.training.sharded_state import Extent, SavedState, ShardOfState


def make(folder: Path, images: int, complete: bool = True) -> Path:
    path = folder / checkpoint.checkpoint_name(images)
    path.mkdir(parents=True)
    if complete:
        write_text_atomically(path / checkpoint.MARKER, "")
    return path


def test_the_newest_complete_one_is_taken(tmp_path: Path) -> None:
    assert checkpoint.complete_ones(tmp_path / "none") == []
    for images in (500, 9_000, 10_000):
        make(tmp_path, images)
    make(tmp_path, 20_000, complete=False)
    with pytest.warns(UserWarning, match="20000 is incomplete"):
        found = checkpoint.complete_ones(tmp_path)
    assert [int(p.name) for p in found] == [10_000, 9_000, 500]


def test_pruning_keeps_the_newest_and_every_nth_and_clears_old_ruins(tmp_path: Path) -> None:
    for images, complete in ((10, True), (20, True), (25, False), (30, True), (40, True), (50, True), (60, False)):
        make(tmp_path, images, complete)
    checkpoint.prune(tmp_path, keep=2, keep_every_images=20)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [20, 40, 50, 60]


def state(values: torch.Tensor) -> ShardOfState:
    return ShardOfState(
        {"w": (len(values),)}, (Extent("w", 0, len(values), 0, 0),), {"online": [values]}, {"step": 1.0}
    )


def test_the_state_is_that_of_the_moment_though_training_goes_on(tmp_path: Path) -> None:
    weights = torch.zeros(4_000_000)
    agreement = Agreement(("stop", *CheckpointWriter.FLAGS))
    exported: list[Path] = []
    with CheckpointWriter(tmp_path, keep=1, on_complete=exported.append) as writer:
        for images in (8, 16):
            weights.fill_(images)
            writer.start(state(weights), {"images_seen": images})
            writer.wait_until_copied()
            weights.fill_(-1)
            for _ in range(2_000):
                writer.poll(agreement.exchange({"stop": 0.0, **writer.flags()}))
                if not writer.pending:
                    break
                time.sleep(0.01)
        writer.drain(agreement, must_succeed=True)
    assert [int(p.name) for p in exported] == [8, 16]
    assert [int(p.name) for p in checkpoint.complete_ones(tmp_path)] == [16]
    newest = checkpoint.newest_usable(tmp_path)
    assert newest is not None
    assert checkpoint.read_state(newest) == {"images_seen": 16, "ranks": 1}
    assert SavedState(newest, 1).full("online")["w"].unique().tolist() == [16.0]


def test_a_full_disk_leaves_the_checkpoint_before_and_room_helps(disk_of: Callable[[int], Path]) -> None:
    small_disk = disk_of(8)
    weights = torch.ones(1_200_000)  # 4.8 MB: one fits, two do not
    agreement = Agreement(("stop", *CheckpointWriter.FLAGS))
    with CheckpointWriter(small_disk, keep=1) as writer:
        writer.start(state(weights), {"images_seen": 8})
        writer.drain(agreement, must_succeed=True)
        writer.start(state(weights), {"images_seen": 16})
        with (
            pytest.warns(UserWarning, match=r"000000000016 could not be written and is left out: .*[Ss]pace"),
            pytest.raises(OSError, match="could not be written"),
        ):
            writer.drain(agreement, must_succeed=True)
        assert [int(p.name) for p in checkpoint.complete_ones(small_disk)] == [8]
        assert sharded_state.find_damage(small_disk / f"{8:012d}", 1, read_all=True) is None
        assert writer.num_failed == 1
        shutil.rmtree(small_disk / f"{8:012d}")  # room is made
        writer.start(state(weights), {"images_seen": 24})
        writer.drain(agreement, must_succeed=True)
    assert [int(p.name) for p in checkpoint.complete_ones(small_disk)] == [24]


def test_schedules_count_images() -> None:
    config = TrainConfig(num_images=1000, warmup_images=100, lr=2.0)
    assert learning_rate(0, config) < 0.05
    assert learning_rate(100, config) == pytest.approx(2.0)
    assert learning_rate(550, config) == pytest.approx(1.0)
    assert learning_rate(1000, config) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(900, TrainConfig(num_images=1000, warmup_images=100, lr=2.0, lr_decay="constant")) == 2.0
