"""The counter of bytes, launches and activations kept: against sums by hand; and the fused step against its targets."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
counting: Any = importlib.import_module("support.step_budget")
step_budget: Any = importlib.import_module("step_budget")

META = torch.device("meta")
# Bytes of an activation of the small tests: bf16 [2, 16, 8, 8].
ACTIVATION = 2 * 2 * 16 * 8 * 8


def _activation(memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    x_NCHW = torch.empty(2, 16, 8, 8, dtype=torch.bfloat16, device=META)
    return x_NCHW.contiguous(memory_format=memory_format).requires_grad_()


def _counted(module: nn.Module, x_NCHW: Tensor) -> Any:
    """The budget of module(x) and of a loss that gives its output a gradient in x's layout."""
    target_NCHW = torch.empty_like(x_NCHW, requires_grad=False)
    return counting.count(lambda: F.mse_loss(module(x_NCHW), target_NCHW), module)


def test_a_convolution_costs_its_bias_and_copies_to_its_layout() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1, device=META, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    budget = _counted(conv, _activation(torch.channels_last))
    # The bias, 16 values, is added in place; its gradient is a sum that reads dy.
    assert budget.kinds["bias of convolutions"] == counting.Tally(3 * ACTIVATION + 2 * 32, 2)
    assert budget.kinds[counting.PRODUCTS].launches == 3
    assert "copies to another layout" not in budget.kinds
    # From rows: x on the way and again on the way back, dy.
    assert _counted(conv, _activation()).kinds["copies to another layout"] == counting.Tally(3 * 2 * ACTIVATION, 3)


def test_a_norm_knows_rows_only() -> None:
    norm = nn.GroupNorm(4, 16, device=META, dtype=torch.bfloat16)
    rows, channels_last = _counted(norm, _activation()), _counted(norm, _activation(torch.channels_last))
    statistics = 2 * 2 * 4 * 2  # mean and rstd: two samples of four groups
    forward = 3 * ACTIVATION + 2 * 32 + statistics  # read, read, written; weight and bias
    backward = 5 * ACTIVATION + 32 + statistics + 2 * 32  # dy and x read twice, dx written; weight; dweight and dbias
    assert rows.kinds["GroupNorm"] == channels_last.kinds["GroupNorm"] == counting.Tally(forward + backward, 8)
    assert "copies to another layout" not in rows.kinds
    assert channels_last.kinds["copies to another layout"] == counting.Tally(2 * 2 * ACTIVATION, 2)  # x and dy


def test_views_are_free_and_what_is_saved_counts_once() -> None:
    x_NCHW = _activation()
    budget = counting.count(lambda: F.silu(x_NCHW.flatten(2).transpose(1, 2)).sum(), nn.Identity())
    assert budget.kinds["SiLU"].launches == 2
    assert budget.saved_bytes == ACTIVATION
    assert "copies to another layout" not in budget.kinds
    twice = counting.count(lambda: (F.silu(x_NCHW) * F.silu(x_NCHW)).sum(), nn.Identity())
    assert twice.saved_bytes == 3 * ACTIVATION  # x once, and both factors


def test_a_kernel_without_a_rule_is_refused() -> None:
    @torch.library.custom_op("segdiff::unheard_of", mutates_args=())
    def unheard_of(x: Tensor) -> Tensor:
        return x.clone()

    unheard_of.register_fake(torch.empty_like)
    with counting.Counter(), pytest.raises(KeyError, match="segdiff::unheard_of: say in _RULES"):
        unheard_of(torch.empty(1, device=META))


@pytest.fixture(scope="module")
def budgets() -> dict[str, Any]:
    config = step_budget.DenoiserConfig()
    eager = step_budget.eager_budget(config, 256, torch.channels_last)
    fused = step_budget.fused_budget(config, 256)
    return {
        "eager, channels-last": counting.per_image(eager)[0],
        "fused": counting.per_image(fused)[0],
    }


def test_the_fused_step_reaches_its_targets(budgets: dict[str, Any]) -> None:
    for name, share in step_budget.shares(budgets).items():
        assert share <= step_budget.TARGETS[name], (name, share)


def test_the_bytes_and_launches_of_the_fused_step_have_limits(budgets: dict[str, Any]) -> None:
    fused = budgets["fused"]
    assert fused.bytes <= step_budget.MOST_BYTES
    assert fused.launches <= step_budget.MOST_LAUNCHES
    rows = step_budget.fused_budget(step_budget.DenoiserConfig(), 256, torch.contiguous_format)(2)
    assert rows.launches <= step_budget.MOST_LAUNCHES_OF_ROWS


def test_nothing_of_the_fused_step_is_copied_to_another_layout(budgets: dict[str, Any]) -> None:
    copied = budgets["fused"].kinds.get("copies to another layout", counting.Tally())
    assert copied.bytes < 0.005 * budgets["fused"].bytes
