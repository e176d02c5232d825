"""Ranks and devices: what a process of a distributed run knows of the others."""

from __future__ import annotations

import os
import socket
from typing import Any

from data_shards.problems import problem


def rank() -> int:
    """This process' global rank; 0 outside a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the run; 1 outside a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process' rank on its machine; 0 outside a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes what only one may write."""
    return rank() == 0


def pick_device(requested: str) -> Any:
    """A torch.device for `auto | cpu | cuda`; `auto` takes this rank's GPU where there is one."""
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise problem("config", "device", "cuda", "no CUDA GPU is visible here; set device to auto or cpu")
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def pretend_launcher() -> None:
    """Give a process that no launcher started the environment of a world of one, so that it can go on like any rank."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def mean_over_ranks(values: Any) -> Any:
    """The tensor's mean over ranks, on every rank."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
