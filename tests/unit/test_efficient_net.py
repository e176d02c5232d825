"""`denoiser.net: efficient`: the space-to-depth stem and adaptive group norm, and all that must know of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_shards.labels import AMOS
from segdiff_dist.denoising.conditioning import NUM_CLASSES
from segdiff_dist.denoising.denoiser import Denoiser, DenoiserConfig

CPU = torch.device("cpu")
SMALL = DenoiserConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    attention_resolutions=(8,),
    net="efficient",
)


def inputs(size: int = 32, num: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.randint(0, AMOS.num_classes, (num, size, size), dtype=torch.uint8)
    return torch.randn(num, 1, size, size), torch.randint(0, 1000, (num,)), mask, torch.arange(num)


def test_it_is_a_unet_of_diffusers_between_two_rearrangements() -> None:
    """Each 2x2 pixels are four channels, the rows of the square first: Shi et al. 2016, eq. 4."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = Denoiser(SMALL, AMOS, 32).prepare_for(CPU)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=4 * (1 + AMOS.num_classes),
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        num_class_embeds=NUM_CLASSES,
        resnet_time_scale_shift="scale_shift",
    )
    unet.load_state_dict(model.unet.state_dict())
    x_t_BCHW, timestep_B, mask_BHW, class_B = inputs()
    onehot_BKHW = F.one_hot(mask_BHW.long(), AMOS.num_classes).permute(0, 3, 1, 2).float()
    joined_BCHW = torch.cat((x_t_BCHW, onehot_BKHW), dim=1)
    squares = [joined_BCHW[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    y_B4hw = unet(torch.stack(squares, dim=2).flatten(1, 2), timestep_B, class_B).sample
    expected_BCHW = torch.empty_like(x_t_BCHW)
    for k, (i, j) in enumerate((i, j) for i in (0, 1) for j in (0, 1)):
        expected_BCHW[:, 0, i::2, j::2] = y_B4hw[:, k]
    found_BCHW = model(x_t_BCHW, timestep_B, mask_BHW, class_B)
    assert (found_BCHW.shape, found_BCHW.dtype) == (x_t_BCHW.shape, torch.float32)
    torch.testing.assert_close(found_BCHW, expected_BCHW, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["concat", "add", "multiply"])
@pytest.mark.parametrize("encoding", ["onehot", "embedding", "scalar_signed"])
def test_saved_and_loaded_it_computes_the_same(tmp_path: Path, encoding: str, conditioning: str) -> None:
    config = replace(SMALL, mask_encoding=encoding, conditioning=conditioning)  # type: ignore[arg-type]
    model = Denoiser(config, AMOS, 32).eval()
    model.save(tmp_path / "ema", model.state_dict())
    loaded = Denoiser.load(tmp_path / "ema")
    assert loaded.config.net == "efficient"
    assert torch.equal(model(*inputs()), loaded(*inputs()))


def test_every_parameter_learns_and_every_condition_counts() -> None:
    model = Denoiser(SMALL, AMOS, 32).prepare_for(CPU).train()
    x, t, mask, classes = inputs()
    base = model(x, t, mask, classes)
    (base * torch.randn_like(base)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    for changed in ((x + 0.1, t, mask, classes), (x, t - 1, mask, classes), (x, t, (mask + 1) % 17, classes)):
        assert (model(*changed) - base).abs().max() > 1e-6
    assert (model(x, t.float() - 0.25, mask, classes) - base).abs().max() > 1e-6  # timesteps may be fractions
    assert (model(x, t, mask, (classes + 1) % NUM_CLASSES) - base).abs().max() > 1e-6


def test_settings_that_do_not_fit_the_stem_are_named() -> None:
    assert replace(SMALL, attention_head_dim=16).problems(32) == []
    [found] = SMALL.problems(34)  # 17 pixels behind the stem
    assert found.field == "denoiser.block_out_channels"
    assert "a multiple of 4" in found.remedy
    assert replace(SMALL, net="unet").problems(34) != SMALL.problems(34)
    [found] = replace(SMALL, attention_resolutions=(32,)).problems(32)
    assert found.field == "denoiser.attention_resolutions"
    assert "16, 8 pixels wide" in found.remedy
    [found] = replace(SMALL, kernels="triton").problems(32)
    assert found.field == "denoiser.kernels"


def test_the_other_net_has_the_names_and_numbers_it_had() -> None:
    torch.manual_seed(0)
    model = Denoiser(replace(SMALL, net="unet", attention_resolutions=(16,)), AMOS, 32)
    assert model.unet.config.resnet_time_scale_shift == "default"
    assert model.unet.config.attn_norm_num_groups is None
    assert isinstance(model.unet.mid_block.attentions[0].group_norm, nn.GroupNorm)
    assert (model.unet.config.sample_size, model.unet.config.out_channels) == (32, 1)
