"""Conditions: what is dropped in training and how often, organs that are left out, and guidance."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from recipes_support import ALPHAS_CUMPROD, LIVER, SPLEEN
from training_support import NET

from data_shards.labels import AMOS, BACKGROUND, LabelTable
from segdiff_dist.denoising.conditioning import (
    NULL_CLASS,
    NULL_MASK,
    Conditions,
    class_ids,
    drop_conditions,
    guided,
    modality_of,
)
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.organ_dropout import drop_organs, relabelled
from segdiff_kernels.noising import predicted_x_0


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
    config = replace(NET, conditioning=conditioning, mask_encoding=encoding)  # type: ignore[arg-type]
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
    model = Denoiser(replace(NET, soft_masks=True), AMOS, 16).eval()
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
    model = Denoiser(replace(NET, soft_masks=True), AMOS, 16)
    channels = model.mask_encoder(found.mask_BHW, torch.float32, found.edge_B2HW)
    torch.testing.assert_close(channels.sum(1), torch.ones(1, 1, 3))
    assert channels[0, body, 0].tolist() == pytest.approx([1.0, 1.0, 115 / 255])


def test_without_a_body_class_a_lost_organ_is_background() -> None:
    table = LabelTable("two", (BACKGROUND, "liver"))
    found = relabelled(Conditions(torch.ones(1, 1, 1, dtype=torch.uint8), torch.zeros(1)), torch.ones(1, 2) > 0, table)
    assert found.mask_BHW.tolist() == [[[0]]]


def test_each_class_is_of_one_modality_and_axis() -> None:
    modality, axis = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    classes = class_ids(modality, axis)
    assert len(set(classes.tolist()) | {NULL_CLASS}) == 13
    assert classes[:6].tolist() == list(range(6))  # those of CT and MR are what they were
    assert torch.equal(modality_of(classes), modality)
