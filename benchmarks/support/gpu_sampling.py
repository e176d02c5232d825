"""benchmarks/gpu.py: sampling in small batches, where launching kernels takes longer than running them; attention.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_shards.labels import AMOS
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.replayed import ReplayedNet
from segdiff_kernels.backend import Kernels
from support.gpu_kernels import called_once, kernel_bench
from support.gpu_session import Session, describe
from support.gpu_training import random_batch

# Network evaluations of the paper's sampler.
STEPS_AN_IMAGE = 50


def sampling(session: Session) -> list[dict[str, Any]]:
    """Images a second at 50 network evaluations an image, by batch: eager, fused, compiled, and as a CUDA graph."""
    rows = []
    ways = _ways(session)
    for batch in session.scale.sampling_batches:
        for name, make in ways.items():
            if name == "ours, compiled" and batch != session.scale.sampling_batches[0]:
                continue  # a minute of compiling each
            row: dict[str, Any] = {"batch": batch, "way": name}
            try:
                with torch.no_grad():
                    step_s = session.seconds(make(batch), session.scale.sampling_steps)
                row["images_per_s"] = batch / (step_s * STEPS_AN_IMAGE)
                print(f"  batch {batch:<4} {name:<28} {row['images_per_s']:>8.2f} img/s", flush=True)
            except Exception as error:  # the results of the other ways are still useful
                row["error"] = describe(error)
                print(f"  batch {batch:<4} {name:<28} {row['error']}", flush=True)
            rows.append(row)
    return rows


def _ways(session: Session) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """By name, a function that makes one network evaluation for a batch."""
    diffusers, ours = (_denoiser(session, kernels) for kernels in ("torch", "triton"))
    ways: dict[str, Callable[[int], Callable[[], Any]]] = {
        "diffusers": partial(_evaluation, session, diffusers, diffusers),
        "ours": partial(_evaluation, session, ours, ours),
    }
    if session.device.type == "cuda":
        ways["ours, CUDA graph"] = lambda batch: captured(_evaluation(session, ours, ours, batch))
        ways["ours, as sampled"] = lambda batch: _recorded(
            _evaluation(session, ours, ReplayedNet(ours, session.device), batch)
        )
    if session.scale.compiler is not None:
        compiled = torch.compile(ours, backend=session.scale.compiler, dynamic=False)
        ways["ours, compiled"] = partial(_evaluation, session, ours, compiled)
    return ways


def _denoiser(session: Session, kernels: Kernels) -> Denoiser:
    """In bf16, channels-last, ready to predict."""
    scale = session.scale
    torch.manual_seed(0)
    denoiser = Denoiser(replace(scale.net, kernels=kernels), AMOS, scale.size).prepare_for(session.device)
    return denoiser.to(torch.bfloat16).to(memory_format=torch.channels_last).eval()


def _evaluation(
    session: Session, denoiser: Denoiser, forward: Callable[..., Tensor], batch: int
) -> Callable[[], Tensor]:
    size, device = session.scale.size, session.device
    conditions = denoiser.conditions_of(random_batch(batch, size, device))
    x_t_B1HW, timestep_B = torch.randn(batch, 1, size, size, device=device), torch.full((batch,), 500, device=device)
    return lambda: forward(x_t_B1HW, timestep_B, *conditions)


def _recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, after ReplayedNet has recorded it."""
    for _ in range(3):
        call()
    return call


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as one CUDA graph, replayed: its inputs and outputs stay in place."""
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
            rows += kernel_bench.measure(case) if session.device.type == "cuda" else called_once(case)
    if session.device.type == "cuda":
        kernel_bench.print_table(rows)
    return rows
