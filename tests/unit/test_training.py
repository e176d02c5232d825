"""The training loop on DeepSpeed in one process: learning, exact resume, what a checkpoint holds, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import write_shapes

from data_shards.feed.loader import LoaderConfig
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.denoiser import Denoiser, DenoiserConfig
from segdiff_dist.denoising import DenoiserTask
from segdiff_dist.diffusion import DiffusionConfig
from segdiff_dist.engine import Engine, TrainConfig, learning_rate
from segdiff_dist.tracking import Tracker, TrackingConfig
from segdiff_dist.training import train

CPU = torch.device("cpu")
NET = DenoiserConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=(16,))
DIFFUSION = DiffusionConfig(prediction_type="v", zero_terminal_snr=True)
QUICK: dict[str, Any] = {
    "num_images": 96,
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "lr": 2e-3,
    "warmup_images": 16,
    "ema_halflife_images": 30,
    "checkpoint_every_images": 32,
    "log_every_images": 16,
}


def run_training(shapes: Path, run: Path, **changes: Any) -> list[float]:
    """Train as the stage does; returns the logged losses."""
    shards = ShardSet.open(shapes)
    config = TrainConfig(**{**QUICK, **changes})
    task = DenoiserTask(shards, shards.size, NET, DIFFUSION, config.seed, run / "weights", CPU)
    with Tracker(run, TrackingConfig(enabled=False), "train") as tracker:
        train(
            task,
            shards,
            shards.select(split="train"),
            LoaderConfig(flip=True, rotate_degrees=10),
            config,
            run,
            tracker,
            CPU,
            "config: here\n",
        )
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def exported(run: Path) -> bytes:
    return (run / "weights" / "ema" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize(("precision", "zero_stage"), [("bf16", 1), ("fp32", 0), ("bf16", 3)])
def test_a_resumed_run_is_bit_identical(shapes: Path, tmp_path: Path, precision: str, zero_stage: int) -> None:
    whole = run_training(shapes, tmp_path / "whole", precision=precision, zero_stage=zero_stage)
    assert whole[-1] < 0.7 * whole[0]
    # The other run loses its last checkpoint and half-writes another: it goes on from the one before.
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / f"{96:012d}")
    (cut / "checkpoints" / f"{64:012d}" / "COMPLETE").unlink()
    with pytest.warns(UserWarning, match="incomplete"):
        assert run_training(shapes, cut, precision=precision, zero_stage=zero_stage) == whole
    assert exported(cut) == exported(tmp_path / "whole")


def test_a_checkpoint_holds_what_is_promised(shapes: Path, tmp_path: Path) -> None:
    run_training(shapes, tmp_path, keep_checkpoints=2)
    folders = sorted(p for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert [int(p.name) for p in folders] == [64, 96]
    assert (folders[-1] / "COMPLETE").exists()
    assert json.loads((folders[-1] / "state.json").read_text())["images_seen"] == 96
    assert (folders[-1] / "config.yaml").read_text() == "config: here\n"
    assert Denoiser.load(tmp_path / "weights" / "ema").label_table == AMOS


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 2)])
def test_deepspeed_trains_what_plain_pytorch_trains(
    shapes: Path, tmp_path: Path, precision: str, zero_stage: int
) -> None:
    """The referee has no DeepSpeed: one loop over the same batches, gradients averaged over the micro-batches."""
    steps = 6
    deepspeed = run_training(
        shapes, tmp_path, precision=precision, zero_stage=zero_stage, num_images=8 * steps, log_every_images=8
    )
    plain = plain_losses(shapes, steps)
    # bf16 keeps 8 bits of every weight and activation, an error of up to 0.4 % in each; ten times that is allowed.
    assert deepspeed == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 4e-2)


def plain_losses(shapes: Path, steps: int) -> list[float]:
    from data_shards.feed.loader import Loader
    from data_shards.feed.order import Shuffled, rank_positions

    shards, config = ShardSet.open(shapes), TrainConfig(**{**QUICK, "num_images": 8 * steps})
    task = DenoiserTask(shards, shards.size, NET, DIFFUSION, 0, Path("unused"), CPU)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    positions = rank_positions(0, micro_batch_size=4, num_micro_batches=2, rank=0, world_size=1)
    rows = shards.select(split="train")
    batches = iter(
        Loader(shards, Shuffled(rows, 0), positions, LoaderConfig(flip=True, rotate_degrees=10), batch_size=4, seed=0)
    )
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(8 * step, config)
        micro = []
        for _ in range(2):
            loss, _ = task.loss(task.model, next(batches))
            (loss / 2).backward()
            micro.append(loss.item())
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(micro) / 2)
    return losses


def test_the_loss_depends_on_positions_and_not_on_their_batching(shapes: Path, tmp_path: Path) -> None:
    accumulated = run_training(shapes, tmp_path / "a", precision="fp32", micro_batch_size=2)
    at_once = run_training(shapes, tmp_path / "b", precision="fp32", micro_batch_size=8)
    assert accumulated == pytest.approx(at_once, rel=1e-4)


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("fp32", 2), ("bf16", 1), ("bf16", 3)])
def test_the_ema_is_the_average_of_the_fp32_weights(precision: str, zero_stage: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(global_batch_size=2, micro_batch_size=2, lr=0.1, precision=precision, zero_stage=zero_stage)  # type: ignore[arg-type]
    engine = Engine(model, config, CPU)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = dict(start)
    for _ in range(3):
        engine.backward(engine(torch.randn(2, 8, dtype=dtype)).float().square().mean())
        engine.step()
        engine.update_ema(0.0)
        now = engine.full_weights()  # with decay 0 the average is the weights themselves
        for name in expected:
            expected[name] = now[name].clone()
    moved = {name: (expected[name] - start[name]).abs().max() for name in start}
    assert all(0.05 < float(m) < 0.5 for m in moved.values())  # AdamW moves by about lr a step
    engine.update_ema(1.0)  # and with decay 1 it stays
    for name, value in engine.full_weights().items():
        assert torch.equal(value, expected[name])
    engine.close()


def test_ctrl_c_saves_and_the_same_call_goes_on(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_training(shapes, tmp_path / "whole")
    loss = DenoiserTask.loss

    def interrupted(self: DenoiserTask, forward: Any, batch: Batch) -> Any:
        if int(batch.position_B[0]) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, forward, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserTask, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_training(shapes, tmp_path / "cut")
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir() if p.is_dir())[-1] == f"{48:012d}"
    assert run_training(shapes, tmp_path / "cut") == whole
    assert exported(tmp_path / "cut") == exported(tmp_path / "whole")


def test_a_checkpoint_of_other_data_or_ranks_is_refused(shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(shapes, run, num_images=32)
    other = write_shapes(tmp_path / "other", num_patients=3)
    with pytest.raises(InputProblems, match="shards_digest"):
        run_training(other, run)
    state = run / "checkpoints" / f"{32:012d}" / "state.json"
    state.write_text(state.read_text().replace('"ranks": 1', '"ranks": 4'))
    with pytest.raises(InputProblems, match="start it on 4 ranks again"):
        run_training(shapes, run)


def test_a_loss_that_is_no_number_stops_the_run(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenoiserTask, "loss", lambda self, forward, batch: _nan_loss(self, forward, batch))
    with pytest.raises(FloatingPointError, match="at 16 images"):
        run_training(shapes, tmp_path)
    assert not list((tmp_path / "weights").glob("*"))


_loss = DenoiserTask.loss


def _nan_loss(self: DenoiserTask, forward: Any, batch: Batch) -> Any:
    loss, told = _loss(self, forward, batch)
    return loss * float("nan"), told
