"""How training scales over GPUs, computed from measurements of one H100 and from bytes and bandwidths.

`python -m segdiff_dist.planning.scaling` prints the tables of docs/scale.md. They are computed: one GPU was measured,
and never several.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace


def most_ranks(global_batch_size: int, micro_batch_size: int, available: int) -> int:
    """The largest number of ranks, up to `available`, by which the global batch divides into whole micro-batches.

    0 where the global batch is not a multiple of the micro-batch.
    """
    if global_batch_size % micro_batch_size:
        return 0
    micro_batches = global_batch_size // micro_batch_size
    return max((ranks for ranks in range(1, available + 1) if micro_batches % ranks == 0), default=0)


@dataclass(frozen=True)
class NetworkCosts:
    """The cost of a network: weights, FLOPs and bytes."""

    parameters: float = 113.67e6
    """The paper's UNet at 256x256."""
    flop_per_image: float = 1.49e12
    """FLOPs of a forward and a backward pass, counted."""
    averages: int = 2
    """fp32 copies of the weights that follow them (train.ema_lengths)."""
    bytes_per_image: float = 131_072
    """A raw 256x256 pair as it is read and copied to the GPU."""


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes, joined by a network.

    Bandwidths are in bytes/s, in one direction, as NCCL can use them: assumed to be 80 % of the link's nominal rate.
    Measured: H100 80GB HBM3, torch 2.11, CUDA 13.0, the paper's UNet at 256x256 in bf16.
    """

    name: str = "InfiniBand"
    gpus_per_node: int = 8
    flops: float = 786e12
    """bf16 matrix products, measured."""
    mfu: float = 0.4473
    """The share of them that an image's work reaches. As CUDA graphs, micro-batches of 32 and 8 took 143.63 and 41.92
    ms, so that an image adds 4.238 ms."""
    micro_batch_s: float = 8.02e-3
    """The remaining time of those micro-batches: kernels that are too small to fill the GPU."""
    host_s: float = 0.217
    """The host's time to launch a micro-batch's kernels one by one: four of 16 images took 868 ms."""
    launch_s: float = 3.1e-6
    """A small kernel: 1,610 copies took 5 ms."""
    memory_bandwidth: float = 2.991e12
    """Copies, measured. AdamW's kernel reached 0.84 of it, that of the averages the full rate."""
    in_node: float = 0.8 * 450e9
    """NVLink 4: 450 GB/s each way a GPU."""
    between_nodes: float = 0.8 * 8 * 50e9
    """Bytes a second of a node: eight NDR InfiniBand ports of 400 Gb/s, one a GPU."""


UPDATE_LAUNCHES = 60
"""Upper bound for AdamW with ZeRO 1: tests/unit/test_step_waits.py."""
INFINIBAND = Machine()
ETHERNET = replace(INFINIBAND, name="25 GbE", between_nodes=0.8 * 25e9 / 8)
"""One port of 25 Gb/s a node."""


@dataclass(frozen=True)
class ParallelPlan:
    """How a batch is divided over GPUs and micro-batches."""

    gpus: int
    global_batch_size: int
    micro_batch_size: int
    zero_stage: int = 1
    overlap: float = 0.0
    """The share of the backward pass that hides the transfer of gradients. 0: none, as for ZeRO 0 to 2."""
    cuda_graph: bool = True
    """Whether micro-batches are replayed, if ZeRO allows it (train.cuda_graph)."""

    @property
    def is_replayed(self) -> bool:
        """ZeRO 2 and 3 reduce gradients by hooks in Python: their kernels are launched one by one."""
        return self.cuda_graph and self.zero_stage <= 1

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that a GPU accumulates in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.gpus)


def bytes_reduced(network: NetworkCosts, plan: ParallelPlan) -> float:
    """Bytes of a step's gradients on the network, times the rounds of the ring: one to reduce-scatter, one to
    all-gather.

    ZeRO 0 keeps fp32 weights under autocast, so fp32 gradients, all-reduced once a step. ZeRO 1 reduce-scatters bf16
    gradients once a step, ZeRO 2 and 3 after every micro-batch. Rajbhandari et al. 2020, section 7.
    """
    rounds = plan.num_micro_batches if plan.zero_stage >= 2 else 1
    return network.parameters * (8.0 if plan.zero_stage == 0 else 2.0 * rounds)


def bytes_gathered(network: NetworkCosts, plan: ParallelPlan) -> float:
    """The same for bf16 weights: ZeRO 1 and 2 all-gather them after the update, ZeRO 3 before each forward and each
    backward pass. Rajbhandari et al. 2020, section 7."""
    rounds = {0: 0, 1: 1, 2: 1, 3: 2 * plan.num_micro_batches}[plan.zero_stage]
    return network.parameters * 2.0 * rounds


def wire_s(machine: Machine, gpus: int, size: float) -> float:
    """Seconds that a ring takes to move `size` bytes around once: (n - 1) / n of them pass the slowest link.

    A node's ports carry a ring each, so that between nodes their bandwidths add up. Latency is left out.
    """
    nodes = math.ceil(gpus / machine.gpus_per_node)
    bandwidth = min(machine.in_node, machine.between_nodes) if nodes > 1 else machine.in_node
    return size * (gpus - 1) / gpus / bandwidth


def micro_batch_s(network: NetworkCosts, machine: Machine, plan: ParallelPlan) -> float:
    """Seconds of a micro-batch's forward and backward pass: those of the GPU, or of the host if it takes longer."""
    image_s = network.flop_per_image / (machine.flops * machine.mfu)
    gpu_s = plan.micro_batch_size * image_s + machine.micro_batch_s
    return gpu_s if plan.is_replayed else max(gpu_s, machine.host_s)


def step_s(network: NetworkCosts, machine: Machine, plan: ParallelPlan) -> float:
    """Seconds of one update: computing, communication that is not hidden, and the optimiser's pass over memory.

    AdamW in fp32 reads and writes weights, gradients and both moments (28 bytes a parameter), an average 12; with ZeRO
    the ranks share this work.
    """
    compute_s = plan.num_micro_batches * micro_batch_s(network, machine, plan)
    # Backward is two thirds of the work; with accumulation ZeRO 0 and 1 can only use the last micro-batch's.
    usable = compute_s / (plan.num_micro_batches if plan.zero_stage <= 1 else 1)
    hidden_s = plan.overlap * usable * 2 / 3
    reduce_s = wire_s(machine, plan.gpus, bytes_reduced(network, plan))
    gather_s = wire_s(machine, plan.gpus, bytes_gathered(network, plan))
    update_bytes = network.parameters * (28 + 12 * network.averages) / (plan.gpus if plan.zero_stage else 1)
    update_s = update_bytes / machine.memory_bandwidth + UPDATE_LAUNCHES * machine.launch_s
    return compute_s + max(0.0, reduce_s - hidden_s) + gather_s + update_s


def images_per_s(network: NetworkCosts, machine: Machine, plan: ParallelPlan) -> float:
    """Images a second of all GPUs together."""
    return plan.global_batch_size / step_s(network, machine, plan)


def dollars_per_million_images(rate: float, gpus: int, dollars_per_gpu_hour: float) -> float:
    """The cost of a million trained images at `rate` images/s."""
    return 1e6 / rate * gpus * dollars_per_gpu_hour / 3600


def state_bytes(network: NetworkCosts, zero_stage: int, gpus: int) -> float:
    """Weights, gradients, AdamW's moments and averages on one GPU, without activations and buffers.

    Rajbhandari et al. 2020, figure 1, plus averages, and the fp32 gradients that DeepSpeed makes for a rank's update.
    """
    averages = 4 * network.averages
    if zero_stage == 0:
        return network.parameters * (4 + 4 + 8 + averages)
    whole = {1: 2 + 2, 2: 2, 3: 0}[zero_stage]
    shared = {1: 0, 2: 2, 3: 2 + 2}[zero_stage] + 4 + 4 + 8 + averages
    return network.parameters * (whole + shared / gpus)


def growing_plan(gpus: int) -> ParallelPlan:
    """A plan for any power of two up to 512 GPUs: a batch of 256, from 16 GPUs on 16 a GPU up to 2,048; 64 images at
    once, or all images of a GPU if it has fewer."""
    global_batch_size = max(256, min(2048, 16 * gpus))
    return ParallelPlan(gpus, global_batch_size, min(64, global_batch_size // gpus))


def growth_table(network: NetworkCosts, dollars_per_gpu_hour: float) -> str:
    """Images a second and cost from 1 to 512 GPUs."""
    rows = []
    for gpus in (2**power for power in range(10)):
        plan = growing_plan(gpus)
        alone = images_per_s(network, INFINIBAND, growing_plan(1))
        fast, slow = (images_per_s(network, machine, plan) for machine in (INFINIBAND, ETHERNET))
        launched = images_per_s(network, INFINIBAND, replace(plan, cuda_graph=False))
        per_node = fast / math.ceil(gpus / INFINIBAND.gpus_per_node) * network.bytes_per_image / 1e6
        rows.append(
            [
                f"{gpus}",
                f"{plan.global_batch_size:,}",
                f"{plan.micro_batch_size} x {plan.num_micro_batches}",
                f"{fast:,.0f}",
                f"{fast / alone / gpus:.0%}",
                f"{launched:,.0f}",
                f"{dollars_per_million_images(fast, gpus, dollars_per_gpu_hour):.2f}",
                f"{per_node:,.0f}",
                f"{slow:,.0f}",
                f"{slow / alone / gpus:.0%}",
                f"{dollars_per_million_images(slow, gpus, dollars_per_gpu_hour):.2f}",
            ]
        )
    return _table(
        "GPUs | global batch | micro-batch x accumulation | images/s, InfiniBand | efficiency | "
        "without CUDA graph | $ per million images | raw data, MB/s a node | images/s, 25 GbE | efficiency | "
        "$ per million images",
        rows,
    )


def stage_table(network: NetworkCosts, gpus: int = 64) -> str:
    """State and speed of each ZeRO stage, with and without accumulation, on both networks."""
    rows = []
    for stage in range(4):
        row = [f"{stage}", f"{state_bytes(network, stage, gpus) / 2**30:.2f}"]
        for machine in (INFINIBAND, ETHERNET):
            for accumulation in (1, 8):
                plan = ParallelPlan(gpus, 16 * gpus * accumulation, 16, stage)
                row.append(f"{images_per_s(network, machine, plan):,.0f}")
        rows.append(row)
    columns = " | ".join(f"{m.name}, 16 x {a}" for m in (INFINIBAND, ETHERNET) for a in (1, 8))
    return _table(f"ZeRO stage | state, GiB a GPU | {columns}", rows)


def accumulation_table(network: NetworkCosts, gpus: int = 32) -> str:
    """How much accumulation and overlap compensate for a slow network, with ZeRO 1."""
    rows = []
    for accumulation in (1, 2, 4, 8, 16):
        plan = ParallelPlan(gpus, 16 * gpus * accumulation, 16)
        alone = images_per_s(network, ETHERNET, growing_plan(1)) * gpus
        plans = (plan, replace(plan, overlap=1.0))
        shares = [images_per_s(network, machine, p) / alone for machine in (INFINIBAND, ETHERNET) for p in plans]
        rows.append([f"16 x {accumulation}", f"{plan.global_batch_size:,}", *(f"{share:.0%}" for share in shares)])
    names = " | ".join(f"{m.name}, {how}" for m in (INFINIBAND, ETHERNET) for how in ("no overlap", "full overlap"))
    return _table(f"micro-batch x accumulation | global batch | {names}", rows)


def size_table(gpus: int = 64) -> str:
    """State of larger networks of the same kind, which shows where a stage is needed."""
    rows = []
    for parameters in (113.67e6, 1e9, 4e9, 16e9):
        network = NetworkCosts(parameters=parameters)
        gib = [state_bytes(network, stage, gpus) / 2**30 for stage in range(4)]
        rows.append([f"{parameters / 1e9:.3g} G", *(f"{size:,.1f}" for size in gib)])
    return _table("parameters | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3", rows)


DOLLARS_PER_GPU_HOUR = 3.0
"""A round figure for a rented H100; costs are proportional to it."""


def tables() -> list[str]:
    """The tables of docs/scale.md, in its order."""
    network = NetworkCosts()
    return [
        growth_table(network, DOLLARS_PER_GPU_HOUR),
        accumulation_table(network),
        stage_table(network),
        size_table(),
    ]


def _table(head: str, rows: list[list[str]]) -> str:
    lines = [head, " | ".join("---" for _ in head.split("|")), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write("\n".join(tables()))
