"""The network: encodings, conditioning, attention switch, and going to and fro between it and diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_shards.labels import AMOS, LabelTable
from data_shards.problems import InputProblems
from segdiff_dist.attention import choose_attention
from segdiff_dist.denoising.conditioning import NULL_CLASS, NUM_CLASSES, MaskEncoder, MaskJoin, class_ids
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser

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


@pytest.mark.parametrize("encoding", ["onehot", "embedding"])
def test_soft_masks_mix_two_classes_by_their_shares(encoding: str) -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 17, (2, 5, 7), dtype=torch.uint8)
    second, share = torch.randint(0, 17, (2, 5, 7), dtype=torch.uint8), torch.randint(0, 256, (2, 5, 7))
    encoder = MaskEncoder(encoding, 17, 4)  # type: ignore[arg-type]
    table = torch.eye(17) if encoder.embedding is None else encoder.embedding.weight
    soft = encoder(mask, torch.float32, torch.stack((second, share.to(torch.uint8)), dim=1))
    for b, i, j in ((0, 0, 0), (1, 4, 6), (0, 3, 2), (1, 2, 5)):
        part = int(share[b, i, j]) / 255
        expected = part * table[int(mask[b, i, j])] + (1 - part) * table[int(second[b, i, j])]
        torch.testing.assert_close(soft[b, :, i, j], expected)
    # 255 is all of the pixel, whatever the second class: then soft is hard.
    whole = encoder(mask, torch.float32, torch.stack((second, torch.full_like(second, 255)), dim=1))
    torch.testing.assert_close(whole, encoder(mask, torch.float32))


@pytest.mark.parametrize("num_channels", [1, 5])
def test_the_three_ways_of_joining(num_channels: int) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 1, 4, 4), torch.rand(2, num_channels, 4, 4)
    assert torch.equal(MaskJoin("concat", num_channels)(x, mask), torch.cat((x, mask), dim=1))
    for conditioning in ("add", "multiply"):
        join = MaskJoin(conditioning, num_channels)  # type: ignore[arg-type]
        value = mask
        if join.projection is not None:
            value = (mask * join.projection.weight.flatten()[:, None, None]).sum(1, keepdim=True)
        expected = {"add": x + value, "multiply": x * (value if num_channels == 1 else 1 + value)}[conditioning]
        torch.testing.assert_close(join(x, mask), expected)
        assert join(x, mask).shape == x.shape
        if num_channels > 1:  # all-zero channels, the mask that is not shown, leave the image as it is
            assert torch.equal(join(x, torch.zeros_like(mask)), x)


@pytest.mark.parametrize("conditioning", ["concat", "add", "multiply"])
@pytest.mark.parametrize("encoding", ["onehot", "embedding", "scalar_255", "scalar_signed"])
def test_the_output_depends_on_every_condition(encoding: str, conditioning: str) -> None:
    torch.manual_seed(1)
    config = replace(SMALL, mask_encoding=encoding, conditioning=conditioning)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("conditioning", ["concat", "add", "multiply"])
@pytest.mark.parametrize("encoding", ["onehot", "embedding", "scalar_signed"])
def test_saved_and_loaded_it_computes_the_same(tmp_path: Path, encoding: str, conditioning: str) -> None:
    from diffusers import UNet2DModel

    config = replace(SMALL, mask_encoding=encoding, conditioning=conditioning)  # type: ignore[arg-type]
    model = Denoiser(config, AMOS, 16).eval()
    model.save(tmp_path / "ema", model.state_dict(), {"diffusion": {"prediction_type": "v"}})
    loaded = Denoiser.load(tmp_path / "ema")
    assert loaded.label_table == AMOS
    assert loaded.config.conditioning == conditioning
    assert torch.equal(model(*inputs()), loaded(*inputs()))
    unet = UNet2DModel.from_pretrained(tmp_path / "ema", low_cpu_mem_usage=False)
    assert (unet.config.sample_size, unet.config.in_channels) == (16, model.mask_join.num_channels)


def test_a_killed_save_leaves_the_weights_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Denoiser(SMALL, AMOS, 16).eval()
    model.save(tmp_path / "online", model.state_dict())
    expected = model(*inputs())
    changed = {name: value + 1.0 for name, value in model.state_dict().items()}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(model.unet), "save_config", killed)  # after the new weights were written
        with pytest.raises(KeyboardInterrupt):
            model.save(tmp_path / "online", changed)
    assert torch.equal(Denoiser.load(tmp_path / "online")(*inputs()), expected)
    model.save(tmp_path / "online", changed)
    assert [p.name for p in tmp_path.iterdir()] == ["online"]
    assert not torch.equal(Denoiser.load(tmp_path / "online")(*inputs()), expected)


def test_weights_from_before_soft_masks_are_loaded(tmp_path: Path) -> None:
    model = Denoiser(replace(SMALL, mask_encoding="embedding"), AMOS, 16).eval()
    model.save(tmp_path, model.state_dict())
    about = json.loads((tmp_path / "segdiff.json").read_text())
    del about["denoiser"]["soft_masks"]
    (tmp_path / "segdiff.json").write_text(json.dumps(about))
    (tmp_path / "digests.json").unlink()  # likewise of later
    assert torch.equal(model(*inputs()), Denoiser.load(tmp_path)(*inputs()))


def test_class_ids_are_distinct_and_leave_one_free() -> None:
    ids = class_ids(*torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"))
    assert sorted(ids.flatten().tolist()) == list(range(NULL_CLASS))


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
    assert DenoiserConfig(soft_masks=True, mask_encoding="scalar_255").problems()[0].field == "denoiser.soft_masks"
    assert DenoiserConfig().problems(100)[0].field == "denoiser.block_out_channels"
    [found] = DenoiserConfig().problems(224)  # 224, 112, 56, 28, 14, 7: nowhere 16
    assert found.field == "denoiser.attention_resolutions"
    wide = DenoiserConfig((16, 32), norm_num_groups=8, attention_resolutions=(32,), attention_head_dim=32)
    [found] = wide.problems(32)
    assert found.field == "denoiser.attention_head_dim"  # the first level's 16 channels attend too


def test_a_table_that_leaves_no_id_for_a_hidden_mask_is_refused() -> None:
    table = LabelTable("full", ("background", *(f"organ_{i}" for i in range(255))))
    with pytest.raises(InputProblems, match="255 means a mask that is not shown"):
        Denoiser(SMALL, table, 16)


def test_missing_weights_are_a_problem_for_people(tmp_path: Path) -> None:
    with pytest.raises(InputProblems, match="segdiff train"):
        Denoiser.load(tmp_path)


@pytest.mark.parametrize(
    ("harm", "message"), [("cut", "not those that were written"), ("gone", "missing"), ("nan", "not finite")]
)
def test_broken_weights_are_a_problem_for_people(tmp_path: Path, harm: str, message: str) -> None:
    model = Denoiser(SMALL, AMOS, 16)
    weights = model.state_dict()
    if harm == "nan":
        weights["unet.conv_out.bias"] = torch.full_like(weights["unet.conv_out.bias"], float("nan"))
    model.save(tmp_path / "ema", weights)
    file = tmp_path / "ema" / "diffusion_pytorch_model.safetensors"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "gone":
        file.unlink()
    with pytest.raises(InputProblems, match=message):
        Denoiser.load(tmp_path / "ema")
