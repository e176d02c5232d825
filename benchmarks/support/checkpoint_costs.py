"""The cost of writing a checkpoint for the step that begins it, and for the work during the writing."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch

# Seconds of forward and backward pass, beside which the state is copied: a tenth of what the paper's network, which has
# a state of this size, takes for two images on the CPUs that this was measured on.
_STEP_S = 0.5


def checkpoint_costs(num_parameters: int, folder: Path, times: int) -> dict[str, Any]:
    """Write a made-up state of so many parameters (weights, two moments, two averages, fp32) `times` times, from a
    process of its own that works beside the writing; see _costs_here."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_costs_here, (num_parameters, folder, times))


def _costs_here(num_parameters: int, folder: Path, times: int) -> dict[str, Any]:
    """`gib` of a checkpoint; for each checkpoint `waited_s`, the time that the loop waited, and `written_s`, from its
    start until it is complete; `slowed`, how much longer work takes during a writing than without; and `step_s`, the
    work between the start of a checkpoint and the next change of the weights."""
    from segdiff_dist.training.checkpoint_writer import CheckpointWriter
    from segdiff_dist.training.sharded_state import Extent, StateShard

    torch.set_num_threads(1)
    kinds = ("online", "exp_avg", "exp_avg_sq", "ema_0.05", "ema_0.1")
    state = StateShard(
        {"weight": (num_parameters,)},
        (Extent("weight", 0, num_parameters, 0, 0),),
        {kind: [torch.full((num_parameters,), math.pi)] for kind in kinds},
        {"step": 1.0},
    )
    matrix = torch.ones(512, 512)
    waited_s, written_s, beside_s, alone_s = [], [], [], []

    def work(seconds: list[float]) -> None:
        start = time.perf_counter()
        for _ in range(8):
            matrix @ matrix
        seconds.append(time.perf_counter() - start)

    with CheckpointWriter(folder, config="", keep=1) as writer:
        writer.reserve(state.shards)  # as the loop does before its first step
        for number in range(1, times + 1):
            for _ in range(100):
                work(alone_s)
            before_s, start = writer.waited_s, time.perf_counter()
            writer.start(state, {"images_seen": number})
            returned = time.perf_counter()
            assert returned - start < 1.1 * (writer.waited_s - before_s) + 0.01, "start() took longer than it says"
            while time.perf_counter() - returned < _STEP_S:
                work(beside_s)
            writer.wait_until_copied()
            waited_s.append(writer.waited_s - before_s)
            while writer.pending:
                work(beside_s)
                writer.after_step()
            written_s.append(time.perf_counter() - start)
    return {
        "gib": 4 * len(kinds) * num_parameters / 2**30,
        "waited_s": waited_s,
        "written_s": written_s,
        "step_s": _STEP_S,
        "slowed": statistics.median(beside_s) / statistics.median(alone_s) - 1.0,
    }
