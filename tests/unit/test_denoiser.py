"""The network: encodings, conditioning, attention switch, and going to and fro between it and diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from segdiff_dist.attention import choose_attention
from segdiff_dist.denoiser import NUM_CLASSES, Denoiser, DenoiserConfig, MaskEncoder, class_ids

SMALL = DenoiserConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=(8,))


def inputs(size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.randint(0, AMOS.num_classes, (2, size, size), dtype=torch.uint8)
    return torch.randn(2, 1, size, size), torch.tensor([3, 900]), mask, torch.tensor([0, 4])


def test_the_default_is_the_papers_net() -> None:
    with torch.device("meta"):
        model = Denoiser(DenoiserConfig(mask_encoding="scalar_signed", class_conditioning=False), AMOS, 256)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(113.67e6, rel=1e-4)
    names = [type(block).__name__ for block in model.unet.down_blocks]
    assert names == ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]  # 256 halves to 16 at the fifth level
    assert model.unet.mid_block.attentions[0].heads == 64


def test_mask_encodings() -> None:
    mask = torch.tensor([[[0, 5], [16, 1]]], dtype=torch.uint8)
    onehot = MaskEncoder("onehot", 17, 4)(mask, torch.float32)
    assert onehot.shape == (1, 17, 2, 2)
    assert torch.equal(onehot.argmax(1), mask.long())
    assert torch.equal(onehot.sum(1), torch.ones(1, 2, 2))
    assert MaskEncoder("scalar_255", 17, 4)(mask, torch.float32)[0, 0, 0, 1] == pytest.approx(5 / 255)
    assert MaskEncoder("scalar_signed", 17, 4)(mask, torch.float32)[0, 0, 0, 1] == pytest.approx(10 / 255 - 1)
    embedding = MaskEncoder("embedding", 17, 4)
    embedded = embedding(mask, torch.float32)
    assert embedding.embedding is not None
    assert torch.equal(embedded[0, :, 1, 0], embedding.embedding.weight[16])


@pytest.mark.parametrize("encoding", ["onehot", "embedding", "scalar_255", "scalar_signed"])
def test_the_output_depends_on_every_condition(encoding: str) -> None:
    torch.manual_seed(1)
    config = DenoiserConfig(**{**SMALL.__dict__, "mask_encoding": encoding})
    model = Denoiser(config, AMOS, 16).prepare_for(torch.device("cpu"))
    x, t, mask, classes = inputs()
    base = model(x, t, mask, classes)
    assert base.shape == x.shape
    assert base.dtype == torch.float32
    for changed in (
        model(x + 0.1, t, mask, classes),
        model(x, t - 1, mask, classes),
        model(x, t, (mask + 1) % 17, classes),
        model(x, t, mask, (classes + 1) % NUM_CLASSES),
    ):
        assert (changed - base).abs().max() > 1e-6


@pytest.mark.parametrize("encoding", ["onehot", "embedding"])
def test_saved_and_loaded_it_computes_the_same(tmp_path: Path, encoding: str) -> None:
    from diffusers import UNet2DModel

    config = DenoiserConfig(**{**SMALL.__dict__, "mask_encoding": encoding})
    model = Denoiser(config, AMOS, 16).eval()
    model.save(tmp_path / "ema", model.state_dict())
    loaded = Denoiser.load(tmp_path / "ema")
    assert loaded.label_table == AMOS
    assert torch.equal(model(*inputs()), loaded(*inputs()))
    assert UNet2DModel.from_pretrained(tmp_path / "ema", low_cpu_mem_usage=False).config.sample_size == 16


def test_class_ids_are_distinct_and_leave_one_free() -> None:
    ids = class_ids(*torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"))
    assert sorted(ids.flatten().tolist()) == list(range(NUM_CLASSES - 1))


def test_xformers_by_name_is_refused_on_a_cpu() -> None:
    with pytest.raises(InputProblems, match="xformers"):
        choose_attention("xformers", torch.device("cpu"))
    assert choose_attention("auto", torch.device("cpu")) == "sdpa"


def test_settings_out_of_range_are_named() -> None:
    bad = DenoiserConfig(block_out_channels=(20, 40), layers_per_block=0, attention_head_dim=7)
    assert {p.field.split(".")[1] for p in bad.problems()} == {
        "block_out_channels",
        "layers_per_block",
        "attention_head_dim",
    }
    assert DenoiserConfig().problems(256) == []
    assert DenoiserConfig().problems(100)[0].field == "denoiser.block_out_channels"


def test_missing_weights_are_a_problem_for_people(tmp_path: Path) -> None:
    with pytest.raises(InputProblems, match="segdiff train"):
        Denoiser.load(tmp_path)
