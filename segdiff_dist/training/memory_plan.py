"""Whether a training fits into memory, and how long it will take: estimated before it starts.

Nothing is computed: the network is built on the meta device, where tensors have shapes only. State and the checkpoint's
copy are counted, and so is what autograd keeps for the backward pass; the peak of activations is a multiple of the
latter that was measured. A run is refused only where LOW of the estimate is more than there is, and a setting is
suggested only where HIGH of it is free.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data_shards.host_memory import HostMemory, host_memory, rank_share
from data_shards.problems import Problem, refuse
from segdiff_dist.ranks.distributed import gather_objects, is_main, world_size
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.engine import start_distributed
from segdiff_dist.training.throughput import count_flops, peak_flops

LOW, HIGH = 0.9, 1.3
# Peak of a step over what autograd keeps. Measured on a CPU with two to four levels of 64 to 256 channels in bf16 and
# fp32, from the second step on: 1.36 to 1.77, with activation checkpointing 1.20. A GPU's is taken to be low.
_PEAK = {False: 1.35, True: 1.2}
_PEAK_ON_GPU = 1.1
# What a process comes to hold after this check beside what is counted here: DeepSpeed, DALI, batches in advance.
_PROCESS = 0.4 * 2**30
_GIB = 2**30
_DAY_S = 86_400.0
# The share of a device's peak that a training step reaches: about what nets of this kind do (docs/scale.md).
_USUAL_MFU = 0.4
# No machine is so slow: a run that would take less than a day at this rate is not timed.
_SLOWEST_FLOPS = 5e9


class Network:
    """A network to be trained, by what it needs for one image."""

    def __init__(self, make: Callable[[], nn.Module], inputs: Callable[[int], tuple[Any, ...]]) -> None:
        """`make`: the network, called under the meta device; `inputs`: the arguments of its forward for so many images,
        on the meta device."""
        self._make, self._inputs = make, inputs
        self._kept: dict[tuple[str, bool], float] = {}

    @cached_property
    def num_parameters(self) -> int:
        """Of the whole network."""
        return sum(p.numel() for p in self._model.parameters())

    @cached_property
    def flops_per_image(self) -> int:
        """Forward and backward."""
        return count_flops(self._model, *self._inputs(1))

    @property
    def most_flops_per_image(self) -> float:
        """A bound that needs no pass: every weight is used at every pixel, three times (forward and backward)."""
        return 2 * 6.0 * self.num_parameters * self._inputs(1)[0].shape[-1] ** 2

    def activations(self, images: int, precision: str, checkpointing: bool) -> int:
        """Bytes that autograd keeps of a forward pass, without the weights; with activation checkpointing also those of
        the largest block, which is computed again."""
        key = (precision, checkpointing)
        if key not in self._kept:
            self._kept[key] = self._kept_of_two(*key) / 2
        return int(images * self._kept[key])

    @cached_property
    def _model(self) -> nn.Module:
        with torch.device("meta"):
            return self._make().train()

    def _kept_of_two(self, precision: str, checkpointing: bool) -> int:
        model = self._model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        kept, inputs = _KeptBytes(model), self._inputs(2)
        if not checkpointing:
            return kept.of(*inputs)
        largest = kept.of_largest(_checkpointed(model), *inputs)
        networks: list[Any] = [m for m in model.children() if hasattr(m, "enable_gradient_checkpointing")]
        for network in networks:
            network.enable_gradient_checkpointing()
        try:
            return kept.of(*inputs) + largest
        finally:
            for network in networks:
                network.disable_gradient_checkpointing()


class _KeptBytes:
    """Counts what autograd keeps of a model's forward pass; each storage once, weights not at all."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._storages: dict[int, Any] = {}
        self._bytes = 0

    def of(self, *inputs: Any) -> int:
        self._storages, self._bytes = {}, 0
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept)
        with torch.enable_grad(), hooks, _ThriftyAttention():
            self._model(*inputs)
        return self._bytes

    def of_largest(self, blocks: Iterable[nn.Module], *inputs: Any) -> int:
        """What the one block keeps that keeps most."""
        before: dict[nn.Module, int] = {}
        most = 0

        def enter(block: nn.Module, *_: Any) -> None:
            before[block] = self._bytes

        def leave(block: nn.Module, *_: Any) -> None:
            nonlocal most
            most = max(most, self._bytes - before[block])

        hooks = [h for b in blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
        self.of(*inputs)
        for hook in hooks:
            hook.remove()
        return most

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # The storage is held too, so that no later one gets its address.
        if storage._cdata not in self._weights and storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            self._bytes += storage.nbytes()
        return tensor


class _ThriftyAttention(TorchFunctionMode):
    """Attention that keeps no matrix of weights, as on a GPU; on the meta device torch takes the one that does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            return _Attention.apply(query, key, value)
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("only what is kept is of interest")


def _checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """The parts that diffusers computes again one at a time: its resnets."""
    return (module for module in model.modules() if hasattr(module, "time_emb_proj") and hasattr(module, "conv1"))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a rank needs, by what they are for."""

    state: int
    """Weights, gradients, Adam's moments and the averages, on the device."""
    activations: int
    offloaded: int
    """State in the host's memory instead."""
    checkpoint: int
    """The host's copy of what a checkpoint holds."""

    def needed(self, where: str) -> int:
        """On the `GPU`, on the `host` beside it, or on a `lone host`, which computes itself."""
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
    """What a rank of `ranks` needs; for micro_batch_size auto, with one image at a time.

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
        return MemoryPlan(number * (4 + 4 + 8 + averages), activations, 0, checkpoint)
    width = 2 if config.precision == "bf16" else 4
    working = number * width // (ranks if stage == 3 else 1)
    gradients = number * width // (ranks if stage >= 2 else 1)
    optimizer = number * (4 + 4 + 8 + averages) // ranks
    offloaded = {"none": 0, "optimizer": optimizer, "all": optimizer + working}[config.offload]
    return MemoryPlan(working + gradients + optimizer - offloaded, activations, offloaded, checkpoint)


@dataclass(frozen=True)
class Capacity:
    """What a rank may use. `gpu`: None where the CPU computes."""

    host: HostMemory | None
    gpu: HostMemory | None = None

    def lacks(self, plan: MemoryPlan, factor: float) -> tuple[str, int, HostMemory] | None:
        """Where `factor` of the plan is more than is free: whose memory, what is needed there, and what there is."""
        places = {"GPU": self.gpu, "host": self.host} if self.gpu is not None else {"lone host": self.host}
        for where, memory in places.items():
            if memory is not None and factor * plan.needed(where) > memory.available:
                return where, plan.needed(where), memory
        return None


def capacity_of(device: torch.device) -> Capacity:
    """Of this rank, now."""
    host = host_memory()
    host = rank_share(host) if host is not None else None
    if device.type != "cuda":
        return Capacity(host)
    free, total = torch.cuda.mem_get_info(device)
    return Capacity(host, HostMemory(total, free))


@dataclass(frozen=True)
class SmallConfig:
    """A configuration that is named to who has too little memory."""

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
    """What cannot fit, with the settings that would. `section`: the settings' own, such as `train`; `multiple_of`: what
    micro-batches must be multiples of."""
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
        advice.append("end what else holds memory here")
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
    """Settings that need less memory for the same training, as flags, those that cost least time first."""
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
    """Raise InputProblems, the same on every rank, where any rank has problems. Call on every rank."""
    if world_size() > 1:
        start_distributed(device)
        host = socket.gethostname()
        everywhere = gather_objects([replace(p, where=f"{p.where} of {host}") for p in problems])
        problems = next((theirs for theirs in everywhere if theirs), [])
    refuse(problems)


def duration_s(network: Network, images: int, flops: float) -> float:
    """About how long so many images take on devices of `flops` FLOP/s together."""
    return images * network.flops_per_image / (flops * _USUAL_MFU)


def warn_of_length(section: str, network: Network, images: int, config: TrainConfig, device: torch.device) -> None:
    """One line from the main rank where `images` images will take longer than a day."""
    if not is_main() or images * network.most_flops_per_image < _DAY_S * _SLOWEST_FLOPS:
        return
    seconds = duration_s(network, images, peak_flops(device, config.precision).flops * world_size())
    if seconds > _DAY_S:
        sys.stderr.write(length_warning(section, images, seconds) + "\n")


def length_warning(section: str, images: int, seconds: float) -> str:
    """What is printed of a long run."""
    return (
        f"warning: {section}: {images:,} images take about {seconds / _DAY_S:,.0f} days on this machine "
        f"({images / seconds:.3g} images/s); fewer: --{section}.num-images N, smaller nets: --config amos_small"
    )


def gib(size: float) -> str:
    """`3.1 GiB`."""
    return f"{size / _GIB:.1f} GiB"


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of this shape without content, for Network's `inputs`."""
    return torch.empty(shape, dtype=dtype, device="meta")
