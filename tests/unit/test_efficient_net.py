"""`denoiser.net: efficient`: the space-to-depth stem and adaptive group norm, and all that must know of them."""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sampling_support import DIFFUSION, sample_and_compare_pipeline
from torch import nn
from training_support import CPU, run_training

from data_shards.labels import AMOS
from segdiff_dist.denoising.conditioning import NUM_CLASSES
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.network_shapes import denoiser_network
from segdiff_dist.sampling.batch_size import batch_size_for
from segdiff_dist.training.throughput import count_flops

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
    """Each 2x2 pixels are four channels, the rows of the square first: Shi et al. 2016, eq. 4. Of nine numbers a pixel
    that come back, the first is the prediction, and a small net at the image's side corrects it by the others."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = Denoiser(SMALL, AMOS, 32).prepare_for(CPU)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=4 * (1 + AMOS.num_classes),
        out_channels=4 * 9,
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
    y_BFhw = unet(torch.stack(squares, dim=2).flatten(1, 2), timestep_B, class_B).sample
    features_B9HW = torch.empty(2, 9, 32, 32)
    for k, (i, j) in enumerate((i, j) for i in (0, 1) for j in (0, 1)):
        features_B9HW[:, :, i::2, j::2] = y_BFhw[:, k::4]
    # It begins as no correction at all.
    torch.testing.assert_close(
        model(x_t_BCHW, timestep_B, mask_BHW, class_B), features_B9HW[:, :1], rtol=1e-5, atol=1e-5
    )
    assert model.head is not None
    nn.init.normal_(model.head.conv_out.weight)
    joined_BCHW = torch.cat((features_B9HW[:, 1:], x_t_BCHW), dim=1)
    correction_BCHW = model.head.conv_out(F.silu(model.head.conv_in(joined_BCHW)))
    expected_BCHW = features_B9HW[:, :1] + correction_BCHW
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
    assert model.head is not None
    # What begins as 0 is all that learns before it in the first step.
    for name, parameter in model.named_parameters():
        if name.endswith(("head.conv_out.weight", "conv2.weight")):
            nn.init.normal_(parameter, std=0.1)
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


def test_the_other_net_has_the_names_and_numbers_it_had() -> None:
    torch.manual_seed(0)
    model = Denoiser(replace(SMALL, net="unet", attention_resolutions=(16,)), AMOS, 32)
    assert model.unet.config.resnet_time_scale_shift == "default"
    assert model.unet.config.attn_norm_num_groups is None
    assert isinstance(model.unet.mid_block.attentions[0].group_norm, nn.GroupNorm)
    assert (model.unet.config.sample_size, model.unet.config.out_channels) == (32, 1)


def test_on_a_cpu_it_computes_what_diffusers_does_and_stays_channels_last() -> None:
    torch.manual_seed(0)
    theirs = Denoiser(SMALL, AMOS, 32).train()
    ours = copy.deepcopy(theirs).prepare_for(CPU)
    in_rows: list[str] = []

    def note(name: str, y_NCHW: torch.Tensor) -> None:
        if not y_NCHW.is_contiguous(memory_format=torch.channels_last):
            in_rows.append(name)

    for name, module in ours.unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(lambda _, __, y_NCHW, name=name: note(name, y_NCHW))
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda _, args, name=name: note(f"into {name}", args[0]))
    losses = []
    for model in (theirs, ours):
        loss = model(*inputs()).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - yours.grad).abs().max() <= 1e-5 * yours.grad.abs().max() + 1e-8, name  # type: ignore[operator, union-attr]
    assert [name for name in in_rows if "attentions" not in name] == []  # attention norms pixels in rows


def test_it_trains_and_goes_on_where_it_stopped(shapes: Path, tmp_path: Path) -> None:
    """With its activations computed twice."""
    changes: dict[str, Any] = {"num_images": 48, "micro_batch_size": 8, "activation_checkpointing": True}
    whole = run_training(shapes, tmp_path / "whole", SMALL, **changes)
    assert whole[-1] < 0.9 * whole[0]
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / f"{48:012d}")
    assert run_training(shapes, cut, SMALL, **changes) == whole
    weights = [
        run / "weights" / "ema_0.05" / "diffusion_pytorch_model.safetensors" for run in (tmp_path / "whole", cut)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert Denoiser.load(weights[0].parent).config == SMALL


def test_recomputed_activations_change_no_gradient() -> None:
    model = Denoiser(SMALL, AMOS, 32).prepare_for(CPU).train()
    found = []
    for _ in range(2):
        model.zero_grad()
        model(*inputs()).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
        model.unet.enable_gradient_checkpointing()
    assert all(torch.equal(again, plain) for plain, again in zip(*found, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_activations_are_counted(checkpointing: bool) -> None:
    shards: Any = SimpleNamespace(label_table=AMOS, modalities=("CT", "MR"))
    network = denoiser_network(SMALL, shards, 32, CPU)
    model = network.make().prepare_for(CPU).train()
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*(torch.zeros_like(t, device="cpu") for t in network.inputs(4)))
    counted = sum(storage.nbytes() for storage in kept.values())
    planned = network.activations(4, "fp32", checkpointing)
    if checkpointing:  # with the block that is computed again
        assert counted < planned < network.activations(4, "fp32", False)
    else:
        assert planned == pytest.approx(counted, rel=0.03)


def test_flops_and_batches_know_the_stem() -> None:
    """The stem's convolutions see a quarter of the pixels; memory of a batch as measured on a CPU in fp32."""
    config = replace(SMALL, attention_resolutions=(), norm_num_groups=8)
    flops = {}
    for net in ("unet", "efficient"):
        with torch.device("meta"):
            model = Denoiser(replace(config, net=net), AMOS, 32)  # type: ignore[arg-type]
            flops[net] = count_flops(model, *(x.to("meta")[:1] for x in inputs()))
    assert flops["unet"] / 4 < flops["efficient"] < flops["unet"] / 2
    deep = replace(config, block_out_channels=(64, 96, 128), layers_per_block=2)
    for size, measured_mib in ((64, 7.6), (256, 85.2)):
        fit = batch_size_for(deep, size, 1, 2 * 2**34, 10**6)  # of which a half is for activations
        assert 0.6 * 2**34 < fit * measured_mib * 2**20 < 2**34
    assert batch_size_for(deep, 64, 1, 2**30, 10**6) > batch_size_for(replace(deep, net="unet"), 64, 1, 2**30, 10**6)


def test_sampling_and_the_pipeline_folder_give_the_same_images(shapes: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = Denoiser(SMALL, AMOS, 32)
    weights = tmp_path / "weights" / "ema"
    model.save(weights, model.state_dict(), {"diffusion": asdict(DIFFUSION)})
    sample_and_compare_pipeline(weights, shapes, num=3)
    unet = UNet2DModel.from_pretrained(tmp_path / "pipeline", subfolder="unet")
    assert (unet.config.sample_size, unet.config.in_channels, unet.config.out_channels) == (16, 72, 36)
    assert "pixel_unshuffle(x, 2)" in (tmp_path / "pipeline" / "README.md").read_text()
