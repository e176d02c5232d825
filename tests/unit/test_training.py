"""The training loop on DeepSpeed in one process: learning, exact resume, what a checkpoint holds, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests_support import write_shapes
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_support import CPU, NET, QUICK, disk_is_full_for, exported, interrupt_at, losses, run_training

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import Batch
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.task import DenoiserTask
from segdiff_dist.training import checkpoint, checkpoint_writer
from segdiff_dist.training.checkpoint import complete_checkpoints
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.export import average_snapshots, is_exported
from segdiff_dist.training.loop import TrainingStopped
from segdiff_dist.training.sharded_state import SavedState
from segdiff_dist.training.step_log import UpdateGuard


@pytest.fixture(scope="module")
def shapes(small_shapes: Path) -> Path:
    return small_shapes


@pytest.fixture(scope="module")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Called with some settings: a finished run under them, made once; a test that changes one works on a copy."""
    made: dict[str, Path] = {}

    def find(**changes: Any) -> Path:
        settings = repr(TrainConfig(**{**QUICK, **changes}))
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("finished")
            run_training(shapes, made[settings], **changes)
        return made[settings]

    return find


@pytest.mark.parametrize(("precision", "zero_stage"), [("bf16", 1), ("fp32", 0), ("bf16", 3)])
def test_a_resumed_run_is_bit_identical(
    shapes: Path, finished: Callable[..., Path], tmp_path: Path, precision: str, zero_stage: int
) -> None:
    settings: dict[str, Any] = {"precision": precision, "zero_stage": zero_stage}
    whole = finished(**settings)
    assert losses(whole)[-1] < 0.7 * losses(whole)[0]
    # The other run loses its last checkpoint and half-writes another: it goes on from the one before.
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    shutil.rmtree(cut / "checkpoints" / f"{96:012d}")
    (cut / "checkpoints" / f"{64:012d}" / "COMPLETE").unlink()
    with pytest.warns(UserWarning, match="incomplete"):
        assert run_training(shapes, cut, **settings) == losses(whole)
    assert exported(cut) == exported(whole)


def test_a_checkpoint_holds_what_is_promised(finished: Callable[..., Path]) -> None:
    run = finished()
    folders = sorted(p for p in (run / "checkpoints").iterdir() if p.is_dir())
    assert [int(p.name) for p in folders] == [32, 64, 96]
    assert (folders[-1] / "COMPLETE").exists()
    assert json.loads((folders[-1] / "state.json").read_text())["images_seen"] == 96
    assert yaml.safe_load((folders[-1] / "config.yaml").read_text()) == {"config": "here"}
    assert Denoiser.load(run / "weights" / "ema_0.05").label_table == AMOS


def test_ctrl_c_saves_and_the_same_call_goes_on(
    shapes: Path, finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished()
    interrupt_at(56, monkeypatch, shapes, tmp_path)
    assert run_training(shapes, tmp_path) == losses(whole)
    assert exported(tmp_path) == exported(whole)


def test_a_checkpoint_of_other_data_or_another_net_is_refused(shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(shapes, run, num_images=32)
    other = write_shapes(tmp_path / "other", num_patients=3)
    with pytest.raises(InputProblems, match="shards_digest"):
        run_training(other, run)
    with pytest.raises(
        InputProblems, match=r"unet.conv_in.weight.*16x18x3x3 in the checkpoint, 24x18x3x3 in the model"
    ):
        run_training(shapes, run, net=replace(NET, block_out_channels=(24, 32)))


def test_an_update_waits_for_the_copy_of_what_it_changes(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_into = checkpoint_writer.copy_into

    def slow(copies: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        time.sleep(0.1)
        copy_into(copies, tensors)

    for name, copying in (("quick", copy_into), ("slow", slow)):
        monkeypatch.setattr(checkpoint_writer, "copy_into", copying)
        run_training(shapes, tmp_path / name, num_images=48)
    saved = [SavedState(tmp_path / name / "checkpoints" / f"{32:012d}", 1).full for name in ("quick", "slow")]
    for kind in ("online", "exp_avg", "ema_0.05"):
        quick, slowly = (full(kind) for full in saved)
        assert all(torch.equal(quick[key], slowly[key]) for key in quick), kind


@pytest.mark.parametrize("damage", ["cut", "missing", "flipped", "state"])
def test_a_damaged_checkpoint_is_passed_over(
    shapes: Path, finished: Callable[..., Path], tmp_path: Path, damage: str
) -> None:
    whole = finished()
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    folder = run / "checkpoints" / f"{96:012d}"
    file = folder / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "state":  # as after a power cut
        (folder / "state.json").write_text("")
    elif damage == "cut":
        file.write_bytes(content[:-100])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"damaged and skipped: (rank_00000|state)"):
        assert run_training(shapes, run) == losses(whole)


# Stage 1 in bf16 has its losses spoilt below.
@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        (0, "fp32"),
        (3, "bf16"),
        pytest.param(1, "bf16", marks=pytest.mark.exhaustive),
        pytest.param(2, "fp32", marks=pytest.mark.exhaustive),
    ],
)
def test_a_loss_or_gradient_that_is_no_number_costs_its_step_and_many_stop_the_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int, precision: str
) -> None:
    loss = DenoiserTask.loss

    def spoilt(self: DenoiserTask, forward: Any, batch: Batch) -> Any:
        found, metrics = loss(self, forward, batch)
        position = int(batch.position_B[0])
        if position == 20:
            found = found + (found * 0).sqrt()  # adds nothing, and its gradient is NaN
        return (found * float("nan") if position >= 48 else found), metrics

    monkeypatch.setattr(DenoiserTask, "loss", spoilt)
    with pytest.raises(TrainingStopped, match=r"3 steps in a row up to 72 images.*000000000032"):
        run_training(
            shapes, tmp_path, zero_stage=zero_stage, precision=precision, max_skipped_steps=3, log_every_images=8
        )
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 2, 3, 4]
    assert [row["images_seen"] for row in rows if row["loss"] is None] == [24, 56, 64, 72]
    for kind in ("online", "ema_0.1"):
        for weights in SavedState(tmp_path / "checkpoints" / f"{32:012d}", 1).full(kind).values():
            assert torch.isfinite(weights).all()


def _without_a_loss(monkeypatch: pytest.MonkeyPatch, positions: range) -> None:
    loss = DenoiserTask.loss

    def spoilt(self: DenoiserTask, forward: Any, batch: Batch) -> Any:
        found, metrics = loss(self, forward, batch)
        return (found * float("nan") if int(batch.position_B[0]) in positions else found), metrics

    monkeypatch.setattr(DenoiserTask, "loss", spoilt)


DIVERGING: dict[str, Any] = {"max_skipped_steps": 5, "keep_checkpoints": 1, "checkpoint_every_images": 8}


def test_the_checkpoint_from_before_a_streak_of_skipped_steps_is_kept_named_and_gone_on_from(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _without_a_loss(patch, range(40, 200))
        with pytest.raises(TrainingStopped, match=r"from before the first of them is .*000000000040, and the same"):
            run_training(shapes, tmp_path, **DIVERGING)
    weights = json.loads((tmp_path / "weights" / "exported.json").read_text())
    assert weights["images_seen"] == 40
    assert [one.name for one in checkpoint.complete_checkpoints(tmp_path / "checkpoints")] == [f"{40:012d}"]
    # What spoilt the steps is gone: the same call ends as a run that never met it.
    assert run_training(shapes, tmp_path, **DIVERGING) == run_training(shapes, tmp_path / "well", **DIVERGING)


def test_a_streak_that_ended_between_two_lines_of_the_log_stops_the_run_too(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_a_loss(monkeypatch, range(24, 64))
    with pytest.raises(TrainingStopped, match=r"5 steps in a row up to 96 images.*000000000024"):
        run_training(shapes, tmp_path, log_every_images=96, **DIVERGING)


def test_a_run_that_never_learned_names_no_checkpoint(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_a_loss(monkeypatch, range(200))
    with pytest.raises(TrainingStopped, match=r"No checkpoint is from before.*lower lr"):
        run_training(shapes, tmp_path, **DIVERGING)
    assert not (tmp_path / "weights").exists()
    with pytest.warns(UserWarning, match="is from within a streak of skipped steps and skipped"):
        assert checkpoint.complete_checkpoints(tmp_path / "checkpoints") == []


def test_a_spike_is_skipped_and_the_rest_is_as_if_it_had_not_been() -> None:
    guard = UpdateGuard(10.0, CPU)
    skipped = []
    for step in range(300):
        veto = guard.veto(torch.tensor(50.0 if step in (5, 200) else 1.0 + 0.1 * (step % 3), dtype=torch.float64))
        guard.count(veto)
        skipped.append(float(veto))
    assert [step for step, veto in enumerate(skipped) if veto] == [200]  # the first comes before a mean is known
    assert (guard.num_skipped, guard.num_in_a_row) == (1, 0)
    again = UpdateGuard(10.0, CPU, guard.values())
    assert float(again.veto(torch.tensor(50.0, dtype=torch.float64))) == 1.0


def test_the_micro_batch_that_is_found_is_kept(shapes: Path, finished: Callable[..., Path], tmp_path: Path) -> None:
    found = run_training(shapes, tmp_path, micro_batch_size="auto", precision="fp32", zero_stage=0)
    [size] = json.loads((tmp_path / "micro_batch.json").read_text()).values()
    assert 8 % size == 0
    assert found == losses(finished(micro_batch_size=size, precision="fp32", zero_stage=0))


def test_from_the_loop_to_the_optimiser_there_are_two_frames_of_ours(shapes: Path, tmp_path: Path) -> None:
    stacks: list[list[str]] = []

    def note(*_: Any) -> None:
        frames = traceback.extract_stack()
        stacks.append([frame.name for frame in frames if f"{os.sep}segdiff_dist{os.sep}" in frame.filename])

    hook = register_optimizer_step_pre_hook(note)
    try:
        run_training(shapes, tmp_path, num_images=8)
    finally:
        hook.remove()
    assert stacks == [["train", "step"]]


@pytest.mark.parametrize(
    "option",
    [
        {"activation_checkpointing": True, "zero_stage": 0},
        pytest.param({"activation_checkpointing": True, "zero_stage": 3}, marks=pytest.mark.exhaustive),
        {"offload": "optimizer", "zero_stage": 2},
        {"offload": "all", "zero_stage": 3},
    ],
    ids=str,
)
def test_what_saves_memory_changes_no_loss(
    shapes: Path, finished: Callable[..., Path], tmp_path: Path, option: dict[str, Any]
) -> None:
    plain = losses(finished(precision="fp32", zero_stage=0))
    assert run_training(shapes, tmp_path, precision="fp32", **option) == pytest.approx(plain, rel=1e-5)


def test_a_full_disk_costs_a_checkpoint_and_not_the_one_before(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_is_full_for(64, monkeypatch)
    with pytest.warns(UserWarning, match=r"000000000064 could not be written.*No space"):
        run_training(shapes, tmp_path, num_images=80)
    assert [int(p.name) for p in complete_checkpoints(tmp_path / "checkpoints")] == [80, 32]
    assert not (tmp_path / "checkpoints" / f"{64:012d}").exists()


def snapshots(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "snapshots").iterdir())


def test_snapshots_and_old_checkpoints_are_kept_where_the_batch_divides_no_interval(
    shapes: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"global_batch_size": 12, "checkpoint_every_images": 16, "keep_checkpoints": 1}
    run_training(shapes, tmp_path, snapshot_every_images=32, keep_every_images=48, **options)
    assert snapshots(tmp_path) == [36, 72, 96]
    assert [int(p.name) for p in complete_checkpoints(tmp_path / "checkpoints")] == [96, 48]


def test_a_snapshot_that_a_kill_cut_short_is_not_used_and_made_again(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill is an error that no handler expects, at the worst moment: the first file of a snapshot is there."""
    full = SavedState.full

    def killed(self: SavedState, kind: str) -> dict[str, torch.Tensor]:
        if int(self.folder.name) == 96 and kind == "ema_0.1":
            raise ZeroDivisionError
        return full(self, kind)

    options: dict[str, Any] = {"snapshot_every_images": 32, "keep_checkpoints": 1}
    with monkeypatch.context() as patch:
        patch.setattr(SavedState, "full", killed)
        with pytest.raises(ZeroDivisionError):
            run_training(shapes, tmp_path, **options)
    assert snapshots(tmp_path) == [32, 64, 96]
    [newest] = complete_checkpoints(tmp_path / "checkpoints")
    assert not is_exported(newest, tmp_path)
    config = TrainConfig()
    with pytest.raises(InputProblems, match="there: 32, 64;"):
        average_snapshots(tmp_path, config, 0.07, 96)
    average_snapshots(tmp_path, config, 0.07)
    run_training(shapes, tmp_path, **options)
    average_snapshots(tmp_path, config, 0.07, 96)
    assert is_exported(newest, tmp_path)


def test_any_length_of_average_is_made_from_snapshots(shapes: Path, tmp_path: Path) -> None:
    """A run that kept two lengths gives a third one, as near as a run that kept that one had it."""
    options: dict[str, Any] = {
        "num_images": 192,
        "snapshot_every_images": 32,
        "precision": "fp32",
        "keep_checkpoints": 1,
    }
    run_training(shapes, tmp_path / "third", ema_lengths=(0.07,), **options)
    run_training(shapes, tmp_path / "two", ema_lengths=(0.05, 0.1), **options)
    config = TrainConfig(ema_lengths=(0.05, 0.1))
    weights, misfit = average_snapshots(tmp_path / "two", config, 0.07)
    exact = SavedState(tmp_path / "third" / "checkpoints" / f"{192:012d}", 1)
    online, wanted = exact.full("online"), exact.full("ema_0.07")
    moved = sum(float((online[k] - wanted[k]).square().sum()) for k in wanted) ** 0.5
    off = sum(float((weights[k] - wanted[k]).square().sum()) for k in wanted) ** 0.5
    assert misfit < 0.05
    assert off < 0.25 * moved
    with pytest.raises(InputProblems, match="snapshot-every-images"):
        average_snapshots(tmp_path / "nothing", config, 0.07)
