"""`segdiff serve` beside the same model in a bare loop, in turns: images a second, and how long clients wait.

    bare loop     the small model of the package in this process, batch after batch of the size that the service uses
    N clients     each sends a mask of one slice, waits for the image, and sends the next one

Both make the same images with as many threads as there are cores. With `--processes N` the service has N processes of
the model, which share the cores; a third contender is N bare loops at once. `--memory N` then sends N requests of one
step each and prints the memory of the service's processes at the beginning and after each tenth. `--replicas N`
measures none of that: it loads a service that may have up to N processes until all have started, kills one of them, and
prints how many requests were answered.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import asyncio
import random
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context

import aiohttp
import numpy as np
import psutil
import torch
from support.harness import Contender, arguments, compare, measure, report, write

from data_shards.ray_session import num_cores, ray_session
from segdiff_dist.painting.model import Model, open_model
from segdiff_dist.pipeline import SliceKey
from segdiff_dist.serving.config import ServeConfig
from segdiff_dist.serving.engine import running
from segdiff_dist.serving.examples import example_masks

_BARE = "bare loop"
_TARGET = 0.9


@contextmanager
def served(threads: int, most_replicas: int = 1, least_replicas: int = 1) -> Iterator[str]:
    """The URL of a service that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ServeConfig(
        threads=threads, device="cpu", queue=1000, min_replicas=least_replicas, max_replicas=most_replicas
    )
    with ray_session(), running(config, "127.0.0.1", port, None):
        yield f"http://127.0.0.1:{port}"


def bare_loop(model: Model, mask_HW: np.ndarray, num: int) -> tuple[float, float]:
    """Images and seconds."""
    at_once, began = model.pipeline.num_at_once, time.perf_counter()
    for first in range(0, num, at_once):
        keys = [SliceKey(0, "CT", "axial", first + k) for k in range(at_once)]
        model.pipeline.generate_at_once(np.stack([mask_HW] * at_once), keys)
    return num, time.perf_counter() - began


class BareLoops:
    """Bare loops in processes of their own, which share the cores."""

    def __init__(self, processes: int, threads: int, steps: int | None) -> None:
        context = get_context("spawn")
        self._num, self._pool = processes, ProcessPoolExecutor(processes, context, _open, (threads, steps))
        list(self._pool.map(_loop, [4] * 4 * processes))  # all have started

    def __call__(self, num: int) -> tuple[float, float]:
        """Images and seconds."""
        began = time.perf_counter()
        made = self._pool.map(_loop, [num // self._num] * self._num)
        return sum(made), time.perf_counter() - began


_opened: list[tuple[Model, np.ndarray]] = []


def _open(threads: int, steps: int | None) -> None:
    torch.set_num_threads(threads)
    model = open_model(device="cpu").with_sampler(steps, None)
    _opened.append((model, _pixels(example_masks(model.table)["liver"], model)))


def _loop(num: int) -> float:
    return bare_loop(*_opened[0], num)[0]


async def load(url: str, mask: bytes, clients: int, num: int, steps: int | None) -> list[float]:
    """The seconds of each request. A client that is refused comes again after a second."""
    seeds, waited = iter(range(num)), []

    async def client(session: aiohttp.ClientSession) -> None:
        for seed in seeds:
            began = time.perf_counter()
            while True:
                form = aiohttp.FormData({"seed": str(seed)} | ({} if steps is None else {"steps": str(steps)}))
                form.add_field("mask", mask, filename="mask.nii.gz")
                async with session.post(f"{url}/paint", data=form) as answer:
                    await answer.read()
                if answer.status == 200:
                    break
                assert answer.status in (429, 503), answer.status
                await asyncio.sleep(1.0)
            waited.append(time.perf_counter() - began)

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return waited


def with_clients(waits: dict[int, list[float]], send: partial[list[float]], clients: int) -> tuple[float, float]:
    """Images and seconds; `waits` gets the requests' seconds."""
    began = time.perf_counter()
    waited = asyncio.run(send(clients=clients))
    waits.setdefault(clients, []).extend(waited)
    return len(waited), time.perf_counter() - began


def model_processes() -> list[psutil.Process]:
    """Those that are running."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if " ".join(one.cmdline()).startswith("ray::ServeReplica:segdiff:model-")]


async def load_and_kill(url: str, mask: bytes, replicas: int, steps: int | None, limit_s: float) -> dict[str, object]:
    """16 clients until there are `replicas` processes, and for as long again after one of them is killed."""
    answered: list[float] = []
    began, killed_at, most, is_over = time.perf_counter(), None, 0, False

    async def client() -> None:
        while not is_over:
            answered.extend(await load(url, mask, 1, 1, steps))

    clients = [asyncio.ensure_future(client()) for _ in range(16)]
    while not is_over:
        await asyncio.sleep(0.5)
        found, seconds = model_processes(), time.perf_counter() - began
        most = max(most, len(found))
        if killed_at is None and len(found) >= replicas:
            killed_at, before = seconds, len(answered)
            found[0].kill()
        is_over = seconds > (limit_s if killed_at is None else 2 * killed_at)
    await asyncio.gather(*clients)  # a request that is lost raises here
    assert killed_at is not None, f"{most} of {replicas} processes after {limit_s:g} s"
    return {
        "processes at most": most,
        "s until then": round(killed_at, 1),
        "answered before one was killed": before,
        "and after": len(answered) - before,
        "lost": 0,
        "longest wait, s": round(max(answered), 1),
    }


def memory_mib() -> dict[str, int]:
    """Resident memory of the service's processes."""
    found: dict[str, int] = {}
    for one in psutil.Process().children(recursive=True):
        name = " ".join(one.cmdline()).split(" ")[0]
        if name.startswith("ray::Serve") or name == "ray::ProxyActor":
            found[name.rpartition(":")[2]] = round(one.memory_info().rss / 2**20)
    return found


def memory_under_load(send: Callable[[], Coroutine[None, None, list[float]]], num: int) -> list[dict[str, int]]:
    """The memory before and after each tenth of `num` requests; `send` sends a tenth. Prints a line for each."""
    print(f"memory of the service, over {num:,} requests of one step, in MiB:", flush=True)
    found = [memory_mib()]
    print(f"  before  {found[0]}", flush=True)
    for tenth in range(1, 11 if num else 1):
        asyncio.run(send())
        found.append(memory_mib())
        print(f"  {tenth * (num // 10):,} of {num:,} requests  {found[-1]}", flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--images", type=int, default=64, help="of each turn")
    parser.add_argument("--steps", type=int, help="of the sampler. By default the model's own, as clients get them")
    parser.add_argument("--processes", type=int, default=1, help="of the model")
    parser.add_argument("--memory", type=int, default=2000, help="requests of one step, for the memory")
    parser.add_argument("--replicas", type=int, help="start up to so many processes under load, and kill one")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.clients, args.images, args.memory, args.steps = 1, [1, 8], 8, 20, args.steps or 4
    threads = num_cores()
    torch.set_num_threads(threads)
    random.seed(0)
    model = open_model(device="cpu").with_sampler(args.steps, None)
    file = example_masks(model.table)["liver"]
    if args.replicas is not None:
        with served(1, args.replicas) as url:
            print(asyncio.run(load_and_kill(url, file, args.replicas, args.steps, limit_s=300)))
        return
    mask_HW = _pixels(file, model)
    waits: dict[int, list[float]] = {}
    busy = os.getloadavg()[0]
    shared = max(1, threads // args.processes)
    with served(shared, args.processes, args.processes) as url:
        send = partial(load, url, file, num=args.images, steps=args.steps)
        asyncio.run(load(url, file, 4, 4, 1))  # waits until the model is loaded
        contenders: dict[str, Contender] = {_BARE: partial(bare_loop, model, mask_HW, args.images)}
        if args.processes > 1:
            contenders[f"{args.processes} bare loops"] = partial(
                BareLoops(args.processes, shared, args.steps), args.images
            )
        contenders |= {f"{n} clients": partial(with_clients, waits, send, n) for n in args.clients}
        rates = measure(contenders, args.rounds)
        notes = {f"{n} clients, p50 and p95, s": _quantiles(waited) for n, waited in sorted(waits.items())}
        notes |= {
            "steps": model.pipeline.sampler.num_steps,
            "threads": threads,
            "load of the machine before": round(busy, 1),
        }
        bare = [_BARE, *(name for name in rates if name.endswith("bare loops"))]
        compared = [compare(rates, f"{max(args.clients)} clients", one, _TARGET) for one in bare]
        record = report(args, rates, compared, unit="images a second", notes=notes)
        memory = memory_under_load(partial(load, url, file, 8, args.memory // 10, 1), args.memory)
    record["notes"] |= {f"MiB before and after each tenth of {args.memory} requests": memory}
    write(args.json, record)


def _pixels(file: bytes, model: Model) -> np.ndarray:
    """The mask as the service cuts it, uint8 [H, W]."""
    import tempfile
    from pathlib import Path

    from segdiff_dist.painting.job import PaintSettings, check_paint
    from segdiff_dist.painting.masks import open_mask

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mask.nii.gz").write_bytes(file)
        mask = open_mask(Path(folder) / "mask.nii.gz", grid_mm=model.grid_mm)
        found: np.ndarray = check_paint(mask, model, PaintSettings()).cut().mask_SHW[0]
    return found


def _quantiles(waited: list[float]) -> list[float]:
    return [round(float(np.quantile(waited, q)), 2) for q in (0.5, 0.95)]


if __name__ == "__main__":
    main()
