"""GroupNorm over channels-last on a CPU, against float64; and the UNet that stays channels-last with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdiff_dist import cpu_norm
from segdiff_dist.cpu_norm import group_norm, use_cpu_norms

LAST = torch.channels_last


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def gradients(
    norm: Any, x_NCHW: Tensor, dy_NCHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor
) -> tuple[Tensor, ...]:
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x_NCHW, weight_C, bias_C)
    ]
    y_NCHW = norm(leaves[0], groups, *leaves[1:], 1e-5)
    return (y_NCHW, *torch.autograd.grad(y_NCHW, leaves, dy_NCHW))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 32, 9, 7), 32),  # a channel a group
        ((3, 24, 5, 5), 8),
        ((1, 48, 1, 33), 1),
        ((2, 8, 16, 16), 4),
        ((1, 16, 64, 64), 4),  # more than a block, the last one shorter
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("by_rows", [True, False])
def test_against_float64(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    bound: float,
    offset: float,
    by_rows: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_norm, "BLOCK", 16 * 1000)
    monkeypatch.setattr(cpu_norm, "is_slow", lambda *_: by_rows)
    x_NCHW = (torch.randn(shape) + offset).to(dtype).contiguous(memory_format=LAST)
    dy_NCHW = torch.randn(shape).to(dtype)  # rows, as a sum's gradient may come
    weight_C, bias_C = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    if offset:  # what is left of x after its mean has so many digits less, in torch's forward pass too
        bound *= 3 * offset
    found = gradients(group_norm, x_NCHW, dy_NCHW, groups, weight_C, bias_C)
    x_NCHW, dy_NCHW, weight_C, bias_C = (t.double() for t in (x_NCHW, dy_NCHW, weight_C, bias_C))
    wanted = gradients(F.group_norm, x_NCHW, dy_NCHW, groups, weight_C, bias_C)
    for name, ours, theirs in zip(("y", "dx", "dweight", "dbias"), found, wanted, strict=True):
        assert relative(ours, theirs) < bound, name
        assert ours.dtype == dtype
    assert found[0].is_contiguous(memory_format=LAST)
    assert found[1].is_contiguous(memory_format=LAST)


def test_bf16_gradients_are_nearer_to_float64_than_torchs() -> None:
    x_NCHW = (torch.randn(2, 32, 32, 32) + 4).bfloat16().contiguous(memory_format=LAST)
    dy_NCHW, weight_C, bias_C = (torch.randn(shape).bfloat16() for shape in ((2, 32, 32, 32), 32, 32))
    inputs = (x_NCHW, dy_NCHW, 8, weight_C, bias_C)
    exact = gradients(F.group_norm, x_NCHW.double(), dy_NCHW.double(), 8, weight_C.double(), bias_C.double())
    ours, torchs = gradients(group_norm, *inputs), gradients(F.group_norm, *inputs)
    assert relative(ours[2], exact[2]) < relative(torchs[2], exact[2])


def test_other_layouts_are_torchs() -> None:
    x_NCHW = torch.randn(2, 8, 6, 6)
    arguments = (torch.randn(2, 8, 6, 6), 4, torch.randn(8), torch.randn(8))
    found, wanted = (gradients(norm, x_NCHW, *arguments) for norm in (group_norm, F.group_norm))
    assert all(map(torch.equal, found, wanted))


def test_weights_may_be_wider_than_the_image_as_under_autocast() -> None:
    x_NCHW = torch.randn(2, 8, 6, 6).bfloat16().contiguous(memory_format=LAST)
    _, dx_NCHW, dweight_C, _ = gradients(group_norm, x_NCHW, torch.ones_like(x_NCHW), 4, torch.randn(8), torch.randn(8))
    assert (dx_NCHW.dtype, dweight_C.dtype) == (torch.bfloat16, torch.float32)


def test_a_network_keeps_its_names() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(4, 8), nn.SiLU())
    before = copy.deepcopy(net.state_dict())
    use_cpu_norms(net)
    assert list(net.state_dict()) == list(before)
    x_NCHW = torch.randn(2, 1, 9, 9).contiguous(memory_format=LAST)
    wanted = F.silu(F.group_norm(net[0](x_NCHW), 4, before["1.weight"], before["1.bias"]))
    torch.testing.assert_close(net(x_NCHW), wanted)


def test_the_unet_computes_what_diffusers_does_and_stays_channels_last() -> None:
    from diffusers import UNet2DModel

    from segdiff_dist.denoising.cpu_unet import adapt_to_cpu

    torch.manual_seed(0)
    theirs = UNet2DModel(
        sample_size=32,
        in_channels=2,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )
    ours = copy.deepcopy(theirs)
    adapt_to_cpu(ours)
    in_rows = []
    for name, module in ours.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, args, y, name=name: None if y.is_contiguous(memory_format=LAST) else in_rows.append(name)
            )
    x_NCHW, timestep_N = torch.randn(2, 2, 32, 32), torch.tensor([3, 700])
    losses = []
    for unet, image in ((theirs, x_NCHW), (ours, x_NCHW.contiguous(memory_format=LAST))):
        loss = unet.train()(image, timestep_N).sample.square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - yours.grad).abs().max() <= 1e-5 * yours.grad.abs().max() + 1e-8, name
    assert [name for name in in_rows if name != "conv_out"] == []  # of one channel: both layouts are one
