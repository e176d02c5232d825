"""`micro_batch_size: auto`: the number of images that a rank takes through the net at once, found at the start of a
run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from data_shards.files import write_atomic
from data_shards.host_memory import host_memory, rank_share
from data_shards.records import Batch
from segdiff_dist.ranks.distributed import gather_objects, is_main, world_size
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.deepspeed_internals import bucket_elements
from segdiff_dist.training.throughput import memory_in_use

if TYPE_CHECKING:
    from segdiff_dist.training.task import Task

_SIZES = "micro_batch.json"
# A larger size is taken only if it is this much faster.
_LEAST_GAIN = 1.02


def find_micro_batch(task: Task, load: Callable[[], Batch], config: TrainConfig, folder: Path) -> int:
    """The configured size or, for `auto`, the smallest of the fastest sizes that fit.

    It times training steps on copies of the first image from `load`, for each size that divides a rank's share of the
    global batch. The slowest rank decides. The result is kept in `folder`, keyed by ranks, devices and everything else
    that memory and speed depend on, so that a resumed run computes the same bits. Call it on every rank, after
    torch.distributed was started.
    """
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    batch = load()
    share = config.global_batch_size // world_size()
    file = folder / _SIZES
    devices = gather_objects(device_name(batch.image_BHW.device))
    key = _key(task.model, batch, config, devices)
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    # Only rank 0 reads the file: another rank may see an older version, and would then measure alone.
    known = _read(file) if is_main() else {}
    decided: int | None = gather_objects(known.get(key))[0]
    if decided in sizes:
        return decided
    rates = gather_objects(measure_rates(task, batch, config, sizes))
    everywhere = [min(rate[i] for rate in rates) for i in range(min(map(len, rates)))]
    if not everywhere:
        raise MemoryError(f"{task.name}: not even one image fits into the memory of every rank")
    best = 0
    for i, rate in enumerate(everywhere):
        if rate > everywhere[best] * _LEAST_GAIN:
            best = i
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({**known, key: sizes[best]}) + "\n")
    return sizes[best]


def _read(file: Path) -> dict[str, int]:
    """The sizes of earlier runs, by key; empty if the file cannot be read."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in known.items() if type(v) is int} if isinstance(known, dict) else {}


def device_name(device: torch.device) -> str:
    """`cpu`, or a GPU's name and memory."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.total_memory / 2**30:.0f} GiB"


def _key(model: nn.Module, batch: Batch, config: TrainConfig, devices: list[str]) -> str:
    """Everything that the fastest size depends on, as text. `devices` by rank."""
    shapes = repr([(name, tuple(p.shape)) for name, p in model.named_parameters()])
    facts = {
        "ranks": len(devices),
        "devices": sorted(set(devices)),
        "kernels": "triton" if getattr(model, "uses_kernels", False) else "torch",
        "precision": config.precision,
        "compile": config.compile,
        "checkpointing": config.activation_checkpointing,
        "zero": f"{config.zero_stage} {config.offload}",
        "global batch": config.global_batch_size,
        "torch": torch.__version__,
        "net": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "size": list(batch.image_BHW.shape[1:]),
    }
    return json.dumps(facts)


def measure_rates(task: Task, batch: Batch, config: TrainConfig, sizes: list[int]) -> list[float]:
    """Images a second of each size, up to the first that does not fit or is slower than two smaller ones."""
    device = batch.image_BHW.device
    rates: list[float] = []
    held = held_elements(task.model, config)
    before, done = resident_bytes(), 0
    try:
        kept_free = torch.empty(held if device.type == "cuda" else 0, device=device)
        for size in sizes:
            # A CPU raises no error when the memory is used up: the operating system kills the process.
            if device.type == "cpu" and rates and not _has_room(resident_bytes() - before, done, size, 4 * held):
                break
            rates.append(images_per_s(task, _repeated(batch, size), config, device))
            done = size
            if len(rates) > 2 and rates[-1] < min(rates[-3:-1]):
                break
        del kept_free
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    finally:
        task.model.zero_grad(set_to_none=True)
    return rates


def held_elements(model: nn.Module, config: TrainConfig) -> int:
    """The engine's memory besides activations and gradients, in fp32 elements: weights, Adam's two moments, the
    averages, and DeepSpeed's bucket."""
    number = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = number * (3 + len(config.ema_lengths)) // max(1, world_size() if config.zero_stage else 1)
    return state if config.adds_up_gradients else state + bucket_elements(number)


def resident_bytes() -> float:
    """Bytes of the host's memory that this process holds."""
    return memory_in_use(torch.device("cpu"))["host_memory_gib"] * 2**30


def _has_room(grown: float, done: int, size: int, held: float) -> bool:
    """Whether the host has memory for `size` images, if `done` images took `grown` bytes, and for `held` further
    bytes."""
    memory = host_memory()
    return memory is None or grown / done * size - grown + held <= rank_share(memory).available


def images_per_s(task: Task, batch: Batch, config: TrainConfig, device: torch.device) -> float:
    """The rate of training steps on a batch; the first step does not count."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, _ = task.loss(task.model, batch)
        loss.backward()
        float(loss)  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return len(batch.position_B) / min(seconds[1:])


def _repeated(batch: Batch, size: int) -> Batch:
    """`size` copies of a batch's first image."""
    repeated = {k: v if v is None else v[:1].repeat_interleave(size, 0) for k, v in vars(batch).items()}
    return Batch(**repeated)  # type: ignore[arg-type]
