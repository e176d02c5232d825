"""The speed of training and its use of the hardware: clock, FLOPs, MFU and memory.

Nothing here waits for the device. Read the clock after the loss has been read, so that the measured work is done.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segdiff_dist.attention import set_attention
from segdiff_dist.ranks.distributed import world_size
from segdiff_dist.ranks.precision import Precision, settled

# Dense TFLOP/s of bf16 and TF32 tensor cores and of fp32, from NVIDIA's data sheets (half of the figures "with
# sparsity"). The first name that is part of torch.cuda.get_device_name() counts.
_PEAK_TFLOPS: dict[str, tuple[float, float, float]] = {
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.5, 494.5, 67.0),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.5, 494.5, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX A6000": (154.8, 77.4, 38.7),
}
# Side of the matrices whose product is timed for devices outside the table: large enough to reach the peak, small
# enough to take a fraction of a second.
_MEASURED_SIDE = {"cpu": 768, "cuda": 8192}
# Long enough for one product among them to run undisturbed on a machine that does other work.
_MEASURED_S = 0.5
_MEASURED_REPEATS = 5


class Peak(NamedTuple):
    """Peak FLOP/s of one device, and where the figure comes from."""

    flops: float
    source: Literal["data sheet", "measured"]


def peak_flops(device: torch.device, precision: Precision) -> Peak:
    """The device's peak for matrix products: from the data sheet or, elsewhere, the best rate of a few products.

    fp32 counts as TF32 if cuDNN may use that for convolutions, which is torch's default.
    """
    precision = settled(precision, device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (bf16, tf32, fp32) in _PEAK_TFLOPS.items():
            if part in name:
                full = tf32 if torch.backends.cudnn.allow_tf32 else fp32
                return Peak(1e12 * (bf16 if precision == "bf16" else full), "data sheet")
    return Peak(measured_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32), "measured")


@cache
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few matrix products. Measured once a process: bf16 takes seconds on many CPUs."""
    side = _MEASURED_SIDE[device.type]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best_s, repeats, end = float("inf"), 0, time.perf_counter() + _MEASURED_S
    while repeats < _MEASURED_REPEATS or time.perf_counter() < end:
        repeats += 1
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * side**3 / best_s


class FlopCounter:
    """FLOPs of training on one image, forward and backward, counted on the meta device: no memory, no arithmetic.

    Make it before an engine takes the model. It keeps a copy without weights, notes the arguments of the model's first
    forward, and counts when asked. Work that activation checkpointing does twice counts once, as is usual for MFU.
    """

    def __init__(self, model: nn.Module, passes: int = 1) -> None:
        """`passes`: images that the model computes for each image of a batch."""
        self._copy, self._passes = _meta_copy(model), passes
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._flops: int | None = None
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def flops_per_image(self) -> int | None:
        """2 for each multiply-add of convolutions, products and attention; None before the first forward."""
        if self._flops is None and self._inputs is not None:
            args, kwargs = self._inputs
            self._flops = self._passes * count_flops(self._copy, *args, **kwargs)
        return self._flops

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = (tuple(map(_one_on_meta, args)), {k: _one_on_meta(v) for k, v in kwargs.items()})
        self._hook.remove()


def count_flops(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """FLOPs of model(*args, **kwargs) and of its backward pass; with everything on the meta device it costs nothing."""
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        made = model(*args, **kwargs)
        sum(part.sum() for part in (made if isinstance(made, tuple) else (made,))).backward()
    return counter.get_total_flops()


def _meta_copy(model: nn.Module) -> nn.Module:
    """The model with weights that have only shapes, attention in torch's own operators, and without activation
    checkpointing."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    if any(hasattr(module, "set_processor") for module in copied.modules()):
        set_attention(copied, "sdpa")
    return copied


def _one_on_meta(value: Any) -> Any:
    """The first image's part of a model's argument, as a shape."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_like(value[:1] if value.dim() else value, device="meta")


class StepClock:
    """Images a second, time spent waiting for data, step times, MFU and memory since the last call.

    Each rank measures itself; images_seen counts those of all ranks.
    """

    def __init__(
        self, images_seen: int, device: torch.device, counter: FlopCounter | None = None, peak: Peak | None = None
    ) -> None:
        self._device, self._counter, self._peak = device, counter, peak
        self._begin(images_seen)

    def _begin(self, images_seen: int) -> None:
        self._images, self._start, self._waited_s, self._paused_s = images_seen, time.perf_counter(), 0.0, 0.0
        self._step_start = 0.0  # measured by a clock that stops in pauses
        self._step_s: list[float] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context for time that does not count: validation, and waiting for a checkpoint."""
        start = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start

    def step(self) -> None:
        """The host has finished a step. Once the GPU's queue is full, its steps have the same pace."""
        now = self._busy_s()
        self._step_s.append(now - self._step_start)
        self._step_start = now

    def rates(self, images_seen: int) -> dict[str, float]:
        """The values to log, by stable names (docs/watching.md); starts the next measurement."""
        busy_s = max(self._busy_s(), 1e-9)
        images_per_s = (images_seen - self._images) / busy_s
        rates = {"images_per_s": images_per_s, "data_wait_fraction": self._waited_s / busy_s}
        if self._step_s:
            rates["step_s_p50"], rates["step_s_p95"] = map(float, np.percentile(self._step_s, (50, 95)))
        flops = self._counter.flops_per_image() if self._counter is not None else None
        if flops is not None and self._peak is not None:
            rates["mfu"] = images_per_s * flops / (self._peak.flops * world_size())
        self._begin(images_seen)
        return rates | memory_in_use(self._device)

    def _busy_s(self) -> float:
        return time.perf_counter() - self._start - self._paused_s


def memory_in_use(device: torch.device) -> dict[str, float]:
    """GiB of host memory of this process and, as a peak since it began, of GPU memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = {"host_memory_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}
    if device.type == "cuda":
        memory["gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return memory


def progress_line(row: Mapping[str, float]) -> str:
    """A short form of a log line, for the end of a progress bar, which itself shows img/s and ETA."""
    words = [f"loss {row['loss']:.4f}"]
    if "mfu" in row:
        words.append(f"MFU {row['mfu']:.0%}")
    words.append(f"data wait {row['data_wait_fraction']:.1%}")
    memory = row.get("gpu_memory_peak_gib", row.get("host_memory_gib"))
    if memory is not None:
        words.append(f"{memory:.1f} GiB")
    if row.get("skipped_steps"):
        words.append(f"{row['skipped_steps']:.0f} steps skipped")
    return ", ".join(words)
