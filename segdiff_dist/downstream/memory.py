"""Whether segmenters that are trained at the same time fit into the memory of this machine."""

from __future__ import annotations

from dataclasses import replace

from data_shards.host_memory import HostMemory
from data_shards.problems import Problem
from segdiff_dist.planning.memory import HIGH, Capacity, memory_problems, plan_memory
from segdiff_dist.planning.network import Network
from segdiff_dist.segmentation.config import SegmenterConfig

_SECTION = "segmenter.train"


def share_of(capacity: Capacity, num_workers: int, num_beside: int) -> Capacity:
    """The memory for one of `num_workers` trainings, of which `num_beside` share a GPU."""
    return Capacity(_part(capacity.host, num_workers), _part(capacity.gpu, num_beside))


def trainings_problems(
    network: Network, config: SegmenterConfig, capacity: Capacity, num_workers: int, num_beside: int = 1
) -> list[Problem]:
    """Problems of trainings that do not fit, with settings that would. `capacity`: of the machine; see share_of."""
    problems = memory_problems(
        _SECTION,
        network,
        config.train,
        share_of(capacity, num_workers, num_beside),
        multiple_of=config.dice_group,
    )
    return [_with_fewer(one, network, config, capacity, num_workers, num_beside) for one in problems]


def _with_fewer(
    one: Problem, network: Network, config: SegmenterConfig, capacity: Capacity, num_workers: int, num_beside: int
) -> Problem:
    """The problem, with the number of trainings and the largest number that would fit."""
    if num_workers == 1:
        return one
    plan = plan_memory(network, config.train, ranks=1, on_gpu=capacity.gpu is not None)
    num_gpus = max(1, num_workers // num_beside)
    fitting = (
        n for n in range(num_workers - 1, 0, -1) if share_of(capacity, n, -(-n // num_gpus)).lacks(plan, HIGH) is None
    )
    remedy = one.remedy
    if fewer := next(fitting, None):
        remedy = f"give --evaluate.num-workers {fewer}, so that no more are trained at a time, or {remedy}"
    return replace(one, value=f"{one.value}, {num_workers} trainings at a time", remedy=remedy)


def _part(memory: HostMemory | None, num: int) -> HostMemory | None:
    return None if memory is None else HostMemory(memory.total // num, memory.available // num)
