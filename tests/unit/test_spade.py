"""`denoiser.conditioning: spade`: the mask scales and shifts what the norms give, at each pixel."""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sampling_support import DIFFUSION, sample_and_compare_pipeline
from torch import nn
from training_support import CPU, run_training

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from segdiff_dist.denoising.conditioning import NULL_MASK, MaskEncoder
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser

SMALL = DenoiserConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    attention_resolutions=(),
    conditioning="spade",
    spade_channels=8,
)
EFFICIENT = replace(SMALL, net="efficient")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.randint(0, AMOS.num_classes, (2, 32, 32), dtype=torch.uint8)
    return torch.randn(2, 1, 32, 32), torch.tensor([3, 900]), mask, torch.arange(2)


def learned(config: DenoiserConfig) -> Denoiser:
    """A net of which no weight is 0."""
    torch.manual_seed(1)
    model = Denoiser(config, AMOS, 32).prepare_for(CPU)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("config", [SMALL, EFFICIENT], ids=["unet", "efficient"])
def test_the_norms_are_those_of_the_paper(config: DenoiserConfig) -> None:
    """Park et al. 2019, eq. 1, of the decoder's coarsest level. Its norms have a scale and a shift of their own, as
    Wang et al.'s."""
    model = learned(config)
    norm, seen = model.unet.up_blocks[0].resnets[0].norm1, {}
    norm.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    x, t, mask, classes = inputs()
    model(x, t, mask, classes)
    m = MaskEncoder("onehot", AMOS.num_classes, 0)(mask, torch.float32)
    m = F.avg_pool2d(F.pixel_unshuffle(m, 2) if config.net == "efficient" else m, 2)
    assert model.spade is not None
    embedding, both = model.spade.embedding["1"], model.spade.scale_shift[0]
    features = F.relu(F.conv2d(m, embedding.weight, embedding.bias, padding=1))
    gamma, beta = F.conv2d(features, both.weight, both.bias, padding=1).chunk(2, dim=1)
    normed = F.group_norm(seen["x"], 8, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(seen["y"], normed * (1 + gamma) + beta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norms", ["decoder", "all"])
def test_it_begins_without_the_mask_and_learns_it(norms: Any) -> None:
    model = Denoiser(replace(EFFICIENT, spade_norms=norms), AMOS, 32).prepare_for(CPU)
    x, t, mask, classes = inputs()
    assert torch.equal(model(x, t, mask, classes), model(x, t, (mask + 1) % 17, classes))
    model = learned(replace(EFFICIENT, spade_norms=norms))
    base = model(x, t, mask, classes)
    (base * torch.randn_like(base)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    for other in ((mask + 1) % 17, torch.full_like(mask, NULL_MASK), torch.zeros_like(mask)):
        assert (model(x, t, other, classes) - base).abs().max() > 1e-3
    again = copy.deepcopy(model)  # whose norms use its own convolutions
    assert again.spade is not None
    for parameter in again.spade.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(again(x, t, mask, classes), again(x, t, (mask + 1) % 17, classes))
    assert torch.equal(model(x, t, mask, classes), base)


def test_recomputed_activations_change_no_gradient() -> None:
    model, found = learned(SMALL).train(), []
    for _ in range(2):
        model.zero_grad()
        model(*inputs()).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
        model.unet.enable_gradient_checkpointing()
    assert all(torch.equal(again, plain) for plain, again in zip(*found, strict=True))


def test_it_trains_and_goes_on_where_it_stopped(small_shapes: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_images": 48, "micro_batch_size": 8, "zero_stage": 3}
    whole = run_training(small_shapes, tmp_path / "whole", EFFICIENT, **changes)
    assert whole[-1] < 0.9 * whole[0]
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / f"{48:012d}")
    assert run_training(small_shapes, cut, EFFICIENT, **changes) == whole
    weights = [run / "weights" / "ema_0.05" / "mask_encoder.safetensors" for run in (tmp_path / "whole", cut)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_sampling_and_the_pipeline_folder_give_the_same_images(shapes: Path, tmp_path: Path) -> None:
    model, weights = learned(EFFICIENT), tmp_path / "weights" / "ema"
    model.save(weights, model.state_dict(), {"diffusion": asdict(DIFFUSION)})
    assert torch.equal(Denoiser.load(weights)(*inputs()), model.eval()(*inputs()))
    sample_and_compare_pipeline(weights, shapes, num=2)
    assert "without segdiff" not in (tmp_path / "pipeline" / "README.md").read_text()


def test_the_kernels_are_refused_by_name(tmp_path: Path) -> None:
    [found] = replace(SMALL, kernels="triton").problems(32)
    assert (found.field, found.value) == ("denoiser.kernels", "triton")
    model = Denoiser(SMALL, AMOS, 32)
    model.save(tmp_path / "weights", model.state_dict())
    with pytest.raises(InputProblems, match="no scale and shift for each pixel"):
        Denoiser.load(tmp_path / "weights", kernels="triton")
