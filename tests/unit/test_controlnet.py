"""`denoiser.conditioning: controlnet`: a frozen denoiser gets masks by a trainable copy of its encoder; and `none`."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sampling_support import DIFFUSION, sample_and_compare_pipeline
from torch import nn
from training_support import CPU, run_training

from data_shards.labels import AMOS, WHOLEBODY
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.conditioning import NULL_MASK
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.frozen_base import Base
from segdiff_dist.denoising.network_shapes import denoiser_network
from segdiff_dist.denoising.task import find_problems

FREE = DenoiserConfig(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=(), conditioning="none"
)
EFFICIENT = replace(FREE, net="efficient")
MASKED = replace(FREE, conditioning="concat", mask_encoding="embedding")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.randint(0, AMOS.num_classes, (2, 32, 32), dtype=torch.uint8)
    return torch.randn(2, 1, 32, 32), torch.tensor([3, 900]), mask, torch.arange(2)


def save_base(folder: Path, config: DenoiserConfig, table: Any = AMOS, size: int = 32, **trained_with: Any) -> Denoiser:
    """A denoiser of which no weight is 0."""
    torch.manual_seed(1)
    model = Denoiser(config, table, size).prepare_for(CPU)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save(folder, model.state_dict(), {"diffusion": asdict(replace(DIFFUSION, **trained_with))})
    return model


def controlled(base_folder: Path, run: Path, config: DenoiserConfig) -> tuple[Denoiser, DenoiserConfig]:
    """A ControlNet as its training begins."""
    config = replace(config, conditioning="controlnet", base=str(base_folder))
    base = Base.find(config, run)
    assert base is not None
    model = Denoiser(config, AMOS, 32, base=base.net)
    base.begin(model)
    return model.prepare_for(CPU), config


@pytest.mark.parametrize(
    ("config", "table"), [(FREE, AMOS), (EFFICIENT, AMOS), (MASKED, WHOLEBODY)], ids=["none", "efficient", "masked"]
)
def test_at_step_0_it_is_its_base_bit_for_bit(config: DenoiserConfig, table: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", config, table)
    model, _ = controlled(tmp_path / "base", tmp_path, config)
    x, t, mask, classes = inputs()
    without = base(x, t, torch.full_like(mask, NULL_MASK), classes)
    assert torch.equal(model(x, t, mask, classes), without)
    # The gradient reaches the zero convolutions first, and later all of the control.
    model(x, t, mask, classes).square().sum().backward()
    assert all((p.grad is not None) == name.startswith("control.") for name, p in model.named_parameters())
    assert model.control is not None
    for parameter in model.control.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.zero_grad()
    y = model(x, t, mask, classes)
    y.square().sum().backward()
    assert [n for n, p in model.control.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert (model(x, t, (mask + 1) % 16, classes) - y).abs().max() > 1e-3


@pytest.mark.parametrize("stage", [0, 3])
def test_only_the_control_trains_and_goes_on_where_it_stopped(stage: int, small_shapes: Path, tmp_path: Path) -> None:
    """Also without the folder of the base: the run has a copy, and its weights hold base and control."""
    save_base(tmp_path / "base", EFFICIENT, size=16)
    config = replace(EFFICIENT, conditioning="controlnet", base=str(tmp_path / "base"))
    changes: dict[str, Any] = {"num_images": 32, "micro_batch_size": 8, "zero_stage": stage, "log_every_images": 8}
    changes |= {"precision": "bf16" if stage == 3 else "fp32", "checkpoint_every_images": 16}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    losses = run_training(small_shapes, whole, config, **changes)
    files = sorted((whole / "weights" / "ema_0.05").glob("*.safetensors"))
    assert [file.name[:9] for file in files] == ["control.s", "diffusion", "mask_enco"]
    for file in files[1:]:
        theirs = load_file(tmp_path / "base" / file.name)
        assert all(torch.equal(value, theirs[name]) for name, value in load_file(file).items())
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / f"{32:012d}")
    assert run_training(small_shapes, cut, config, **changes) == losses
    assert (cut / "weights" / "ema_0.05" / files[0].name).read_bytes() == files[0].read_bytes()
    x, t, mask, classes = inputs()
    model = Denoiser.load(whole / "weights" / "ema_0.05").prepare_for(CPU)
    assert (model(x, t, mask, classes) - model(x, t, (mask + 1) % 16, classes)).abs().max() > 0


def test_sampling_and_the_pipeline_folder_give_the_same_images(shapes: Path, tmp_path: Path) -> None:
    """Of weights alone, whose base had another label table and is gone."""
    save_base(tmp_path / "base", MASKED, WHOLEBODY)
    model, _ = controlled(tmp_path / "base", tmp_path, MASKED)
    assert model.control is not None
    nn.init.normal_(model.control.zero_mid.weight, std=0.1)
    weights = tmp_path / "weights" / "ema"
    model.save(weights, model.state_dict(), {"diffusion": asdict(DIFFUSION)})
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(Denoiser.load(weights)(*inputs()), model.eval()(*inputs()))
    sample_and_compare_pipeline(weights, shapes, num=2)
    assert "a ControlNet reads the mask" in (tmp_path / "pipeline" / "README.md").read_text()


def test_a_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    def refused(config: DenoiserConfig, diffusion: DiffusionConfig = DIFFUSION, size: int = 32, mr: str = "MR") -> str:
        base = Base.find(replace(config, conditioning="controlnet", base=str(tmp_path)), tmp_path / "run")
        assert base is not None
        found = base.problems(config, diffusion, size, ("CT", mr), [mr])
        assert all(one.remedy for one in found)
        return ", ".join(f"{one.field} {one.value}" for one in found)

    save_base(tmp_path / "weights" / "ema", FREE)
    assert refused(FREE) == ""
    assert refused(replace(FREE, layers_per_block=2, norm_num_groups=4)) == (
        "denoiser.layers_per_block 2, denoiser.norm_num_groups 4"
    )
    assert refused(FREE, replace(DIFFUSION, prediction_type="x0")) == "diffusion.prediction_type x0"
    assert refused(FREE, size=64) == "denoiser.base trained at 32 pixels, not 64"
    assert "it knows CT, MR, and the slices are PET" in refused(FREE, mr="PET")
    save_base(tmp_path / "weights" / "ema", MASKED)
    assert refused(FREE) == "denoiser.base never trained without its masks"
    save_base(tmp_path / "weights" / "ema", MASKED, mask_dropout=0.1)
    assert refused(FREE) == ""
    with pytest.raises(InputProblems, match="train it first"):
        Base.find(replace(FREE, conditioning="controlnet", base=str(tmp_path / "nowhere")), tmp_path)
    fields = [one.field for one in replace(FREE, base="x").problems()]
    fields += [one.field for one in replace(FREE, conditioning="controlnet", kernels="triton").problems()]
    assert fields == ["denoiser.base", "denoiser.kernels", "denoiser.base"]


def test_the_plan_counts_what_is_trained_and_what_is_frozen(shapes: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", FREE)
    model, config = controlled(tmp_path / "base", tmp_path, FREE)
    network = denoiser_network(config, ShardSet.open(shapes), 32, CPU, model.base)
    assert network.num_frozen == sum(p.numel() for p in base.parameters())
    assert network.num_parameters + network.num_frozen == sum(p.numel() for p in model.parameters())
    plain = denoiser_network(FREE, ShardSet.open(shapes), 32, CPU)
    # The frozen encoder has no backward pass, and the frozen decoder none for its weights.
    assert 0.8 < network.flops_per_image / plain.flops_per_image < 1.2


def test_without_masks_it_learns_from_slices_without_labels(shapes: Path, tmp_path: Path) -> None:
    model, (x, t, mask, classes) = Denoiser(FREE, AMOS, 32).prepare_for(CPU), inputs()
    nn.init.normal_(model.unet.conv_out.weight)
    assert torch.equal(model(x, t, mask, classes), model(x, t, (mask + 1) % 16, classes))
    shards, wrong = ShardSet.open(shapes), DiffusionConfig(mask_dropout=0.1, organ_dropout=0.1)
    fields = [one.field for one in find_problems(shards, 32, FREE, wrong)]
    assert fields == ["diffusion.mask_dropout", "diffusion.organ_dropout"]
