"""Whether a training fits into memory, estimated before it starts.

The estimate counts the state, the checkpoint's copy and the tensors that autograd keeps for the backward pass; the peak
of activations is a measured multiple of these. A run is refused only if LOW times the estimate exceeds the free memory,
and a setting is suggested only if HIGH times its estimate is free.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from data_shards.host_memory import HostMemory, host_memory, rank_share
from data_shards.problems import Problem, refuse
from segdiff_dist.planning.network import Network
from segdiff_dist.ranks.distributed import gather_objects, world_size
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.engine import start_distributed

LOW, HIGH = 0.9, 1.3
# Peak of a step relative to the tensors that autograd keeps. Measured on a CPU with two to four levels of 64 to 256
# channels in bf16 and fp32, from the second step on: 1.36 to 1.77, with activation checkpointing 1.20. A GPU's is
# assumed to be low.
_PEAK = {False: 1.35, True: 1.2}
_PEAK_ON_GPU = 1.1
# Further memory of a process, some time after this check: DeepSpeed, DALI, batches in advance.
_PROCESS = 0.4 * 2**30
_GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a rank needs, by purpose."""

    state: int
    """Weights, gradients, Adam's moments and the averages, on the device."""
    activations: int
    offloaded: int
    """State in the host's memory instead."""
    checkpoint: int
    """The host's copy of a checkpoint's contents."""

    def needed(self, where: str) -> int:
        """Bytes on the `GPU`, on the `host` beside it, or on a `lone host`, which has no GPU."""
        on_device, on_host = self.state + self.activations, self.offloaded + self.checkpoint + int(_PROCESS)
        return {"GPU": on_device, "host": on_host, "lone host": on_device + on_host}[where]

    def __str__(self) -> str:
        parts = {
            "weights, gradients, optimiser and averages": self.state + self.offloaded,
            "the checkpoint's copy": self.checkpoint,
            "activations": self.activations,
        }
        return ", ".join(f"{name} {gib(size)}" for name, size in parts.items())


def plan_memory(network: Network, config: TrainConfig, ranks: int, on_gpu: bool = False) -> MemoryPlan:
    """The memory that one of `ranks` ranks needs. For micro_batch_size auto it is that of one image at a time.

    State as in Rajbhandari et al. 2020, figure 1, plus averages, and the fp32 gradients of a rank's update.
    """
    number, stage = network.num_parameters, config.zero_stage
    averages = 4 * len(config.ema_lengths)
    images = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    checkpointing = config.activation_checkpointing
    peak = _PEAK_ON_GPU if on_gpu else _PEAK[checkpointing]
    activations = int(peak * network.activations(images, config.precision, checkpointing))
    checkpoint = number * (4 + 8 + averages) // ranks
    if stage == 0:
        state = number * (4 + 4 + 8 + averages) + 4 * network.num_frozen
        return MemoryPlan(state, activations, 0, checkpoint)
    width = 2 if config.precision == "bf16" else 4
    working = (number + network.num_frozen) * width // (ranks if stage == 3 else 1)
    gradients = number * width // (ranks if stage >= 2 else 1)
    optimizer = number * (4 + 4 + 8 + averages) // ranks
    offloaded = {"none": 0, "optimizer": optimizer, "all": optimizer + working}[config.offload]
    # Muon has no second moment; the memory saved covers its own buffers on a rank.
    gathered = 4 * number if config.optimizer == "muon" and ranks > 1 else 0
    return MemoryPlan(working + gradients + optimizer + gathered - offloaded, activations, offloaded, checkpoint)


def disk_bytes(network: Network, config: TrainConfig, num_checkpoints: int | None = None) -> int:
    """Bytes of a training's checkpoints and weights: fp32 weights, two moments and the averages. `num_checkpoints`: at
    once; None: those that are kept, and one more while the oldest is not yet removed."""
    number, frozen, averages = network.num_parameters, network.num_frozen, len(config.ema_lengths)
    checkpoints = number * 4 * (3 + averages) * (num_checkpoints or config.keep_checkpoints + 1)
    return checkpoints + (number + frozen) * 4 * (1 + averages) + frozen * 4


@dataclass(frozen=True)
class Capacity:
    """The memory that a rank may use. `gpu` is None if the CPU computes."""

    host: HostMemory | None
    gpu: HostMemory | None = None

    def lacks(self, plan: MemoryPlan, factor: float) -> tuple[str, int, HostMemory] | None:
        """The place where `factor` times the plan exceeds the free memory, the bytes needed there, and its memory."""
        places = {"GPU": self.gpu, "host": self.host} if self.gpu is not None else {"lone host": self.host}
        for where, memory in places.items():
            if memory is not None and factor * plan.needed(where) > memory.available:
                return where, plan.needed(where), memory
        return None


def capacity_of(device: torch.device) -> Capacity:
    """The capacity of this rank, now."""
    host = host_memory()
    host = rank_share(host) if host is not None else None
    if device.type != "cuda":
        return Capacity(host)
    free, total = torch.cuda.mem_get_info(device)
    return Capacity(host, HostMemory(total, free))


@dataclass(frozen=True)
class SmallConfig:
    """A configuration that a refusal for lack of memory suggests."""

    name: str
    network: Network
    config: TrainConfig


def memory_problems(
    section: str,
    network: Network,
    config: TrainConfig,
    capacity: Capacity,
    *,
    ranks: int = 1,
    multiple_of: int = 1,
    small: Callable[[], SmallConfig] | None = None,
) -> list[Problem]:
    """A problem if the training does not fit, with settings that would.

    `section`: name of the config's section, such as `train`. `multiple_of`: micro-batches must be multiples of it.
    """
    plan_of = partial(plan_memory, ranks=ranks, on_gpu=capacity.gpu is not None)
    plan = plan_of(network, config)
    lacking = capacity.lacks(plan, LOW)
    if lacking is None:
        return []
    where, needed, memory = lacking
    remedies: dict[bool, str] = {}  # one without and one with activation checkpointing
    for flags, changed in alternatives(section, config, ranks, multiple_of):
        is_new = changed.activation_checkpointing not in remedies
        if is_new and capacity.lacks(plan_of(network, changed), HIGH) is None:
            size = plan_of(network, changed).needed(where)
            remedies[changed.activation_checkpointing] = f"{flags} (about {gib(size)})"
    advice = [f"give {text}" for text in remedies.values()]
    other = small() if small is not None else None
    if other is not None and capacity.lacks(plan_of(other.network, other.config), HIGH) is None:
        advice.append(f"start from --config {other.name}, a net of a small machine's size")
    if LOW * needed <= memory.total:
        advice.append("end other programs that hold memory here")
    remedy = ", or ".join(advice) or "use a smaller net, smaller slices or a larger machine"
    value = (
        f"{config.micro_batch_size} needs about {gib(needed)} of the {'GPU' if where == 'GPU' else 'host'}'s memory "
        f"for each rank ({plan}); "
        f"{gib(memory.available)} of {gib(memory.total)} are free for it"
    )
    return [Problem("memory", f"{section}.micro_batch_size", value, remedy)]


def alternatives(
    section: str, config: TrainConfig, ranks: int, multiple_of: int = 1
) -> Iterator[tuple[str, TrainConfig]]:
    """Settings that need less memory for the same training, as flags. Those that cost the least time come first."""
    share = config.global_batch_size // ranks
    now = config.micro_batch_size
    sizes = [n for n in range(share, 0, -1) if share % n == 0 and n % multiple_of == 0]
    smaller = [n for n in sizes if now != "auto" and n < now]
    for size in smaller:
        yield f"--{section}.micro-batch-size {size}", replace(config, micro_batch_size=size)
    if section != "train" or config.activation_checkpointing:
        return  # the segmenter's network has none
    for size in [n for n in sizes if now == "auto" or n <= now]:
        changed = replace(config, micro_batch_size=size, activation_checkpointing=True)
        flags = f"--{section}.activation-checkpointing"
        yield flags if size == now else f"--{section}.micro-batch-size {size} {flags}", changed


def refuse_together(problems: list[Problem], device: torch.device) -> None:
    """Raise the same InputProblems on every rank if any rank has problems. Call it on every rank."""
    if world_size() > 1:
        start_distributed(device)
        host = socket.gethostname()
        everywhere = gather_objects([replace(p, where=f"{p.where} of {host}") for p in problems])
        problems = next((theirs for theirs in everywhere if theirs), [])
    refuse(problems)


def gib(size: float) -> str:
    """`3.1 GiB`."""
    return f"{size / _GIB:.1f} GiB"
