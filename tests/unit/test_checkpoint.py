"""Checkpoint folders: only complete ones count, the newest is never lost, and writing one holds nothing up."""

from __future__ import annotations

import errno
import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.files import write_atomic
from data_shards.problems import InputProblems
from segdiff_dist.training import checkpoint, checkpoint_writer, sharded_state
from segdiff_dist.training.checkpoint_writer import CheckpointWriter
from segdiff_dist.training.config import TrainConfig, learning_rate
from segdiff_dist.training.sharded_state import Extent, SavedState, StateShard


def make(folder: Path, images: int, complete: bool = True, **values: int) -> Path:
    path = folder / checkpoint.checkpoint_name(images)
    path.mkdir(parents=True)
    sharded_state.write(path, 0, state(torch.ones(4)))
    if complete:
        write_atomic(path / checkpoint.STATE, json.dumps({"images_seen": images, "ranks": 1, **values}))
        write_atomic(path / checkpoint.MARKER, "")
    return path


def test_the_newest_complete_one_is_taken(tmp_path: Path) -> None:
    assert checkpoint.complete_checkpoints(tmp_path / "none") == []
    for images in (500, 9_000, 10_000):
        make(tmp_path, images)
    make(tmp_path, 20_000, complete=False)
    with pytest.warns(UserWarning, match="20000 is incomplete"):
        found = checkpoint.complete_checkpoints(tmp_path)
    assert [int(p.name) for p in found] == [10_000, 9_000, 500]


def test_pruning_keeps_the_newest_and_every_nth_and_clears_old_ruins(tmp_path: Path) -> None:
    for images, complete in ((10, True), (20, True), (25, False), (30, True), (40, True), (50, True), (60, False)):
        make(tmp_path, images, complete)
    checkpoint.prune(tmp_path, keep=2, keep_every_images=20)
    assert there(tmp_path) == [20, 40, 50, 60]


def test_pruning_keeps_the_first_past_each_multiple_and_the_best(tmp_path: Path) -> None:
    """A batch of 24 ends on few multiples of 64; what was kept once is kept in every later pruning."""
    for images in range(24, 24 * 17, 24):
        make(tmp_path, images, best_images_seen=48)
        checkpoint.prune(tmp_path, keep=1, keep_every_images=64)
    assert there(tmp_path) == [48, 72, 144, 192, 264, 336, 384]
    assert checkpoint.crossings([24, 48, 60], 64) == set()


def test_one_whose_state_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    make(tmp_path, 100)
    (make(tmp_path, 200) / checkpoint.STATE).write_text("")
    with pytest.raises(InputProblems, match="remove this folder"):
        checkpoint.read_state(tmp_path / f"{200:012d}")
    for find in (lambda: checkpoint.complete_checkpoints(tmp_path)[0], lambda: checkpoint.newest_usable(tmp_path)):
        with pytest.warns(UserWarning, match=r"200 is damaged and skipped: state.json"):
            assert find() == tmp_path / f"{100:012d}"


def test_the_message_about_a_damaged_one_is_short(tmp_path: Path) -> None:
    beside = make(tmp_path, 100) / "rank_00000.json"
    beside.write_text(beside.read_text().replace('"bytes":', f'"bytes": "{"x" * 10_000}", "other":'))
    with pytest.warns(UserWarning, match="has .* bytes of xxx") as said:
        assert checkpoint.newest_usable(tmp_path) is None
    assert len(str(said[0].message)) < 1_000


def test_one_that_was_passed_over_never_outlives_or_mixes_with_what_comes_after(tmp_path: Path) -> None:
    """A damaged 300, of two ranks; the run goes on from 200 on one rank, is stopped at 250, and killed at 300."""
    make(tmp_path, 200)
    damaged = make(tmp_path, 300, ranks=2)
    with pytest.warns(UserWarning, match=r"300 is damaged and skipped: rank_00001"):
        assert checkpoint.newest_usable(tmp_path) == tmp_path / f"{200:012d}"
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.start(state(torch.ones(4)), {"images_seen": 250})
        writer.drain(must_succeed=True)
        assert [int(p.name) for p in newest_first(tmp_path)] == [250]
        write_atomic(damaged / checkpoint.MARKER, "")  # as if nobody had skipped it
        writer.start(state(torch.ones(4)), {"images_seen": 300})
    assert (damaged / sharded_state.file_name(0)).is_file()
    assert [int(p.name) for p in newest_first(tmp_path)] == [250]


def there(checkpoints: Path) -> list[int]:
    return sorted(int(p.name) for p in checkpoints.iterdir())


def newest_first(checkpoints: Path) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpoint.complete_checkpoints(checkpoints)


def state(values: torch.Tensor) -> StateShard:
    return StateShard({"w": (len(values),)}, (Extent("w", 0, len(values), 0, 0),), {"online": [values]}, {"step": 1.0})


def test_the_state_is_that_of_the_moment_though_training_goes_on(tmp_path: Path) -> None:
    weights = torch.zeros(4_000_000)
    exported: list[Path] = []
    with CheckpointWriter(tmp_path, keep=1, on_complete=exported.append) as writer:
        for images in (8, 16):
            weights.fill_(images)
            writer.start(state(weights), {"images_seen": images})
            writer.wait_until_copied()
            weights.fill_(-1)
            for _ in range(2_000):
                writer.after_step()
                if not writer.pending:
                    break
                time.sleep(0.01)
        writer.drain(must_succeed=True)
    assert [int(p.name) for p in exported] == [8, 16]
    assert [int(p.name) for p in checkpoint.complete_checkpoints(tmp_path)] == [16]
    newest = checkpoint.newest_usable(tmp_path)
    assert newest is not None
    assert checkpoint.read_state(newest) == {"images_seen": 16, "ranks": 1}
    assert SavedState(newest, 1).full("online")["w"].unique().tolist() == [16.0]


def test_a_full_disk_leaves_the_checkpoint_before_and_room_helps(disk_of: Callable[[int], Path]) -> None:
    small_disk = disk_of(8)
    weights = torch.ones(1_200_000)  # 4.8 MB: one fits, two do not
    with CheckpointWriter(small_disk, keep=1) as writer:
        writer.start(state(weights), {"images_seen": 8})
        writer.drain(must_succeed=True)
        writer.start(state(weights), {"images_seen": 16})
        with (
            pytest.warns(UserWarning, match=r"000000000016 could not be written and is left out: .*[Ss]pace"),
            pytest.raises(OSError, match="could not be written"),
        ):
            writer.drain(must_succeed=True)
        assert [int(p.name) for p in checkpoint.complete_checkpoints(small_disk)] == [8]
        assert sharded_state.find_damage(small_disk / f"{8:012d}", 1, read_all=True) is None
        assert writer.num_failed == 1
        shutil.rmtree(small_disk / f"{8:012d}")  # room is made
        writer.start(state(weights), {"images_seen": 24})
        writer.drain(must_succeed=True)
    assert [int(p.name) for p in checkpoint.complete_checkpoints(small_disk)] == [24]


def test_what_follows_from_a_checkpoint_may_fail_and_the_next_makes_up_for_it(tmp_path: Path) -> None:
    exported = []

    def export(folder: Path) -> None:
        if int(folder.name) != 24:
            raise OSError(errno.ENOSPC, "No space left on device")
        exported.append(int(folder.name))

    with CheckpointWriter(tmp_path, keep=1, on_complete=export) as writer:
        for images in (16, 24):
            writer.start(state(torch.ones(4)), {"images_seen": images})
            if images == 16:
                with pytest.warns(UserWarning, match=r"016 is whole, but .*No space"):
                    writer.drain()
                assert [int(p.name) for p in checkpoint.complete_checkpoints(tmp_path)] == [16]
        writer.drain(must_succeed=True)
        assert (exported, writer.num_failed, writer.lost) == ([24], 1, 0)
        writer.start(state(torch.ones(4)), {"images_seen": 32})
        with pytest.warns(UserWarning, match="is whole"), pytest.raises(OSError, match=r"is whole.*No space"):
            writer.drain(must_succeed=True)


def test_one_that_cannot_be_marked_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint_writer.write_atomic

    def full(path: Path, text: str, **options: Any) -> None:
        if path.name == checkpoint.MARKER and int(path.parent.name) == 16:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text, **options)

    monkeypatch.setattr(checkpoint_writer, "write_atomic", full)
    with CheckpointWriter(tmp_path, keep=3) as writer:
        for images in (8, 16, 24):
            writer.start(state(torch.ones(4)), {"images_seen": images})
            if images == 16:
                with pytest.warns(UserWarning, match=r"016 could not be written.*No space"):
                    writer.drain()
            writer.drain(must_succeed=images != 16)
        assert (writer.num_failed, writer.lost) == (1, 16)
    assert there(tmp_path) == [8, 24]


def test_the_copy_waits_for_the_gpu_that_holds_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with GPU 0 as its device, whichever is its rank's."""

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 3)  # type: ignore[assignment]

    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.start(state(torch.ones(4).as_subclass(OnGpu)), {"images_seen": 8})
        writer.wait_until_copied()
    assert waited == [torch.device("cuda", 3)]


def test_schedules_count_images() -> None:
    config = TrainConfig(num_images=1000, warmup_images=100, lr=2.0)
    assert learning_rate(0, config) < 0.05
    assert learning_rate(100, config) == pytest.approx(2.0)
    assert learning_rate(550, config) == pytest.approx(1.0)
    assert learning_rate(1000, config) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(900, TrainConfig(num_images=1000, warmup_images=100, lr=2.0, lr_decay="constant")) == 2.0
