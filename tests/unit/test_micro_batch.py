"""`micro_batch_size: auto`: what is kept of it, and who decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks_support import ranks, sizing, tiny_batch, tiny_task
from torch.utils._python_dispatch import TorchDispatchMode

from data_shards.host_memory import HostMemory
from segdiff_dist.training import micro_batch
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.engine import Engine, start_distributed

CONFIG = TrainConfig(global_batch_size=8, micro_batch_size="auto")


def test_the_main_rank_decides_where_another_does_not_see_the_file(tmp_path: Path) -> None:
    with ranks(2, tmp_path, sizing) as started:
        assert [started.ended(rank, within_s=60) for rank in range(2)] == [0, 0], started.stderr(0) + started.stderr(1)
    assert [json.loads((tmp_path / f"size-{rank}").read_text()) for rank in range(2)] == [[[2, 2], True, False]] * 2


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, bool]]:
    """find_micro_batch, and whether it tried."""
    tried = []
    monkeypatch.setattr(micro_batch, "measure_rates", lambda *_: tried.append(1) or [1.0, 2.0, 1.0])

    def find(config: TrainConfig = CONFIG, task: Any = None) -> tuple[int, bool]:
        before = len(tried)
        size = micro_batch.find_micro_batch(task or tiny_task(), tiny_batch, config, tmp_path)
        return size, len(tried) > before

    return find


def test_what_was_found_is_kept_for_the_same_machine_alone(
    find: Callable[..., tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find() == (2, True)
    assert find() == (2, False)
    for other in ({"precision": "fp32"}, {"compile": True}, {"activation_checkpointing": True}, {"zero_stage": 3}):
        assert find(replace(CONFIG, **other)) == (2, True), other
    assert find(task=SimpleNamespace(name="tiny", model=torch.nn.Linear(2, 3))) == (2, True)
    fused = tiny_task()
    fused.model.uses_kernels = True
    assert find(task=fused) == (2, True)
    for device in ("NVIDIA H100 79 GiB", "NVIDIA H100 39 GiB", "NVIDIA H200 79 GiB"):
        monkeypatch.setattr(micro_batch, "device_name", lambda _, device=device: device)
        assert find() == (2, True)
    assert find() == (2, False)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"1 ranks, cpu": 4}', "\xff", "[" * 5000])
def test_a_damaged_file_is_tried_again(content: str, find: Callable[..., tuple[int, bool]], tmp_path: Path) -> None:
    (tmp_path / "micro_batch.json").write_bytes(content.encode("latin-1"))
    assert find() == (2, True)
    assert find() == (2, False)


def test_on_a_cpu_a_size_is_not_tried_that_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, tried = [0.0], []

    def rate(_: Any, batch: Any, *__: Any) -> float:
        size = len(batch.position_B)
        tried.append(size)
        resident[0] = max(resident[0], size * 1e9)
        return float(size)

    monkeypatch.setattr(micro_batch, "images_per_s", rate)
    monkeypatch.setattr(micro_batch, "resident_bytes", lambda: resident[0])
    monkeypatch.setattr(micro_batch, "host_memory", lambda: HostMemory(8 * 10**9, int(5e9 - resident[0])))
    micro_batch.measure_rates(tiny_task(), tiny_batch(), CONFIG, [1, 2, 4, 8])
    assert tried == [1, 2, 4]


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.num_bytes = max(self.num_bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("settings", [{"zero_stage": 2}, {"zero_stage": 3}, {"offload": "optimizer"}], ids=str)
def test_room_is_left_for_the_buffers_of_a_real_step(settings: dict[str, Any]) -> None:
    """By default DeepSpeed collects the gradients of any net in a buffer of 1 GB, which no trial contains."""
    net, device = torch.nn.Linear(30, 30), torch.device("cpu")
    config = TrainConfig(global_batch_size=2, precision="bf16", **settings)
    start_distributed(device)
    with Largest() as largest:
        engine = Engine(net, config, 2, device)
        engine.backward(engine(torch.zeros(2, 30, dtype=torch.bfloat16)).float().sum())
        engine.step()
    engine.close()
    assert largest.num_bytes <= 4 * micro_batch.held_elements(torch.nn.Linear(30, 30), config)
