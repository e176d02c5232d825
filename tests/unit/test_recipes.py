"""The recipes' loss: the same however a batch is split; only positions decide what is dropped; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_support import ALPHAS_CUMPROD, LIVER, SPLEEN
from tests_support import write_shapes
from torch import Tensor
from training_support import NET

from data_shards.labels import AMOS, LabelTable
from data_shards.problems import InputProblems, refuse
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.conditioning import NULL_CLASS, NULL_MASK, Conditions
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.task import DenoiserTask, DiceTerm, find_problems
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import save_segmenter

CPU = torch.device("cpu")


def mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor changed."""
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return Batch(**{name: None if value is None else change(value) for name, value in fields.items()})


def batch_of(shards: ShardSet, positions: range) -> Batch:
    rows = shards.select(split="train")
    records = [shards.read(int(rows[p % len(rows)])) for p in positions]
    edges = [torch.from_numpy(r.edge_2HW) for r in records if r.edge_2HW is not None]
    return Batch(
        torch.stack([torch.from_numpy(r.image_HW) for r in records]),
        torch.stack([torch.from_numpy(r.mask_HW) for r in records]),
        torch.tensor([int(r.meta.modality == "MR") for r in records]),
        torch.zeros(len(records), dtype=torch.int64),
        torch.tensor(positions),
        torch.stack(edges) if edges else None,
    )


@pytest.fixture(scope="module")
def soft_shapes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shapes(tmp_path_factory.mktemp("soft") / "set", num_patients=2, soft_edge=True))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter") / "weights"
    torch.manual_seed(0)
    config = SegmenterConfig(channels=(16, 32))
    save_segmenter(folder, SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    return folder


@pytest.fixture
def make_task(soft_shapes: ShardSet, segmenter: Path, tmp_path: Path) -> Callable[..., DenoiserTask]:
    def make(**changes: Any) -> DenoiserTask:
        settings: dict[str, Any] = {"prediction_type": "v", "dice_segmenter": str(segmenter), **changes}
        config, diffusion = replace(NET, soft_masks=True), DiffusionConfig(**settings)
        refuse(find_problems(soft_shapes, 32, config, diffusion))
        return DenoiserTask(soft_shapes, 32, config, diffusion, 3, tmp_path / "weights", CPU)

    return make


EVERYTHING: dict[str, Any] = {
    "zero_terminal_snr": True,
    "snr_shift": 0.5,
    "loss_weighting": "edm",
    "mask_dropout": 0.2,
    "class_dropout": 0.2,
    "joint_dropout": 0.2,
    "organ_dropout": 0.7,
    "dice_weight": 0.3,
}


def test_the_loss_does_not_depend_on_how_a_batch_is_split(
    make_task: Callable[..., DenoiserTask], soft_shapes: ShardSet
) -> None:
    task = make_task(**EVERYTHING)
    with torch.no_grad():
        whole, metrics = task.loss(task.model, batch_of(soft_shapes, range(40, 48)))
        parts = [task.loss(task.model, batch_of(soft_shapes, range(p, p + 1))) for p in range(40, 48)]
    mean = torch.stack([loss for loss, _ in parts]).mean()
    torch.testing.assert_close(mean, whole, atol=1e-6, rtol=0)
    for name, sums in metrics.items():
        torch.testing.assert_close(torch.stack([t[name] for _, t in parts]).sum(0), sums, atol=1e-5, rtol=1e-5)
    assert sum(float(metrics[n][1]) for n in metrics if n.startswith("loss_t_")) == 8


def test_reported_sums_are_the_loss(make_task: Callable[..., DenoiserTask], soft_shapes: ShardSet) -> None:
    task = make_task()
    loss, metrics = task.loss(task.model, batch_of(soft_shapes, range(8)))
    assert set(metrics) == {"loss_t_0_250", "loss_t_250_500", "loss_t_500_750", "loss_t_750_1000"}
    assert not any(sums.requires_grad for sums in metrics.values())
    torch.testing.assert_close(sum(s[0] for s in metrics.values()) / 8, loss.detach())
    with torch.no_grad():
        weighted, told_again = make_task(loss_weighting="min_snr").loss(task.model, batch_of(soft_shapes, range(8)))
    assert not torch.equal(weighted, loss)
    for name, sums in metrics.items():  # the logged errors do not depend on the weighting
        torch.testing.assert_close(told_again[name], sums)


def test_the_network_sees_what_was_dropped(make_task: Callable[..., DenoiserTask], soft_shapes: ShardSet) -> None:
    seen: list[Conditions] = []

    def forward(x_t: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        seen.append(Conditions(*conditions))
        return torch.zeros_like(x_t)

    batch = batch_of(soft_shapes, range(12))
    make_task(mask_dropout=1.0).loss(forward, batch)
    make_task(class_dropout=1.0).loss(forward, batch)
    make_task(organ_dropout=1.0).loss(forward, batch)
    make_task().loss(forward, batch)
    no_mask, no_class, no_organs, whole = seen
    assert (no_mask.mask_BHW == NULL_MASK).all()
    assert torch.equal(no_mask.class_B, whole.class_B)
    assert (no_class.class_B == NULL_CLASS).all()
    assert torch.equal(no_class.mask_BHW, batch.mask_BHW)
    changed = no_organs.mask_BHW != batch.mask_BHW
    assert changed.any()
    assert (no_organs.mask_BHW[changed] == AMOS.body_id).all()
    assert whole.edge_B2HW is batch.edge_B2HW


def test_positions_decide_what_is_dropped(make_task: Callable[..., DenoiserTask], soft_shapes: ShardSet) -> None:
    """The same slice twelve times: neither its neighbours nor its place in the batch matter, its position does."""
    task = make_task(mask_dropout=0.3, class_dropout=0.3, organ_dropout=0.6)
    one = batch_of(soft_shapes, range(1))
    twelve = mapped(one, lambda tensor: tensor.repeat_interleave(12, dim=0))
    position, order = torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    given, shuffled = (task.conditions(replace(twelve, position_B=p)) for p in (position, position[order]))
    assert torch.equal(shuffled.mask_BHW, given.mask_BHW[order])
    assert torch.equal(shuffled.class_B, given.class_B[order])
    assert 0 < int((given.class_B == NULL_CLASS).sum()) < 12
    seen = {mask.numpy().tobytes() for mask in given.mask_BHW}
    assert len(seen) >= 4  # whole, hidden, without one organ or the other or both


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_terminal_snr": False, "timestep_sampling": "lognormal"},
        {"contrastive_weight": 0.1, "organ_dropout": 0.0},
    ],
)
def test_nothing_in_the_loss_waits_for_the_device(
    soft_shapes: ShardSet, segmenter: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """On the meta device whatever asks a tensor for its values fails."""
    meta = torch.device("meta")
    settings: dict[str, Any] = {**EVERYTHING, "prediction_type": "v", "dice_segmenter": str(segmenter), **changes}
    config = replace(NET, soft_masks=True)
    task = DenoiserTask(soft_shapes, 32, config, DiffusionConfig(**settings), 3, tmp_path, meta)
    on_host = batch_of(soft_shapes, range(4))
    batch = mapped(on_host, lambda tensor: tensor.to(meta))
    loss, metrics = task.loss(task.model, batch)
    loss.backward()
    assert {t.device for t in (loss, *metrics.values())} == {meta}


def test_soft_dice_by_hand(soft_shapes: ShardSet, segmenter: Path) -> None:
    term, batch = DiceTerm(segmenter, AMOS, CPU), batch_of(soft_shapes, range(3))
    batch.mask_BHW[2] = AMOS.body_id or 0  # nothing but body: nothing to judge
    x_0 = torch.rand(3, 1, 32, 32) * 2 - 1
    loss_B, counts_B = term(x_0, batch)
    p = term.net.scores(x_0, batch.modality_B).softmax(1)
    for i in range(2):
        dice = [
            2 * p[i, k][batch.mask_BHW[i] == k].sum() / (p[i, k].sum() + (batch.mask_BHW[i] == k).sum())
            for k in (SPLEEN, LIVER)
        ]
        torch.testing.assert_close(loss_B[i], 1 - sum(dice) / 2)
    assert counts_B.tolist() == [1.0, 1.0, 0.0]
    assert float(loss_B[2]) == 0.0


def test_a_perfect_segmentation_costs_nothing(soft_shapes: ShardSet, segmenter: Path) -> None:
    term, batch = DiceTerm(segmenter, AMOS, CPU), batch_of(soft_shapes, range(2))
    certain = 50.0 * torch.nn.functional.one_hot(batch.mask_BHW.long(), AMOS.num_classes).movedim(-1, 1).float()
    term.net.scores = lambda x, modality: certain  # type: ignore[method-assign]
    assert term(torch.zeros(2, 1, 32, 32), batch)[0].abs().max() < 1e-6


def test_the_dice_term_moves_the_denoiser_alone_and_counts_where_little_is_noised(
    make_task: Callable[..., DenoiserTask], soft_shapes: ShardSet
) -> None:
    batch = batch_of(soft_shapes, range(8))
    plain, with_dice = make_task(), make_task(dice_weight=0.5)
    base, _ = plain.loss(plain.model, batch)
    loss, metrics = with_dice.loss(with_dice.model, batch)
    torch.testing.assert_close((loss - base).detach(), 0.5 * metrics["dice_loss"][0] / 8)
    t = with_dice.process.noised(batch, with_dice.seed, use_kernels=False).level_B
    torch.testing.assert_close(metrics["dice_loss"][1], ALPHAS_CUMPROD[t].sum())
    loss.backward()
    base.backward()
    assert with_dice.dice_term is not None
    assert all(p.grad is None for p in with_dice.dice_term.net.parameters())
    pairs = zip(with_dice.model.parameters(), plain.model.parameters(), strict=True)
    assert any(not torch.equal(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None)


def test_weights_say_how_they_were_trained(make_task: Callable[..., DenoiserTask], segmenter: Path) -> None:
    import hashlib

    task = make_task(**EVERYTHING)
    task.export("online", task.model.state_dict())
    about = json.loads((task.weights / "online" / "segdiff.json").read_text())
    assert about["diffusion"]["mask_dropout"] == 0.2
    assert about["diffusion"]["snr_shift"] == 0.5
    digest = hashlib.sha256((segmenter / "model.safetensors").read_bytes()).hexdigest()
    assert about["dice_segmenter_sha256"] == digest
    make_task(**EVERYTHING)  # goes on
    config = SegmenterConfig(channels=(16, 32))
    save_segmenter(segmenter.parent / "another", SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    with pytest.raises(InputProblems, match="not the weights the run was started with"):
        make_task(**EVERYTHING, dice_segmenter=str(segmenter.parent / "another"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_dropout": 0.6, "class_dropout": 0.6}, "add up to more than 1"),
        ({"organ_dropout": 1.5}, "organ_dropout: 1.5"),
        ({"zero_terminal_snr": True, "timestep_sampling": "lognormal"}, "never draws the last timestep"),
        ({"snr_shift": 0.0}, "snr_shift"),
        ({"edm_sigma_data": 0.0}, "edm_sigma_data"),
        ({"dice_weight": 0.1, "dice_segmenter": None}, "train-segmenter"),
        ({"dice_weight": 0.1, "dice_segmenter": "/nowhere"}, "train-segmenter"),
    ],
)
def test_settings_out_of_range_are_refused(
    make_task: Callable[..., DenoiserTask], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputProblems, match=words):
        make_task(**changes)


def test_settings_that_do_not_go_together_are_refused(shapes: Path, soft_shapes: ShardSet, tmp_path: Path) -> None:
    hard = ShardSet.open(shapes)
    [found] = find_problems(hard, 32, replace(NET, soft_masks=True), DiffusionConfig())
    assert "keeps no soft edges" in found.value
    [found] = find_problems(hard, 32, replace(NET, class_conditioning=False), DiffusionConfig(joint_dropout=0.1))
    assert "class_conditioning" in found.remedy
    other = LabelTable("other", AMOS.names)
    settings = SegmenterConfig(channels=(16, 32))
    save_segmenter(tmp_path / "s", SegmenterNet(settings, AMOS.num_classes).state_dict(), settings, other)
    with pytest.raises(InputProblems, match="label table"):
        DiceTerm(tmp_path / "s", AMOS, CPU)
