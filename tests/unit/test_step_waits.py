"""A step never waits for the host, and its update takes few launches: counted as operators, without a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from training_support import NET, run_training

from data_shards.records import Batch
from segdiff_dist.training import loop
from segdiff_dist.training.captured import MicroStep
from segdiff_dist.training.throughput import Peak

# Reads of a number from the device (.item(), float(), bool(), tolist()), and numbers that Python sends to it.
WAITS = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero")
# Neither kernels nor views by their schema.
FREE = {f"aten::{name}" for name in ("detach", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided")}
# Of an update, which is what a step does outside of its micro-batches.
MOST_LAUNCHES = 60
# Launches of an operator on a few flat tensors, for the 114 million parameters of the paper's net: 320 chunks of 65,536
# elements in each (aten/src/ATen/native/cuda/MultiTensorApply.cuh), and of a norm two more. Averages are one kernel.
LAUNCHES = {"aten::_fused_adamw_": 6, "aten::_foreach_norm": 8, "aten::_foreach_lerp_": 0.5}


class Operators(TorchDispatchMode):
    """Counts operators by name; `in_batches` counts those of the micro-batches apart."""

    def __init__(self) -> None:
        super().__init__()
        self.update: Counter[str] = Counter()
        self.in_batches: Counter[str] = Counter()
        self.counts = self.update

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func._schema.name.startswith("profiler::"):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_no_step_waits_and_an_update_is_few_launches(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference of a run of two steps and one of four, which log and save equally often."""
    run, operators = MicroStep.__call__, Operators()

    def apart(self: MicroStep, batch: Batch) -> None:
        operators.counts = operators.in_batches
        run(self, batch)
        operators.counts = operators.update

    monkeypatch.setattr(MicroStep, "__call__", apart)
    monkeypatch.setattr(loop, "peak_flops", lambda *_: Peak(1e12, "data sheet"))  # which measures as long as it likes
    net = replace(NET, block_out_channels=(8,), attention_resolutions=())
    counts = []
    for num_images in (16, 32):
        operators, every = Operators(), dict.fromkeys(("checkpoint_every_images", "log_every_images"), num_images)
        with operators:
            run_training(shapes, tmp_path / str(num_images), net, num_images=num_images, zero_stage=1, **every)
        counts.append((operators.update, operators.in_batches))
    update, in_batches = (long - short for long, short in zip(counts[1], counts[0], strict=True))
    assert in_batches["aten::convolution"] > 0
    for waiting in WAITS:
        assert (update[waiting], in_batches[waiting]) == (0, 0), waiting
    launches = sum(LAUNCHES.get(name, 1) * count for name, count in update.items() if name not in FREE) / 2
    assert 0 < launches <= MOST_LAUNCHES, sorted(update.items())
