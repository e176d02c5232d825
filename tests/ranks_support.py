"""Real ranks that meet over gloo, quickly started; and what the ranks of some tests do, since a new process must be
able to import that."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEAD_AFTER_S, HANG_TIMEOUT_S = 2.0, 4.0

# From a server that has imported already what takes seconds, ranks are there at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["lean_support", "segdiff_dist.denoising.denoiser", "segdiff_dist.ranks.heartbeat", "training_support"]
)


class Ranks:
    """The processes of one run: `target(rank, *args)` in each, in `folder`, with stderr in files."""

    def __init__(self, num_ranks: int, folder: Path, target: Callable[..., None], *args: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = folder
        self.processes = [
            _context.Process(target=_enter, args=(rank, num_ranks, port, folder, target, args))
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()

    def ended(self, rank: int, within_s: float) -> int | None:
        """The exit code; None where the time was too short."""
        self.processes[rank].join(within_s)
        return self.processes[rank].exitcode

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr-{rank}").read_text()


@contextmanager
def ranks(num_ranks: int, folder: Path, target: Callable[..., None], *args: Any) -> Iterator[Ranks]:
    """Start them, and leave none behind."""
    started = Ranks(num_ranks, folder, target, *args)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.join()


def _enter(rank: int, num_ranks: int, port: int, folder: Path, target: Callable[..., None], args: Any) -> None:
    os.chdir(folder)
    with Path(f"stderr-{rank}").open("wb") as stderr:
        os.dup2(stderr.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    import torch
    import torch.distributed as dist

    from segdiff_dist.ranks.distributed import prepare_environment

    torch.set_num_threads(1)
    prepare_environment()
    dist.init_process_group("gloo")
    target(rank, *args)


def watched(rank: int, fault: str) -> None:
    """Reduce over and over under a Heartbeat, until the fault, which is mostly rank 1's."""
    import torch
    import torch.distributed as dist

    from data_shards.problems import problem
    from segdiff_dist.ranks.heartbeat import Heartbeat

    flushed = Path(f"flushed-{rank}")
    with Heartbeat(HANG_TIMEOUT_S, dead_after_s=DEAD_AFTER_S, last_words=flushed.touch) as heartbeat:
        for step in range(1_000_000):
            heartbeat.beat(8 * step)
            if step == 20:
                Path(f"going-{rank}").touch()
                if fault == "refuses":
                    raise problem("config", "x", 1, "give 2")
                if fault == "patient":
                    with heartbeat.patience(60):
                        time.sleep(HANG_TIMEOUT_S + 2 if rank == 1 else 0)
                        dist.barrier()
                if rank == 1:
                    _commit(fault)
            if step == 30 and fault in ("none", "patient"):
                break
            dist.all_reduce(torch.ones(4))
            time.sleep(0.01)
        # Ranks end at different times, rank 0, which holds the store, first.
        if fault == "none":
            time.sleep(rank * (DEAD_AFTER_S + 1) / 2)


def _commit(fault: str) -> None:
    if fault == "hangs":
        time.sleep(1000)
    if fault == "fails":
        raise ValueError("no such organ\nand more")
    if fault == "leaves":
        raise KeyboardInterrupt


def commanding(rank: int, commands: list[list[str]]) -> None:
    """`segdiff` with this rank's arguments; ends with its exit code."""
    from segdiff_dist.cli import run

    raise SystemExit(run(commands[rank]))


def agreeing(rank: int, differing: dict[int, dict[str, str]]) -> None:
    """Agree on settings of which some ranks have others; leaves found-RANK, the problems."""
    from data_shards.problems import InputProblems
    from segdiff_dist.ranks.distributed import check_agreement

    what = {"train.lr": "0.001", "data": "5" * 64, "long": "a" * 5000}
    found = []
    try:
        check_agreement(what | differing.get(rank, {}))
    except InputProblems as error:
        found = [(p.where, p.field, p.value) for p in error.problems]
    Path(f"found-{rank}").write_text(json.dumps(found))


def exchanging(rank: int) -> None:
    """Rank 1 asks to stop at its third step, after the others; leaves agreed-RANK, what each exchange gave."""
    import torch
    import torch.distributed as dist

    from segdiff_dist.ranks.distributed import DelayedMax, gather_objects, sum_over_ranks

    maxima = DelayedMax(("stop", "fraction"))
    agreed = []
    for step in range(5):
        time.sleep(0.05 * rank)
        agreed.append(maxima.exchange({"stop": float(rank == 1 and step == 2), "fraction": step + rank / 10}))
        # Another collective, in between, on the group that reduces gradients.
        assert float(sum_over_ranks(torch.ones(1))) == dist.get_world_size()
    agreed.append(maxima.finish())
    assert gather_objects({"rank": rank}) == [{"rank": n} for n in range(dist.get_world_size())]
    Path(f"agreed-{rank}").write_text(json.dumps(agreed))


def sizing(rank: int) -> None:
    """Look for a micro-batch size with a file that only rank 0 sees, as on a disk that is slow to show it to others;
    leaves size-RANK and tried-RANK."""
    from segdiff_dist.training import micro_batch
    from segdiff_dist.training.config import TrainConfig

    def rates(*_: Any) -> list[float]:
        Path(f"tried-{rank}").touch()
        return [1.0, 2.0]

    micro_batch.measure_rates = rates
    task, batch = tiny_task(), tiny_batch()
    config = TrainConfig(global_batch_size=4, micro_batch_size="auto")
    folder = Path("run" if rank == 0 else "another view of it")
    sizes = [micro_batch.find_micro_batch(task, lambda: batch, config, folder)]
    was_tried = Path(f"tried-{rank}").exists()
    Path(f"tried-{rank}").unlink(missing_ok=True)
    sizes.append(micro_batch.find_micro_batch(task, lambda: batch, config, folder))
    Path(f"size-{rank}").write_text(json.dumps([sizes, was_tried, Path(f"tried-{rank}").exists()]))


def refusing(rank: int) -> None:
    """Rank 1 alone has too little memory; leaves refused-RANK, what each then says."""
    import torch

    from data_shards.problems import InputProblems, Problem
    from segdiff_dist.planning.memory import refuse_together

    refuse_together([], torch.device("cpu"))
    try:
        refuse_together([Problem("memory", "size", "16", "give 8")] if rank == 1 else [], torch.device("cpu"))
    except InputProblems as error:
        Path(f"refused-{rank}").write_text(str(error))


def tiny_task() -> Any:
    """A task with one linear layer."""
    from types import SimpleNamespace

    import torch

    return SimpleNamespace(name="tiny", model=torch.nn.Linear(2, 2))


def tiny_batch() -> Any:
    """One image of 8x8 on the CPU."""
    import torch

    from data_shards.records import Batch

    zero_B = torch.zeros(1, dtype=torch.int64)
    pixels_BHW = torch.zeros(1, 8, 8, dtype=torch.uint8)
    return Batch(pixels_BHW, pixels_BHW, zero_B, zero_B, zero_B, None)
