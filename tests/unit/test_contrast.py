"""`diffusion.contrastive_weight`: another prediction where organs are erased from the mask, the same elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_support import LIVER, SPLEEN
from torch import Tensor
from training_support import CPU, DIFFUSION, NET, run_training

from data_shards.labels import AMOS, LabelTable
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.conditioning import NULL_MASK, Conditions
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.contrast import ContrastiveTerm, regions
from segdiff_dist.denoising.network_shapes import denoiser_network
from segdiff_dist.denoising.task import DenoiserTask, find_problems

BODY = AMOS.body_id or 0
CONTRASTIVE = replace(DIFFUSION, contrastive_weight=0.5)


def masks(num: int) -> Tensor:
    """uint8 [num, 16, 16]: body, a liver of 6x6 and a spleen of 4x4."""
    mask_BHW = torch.full((num, 16, 16), BODY, dtype=torch.uint8)
    mask_BHW[:, 1:7, 1:7], mask_BHW[:, 10:14, 10:14] = LIVER, SPLEEN
    return mask_BHW


def term_of(table: LabelTable = AMOS, seed: int = 3) -> ContrastiveTerm:
    return ContrastiveTerm(table, 2.0, seed, CPU)


def test_each_mask_loses_one_or_more_organs_which_its_position_decides() -> None:
    shown, position, term = Conditions(masks(64), torch.zeros(64, dtype=torch.int64)), torch.arange(64), term_of()
    lost = term.erased(shown, position).mask_BHW
    organs = torch.stack([(lost == k).flatten(1).any(1) for k in (LIVER, SPLEEN)], dim=1)
    kept = {tuple(pair) for pair in organs.tolist()}
    assert kept == {(True, False), (False, True), (False, False)}
    changed = lost != shown.mask_BHW
    assert (lost[changed] == BODY).all()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(term.erased(shown, position[order]).mask_BHW, lost[order])
    assert not torch.equal(term_of(seed=4).erased(shown, position).mask_BHW, lost)
    nothing = shown._replace(mask_BHW=torch.full_like(shown.mask_BHW, BODY))
    assert torch.equal(term.erased(nothing, position).mask_BHW, nothing.mask_BHW)


@pytest.mark.parametrize("delta", [2.0, 0.5])
def test_the_loss_is_that_of_the_authors(delta: float) -> None:
    """Term by term as they write it: relu(delta - inside) - delta + outside. The second sample's mask is not shown."""
    torch.manual_seed(0)
    classes, (f, f_0, target) = torch.zeros(2, dtype=torch.int64), torch.randn(3, 2, 1, 16, 16)
    f_0.requires_grad_()
    mask, without = masks(2), masks(2)
    without[:, 1:7, 1:7] = BODY
    mask[1] = without[1] = NULL_MASK
    found = ContrastiveTerm(AMOS, delta, 0, CPU)(
        f, f_0, target, Conditions(mask, classes), Conditions(without, classes)
    )
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[0:8, 0:8] = False
    inside = (f - f_0)[0, 0, 1:7, 1:7].abs().mean()
    error = (f_0 - target)[0, 0][outside].abs().mean()
    torch.testing.assert_close(found.loss_B[0], torch.relu(delta - inside) - delta + error)
    torch.testing.assert_close(found.difference_B[0], inside)
    assert found.counts_B.tolist() == [1.0, 0.0]
    assert found.loss_B[1] == 0.0
    found.loss_B.sum().backward()
    gradient = f_0.grad
    assert gradient is not None
    # Beyond delta nothing is gained; the border and the second sample never matter.
    assert gradient[0, 0, 1:7, 1:7].any() == (delta > inside)
    border = ~outside
    border[1:7, 1:7] = False
    assert not gradient[0, 0][border].any()
    assert not gradient[1].any()


def test_regions_at_latent_positions_and_with_soft_edges() -> None:
    classes, mask, without = torch.zeros(1, dtype=torch.int64), masks(1), masks(1)
    without[:, 1:7, 1:7] = BODY
    inside, outside = regions(Conditions(mask, classes), Conditions(without, classes), 4)
    # Rows and columns 1 to 6 of 16: 9 of 16 pixels of the first position, and of those beside it.
    assert inside[0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert outside[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    edges = [torch.stack((ids, torch.full_like(ids, 200)), dim=1) for ids in (mask.clone(), without.clone())]
    edges[0][:, 0, 15, 0] = LIVER
    _, soft = regions(Conditions(mask, classes, edges[0]), Conditions(without, classes, edges[1]), 16)
    assert soft[0, 0, 14:, :2].sum() == 0


def test_the_same_samples_give_the_same_loss_in_any_split(small_shapes: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(small_shapes)
    row = shards.read(int(shards.select(split="train")[0]))
    image, mask = torch.from_numpy(row.image_HW), torch.from_numpy(row.mask_HW)
    zero, position = torch.zeros(4, dtype=torch.int64), torch.arange(20, 24)
    batch = Batch(image.expand(4, -1, -1), mask.expand(4, -1, -1), zero, zero, position)
    task, plain = (
        DenoiserTask(shards, 16, NET, replace(diffusion, mask_dropout=0.4), 3, tmp_path / "weights", CPU)
        for diffusion in (CONTRASTIVE, DIFFUSION)
    )
    with torch.no_grad():
        whole, metrics = task.loss(task.model, batch)
        parts = [
            task.loss(task.model, Batch(*(value[i : i + 1] for value in vars(batch).values() if value is not None)))
            for i in range(4)
        ]
        base, _ = plain.loss(plain.model, batch)
    torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).mean(), whole)
    for name, sums in metrics.items():
        torch.testing.assert_close(sum(each[name] for _, each in parts), sums, rtol=1e-4, atol=1e-5)
    assert 0 < metrics["contrastive_loss"][1] < 4
    torch.testing.assert_close(whole - base, 0.5 * metrics["contrastive_loss"][0] / 4)


def test_one_run_in_any_stage_and_micro_batch_which_goes_on(small_shapes: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_images": 48, "log_every_images": 8, "precision": "fp32"}
    whole = run_training(small_shapes, tmp_path / "whole", NET, CONTRASTIVE, micro_batch_size=8, **changes)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / f"{48:012d}")
    other: dict[str, Any] = {"micro_batch_size": 2, "zero_stage": 3}
    assert run_training(small_shapes, cut, NET, CONTRASTIVE, **changes, **other) == pytest.approx(whole, rel=1e-5)
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert "contrastive_difference" in log[0]
    assert "contrastive_loss" in log[0]


def test_what_cannot_work_is_refused(small_shapes: Path) -> None:
    shards = ShardSet.open(small_shapes)
    [found] = find_problems(shards, 16, replace(NET, conditioning="none"), CONTRASTIVE)
    assert (found.field, found.value) == ("diffusion.contrastive_weight", "0.5")
    [found] = replace(CONTRASTIVE, organ_dropout=0.1).problems()
    assert "the opposite" in found.remedy
    fields = [one.field for one in DiffusionConfig(contrastive_weight=-1.0, contrastive_delta=0.0).problems()]
    assert fields == ["diffusion.contrastive_weight", "diffusion.contrastive_delta"]
    shards.label_table = LabelTable("bodies", ("background", "body"))
    [found] = find_problems(shards, 16, NET, CONTRASTIVE)
    assert "no organs" in found.remedy


def test_the_plan_counts_both_predictions(small_shapes: Path) -> None:
    shards = ShardSet.open(small_shapes)
    once, twice = (denoiser_network(NET, shards, 16, CPU, passes=one.passes) for one in (DIFFUSION, CONTRASTIVE))
    assert twice.flops_per_image == 2 * once.flops_per_image
    assert twice.activations(4, "fp32", checkpointing=False) == 2 * once.activations(4, "fp32", checkpointing=False)
