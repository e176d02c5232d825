"""`denoiser.net: compact`: the efficient net behind a stem of 4x4 pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_shards.labels import AMOS
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser

CONFIG = DenoiserConfig(
    net="compact",
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_resolutions=(),
    attention_head_dim=8,
    norm_num_groups=8,
)


def test_its_first_level_is_a_quarter_of_the_image(tmp_path: Path) -> None:
    """It predicts every pixel, comes back from its folder the same, and refuses sides that it cannot quarter."""
    torch.manual_seed(0)
    model = Denoiser(CONFIG, AMOS, 64)
    shapes = []
    model.unet.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[-2:]))
    mask = torch.randint(0, AMOS.num_classes, (2, 64, 64)).to(torch.uint8)
    inputs = (torch.randn(2, 1, 64, 64), torch.tensor([3, 5]), mask, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        made = model(*inputs)
        model.save(tmp_path / "weights", model.state_dict())
        again = Denoiser.load(tmp_path / "weights")(*inputs)
    assert made.shape == (2, 1, 64, 64)
    assert shapes[0] == (16, 16)
    torch.testing.assert_close(again, made)
    assert CONFIG.sides(64) == [16, 8]
    assert not CONFIG.problems(64)
    [problem] = CONFIG.problems(68)
    assert "a multiple of 8" in problem.remedy


@pytest.mark.parametrize("position", [(0, 0), (3, 2)])
def test_each_pixel_of_a_square_matters(position: tuple[int, int]) -> None:
    """No pixel of the 4x4 is lost in the stem: its mask changes the prediction."""
    torch.manual_seed(0)
    model = Denoiser(CONFIG, AMOS, 32).eval()
    x_t, mask = torch.randn(1, 1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.uint8)
    other = mask.clone()
    other[0, 8 + position[0], 8 + position[1]] = 6
    with torch.no_grad():
        one, two = (model(x_t, torch.tensor([3]), m, torch.tensor([0])) for m in (mask, other))
    assert not torch.equal(one, two)
