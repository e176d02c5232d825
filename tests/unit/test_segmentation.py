"""The auxiliary segmenter: it learns, the best on validation is kept, and what is saved is what is loaded."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests_support import flip_mask_bytes, write_shapes

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Shuffled, rank_positions
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import MODALITIES
from data_shards.store.shards import ShardSet
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import Segmenter
from segdiff_dist.segmentation.task import SegmenterTask
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.tracker import Tracker
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.loop import TrainingJob, train

CPU = torch.device("cpu")
CONFIG = SegmenterConfig(
    channels=(16, 32, 32),
    first_stride=1,
    train=TrainConfig(
        num_images=2_400,
        global_batch_size=16,
        micro_batch_size=16,
        lr=1e-2,
        warmup_images=32,
        ema_lengths=(0.05,),
        checkpoint_every_images=800,
        log_every_images=160,
        precision="fp32",
    ),
)


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    shards = ShardSet.open(shapes)
    task = SegmenterTask(shards, CONFIG, LoaderConfig(), folder / "weights", CPU)
    rows = shards.select(split="train")
    with Tracker(folder, TrackingConfig(enabled=False), "segmenter") as tracker:
        train(TrainingJob(task, shards, rows, LoaderConfig(), CONFIG.train, folder, tracker, CPU, {}))
    return folder


def test_it_labels_slices_it_has_not_seen(trained: Path, shapes: Path) -> None:
    shards, segmenter = ShardSet.open(shapes), Segmenter.load(trained / "weights")
    records = [shards.read(int(row)) for row in shards.select(split="test")]
    image = torch.stack([torch.from_numpy(r.image_HW) for r in records])
    mask = torch.stack([torch.from_numpy(r.mask_HW) for r in records])
    modality = torch.tensor([MODALITIES.index(r.meta.modality) for r in records])
    predicted = segmenter.predict(image, modality)
    assert predicted.dtype == torch.uint8
    for label in (1, 6, AMOS.body_id):
        overlap = ((predicted == label) & (mask == label)).sum()
        assert 2 * overlap / ((predicted == label).sum() + (mask == label).sum()) > 0.9
    # The grey that means liver in CT means body in MR: with the wrong modality it must read the image otherwise.
    assert (segmenter.predict(image, 1 - modality) != predicted).float().mean() > 0.02


def test_the_best_on_validation_is_kept(trained: Path) -> None:
    states = [json.loads(p.read_text()) for p in sorted((trained / "checkpoints").glob("*/state.json"))]
    scores = [state["best_score"] for state in states]
    assert scores == sorted(scores)
    assert scores[-1] > 0.9


def test_a_worse_checkpoint_does_not_replace_the_weights(trained: Path, shapes: Path, tmp_path: Path) -> None:
    """The run is taken up again with a learning rate that ruins it: what was exported stays what was best."""
    folder = tmp_path / "segmenter"
    shutil.copytree(trained, folder)
    best = Segmenter.load(folder / "weights").weights_sha256
    shards = ShardSet.open(shapes)
    config = replace(CONFIG.train, num_images=3_200, lr=0.5, lr_decay="constant", spike_factor=0.0)
    task = SegmenterTask(shards, CONFIG, LoaderConfig(), folder / "weights", CPU)
    rows = shards.select(split="train")
    with Tracker(folder, TrackingConfig(enabled=False), "segmenter") as tracker:
        train(TrainingJob(task, shards, rows, LoaderConfig(), config, folder, tracker, CPU, {}))
    last = json.loads((folder / "checkpoints" / f"{3_200:012d}" / "state.json").read_text())
    assert last["best_images_seen"] <= 2_400
    assert Segmenter.load(folder / "weights").weights_sha256 == best


def test_the_default_is_the_papers_net() -> None:
    net = SegmenterNet(SegmenterConfig(), AMOS.num_classes)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    widths = [m.out_channels for m in convolutions]
    assert widths[:6] == [16, 32, 64, 128, 256, 512]
    assert [m.stride for m in convolutions[:6]] == [(2, 2)] * 5 + [(1, 1)]
    assert {m.kernel_size for m in convolutions[:6]} == {(3, 3)}


@pytest.mark.parametrize("channels", [(8, 16), (8, 16, 24), (16, 32, 64, 128)])
def test_features_hold_every_level(channels: tuple[int, ...]) -> None:
    net = SegmenterNet(SegmenterConfig(channels=channels), AMOS.num_classes).eval()
    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    found = net.features(image, torch.tensor([0, 1, 0]))
    assert found.shape == (3, sum(channels))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(("channels", "first_stride"), [((8, 16), 2), ((8, 16, 24), 1), ((16, 32, 64, 128), 2)])
def test_one_pass_gives_labels_and_features_alike(channels: tuple[int, ...], first_stride: int) -> None:
    net = SegmenterNet(SegmenterConfig(channels=channels, first_stride=first_stride), AMOS.num_classes)
    segmenter = Segmenter(net, AMOS, "", CPU)
    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    modality = torch.tensor([0, 1, 0])
    with torch.no_grad():
        scores, _ = net.scores_and_features(image, modality)
    torch.testing.assert_close(scores, net(image, modality), rtol=0, atol=0)
    labels, features = segmenter.predict_and_features(image, modality)
    assert torch.equal(labels, scores.argmax(dim=1).to(torch.uint8))
    assert torch.equal(labels, segmenter.predict(image, modality))
    assert torch.equal(features, segmenter.features(image, modality))


def test_the_loss_depends_on_neither_micro_batch_nor_ranks(shapes: Path, tmp_path: Path) -> None:
    """Dice over eight slices at a time: 16 at once, or two times 8 that are summed up, give one gradient."""
    shards = ShardSet.open(shapes)
    task = SegmenterTask(shards, CONFIG, LoaderConfig(), tmp_path, CPU)
    order = Shuffled(shards.select(split="train"), 0)
    gradients = []
    for size in (16, 8):
        task.model.zero_grad()
        positions = rank_positions(0, micro_batch_size=size, num_micro_batches=16 // size, rank=0, world_size=1)
        batches = Loader(shards, order, positions, LoaderConfig(), batch_size=size, seed=0)
        for batch in itertools.islice(batches, 16 // size):
            loss, _ = task.loss(task.model, batch)
            (loss * size / 16).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    for micro in (4, "auto"):
        [found] = replace(CONFIG, train=replace(CONFIG.train, micro_batch_size=micro)).problems()
        assert "multiple of 8" in str(found)


def test_a_damaged_validation_slice_is_left_out_where_the_loader_is_to_skip_it(tmp_path: Path) -> None:
    shards = ShardSet.open(write_shapes(tmp_path / "set"))
    flip_mask_bytes(shards, shards.select(split="val")[:1])
    for on_corrupt in ("raise", "skip"):
        task = SegmenterTask(shards, CONFIG, LoaderConfig(on_corrupt=on_corrupt), tmp_path, CPU)
        with pytest.raises(ValueError) if on_corrupt == "raise" else pytest.warns(RuntimeWarning, match="skipped"):
            assert 0 <= task.validate(task.model, 0)["val_dice"] <= 1


def test_a_broken_segmenter_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "weights", tmp_path / "weights")
    file = tmp_path / "weights" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputProblems, match="not those that were written"):
        Segmenter.load(tmp_path / "weights")


def test_settings_out_of_range_are_named(tmp_path: Path) -> None:
    bad = SegmenterConfig(channels=(12, 24), first_stride=3)
    assert {p.field for p in bad.problems()} == {"segmenter.channels", "segmenter.first_stride"}
    assert SegmenterConfig().problems(48)[0].field == "segmenter.channels"
    assert SegmenterConfig().problems(256) == []
    with pytest.raises(InputProblems, match="train-segmenter"):
        Segmenter.load(tmp_path)
