from __future__ import annotations

import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks_support import ranks, refusing

from data_shards.host_memory import HostMemory
from data_shards.labels import LabelTable
from segdiff_dist import cli
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.network_shapes import denoiser_network
from segdiff_dist.planning.duration import duration_s, length_warning
from segdiff_dist.planning.memory import (
    HIGH,
    LOW,
    Capacity,
    MemoryPlan,
    SmallConfig,
    alternatives,
    memory_problems,
    plan_memory,
)
from segdiff_dist.planning.network import Network
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import segmenter_network
from segdiff_dist.stages import training_plan
from segdiff_dist.stages.training_plan import small_config
from segdiff_dist.training.config import TrainConfig

GIB = 2**30
CPU = torch.device("cpu")
TABLE = LabelTable("amos", ("background", *(f"organ {i}" for i in range(16))))
SHARDS: Any = SimpleNamespace(label_table=TABLE, modalities=("CT", "MR"))


def amos_small() -> SmallConfig:
    found = small_config(SHARDS, 256, CPU)
    return replace(found, config=replace(found.config, precision="bf16"))


def host(gib: float) -> Capacity:
    return Capacity(HostMemory(int(gib * GIB), int(gib * GIB)))


@pytest.fixture(scope="module")
def paper() -> Network:
    """The default net: the paper's, at 256x256."""
    return denoiser_network(DenoiserConfig(), SHARDS, 256, CPU)


def small(**values: Any) -> Network:
    config = DenoiserConfig(block_out_channels=(32, 32), layers_per_block=1, attention_resolutions=(), **values)
    return denoiser_network(config, SHARDS, 64, CPU)


def test_the_default_net_does_not_fit_into_24_gib(paper: Network) -> None:
    config = TrainConfig(precision="bf16")
    [found] = memory_problems("train", paper, config, host(24), small=amos_small)
    assert "16 needs about" in found.value
    assert "24.0 GiB" in found.value
    size = int(re.findall(r"--train.micro-batch-size (\d+)", found.remedy)[0])
    suggested = replace(config, micro_batch_size=size)
    assert config.global_batch_size % size == 0
    assert HIGH * plan_memory(paper, suggested, 1).needed("lone host") < 24 * GIB
    assert memory_problems("train", paper, suggested, host(24)) == []
    assert "--config amos_small" in found.remedy


def test_a_machine_that_is_large_enough_is_not_refused(paper: Network) -> None:
    assert memory_problems("train", paper, TrainConfig(precision="bf16"), host(64)) == []
    assert (
        memory_problems("train", paper, TrainConfig(precision="bf16"), Capacity(None)) == []
    )  # a system that does not say


def test_where_no_micro_batch_fits_the_small_net_is_named(paper: Network) -> None:
    [found] = memory_problems("train", paper, TrainConfig(precision="bf16"), host(4), small=amos_small)
    assert "micro-batch-size" not in found.remedy
    assert "--config amos_small" in found.remedy
    [found] = memory_problems("train", paper, TrainConfig(micro_batch_size="auto", precision="bf16"), host(0.5))
    assert found.remedy == "use a smaller net, smaller slices or a larger machine"


def test_memory_that_others_hold_is_named(paper: Network) -> None:
    [found] = memory_problems("train", paper, TrainConfig(precision="bf16"), Capacity(HostMemory(64 * GIB, 8 * GIB)))
    assert "8.0 GiB of 64.0 GiB are free" in found.value
    assert "end other programs that hold memory here" in found.remedy


def test_state_is_what_rajbhandari_counts() -> None:
    network, number = small(), small().num_parameters
    config = TrainConfig(micro_batch_size=1, ema_lengths=(0.05,), precision="bf16")
    whole = plan_memory(network, config, 1)
    assert whole.state == number * (2 + 2 + 4 + 4 + 8 + 4)
    assert whole.checkpoint == number * (4 + 8 + 4)
    assert plan_memory(network, replace(config, zero_stage=3), 4).state < whole.state / 3.9
    assert plan_memory(network, replace(config, zero_stage=0), 1).state == number * (4 + 4 + 8 + 4)
    offloaded = plan_memory(network, replace(config, offload="optimizer"), 1)
    assert offloaded.state + offloaded.offloaded == whole.state


def test_a_gpu_and_its_host_are_looked_at_apart() -> None:
    plan = MemoryPlan(state=8 * GIB, activations=8 * GIB, offloaded=0, checkpoint=6 * GIB)
    large = HostMemory(80 * GIB, 80 * GIB)
    assert Capacity(large, large).lacks(plan, LOW) is None
    lacking = Capacity(large, HostMemory(12 * GIB, 12 * GIB)).lacks(plan, LOW)
    assert lacking is not None
    assert lacking == ("GPU", 16 * GIB, HostMemory(12 * GIB, 12 * GIB))
    lacking = Capacity(HostMemory(4 * GIB, 4 * GIB), large).lacks(plan, LOW)
    assert lacking is not None
    assert lacking[0] == "host"


def test_activations_are_what_a_step_keeps() -> None:
    """Counted on the CPU, with its own operators, and on the meta device."""
    network = small()
    model = network.make().prepare_for(CPU).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    inputs = [torch.zeros_like(t, device="cpu") for t in network.inputs(4)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    counted = sum(storage.nbytes() for storage in kept.values())
    assert network.activations(4, "fp32", False) == pytest.approx(counted, rel=0.03)
    assert network.activations(4, "bf16", False) == pytest.approx(counted / 2, rel=0.1)


def test_muon_gathers_gradients_from_the_other_ranks(paper: Network) -> None:
    adamw, muon = TrainConfig(precision="bf16"), TrainConfig(optimizer="muon", precision="bf16")
    assert plan_memory(paper, muon, 1) == plan_memory(paper, adamw, 1)
    assert plan_memory(paper, muon, 2).state == plan_memory(paper, adamw, 2).state + 4 * paper.num_parameters


def test_activation_checkpointing_needs_less(paper: Network) -> None:
    plain, checkpointed = (paper.activations(16, "bf16", on) for on in (False, True))
    assert 0.3 * plain < checkpointed < 0.6 * plain


def test_what_is_suggested_divides_the_batch() -> None:
    sizes = [c.micro_batch_size for _, c in alternatives("segmenter.train", TrainConfig(micro_batch_size=64), 1, 8)]
    assert sizes == [32, 16, 8]
    config = TrainConfig(global_batch_size=24, micro_batch_size=12)
    assert [flags for flags, _ in alternatives("train", config, 2)][:2] == [
        "--train.micro-batch-size 6",
        "--train.micro-batch-size 4",
    ]


def test_a_segmenter_is_counted_too() -> None:
    network = segmenter_network(SegmenterConfig(), SHARDS, 256)
    [found] = memory_problems("segmenter.train", network, SegmenterConfig().train, host(0.8), multiple_of=8)
    assert found.field == "segmenter.train.micro_batch_size"


def test_a_long_run_says_how_long(paper: Network) -> None:
    seconds = duration_s(paper, 12_800_000, 1e12)
    assert seconds == pytest.approx(12_800_000 * 1.494e12 / 0.4e12, rel=0.01)
    assert "about 553 days on this machine (0.268 images/s)" in length_warning("train", 12_800_000, seconds)


@pytest.mark.parametrize("command", ["train", "train-segmenter"])
def test_the_commands_refuse_before_they_write(
    command: str,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training_plan, "capacity_of", lambda _: host(0.1))
    config = str(Path(__file__).parents[2] / "launch/configs/smoke.yaml")
    arguments = [command, "--config", config, "--data", str(shapes), "--run", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    assert "0.1 GiB of 0.1 GiB are free" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_all_ranks_refuse_what_one_has_no_memory_for(tmp_path: Path) -> None:
    with ranks(2, tmp_path, refusing) as started:
        assert [started.ended(rank, within_s=60) for rank in range(2)] == [0, 0], started.stderr(0) + started.stderr(1)
    said = [(tmp_path / f"refused-{rank}").read_text() for rank in range(2)]
    assert said == [f"memory of {socket.gethostname()}: size: 16; give 8"] * 2
