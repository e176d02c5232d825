"""`train.compile`: what torch.compile makes of a network is used where its gradients are eager's, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_support import NET, run_training

from data_shards.problems import InputProblems
from data_shards.records import Batch
from segdiff_dist.training.compiled import compile_checked
from segdiff_dist.training.config import TrainConfig


class Affine(nn.Module):
    """Compiled, it computes the same, but one of its gradients is lost on the way."""

    def __init__(self, *, is_faulty: bool) -> None:
        super().__init__()
        self.scale, self.is_faulty = nn.Linear(1, 4), is_faulty
        self.mix = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale(x)
        if self.is_faulty and torch.compiler.is_compiling():
            y = 0.5 * y + 0.5 * y.detach()
        return self.mix(y)


class AffineTask:
    passes = 1

    def __init__(self, *, is_faulty: bool) -> None:
        torch.manual_seed(0)
        self.model = Affine(is_faulty=is_faulty)

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return (forward(batch.image_BHW[..., None].float() / 255.0) - 1.0).square().mean(), {}


def batch() -> Batch:
    number = torch.zeros(1, dtype=torch.long)
    pixels = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    return Batch(pixels, pixels, number, number, number)


def test_wrong_gradients_are_found_and_named() -> None:
    task = AffineTask(is_faulty=True)
    with pytest.raises(InputProblems, match=r"gradient is .*% off eager's, that of scale.* leave it off"):
        compile_checked(task, batch(), "fp32")  # type: ignore[arg-type]
    assert all(p.grad is None for p in task.model.parameters())
    sound = AffineTask(is_faulty=False)
    compile_checked(sound, batch(), "fp32")  # type: ignore[arg-type]
    assert list(sound.model.state_dict()) == list(Affine(is_faulty=False).state_dict())


def test_a_compiled_run_is_the_eager_run(shapes: Path, tmp_path: Path) -> None:
    net = replace(NET, block_out_channels=(8,), attention_resolutions=())
    settings: dict[str, Any] = {"num_images": 24, "micro_batch_size": 8, "precision": "fp32", "log_every_images": 8}
    eager = run_training(shapes, tmp_path / "eager", net, **settings)
    compiled = run_training(shapes, tmp_path / "compiled", net, compile=True, **settings)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert compiled != eager, "it was compiled to the same operations"


def test_zero_3_is_refused() -> None:
    (found,) = TrainConfig(compile=True, zero_stage=3).problems("train")
    assert (found.field, "zero_stage 3" in found.remedy) == ("train.compile", True)
