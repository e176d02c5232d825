"""`denoiser.dropout`: what is dropped is a function of seed and position, in training alone."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_support import CPU, DIFFUSION, NET, run_training

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Shuffled, rank_positions
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.dropout import Draws, KeyedDropout
from segdiff_dist.denoising.task import DenoiserTask

DROPPING = replace(NET, dropout=0.3)


def test_a_share_is_dropped_and_the_rest_keeps_the_mean() -> None:
    draws, ones = Draws(), torch.ones(4, 8, 32, 32)
    layer, other = KeyedDropout(0.3, 0, draws), KeyedDropout(0.3, 1, draws)
    assert torch.equal(layer(ones), ones), "without positions"
    position = torch.tensor([5, 6, 7, 9])
    draws.at(3, position)
    found = layer(ones)
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(other(ones), found)
    draws.at(3, position.flip(0))
    assert torch.equal(layer(ones), found.flip(0))
    assert torch.equal(layer.eval()(ones), ones)


def test_the_loss_does_not_depend_on_the_micro_batch(small_shapes: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(small_shapes)
    order = Shuffled(shards.select(split="train"), 0)

    def losses(task: DenoiserTask, size: int) -> list[float]:
        positions = rank_positions(0, micro_batch_size=size, num_micro_batches=1, rank=0, world_size=1)
        loader = Loader(shards, order, positions, LoaderConfig(), batch_size=size, seed=0)
        with torch.no_grad():
            return [float(task.loss(task.model.train(), batch)[0]) for batch in itertools.islice(loader, 8 // size)]

    tasks = [DenoiserTask(shards, 16, net, DIFFUSION, 0, tmp_path / "w", CPU) for net in (DROPPING, NET)]
    [whole], halves = losses(tasks[0], 8), losses(tasks[0], 4)
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-5)
    assert losses(tasks[1], 8)[0] != pytest.approx(whole, rel=1e-3)


def test_a_training_goes_on_as_it_would_have(small_shapes: Path, tmp_path: Path) -> None:
    whole = run_training(small_shapes, tmp_path, DROPPING, num_images=32, checkpoint_every_images=16)
    shutil.rmtree(tmp_path / "checkpoints" / f"{32:012d}")
    assert run_training(small_shapes, tmp_path, DROPPING, num_images=32, checkpoint_every_images=16) == whole
    loaded = Denoiser.load(tmp_path / "weights" / "ema_0.05")
    assert loaded.draws is None, "images are sampled without dropout"


def test_what_dropout_does_not_go_with_is_named() -> None:
    assert {p.field for p in replace(NET, dropout=0.1, kernels="triton").problems()} == {"denoiser.kernels"}
    control = replace(NET, dropout=0.1, conditioning="controlnet", base="x")
    assert {p.field for p in control.problems()} == {"denoiser.dropout"}
    assert {p.field for p in replace(NET, dropout=1.0).problems()} == {"denoiser.dropout"}
