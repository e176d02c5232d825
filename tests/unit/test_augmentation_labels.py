"""`denoiser.augmentation_labels`: the net knows what the loader did to a slice; 0 is a slice as it is stored."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_support import sample_and_compare_pipeline
from training_support import CPU, DIFFUSION, LABELLED, LOADER, NET, run_training

from data_shards.feed.augment import NUM_LABELS, augmentation_at
from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Shuffled, rank_positions
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.task import DenoiserTask

AUGMENTED = replace(LOADER, flip=True, rotate_degrees=20.0, zoom=0.2, jitter_mr=0.3, crop="random", crop_size=8)


def batches(shapes: Path, config: LoaderConfig, size: int, start: int = 0) -> list[Batch]:
    """Of 8 images together."""
    shards = ShardSet.open(shapes)
    order = Shuffled(shards.select(split="train"), 0)
    positions = rank_positions(start, micro_batch_size=size, num_micro_batches=1, rank=0, world_size=1)
    return list(islice(Loader(shards, order, positions, config, batch_size=size, seed=3), 8 // size))


def test_labels_say_what_was_done_and_are_a_function_of_the_position(small_shapes: Path) -> None:
    [whole] = batches(small_shapes, AUGMENTED, 8)
    assert whole.augmentation_BA is not None
    assert whole.augmentation_BA.shape == (8, NUM_LABELS)
    halves = torch.cat(
        [b.augmentation_BA for b in batches(small_shapes, AUGMENTED, 4) if b.augmentation_BA is not None]
    )
    assert torch.equal(halves, whole.augmentation_BA)
    [later] = batches(small_shapes, AUGMENTED, 8, start=4)
    assert torch.equal(later.augmentation_BA[:4], whole.augmentation_BA[4:])  # type: ignore[index]
    is_ct_B = whole.modality_B == 0
    assert not whole.augmentation_BA[is_ct_B, 6:].any(), "CT keeps its HU"
    assert whole.augmentation_BA[~is_ct_B, 6:].all()

    numbers = augmentation_at(np.arange(8), 3, AUGMENTED, 16)
    found = dict(zip(("flip", "sin", "cos", "zoom", "top", "left"), whole.augmentation_BA.numpy().T, strict=False))
    np.testing.assert_array_equal(found["flip"], numbers.flip)
    np.testing.assert_allclose(np.rad2deg(np.arctan2(found["sin"], 1 - found["cos"])), numbers.angle, atol=1e-3)
    np.testing.assert_allclose(2 ** found["zoom"], numbers.zoom, rtol=1e-6)
    np.testing.assert_allclose(8 * found["top"] + 4, numbers.top, atol=1e-5)
    np.testing.assert_allclose(8 * found["left"] + 4, numbers.left, atol=1e-5)


def test_a_slice_as_it_is_stored_has_no_label(small_shapes: Path) -> None:
    """A crop at the centre is one: sampling gives it."""
    assert batches(small_shapes, LoaderConfig(crop_size=8), 8)[0].augmentation_BA is None
    [whole] = batches(small_shapes, LoaderConfig(flip=True), 8)
    assert whole.augmentation_BA is not None
    assert not whole.augmentation_BA[:, 1:].any()


def test_the_net_begins_as_the_one_without_and_sampling_adds_nothing(small_shapes: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(small_shapes)
    tasks = [DenoiserTask(shards, 16, net, DIFFUSION, 0, tmp_path / "w", CPU) for net in (LABELLED, NET)]
    [batch] = batches(small_shapes, replace(LOADER, flip=True, zoom=0.2), 8)
    assert torch.equal(tasks[0].loss(tasks[0].model, batch)[0], tasks[1].loss(tasks[1].model, batch)[0])

    model = tasks[0].model
    assert model.augmentation_embedding is not None
    torch.nn.init.normal_(model.augmentation_embedding.linear.weight)
    x, time, shown = torch.randn(8, 1, 16, 16), torch.full((8,), 400), tasks[0].conditions(batch)
    with torch.no_grad():
        stored = model(x, time, *shown._replace(augmentation_BA=None))
        assert torch.equal(stored, model(x, time, *shown._replace(augmentation_BA=torch.zeros(8, NUM_LABELS))))
        assert torch.equal(stored, tasks[1].model(x, time, *shown[:-1]))
        assert not torch.equal(stored, model(x, time, *shown))


def test_a_training_goes_on_as_it_would_have_and_a_pipeline_samples_as_segdiff_does(
    small_shapes: Path, tmp_path: Path
) -> None:
    whole = run_training(small_shapes, tmp_path, LABELLED, num_images=32, checkpoint_every_images=16)
    shutil.rmtree(tmp_path / "checkpoints" / f"{32:012d}")
    assert run_training(small_shapes, tmp_path, LABELLED, num_images=32, checkpoint_every_images=16) == whole
    loaded = Denoiser.load(tmp_path / "weights" / "ema_0.05")
    assert loaded.augmentation_embedding is not None
    assert loaded.augmentation_embedding.linear.weight.abs().max() > 0, "it was learned"
    weights = (tmp_path / "weights" / "ema_0.05").rename(tmp_path / "weights" / "ema")
    sample_and_compare_pipeline(weights, small_shapes, num=2)


def test_what_labels_do_not_go_with_is_named(
    small_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = replace(LABELLED, conditioning="controlnet", base="x")
    assert {p.field for p in control.problems()} == {"denoiser.augmentation_labels"}
    flags = ["--config", "smoke", "--data", str(small_shapes), "--run", str(tmp_path), "--loader.no-flip"]
    assert main(["train", *flags, "--denoiser.augmentation-labels", "--denoiser.attention-resolutions", "8"]) == 2
    assert "the loader does not augment: give --loader.flip" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
