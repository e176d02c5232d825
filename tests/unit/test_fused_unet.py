"""The UNet on the fused kernels against diffusers' own modules: same weights, same loss, same gradients, no copies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from kernels_support import DEVICE, TOLERANCE, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from data_shards.feed.augment import NUM_LABELS
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising import fused_convs
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser, choose_kernels
from segdiff_dist.denoising.fused_unet import why_not_fused
from segdiff_dist.denoising.task import DenoiserTask
from segdiff_dist.diffusers_parts import Upsample2D
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.engine import Engine

# Skips of 16 channels beside streams of 24: with 8 groups of 5 channels one straddles the border.
NET = DenoiserConfig(
    block_out_channels=(16, 24), layers_per_block=1, norm_num_groups=8, attention_resolutions=(4,), kernels="torch"
)
SIZE = 8


def pair(**changes: Any) -> tuple[Denoiser, Denoiser]:
    """The same weights in diffusers' modules and in the fused ones."""
    config = replace(NET, **changes)
    torch.manual_seed(0)
    eager = Denoiser(config, AMOS, SIZE).prepare_for(DEVICE).train()
    if eager.augmentation_embedding is not None:  # begins as 0
        torch.nn.init.normal_(eager.augmentation_embedding.linear.weight)
    fused = Denoiser(replace(config, kernels="triton"), AMOS, SIZE).prepare_for(DEVICE).train()
    fused.load_state_dict(eager.state_dict())
    return eager, fused


def upsampling(denoiser: Denoiser) -> Upsample2D:
    return next(module for module in denoiser.unet.modules() if isinstance(module, Upsample2D))


def inputs(soft: bool = False, labelled: bool = False) -> tuple[Tensor | None, ...]:
    x_t = torch.randn(2, 1, SIZE, SIZE)
    mask = torch.randint(0, AMOS.num_classes, (2, SIZE, SIZE), dtype=torch.uint8)
    mask[0, :3] = 255
    edge = torch.randint(0, AMOS.num_classes, (2, 2, SIZE, SIZE), dtype=torch.uint8) if soft else None
    label = torch.randn(2, NUM_LABELS) if labelled else None
    given = (x_t, torch.tensor([3, 900]), mask, torch.tensor([0, 4]), edge, None, None, label)
    return tuple(x if x is None else x.to(DEVICE) for x in given)


def gradients(model: Denoiser, given: tuple[Tensor | None, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = (model(*given) - given[0]).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"soft_masks": True, "augmentation_labels": True},
        # Some norms of whole parts of 32 channels, which are one kernel in each direction, and share their counters.
        {"mask_encoding": "scalar_signed", "class_conditioning": False, "block_out_channels": (32, 64)},
        {"mask_encoding": "embedding", "conditioning": "multiply"},
        {"net": "efficient", "augmentation_labels": True},
    ],
)
def test_loss_and_gradients_are_eagers(changes: dict[str, Any]) -> None:
    eager, fused = pair(**changes)
    given = inputs(soft="soft_masks" in changes, labelled="augmentation_labels" in changes)
    loss, expected = gradients(eager, given)
    fused_loss, found = gradients(fused, given)
    assert relative_error(fused_loss, loss) <= 1e-5
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * scale, name


def test_checkpointed_activations_change_nothing() -> None:
    _, fused = pair()
    given = inputs()
    loss, expected = gradients(fused, given)
    fused.unet.enable_gradient_checkpointing()
    again, found = gradients(fused, given)
    assert torch.equal(again, loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_the_state_dict_goes_both_ways(tmp_path: Any) -> None:
    eager, fused = pair()
    assert list(fused.state_dict()) == list(eager.state_dict())
    fused.save(tmp_path / "weights", fused.state_dict())
    theirs = UNet2DModel.from_pretrained(tmp_path / "weights")
    assert type(theirs) is UNet2DModel
    for name, value in eager.unet.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value.cpu()), name
    given = inputs()
    loaded = Denoiser.load(tmp_path / "weights", kernels="triton").prepare_for(DEVICE)
    with torch.no_grad():
        assert relative_error(loaded(*given), eager(*given)) <= 1e-5


@pytest.mark.parametrize(("net", "channels"), [("unet", (16, 16)), ("efficient", (16,))])
def test_zero_3_trains_it_as_it_trains_eager(net: str, channels: tuple[int, ...]) -> None:
    """Where weights are gathered for the modules that are called, and the fused ones read some of their children's;
    two levels have resampling convolutions, whose biases later blocks would read after they are released."""
    config = TrainConfig(global_batch_size=2, micro_batch_size=2, precision="fp32", zero_stage=3, lr=1e-2)
    settings = {"block_out_channels": channels, "attention_resolutions": (), "augmentation_labels": True}
    models, losses = pair(net=net, **settings), []
    given = inputs(labelled=True)  # after pair, which sets the seed
    for model in models:
        engine = Engine(model, config, 2, DEVICE)
        for _ in range(2):
            loss = (engine(*given) - given[0]).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        engine.close()
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    # AdamW's first step is the gradient's sign, also of gradients that are 0 except for rounding. With 12 seeds the
    # second loss differed from eager's by up to 8e-6, and without ZeRO by up to 1e-5.
    assert losses[3] == pytest.approx(losses[1], rel=5e-5)


class LayoutCopies(TorchDispatchMode):
    """Notes every copy of activations, of two images, from one layout to another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            source, result = args[-1] if func is torch.ops.aten.copy_.default else args[0], out
            is_image = (
                isinstance(source, Tensor) and source.dim() == 4 and min(source.shape[1:]) > 1 and len(source) == 2
            )
            if is_image and source.stride() != result.stride():
                self.found.append(f"{func} {tuple(source.shape)} {source.stride()} -> {result.stride()}")
        return out


def test_a_step_neither_waits_nor_changes_layout(shapes: Path, tmp_path: Path) -> None:
    """With tensors that hold nothing, whose values cannot be asked for: what the custom operators and torch's say they
    return, from the batch to the gradients."""
    shards = ShardSet.open(shapes)
    net = replace(NET, kernels="triton")
    task = DenoiserTask(shards, SIZE, net, DiffusionConfig(loss_weighting="min_snr"), 0, tmp_path, DEVICE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels, number = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
        batch = Batch(*(x.to(DEVICE) for x in (pixels, pixels, number, number, number)))
        with LayoutCopies() as copies:
            loss, _ = task.loss(task.model, batch)
            loss.backward()
    assert copies.found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upsampling_convolution_never_makes_the_large_image(dtype: torch.dtype) -> None:
    """And gives what the convolution of the large image gives, in float64, except for its bias; the same for the
    gradient."""
    eager, fused = (upsampling(denoiser).to(dtype) for denoiser in pair())
    x_NCHW = torch.randn(2, eager.channels, 3, 5, device=DEVICE, dtype=dtype)
    y_NCHW = fused(x_NCHW.contiguous(memory_format=torch.channels_last))
    assert y_NCHW.is_contiguous(memory_format=torch.channels_last)
    eager.double().conv.bias = None
    expected_NCHW = eager(x_NCHW.double())
    assert relative_error(y_NCHW, expected_NCHW) <= TOLERANCE[dtype]
    gradient_NCHW = torch.randn_like(y_NCHW)
    (found,) = torch.autograd.grad(y_NCHW, fused.conv.weight, gradient_NCHW)
    (expected,) = torch.autograd.grad(expected_NCHW, eager.conv.weight, gradient_NCHW.double())
    assert relative_error(found, expected) <= TOLERANCE[dtype]


def test_row_major_weights_are_laid_out_at_once_and_their_gradients_row_major() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Conv2d(16, out, 3, padding=1) for out in (16, 8, 16, 16, 1)))
    net[1] = torch.nn.Conv2d(16, 16, 3, stride=2, padding=1)
    for conv in net:
        conv.__class__ = fused_convs.Conv
    net[3].__class__ = fused_convs.UpsamplingConv
    net[3].register_buffer("sums_9T", fused_convs.sums_of_weights())
    net[4].__class__ = fused_convs.LastConv
    x_NCHW = torch.randn(2, 16, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    alone = net(x_NCHW)
    alone.square().mean().backward()
    expected = [conv.weight.grad for conv in net]
    net.zero_grad()
    with fused_convs.joined_layouts(net):
        assert net[0].laid_out_OCHW.is_contiguous(memory_format=torch.channels_last)
        joined = net(x_NCHW)
    joined.square().mean().backward()
    assert torch.equal(joined, alone)
    assert net[0].laid_out_OCHW is None
    for conv, gradient in zip(net, expected, strict=True):
        assert conv.weight.grad.is_contiguous()
        assert torch.equal(conv.weight.grad, gradient)


def test_more_than_an_int32_can_index_is_upsampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    upsample = upsampling(pair()[1])
    x_NCHW = torch.randn(5, upsample.channels, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    whole = upsample(x_NCHW)
    monkeypatch.setattr(fused_convs, "MOST_ELEMENTS", 2 * 4 * x_NCHW[0].numel())  # two images at once
    pieces = upsample(x_NCHW)
    assert pieces.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pieces, whole)


def test_what_cannot_be_fused_is_reported() -> None:
    assert why_not_fused(Denoiser(NET, AMOS, SIZE).unet) is None
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    assert "dropout" in str(why_not_fused(UNet2DModel(sample_size=8, norm_num_groups=8, dropout=0.1, **blocks)))
    others = {**blocks, "down_block_types": ("ResnetDownsampleBlock2D",)}
    assert "ResnetDownsampleBlock2D" in str(why_not_fused(UNet2DModel(sample_size=8, norm_num_groups=8, **others)))


def test_without_gpu_and_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose_kernels("auto", cpu) == choose_kernels("torch", cpu) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputProblems, match="need a GPU, and this is cpu"):
        choose_kernels("triton", cpu)
