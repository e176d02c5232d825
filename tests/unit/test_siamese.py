"""`diffusion.consistency_weight`: a second prediction that also knows the slice, and the first one near it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_support import CPU, DIFFUSION, NET, run_training

from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.siamese import ImagePrior, NoiseConsistency
from segdiff_dist.denoising.task import DenoiserTask, find_problems
from segdiff_dist.pixels import to_model_range

SIAMESE = replace(DIFFUSION, consistency_weight=0.5, consistency_ramp_images=100)


def batch_at(shapes: Path, *positions: int) -> Batch:
    """One slice at several positions of the order."""
    shards, num = ShardSet.open(shapes), len(positions)
    row = shards.read(int(shards.select(split="train")[0]))
    image, mask = torch.from_numpy(row.image_HW), torch.from_numpy(row.mask_HW)
    zero = torch.zeros(num, dtype=torch.int64)
    return Batch(image.expand(num, -1, -1), mask.expand(num, -1, -1), zero, zero, torch.tensor(positions))


def task_of(shapes: Path, run: Path, net: DenoiserConfig, diffusion: DiffusionConfig = SIAMESE) -> DenoiserTask:
    """A task whose slices matter from the start."""
    task = DenoiserTask(ShardSet.open(shapes), 16, net, diffusion, 3, run / "weights", CPU)
    if task.model.image_prior is not None:
        generator = torch.Generator().manual_seed(0)
        for parameter in task.model.image_prior.parameters():
            parameter.data.normal_(generator=generator)
    return task


def test_the_loss_is_the_papers() -> None:
    """L_m + L_i + weight L_c; the gradient of the last term reaches the prediction from the mask alone."""
    torch.manual_seed(0)
    f_m, f_i, target = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    f_m.requires_grad_()
    f_i.requires_grad_()
    weight_B, conv = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.nn.Module()
    conv.conv_in = torch.nn.Conv2d(1, 2, 3)
    loss, metrics = NoiseConsistency(ImagePrior(conv, 1, 1), 0.5, 100).further_terms(f_m, f_i, target, weight_B)

    def mean(difference: Tensor) -> Tensor:
        return (weight_B[:, None, None, None] * difference**2).mean()

    torch.testing.assert_close(loss, mean(f_i - target) + 0.5 * mean(f_m - f_i))
    torch.testing.assert_close(metrics["consistency_loss"][0], ((f_m - f_i) ** 2).mean((1, 2, 3)).sum().detach())
    of_m, of_i = torch.autograd.grad(loss, (f_m, f_i))
    factor = 2 * weight_B[:, None, None, None] / f_m.numel()
    torch.testing.assert_close(of_m, 0.5 * factor * (f_m - f_i).detach())
    torch.testing.assert_close(of_i, factor * (f_i - target).detach())


@pytest.mark.parametrize("net", [NET, replace(NET, net="efficient", attention_resolutions=(8,))])
def test_the_mask_alone_gives_the_ordinary_prediction_and_the_slice_counts_more_and_more(
    small_shapes: Path, tmp_path: Path, net: DenoiserConfig
) -> None:
    task, batch = task_of(small_shapes, tmp_path, net), batch_at(small_shapes, 0, 50, 100, 900)
    clean, shown, x, time = (
        to_model_range(batch.image_BHW),
        task.conditions(batch),
        torch.randn(4, 1, 16, 16),
        torch.rand(4),
    )
    assert task.consistency is not None
    weighted = task.consistency.weighted(clean, batch.position_B)
    torch.testing.assert_close(weighted, clean * torch.tensor([0.0, 0.5, 1.0, 1.0])[:, None, None, None])
    with torch.no_grad():
        from_mask, from_both = task.consistency.predict_pair(task.model, x, time, shown, weighted)
        ordinary = task.model(x, time, *shown)
    torch.testing.assert_close(from_mask, ordinary)
    differs = (from_both - ordinary).abs().flatten(1).amax(1) > 1e-4
    assert differs.tolist() == [False, True, True, True]


def test_the_same_samples_give_the_same_loss_in_any_split(small_shapes: Path, tmp_path: Path) -> None:
    diffusion = replace(SIAMESE, mask_dropout=0.4)
    task, batch = task_of(small_shapes, tmp_path, NET, diffusion), batch_at(small_shapes, 20, 60, 300)
    with torch.no_grad():
        whole, metrics = task.loss(task.model, batch)
        parts = [task.loss(task.model, batch_at(small_shapes, at))[0] for at in (20, 60, 300)]
        plain = task_of(small_shapes, tmp_path, NET, replace(DIFFUSION, mask_dropout=0.4))
        alone, _ = plain.loss(plain.model, batch)
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    more = (metrics["image_loss"][0] + 0.5 * metrics["consistency_loss"][0]) / 3
    torch.testing.assert_close(whole - alone, more)
    assert metrics["consistency_loss"][0] > 0


def test_one_run_in_any_stage_and_micro_batch_which_goes_on_and_exports_an_ordinary_net(
    small_shapes: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"num_images": 48, "log_every_images": 8, "precision": "fp32"}
    whole = run_training(small_shapes, tmp_path / "whole", NET, SIAMESE, micro_batch_size=8, **changes)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / f"{48:012d}")
    other: dict[str, Any] = {"micro_batch_size": 2, "zero_stage": 3}
    assert run_training(small_shapes, cut, NET, SIAMESE, **changes, **other) == pytest.approx(whole, rel=1e-5)
    assert "consistency_loss" in (tmp_path / "whole" / "log.jsonl").read_text()
    model = Denoiser.load(tmp_path / "whole" / "weights" / "online")
    assert model.state_dict().keys() == Denoiser(NET, model.label_table, 16).state_dict().keys()


def test_what_cannot_work_is_refused(small_shapes: Path) -> None:
    shards = ShardSet.open(small_shapes)
    [found] = find_problems(shards, 16, replace(NET, conditioning="none"), SIAMESE)
    assert (found.field, found.value) == ("diffusion.consistency_weight", "0.5")
    [found] = find_problems(shards, 16, replace(NET, kernels="triton"), SIAMESE)
    assert (found.field, found.value) == ("denoiser.kernels", "triton")
    [found] = replace(SIAMESE, contrastive_weight=0.1).problems()
    assert "three times" in found.remedy
    [found] = replace(SIAMESE, consistency_weight=0.0).problems()
    assert found.field == "diffusion.consistency_ramp_images"
    assert SIAMESE.passes == 2
