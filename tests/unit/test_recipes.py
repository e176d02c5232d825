"""The recipes' mathematics: weights of timesteps, what is dropped and when, and that only positions decide."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import write_shapes
from torch import Tensor

from data_shards.labels import AMOS, BACKGROUND, LabelTable
from data_shards.problems import InputProblems, refuse
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.conditioning import NULL_CLASS, NULL_MASK, Conditions, drop_conditions, guided
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig, LossWeighting, PredictionType
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.diffusion import make_scheduler
from segdiff_dist.denoising.loss_weighting import (
    lognormal_timesteps,
    loss_weights,
    prediction_error_per_x0_error,
    sums_by_timestep,
)
from segdiff_dist.denoising.organ_dropout import drop_organs, relabelled
from segdiff_dist.denoising.task import DenoiserTask, DiceTerm, find_problems
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import save_segmenter
from segdiff_kernels.noising import predicted_x_0, prediction_target, q_sample

CPU = torch.device("cpu")
SMALL = DenoiserConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=(16,))
PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v", "x0")
ALPHAS_CUMPROD = make_scheduler(DiffusionConfig()).alphas_cumprod
LIVER, SPLEEN = 6, 1


def weights_of(weighting: LossWeighting, prediction: PredictionType, alphas_cumprod: Tensor = ALPHAS_CUMPROD) -> Tensor:
    return loss_weights(weighting, prediction, alphas_cumprod, min_snr_gamma=5.0, edm_sigma_data=0.5).double()


# Loss weighting


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_error_of_x_0_shows_in_the_prediction_by_the_stated_factor(prediction: PredictionType) -> None:
    """Take a wrong x_0 at a given x_t, express both as predictions, and compare the squared errors."""
    torch.manual_seed(0)
    timestep = torch.tensor([1, 300, 700, 999])
    a = ALPHAS_CUMPROD[timestep].double()
    a4 = a[:, None, None, None]
    x_0, noise = torch.rand(4, 1, 8, 8).double() * 2 - 1, torch.randn(4, 1, 8, 8).double()
    x_t, wrong_x_0 = q_sample(x_0, noise, a), x_0 + 0.1 * torch.randn_like(x_0)
    wrong_noise = (x_t - a4.sqrt() * wrong_x_0) / (1 - a4).sqrt()
    target, wrong = (prediction_target(prediction, x, n, a) for x, n in ((x_0, noise), (wrong_x_0, wrong_noise)))
    torch.testing.assert_close(predicted_x_0(prediction, wrong, x_t, a), wrong_x_0)
    measured = (wrong - target).square().mean((1, 2, 3)) / (wrong_x_0 - x_0).square().mean((1, 2, 3))
    torch.testing.assert_close(measured, prediction_error_per_x0_error(prediction, ALPHAS_CUMPROD)[timestep])


@pytest.mark.parametrize("weighting", ["min_snr", "edm"])
def test_the_same_x_0_error_costs_the_same_whatever_is_predicted(weighting: LossWeighting) -> None:
    costs = [weights_of(weighting, p) * prediction_error_per_x0_error(p, ALPHAS_CUMPROD) for p in PREDICTIONS]
    for cost in costs[1:]:
        torch.testing.assert_close(cost, costs[0], rtol=1e-6, atol=0)


def test_weights_are_those_of_the_papers() -> None:
    snr = ALPHAS_CUMPROD.double() / (1 - ALPHAS_CUMPROD.double())
    assert (weights_of("none", "v") == 1).all()
    # Hang et al. 2023: min(SNR, gamma) / SNR for the noise, which never exceeds 1 and is 1 where SNR < gamma.
    min_snr = weights_of("min_snr", "epsilon")
    assert (min_snr[snr < 5] == 1).all()
    torch.testing.assert_close(min_snr[0], 5 / snr[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(weights_of("min_snr", "x0"), snr.clamp(max=5), rtol=1e-6, atol=0)
    # Karras et al. 2022, table 1, with sigma = sqrt(1 / SNR) and sigma_data = 0.5.
    sigma = (1 / snr).sqrt()
    expected = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    torch.testing.assert_close(weights_of("edm", "x0"), expected, rtol=1e-5, atol=0)


def test_pure_noise_has_finite_weights() -> None:
    a = make_scheduler(DiffusionConfig(prediction_type="v", zero_terminal_snr=True)).alphas_cumprod
    for prediction in ("v", "x0"):
        for weighting, last in (("min_snr", 0.0), ("edm", 4.0), ("none", 1.0)):
            weights = weights_of(weighting, prediction, a)  # type: ignore[arg-type]
            assert torch.isfinite(weights).all()
            assert float(weights[-1]) == last


def test_lognormal_timesteps_have_the_wanted_noise_levels() -> None:
    position = torch.arange(20_000)
    t = lognormal_timesteps(3, position, ALPHAS_CUMPROD, -1.2, 1.2)
    assert torch.equal(t[4_000:4_010], lognormal_timesteps(3, position[4_000:4_010], ALPHAS_CUMPROD, -1.2, 1.2))
    log_sigma = 0.5 * ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).log()
    drawn = log_sigma[t]
    assert abs(float(drawn.mean()) + 1.2) < 0.02
    assert abs(float(drawn.std()) - 1.2) < 0.02
    assert float((drawn < -1.2).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert 0 <= int(t.min()) <= int(t.max()) <= 999


def test_sums_by_timestep_are_of_quarters() -> None:
    error, t = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 249, 250, 999, 750])
    sums = sums_by_timestep(error, t, 1000)
    assert {name: s.tolist() for name, s in sums.items()} == {
        "loss_t_0_250": [3.0, 2.0],
        "loss_t_250_500": [4.0, 1.0],
        "loss_t_500_750": [0.0, 0.0],
        "loss_t_750_1000": [24.0, 2.0],
    }
    odd = sums_by_timestep(torch.ones(10), torch.arange(10), 10)
    assert [(name, int(s[1])) for name, s in odd.items()] == [
        ("loss_t_0_3", 3),
        ("loss_t_3_5", 2),
        ("loss_t_5_8", 3),
        ("loss_t_8_10", 2),
    ]


# Dropped conditions and guidance


def conditions_of(num: int, edges: bool = False) -> Conditions:
    mask = torch.full((num, 4, 4), LIVER, dtype=torch.uint8)
    edge = torch.full((num, 2, 4, 4), 100, dtype=torch.uint8) if edges else None
    return Conditions(mask, torch.full((num,), 2), edge)


def test_conditions_are_dropped_as_often_as_asked() -> None:
    num = 20_000
    position = torch.arange(num)
    dropped = drop_conditions(conditions_of(num, edges=True), 5, position, mask_only=0.1, class_only=0.2, both=0.05)
    no_mask = (dropped.mask_BHW == NULL_MASK).flatten(1).all(1)
    no_class = dropped.class_B == NULL_CLASS
    assert ((dropped.mask_BHW == LIVER).flatten(1).all(1) == ~no_mask).all()
    shares = [(no_mask & ~no_class), (no_class & ~no_mask), (no_mask & no_class)]
    for share, expected in zip(shares, (0.1, 0.2, 0.05), strict=True):
        assert abs(float(share.float().mean()) - expected) < 5 * math.sqrt(expected / num)
    assert dropped.edge_B2HW is not None
    assert ((dropped.edge_B2HW == 255).flatten(1).all(1) == no_mask).all()
    one = drop_conditions(conditions_of(1), 5, position[77:78], mask_only=0.1, class_only=0.2, both=0.05)
    assert torch.equal(one.mask_BHW[0], dropped.mask_BHW[77])
    assert one.class_B[0] == dropped.class_B[77]


@pytest.mark.parametrize("conditioning", ["concat", "add", "multiply"])
@pytest.mark.parametrize("encoding", ["onehot", "embedding", "scalar_255", "scalar_signed"])
def test_a_mask_not_shown_is_none_of_the_masks(conditioning: str, encoding: str) -> None:
    torch.manual_seed(0)
    config = replace(SMALL, conditioning=conditioning, mask_encoding=encoding)  # type: ignore[arg-type]
    model = Denoiser(config, AMOS, 16).eval()
    x, t, class_B = torch.randn(1, 1, 16, 16), torch.tensor([500]), torch.tensor([0])
    null = model(x, t, torch.full((1, 16, 16), NULL_MASK, dtype=torch.uint8), class_B)
    assert torch.isfinite(null).all()
    for label in range(AMOS.num_classes):
        other = model(x, t, torch.full((1, 16, 16), label, dtype=torch.uint8), class_B)
        assert (other - null).abs().max() > 1e-6


@pytest.mark.parametrize("removes", ["mask", "class", "both"])
def test_guidance_is_the_sum_of_two_predictions(removes: Any) -> None:
    torch.manual_seed(0)
    model = Denoiser(replace(SMALL, soft_masks=True), AMOS, 16).eval()
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([10, 900])
    mask = torch.randint(0, AMOS.num_classes, (2, 16, 16), dtype=torch.uint8)
    edge = torch.stack((mask.roll(1, 2), torch.randint(128, 256, (2, 16, 16), dtype=torch.uint8)), dim=1)
    class_B = torch.tensor([1, 4])
    no_mask = (torch.full_like(mask, NULL_MASK), torch.full_like(edge, 255))
    shown_mask, shown_edge = (mask, edge) if removes == "class" else no_mask
    shown_class = class_B if removes == "mask" else torch.full_like(class_B, NULL_CLASS)
    conditions = Conditions(mask, class_B, edge)
    with torch.no_grad():
        p1, p0 = model(x, t, *conditions), model(x, t, shown_mask, shown_class, shown_edge)
        assert (p1 - p0).abs().max() > 1e-4
        for guidance in (0.0, 1.0, 2.5):
            found = guided(model, conditions, guidance, removes)(x, t)
            torch.testing.assert_close(found, p0 + guidance * (p1 - p0), atol=1e-5, rtol=1e-5)


def test_guidance_in_one_prediction_is_guidance_in_all() -> None:
    torch.manual_seed(0)
    a, x_t = ALPHAS_CUMPROD[torch.tensor([200, 800])].double(), torch.randn(2, 1, 4, 4).double()
    p1, p0 = torch.randn(2, 2, 1, 4, 4).double()
    guided_then_x_0 = predicted_x_0("v", p0 + 3.0 * (p1 - p0), x_t, a)
    x1, x0 = predicted_x_0("v", p1, x_t, a), predicted_x_0("v", p0, x_t, a)
    torch.testing.assert_close(guided_then_x_0, x0 + 3.0 * (x1 - x0))


# Organ dropout


def test_organs_are_dropped_sample_by_sample() -> None:
    num = 20_000
    mask = torch.tensor([[LIVER, SPLEEN], [0, AMOS.body_id or 0]], dtype=torch.uint8).expand(num, 2, 2)
    position = torch.arange(num)
    dropped = drop_organs(Conditions(mask, torch.zeros(num)), AMOS, 0.4, 9, position).mask_BHW
    assert torch.equal(dropped[:, 1], mask[:, 1])  # background and body stay
    lost_liver, lost_spleen = (dropped[:, 0, i] == AMOS.body_id for i in (0, 1))
    assert ((dropped[:, 0, 0] == LIVER) | lost_liver).all()
    # 0.4 are ablated; of those each organ goes with 0.5, independently of the other.
    for share, expected in ((lost_liver, 0.2), (lost_spleen, 0.2), (lost_liver & lost_spleen, 0.1)):
        assert abs(float(share.float().mean()) - expected) < 5 * math.sqrt(expected / num)
    shuffled = torch.randperm(num, generator=torch.Generator().manual_seed(0))[:33]
    again = drop_organs(Conditions(mask[:33], torch.zeros(33)), AMOS, 0.4, 9, position[shuffled]).mask_BHW
    assert torch.equal(again, dropped[shuffled])


def test_a_lost_organ_s_soft_edge_goes_with_it() -> None:
    body = AMOS.body_id or 0
    mask = torch.tensor([[[LIVER, body, SPLEEN]]], dtype=torch.uint8)
    edge = torch.tensor([[[[body, LIVER, LIVER]], [[200, 180, 140]]]], dtype=torch.uint8)
    lost = torch.zeros(1, AMOS.num_classes, dtype=torch.bool)
    lost[0, [LIVER, 0, body]] = True  # naming what is no organ changes nothing
    found = relabelled(Conditions(mask, torch.zeros(1), edge), lost, AMOS)
    assert found.mask_BHW.tolist() == [[[body, body, SPLEEN]]]
    assert found.edge_B2HW is not None
    assert found.edge_B2HW.tolist() == [[[[body, body, body]], [[200, 180, 140]]]]
    model = Denoiser(replace(SMALL, soft_masks=True), AMOS, 16)
    channels = model.mask_encoder(found.mask_BHW, torch.float32, found.edge_B2HW)
    torch.testing.assert_close(channels.sum(1), torch.ones(1, 1, 3))
    assert channels[0, body, 0].tolist() == pytest.approx([1.0, 1.0, 115 / 255])


def test_without_a_body_class_a_lost_organ_is_background() -> None:
    table = LabelTable("two", (BACKGROUND, "liver"))
    found = relabelled(Conditions(torch.ones(1, 1, 1, dtype=torch.uint8), torch.zeros(1)), torch.ones(1, 2) > 0, table)
    assert found.mask_BHW.tolist() == [[[0]]]


# The loss as a whole


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
        config, diffusion = replace(SMALL, soft_masks=True), DiffusionConfig(**settings)
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
        whole, told = task.loss(task.model, batch_of(soft_shapes, range(40, 48)))
        parts = [task.loss(task.model, batch_of(soft_shapes, range(p, p + 1))) for p in range(40, 48)]
    mean = torch.stack([loss for loss, _ in parts]).mean()
    torch.testing.assert_close(mean, whole, atol=1e-6, rtol=0)
    for name, sums in told.items():
        torch.testing.assert_close(torch.stack([t[name] for _, t in parts]).sum(0), sums, atol=1e-5, rtol=1e-5)
    assert sum(float(told[n][1]) for n in told if n.startswith("loss_t_")) == 8


def test_told_sums_are_the_loss(make_task: Callable[..., DenoiserTask], soft_shapes: ShardSet) -> None:
    task = make_task()
    loss, told = task.loss(task.model, batch_of(soft_shapes, range(8)))
    assert set(told) == {"loss_t_0_250", "loss_t_250_500", "loss_t_500_750", "loss_t_750_1000"}
    assert not any(sums.requires_grad for sums in told.values())
    torch.testing.assert_close(sum(s[0] for s in told.values()) / 8, loss.detach())
    with torch.no_grad():
        weighted, told_again = make_task(loss_weighting="min_snr").loss(task.model, batch_of(soft_shapes, range(8)))
    assert not torch.equal(weighted, loss)
    for name, sums in told.items():  # what is told stays comparable from weighting to weighting
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
    twelve = Batch(*(getattr(one, name).repeat_interleave(12, dim=0) for name in one.__dataclass_fields__))
    position, order = torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    told, shuffled = (task._conditions(replace(twelve, position_B=p)) for p in (position, position[order]))
    assert torch.equal(shuffled.mask_BHW, told.mask_BHW[order])
    assert torch.equal(shuffled.class_B, told.class_B[order])
    assert 0 < int((told.class_B == NULL_CLASS).sum()) < 12
    seen = {mask.numpy().tobytes() for mask in told.mask_BHW}
    assert len(seen) >= 4  # whole, hidden, without one organ or the other or both


@pytest.mark.parametrize("changes", [{}, {"zero_terminal_snr": False, "timestep_sampling": "lognormal"}])
def test_nothing_in_the_loss_waits_for_the_device(
    soft_shapes: ShardSet, segmenter: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """On the meta device whatever asks a tensor for its values fails."""
    meta = torch.device("meta")
    settings: dict[str, Any] = {**EVERYTHING, "prediction_type": "v", "dice_segmenter": str(segmenter), **changes}
    config = replace(SMALL, soft_masks=True)
    task = DenoiserTask(soft_shapes, 32, config, DiffusionConfig(**settings), 3, tmp_path, meta)
    on_host = batch_of(soft_shapes, range(4))
    batch = Batch(*(getattr(on_host, name).to(meta) for name in on_host.__dataclass_fields__))
    loss, told = task.loss(task.model, batch)
    loss.backward()
    assert {t.device for t in (loss, *told.values())} == {meta}


# The Dice term


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
    loss, told = with_dice.loss(with_dice.model, batch)
    torch.testing.assert_close((loss - base).detach(), 0.5 * told["dice_loss"][0] / 8)
    t = with_dice.process.noised(batch, with_dice.seed, use_kernels=False).level_B
    torch.testing.assert_close(told["dice_loss"][1], ALPHAS_CUMPROD[t].sum())
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


# What is refused


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
    [found] = find_problems(hard, 32, replace(SMALL, soft_masks=True), DiffusionConfig())
    assert "keeps no soft edges" in found.value
    [found] = find_problems(hard, 32, replace(SMALL, class_conditioning=False), DiffusionConfig(joint_dropout=0.1))
    assert "class_conditioning" in found.remedy
    other = LabelTable("other", AMOS.names)
    settings = SegmenterConfig(channels=(16, 32))
    save_segmenter(tmp_path / "s", SegmenterNet(settings, AMOS.num_classes).state_dict(), settings, other)
    with pytest.raises(InputProblems, match="label table"):
        DiceTerm(tmp_path / "s", AMOS, CPU)
