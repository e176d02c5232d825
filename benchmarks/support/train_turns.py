"""One turn of a training loop, run and timed: a run of its own, as many processes as it has ranks, with one thread of
arithmetic each, that meet over gloo. A step counts from the moment its batch is there to the moment the next one's is.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A turn that has not ended by then never will: ranks wait for each other.
TIMEOUT_S = 900.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["support.train_loops"])


@dataclass(frozen=True)
class Turn:
    """The work of one turn. `loop` names one of train_loops.LOOPS."""

    loop: str
    data: Path
    """Holds pairs/ (PNG files) and shards/ (a shard set) of the same slices."""
    size: int
    block_out_channels: tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    global_batch_size: int
    ranks: int
    precision: str
    warm_up: int
    steps: int
    workers: int = 1
    """DataLoader's processes, for each rank."""
    parts: bool = False
    """Also time the parts of our loop beside the network."""

    @property
    def micro_batch_size(self) -> int:
        return self.global_batch_size // self.ranks


class Watch:
    """Times a rank's steps and its waits for data, and ends its run after the last of them."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._began_s: list[float] = []
        self._waited_s: list[float] = []
        self.logged_wait_s: float | None = None
        """What the loop itself says that it waited for data, where it does."""
        self.parts_s: dict[str, float] = {}
        """Seconds by name, over the timed steps; see time_parts."""

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches, over and over; the time that each takes to come is noted."""
        while True:
            iterator = iter(loader)
            while True:
                start = time.perf_counter()
                batch = next(iterator, None)
                if batch is None:
                    break
                self._waited_s.append(time.perf_counter() - start)
                yield batch

    def begin_step(self) -> None:
        """Call at the beginning of every step, with its batch at hand. Raises Measured after the last timed one."""
        self._began_s.append(time.perf_counter())
        if len(self._began_s) == self._turn.warm_up + 1:
            self.parts_s.clear()
        if len(self._began_s) > self._turn.warm_up + self._turn.steps:
            raise Measured

    def result(self) -> dict[str, Any]:
        """Over the timed steps: `step_s` each, `seconds` of all, `data_wait`, a fraction of them (None if it was not
        measured here), `parts_s`, and `peak_mib`, the rank's own memory without mapped files at its highest."""
        timed = self._began_s[self._turn.warm_up :]
        seconds = timed[-1] - timed[0]
        waited_s = self.logged_wait_s
        if waited_s is None and self._waited_s:
            waited_s = sum(self._waited_s[self._turn.warm_up + 1 :])
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        mapped_kib, peak_kib = (
            sum(int(status[name].split()[0]) for name in names) for names in (("RssFile", "RssShmem"), ("VmHWM",))
        )
        return {
            "seconds": seconds,
            "step_s": np.diff(timed).tolist(),
            "data_wait": None if waited_s is None else waited_s / seconds,
            "parts_s": self.parts_s,
            "peak_mib": (peak_kib - mapped_kib) / 1024,
        }


class Measured(KeyboardInterrupt):
    """The measurement is complete: with this exception every rank leaves our loop without a last checkpoint."""


def run(turn: Turn, folder: Path) -> dict[str, Any]:
    """One turn: of its ranks' results the longest seconds, the sum of memory, and rank 0's else.

    Raises RuntimeError with what a rank wrote last where it failed.
    """
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_context.Process(target=_enter, args=(rank, port, turn, folder)) for rank in range(turn.ranks)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        for rank, process in enumerate(processes):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode != 0:
                said = (folder / f"output-{rank}").read_text(errors="replace")
                raise RuntimeError(f"{turn.loop}: rank {rank} ended with {process.exitcode}:\n{said[-3000:]}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    results = [json.loads((folder / f"result-{rank}").read_text()) for rank in range(turn.ranks)]
    return {
        **results[0],
        "seconds": max(result["seconds"] for result in results),
        "peak_mib": sum(result["peak_mib"] for result in results),
    }


def _enter(rank: int, port: int, turn: Turn, folder: Path) -> None:
    """A rank's process."""
    from support.train_loops import LOOPS

    output = (folder / f"output-{rank}").open("wb")
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    if turn.ranks > 1:  # without these accelerate does not wrap the model
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(turn.ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    watch = Watch(turn)
    try:
        LOOPS[turn.loop](turn, folder, watch)
    except Measured:
        (folder / f"result-{rank}").write_text(json.dumps(watch.result()))
    # Not through the interpreter's normal exit, in which DataLoader's workers and gloo's threads wait for each other.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if (folder / f"result-{rank}").exists() else 1)
