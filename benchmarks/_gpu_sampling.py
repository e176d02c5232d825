"""benchmarks/gpu.py: sampling in small batches, where launching kernels takes longer than running them; attention.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _gpu_kernels import _bench, _called_once
from _gpu_session import Session, describe
from _gpu_training import random_batch
from torch import Tensor

from data_shards.labels import AMOS
from segdiff_dist.denoising.denoiser import Denoiser

# Network evaluations of the paper's sampler.
STEPS_AN_IMAGE = 50


def sampling(session: Session) -> list[dict[str, Any]]:
    """Images a second at 50 network evaluations an image, by batch: eager, fused, compiled, and as a CUDA graph."""
    rows = []
    torch.manual_seed(0)
    for batch in session.scale.sampling_batches:
        for name, make in _ways(session).items():
            row: dict[str, Any] = {"batch": batch, "way": name}
            try:
                with torch.no_grad():
                    step_s = session.seconds(make(batch), session.scale.sampling_steps)
                row["images_per_s"] = batch / (step_s * STEPS_AN_IMAGE)
                print(f"  batch {batch:<4} {name:<28} {row['images_per_s']:>8.2f} img/s", flush=True)
            except Exception as error:  # the other ways are worth having
                row["error"] = describe(error)
                print(f"  batch {batch:<4} {name:<28} {row['error']}", flush=True)
            rows.append(row)
    return rows


def _ways(session: Session) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """By name, what makes one network evaluation for a batch."""
    ways: dict[str, Callable[[int], Callable[[], Any]]] = {
        "diffusers": partial(_evaluation, session, "torch"),
        "ours": partial(_evaluation, session, "triton"),
    }
    if session.scale.compiler is not None:
        ways["ours, compiled"] = partial(_evaluation, session, "triton", compiled=True)
    if session.device.type == "cuda":
        ways["ours, CUDA graph"] = lambda batch: captured(_evaluation(session, "triton", batch))
    return ways


def _evaluation(session: Session, kernels: str, batch: int, *, compiled: bool = False) -> Callable[[], Tensor]:
    scale, device = session.scale, session.device
    net = replace(scale.net, kernels=kernels)
    denoiser = Denoiser(net, AMOS, scale.size).prepare_for(device).to(torch.bfloat16).eval()
    denoiser.unet.to(memory_format=torch.channels_last)
    if compiled:
        denoiser.compile(backend=scale.compiler, dynamic=False)
    conditions = denoiser.conditions_of(random_batch(batch, scale.size, device))
    x_t_B1HW = torch.randn(batch, 1, scale.size, scale.size, device=device)
    timestep_B = torch.full((batch,), 500, device=device)
    return lambda: denoiser(x_t_B1HW, timestep_B, *conditions)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as one CUDA graph, replayed: what it reads and writes stays where it is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def attention(session: Session) -> list[dict[str, Any]]:
    """Attention's backends at the net's shapes, forward and backward; kernels/benchmarks/attention.py."""
    import attention as benchmark

    rows: list[dict[str, Any]] = []
    for size in session.scale.attention_sizes:
        for case in benchmark.cases(size, session.scale.batches[0]):
            rows += _bench.measure(case) if session.device.type == "cuda" else _called_once(case)
    if session.device.type == "cuda":
        _bench.print_table(rows)
    return rows
