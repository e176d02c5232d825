"""The autoencoder of latent diffusion: its losses, its training by the command, and what it leaves."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import CPU

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Shuffled, rank_positions
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.autoencoding.autoencoder import Autoencoder
from segdiff_dist.autoencoding.config import AutoencoderConfig
from segdiff_dist.autoencoding.network import AutoencoderNet
from segdiff_dist.autoencoding.task import AutoencoderTask, hinge_losses, kl_divergence
from segdiff_dist.cli import main
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import save_segmenter

SMALL = AutoencoderConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    discriminator_start=8,
    discriminator_channels=8,
    discriminator_layers=2,
)


def task_of(shapes: Path, weights: Path, **changes: Any) -> AutoencoderTask:
    shards = ShardSet.open(shapes)
    return AutoencoderTask(shards, shards.size, replace(SMALL, **changes), LoaderConfig(), weights, CPU)


def batches(shapes: Path, size: int, count: int) -> list[Batch]:
    shards = ShardSet.open(shapes)
    positions = rank_positions(0, micro_batch_size=size, num_micro_batches=1, rank=0, world_size=1)
    order = Shuffled(shards.select(split="train"), 0)
    return list(itertools.islice(Loader(shards, order, positions, LoaderConfig(), batch_size=size, seed=0), count))


def gradients(task: AutoencoderTask, batch: Batch) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The loss, and the gradients of the autoencoder and of the discriminator."""
    task.model.zero_grad()
    loss, _ = task.loss(task.model, batch)
    loss.backward()
    assert isinstance(task.model, AutoencoderNet)
    parts = (task.model.autoencoder, task.model.discriminator)
    both = [[torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()] for net in parts]
    return loss.item(), *(torch.cat([g.flatten() for g in part]).clone() for part in both)


def untrained_segmenter(folder: Path) -> Path:
    torch.manual_seed(0)
    config = SegmenterConfig(channels=(8, 16), first_stride=1)
    save_segmenter(folder, SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    return folder


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    mean, log_variance = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


def test_the_hinge_losses_stop_where_the_discriminator_is_right() -> None:
    right, wrong = torch.tensor([[3.0, 1.5]]), torch.tensor([[-2.0, 0.0]])
    generator, discriminator = hinge_losses(wrong, right, wrong - 1.0)
    assert (generator.item(), discriminator.item()) == (1.0, 0.0)
    _, discriminator = hinge_losses(wrong, wrong, right)
    assert discriminator.item() == pytest.approx(0.5 * ((3.0 + 1.0) + (4.0 + 2.5)) / 2)


def test_each_network_learns_from_its_own_loss_alone(small_shapes: Path, tmp_path: Path) -> None:
    """Images from discriminator_start on: the weight of the adversarial loss moves the autoencoder alone, and the
    value of the loss does not change."""
    before, after = batches(small_shapes, 8, 2)
    found = [gradients(task_of(small_shapes, tmp_path, discriminator_weight=w), after) for w in (0.1, 1.0)]
    (weak, weak_own, weak_other), (strong, strong_own, strong_other) = found
    assert weak == strong
    assert torch.equal(weak_other, strong_other)
    assert weak_other.any()
    assert (weak_own - strong_own).abs().max() > 1e-4
    task = task_of(small_shapes, tmp_path)
    _, own, other = gradients(task, before)
    assert own.any()
    assert not other.any()


def test_the_loss_does_not_depend_on_the_micro_batch(small_shapes: Path, tmp_path: Path) -> None:
    task = task_of(small_shapes, tmp_path, segmenter=str(untrained_segmenter(tmp_path / "segmenter")))
    [whole] = batches(small_shapes, 16, 1)
    _, *expected = gradients(task, whole)
    halves = [gradients(task, half)[1:] for half in batches(small_shapes, 8, 2)]
    for both, one in zip(zip(*halves, strict=True), expected, strict=True):
        torch.testing.assert_close((both[0] + both[1]) / 2, one, rtol=1e-3, atol=1e-6)


def test_the_command_trains_goes_on_and_measures_what_it_made(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained_segmenter(tmp_path / "run/segmenter/weights")
    flags = ["--config", "smoke", "--data", str(shapes), "--tracking.no-enabled"]
    flags += ["--autoencoder.segmenter", str(tmp_path / "run")]

    def made(run: Path) -> tuple[str, str, bytes]:
        assert main(["train-autoencoder", "--run", str(run), *flags]) == 0
        said, folder = capsys.readouterr().out, run / "autoencoder"
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        parts = ("loss", "l1", "kl", "perceptual", "generator", "discriminator")
        losses = str([[line[name] for name in parts] for line in lines])
        return said, losses, (folder / "weights/diffusion_pytorch_model.safetensors").read_bytes()

    run = tmp_path / "run"
    said, losses, weights = made(run)
    for word in (
        "PSNR",
        "sharpness",
        "power beside",
        "Dice of the segmenter",
        "--denoiser.space latent --denoiser.autoencoder",
    ):
        assert word in said
    figures = json.loads((run / "autoencoder/reconstructions.json").read_text())
    assert figures["num_slices"] == 24
    assert figures["psnr_db"]["value"] > 12
    assert figures["dice_real"]["num_patients"] == 4
    assert (run / "autoencoder/reconstructions.png").is_file()
    assert "nothing to do" in made(run)[0]

    shutil.rmtree(run / "autoencoder/checkpoints" / f"{128:012d}")
    shutil.rmtree(run / "autoencoder/weights")
    picture = run / "autoencoder/reconstructions.png"
    picture.unlink()
    picture.mkdir()  # as if the command ended before the picture
    (run / "autoencoder/reconstructions.json").unlink()
    assert main(["train-autoencoder", "--run", str(run), *flags]) == 1
    picture.rmdir()
    assert made(run)[1:] == (losses, weights)
    assert picture.is_file()


def test_what_is_saved_is_what_diffusers_reads(shapes: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    task = task_of(shapes, tmp_path, discriminator_weight=0.0)
    assert task.score == "val_psnr_db"
    task.export("ema_0.05", {name: value.clone() for name, value in task.model.state_dict().items()})
    [batch] = batches(shapes, 4, 1)
    ours = Autoencoder.load(tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path)
    latent = ours.encode(batch.image_BHW)
    assert latent.shape == (4, 4, 16, 16)
    assert ours.decode(latent).shape == (4, 1, 32, 32)
    x = batch.image_BHW[:, None] / 127.5 - 1.0
    torch.testing.assert_close(theirs.encode(x).latent_dist.mean, latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(task.model(batch.image_BHW), ours.decode(latent), rtol=1e-4, atol=1e-5)
    assert {p.field for p in ours.problems(64, ("T1",))} == {"size", "modalities"}
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputProblems, match="not those that were written"):
        Autoencoder.load(tmp_path)


def test_settings_that_cannot_work_are_named(tmp_path: Path) -> None:
    bad = replace(SMALL, block_out_channels=(8, 10), segmenter=str(tmp_path))
    assert {p.field for p in bad.problems()} == {"autoencoder.block_out_channels", "autoencoder.segmenter"}
    assert {p.field for p in replace(SMALL, discriminator_layers=4).problems(33)} == {
        "autoencoder.block_out_channels",
        "autoencoder.discriminator_layers",
    }
    assert AutoencoderConfig().problems(256) == []
    with pytest.raises(InputProblems, match="train-autoencoder"):
        Autoencoder.load(tmp_path)
