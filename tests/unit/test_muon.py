"""Muon: what is orthogonalised, and that the weights do not depend on how they are cut; exact resume; refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from training_support import NET, run_training

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.muon import MuonAdamW, is_hidden_matrix, orthogonalised
from segdiff_dist.training.sharded_state import Extent


@pytest.mark.parametrize("shape", [(16, 16), (24, 400), (300, 20)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_values_become_alike_and_singular_vectors_stay(shape: tuple[int, int], scale: float) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diagonal(u.T @ orthogonalised(matrix * scale, torch.float32) @ vh.T)
    # Jordan et al. 2024: five iterations bring singular values from 0.005 to 1 to between 0.68 and 1.14.
    assert values.min() > 0.6
    assert values.max() < 1.2
    assert torch.isfinite(orthogonalised(torch.zeros(shape))).all()
    # In bfloat16, and of a matrix whose singular values span seven orders of magnitude: none runs away.
    steep = u @ torch.diag(torch.logspace(-7, 0, min(shape))) @ vh
    assert torch.linalg.svdvals(orthogonalised(steep * scale)).max() < 1.5


def test_hidden_convolutions_are_muons_and_the_rest_is_adamws() -> None:
    net = Denoiser(NET, AMOS, 32)
    hidden = {name for name, p in net.named_parameters() if is_hidden_matrix(name, p)}
    assert {"unet.down_blocks.0.resnets.0.conv1.weight", "unet.mid_block.attentions.0.to_q.weight"} <= hidden
    others = {name.rpartition(".")[0] for name, _ in net.named_parameters()} - {n.rpartition(".")[0] for n in hidden}
    assert {"unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1", "unet.conv_norm_out"} <= others
    assert not any("time_emb" in name or "embedding" in name or name.endswith("bias") for name in hidden)


def test_a_veto_leaves_weights_and_moments() -> None:
    layer = torch.nn.Linear(20, 24)
    optimizer = MuonAdamW(layer.named_parameters(), lr=0.1, weight_decay=0.1, fused=True)
    shards = [layer.weight, layer.bias]
    extents = [Extent("weight", 0, 480, 0, 0), Extent("bias", 0, 24, 1, 0)]
    optimizer.lay_out({"weight": (24, 20), "bias": (24,)}, shards, [extents], 0)

    def step(veto: float, grad: float) -> torch.Tensor:
        for shard in shards:
            shard.grad = torch.full_like(shard, grad)
        optimizer.found_inf = torch.tensor(veto)
        optimizer.step()
        return torch.cat([s.detach().flatten().clone() for s in shards])

    first = step(0.0, 1.0)
    assert torch.equal(step(1.0, float("nan")), first)
    assert torch.isfinite(step(0.0, 1.0)).all()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_resumed_run_is_bit_identical(shapes: Path, tmp_path: Path, precision: str) -> None:
    whole = run_training(shapes, tmp_path / "whole", precision=precision, optimizer="muon")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / f"{96:012d}")
    assert run_training(shapes, cut, precision=precision, optimizer="muon") == whole
    assert whole[-1] < 0.7 * whole[0]


def test_what_cannot_go_together_is_refused(shapes: Path, tmp_path: Path) -> None:
    for changes in ({"zero_stage": 3}, {"offload": "optimizer"}):
        [problem] = TrainConfig(optimizer="muon", **changes).problems("train")
        assert problem.field == "train.optimizer"
        assert "adamw" in problem.remedy
    run_training(shapes, tmp_path, num_images=32)
    with pytest.raises(InputProblems, match="begun with adamw, not muon"):
        run_training(shapes, tmp_path, optimizer="muon")
