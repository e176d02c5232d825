"""The workers of a stage that fans out: as its section asks for them, and as this machine or a cluster provides them.

Sections keep their keys (`sample.num_workers`, `evaluate.ray_address`, ...) and give this view of them as `workers`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from data_shards import fan_out
from data_shards.host_memory import host_memory
from data_shards.problems import Problem, problem

# Resident memory of a worker with its libraries, before its work. Measured: prepare, without torch, 0.26 GB;
# sample 0.63 GB; evaluate 0.78 GB. A third of it is shared among workers.
LEAST_BYTES, LEAST_BYTES_WITH_TORCH = 250 * 2**20, 600 * 2**20
_UNSHARED = 0.6


@dataclass(frozen=True)
class WorkerPool:
    """Available workers."""

    num_workers: int
    device: str
    gpus_per_worker: float

    @property
    def num_beside(self) -> int:
        """Workers that share one GPU; without GPUs all of them, on any number of machines."""
        return round(1 / self.gpus_per_worker) if self.device == "cuda" else self.num_workers


@dataclass(frozen=True)
class WorkersConfig:
    """The number of workers, their threads, their device and their machines."""

    section: str
    """The name of the section, for messages: `sample`."""
    num_workers: int | None = None
    """None: one for each GPU, or one for each core if there is no GPU."""
    threads_per_worker: int = 1
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    ray_address: str | None = None
    """The Ray cluster to join; None: only this machine."""
    most_on_cpu: int | None = None
    """Limit on a CPU, unless num_workers is given; None: no limit."""
    least_bytes: int = LEAST_BYTES
    """Memory of a worker, before its work."""

    def joined(self) -> AbstractContextManager[None]:
        """The Ray cluster at ray_address; nothing if this machine does the work."""
        return nullcontext() if self.ray_address is None else fan_out.ray_session(self.ray_address)

    def pool(self) -> WorkerPool:
        """The workers of this machine, or of the cluster that was joined.

        Raises InputProblems for device cuda if there is no GPU.
        """
        num_cpus, num_gpus = self._available()
        if self.device == "cuda" and not num_gpus:
            where = "this machine" if self.ray_address is None else f"the cluster at {self.ray_address}"
            value = f"cuda, but {where} has no GPU"
            raise problem("config", f"{self.section}.device", value, "give auto or cpu")
        num_gpus = 0 if self.device == "cpu" else num_gpus
        by_default = num_gpus or max(1, num_cpus // self.threads_per_worker)
        if not num_gpus and self.most_on_cpu is not None:
            by_default = min(by_default, self.most_on_cpu)
        if not num_gpus and self.ray_address is None:
            by_default = min(by_default, self._most_in_memory())
        num_workers = self.num_workers or by_default
        return WorkerPool(num_workers, "cuda" if num_gpus else "cpu", min(1.0, num_gpus / num_workers))

    @property
    def num_on_cores(self) -> int:
        """Workers of a stage that computes only on cores: num_workers, or one for each core of this machine, as far as
        there is memory for them."""
        return self.num_workers or min(fan_out.num_cores(), self._most_in_memory())

    def memory_problems(self) -> list[Problem]:
        """A problem if this machine's memory cannot hold num_workers, even without their work."""
        memory = host_memory() if self.ray_address is None and self.num_workers else None
        needed = int(_UNSHARED * self.least_bytes * (self.num_workers or 0))
        if memory is None or needed <= memory.available:
            return []
        value = (
            f"{self.num_workers} need at least {needed / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB are free"
        )
        name = f"{self.section}.num_workers"
        remedy = f"give --{self.section}.num-workers {self._most_in_memory()}"
        return [Problem("memory", name, value, remedy)]

    def _most_in_memory(self) -> int:
        """Workers for which the free memory of this machine or container is enough; at least one."""
        memory = host_memory()
        return fan_out.num_cores() if memory is None else max(1, memory.available // self.least_bytes)

    def _available(self) -> tuple[int, int]:
        """Cores and GPUs."""
        if self.ray_address is not None:
            found = fan_out.resources()
            return found.num_cpus, found.num_gpus
        if self.device == "cpu":
            return fan_out.num_cores(), 0
        import torch

        return fan_out.num_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0
