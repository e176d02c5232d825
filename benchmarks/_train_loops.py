"""The training loops that benchmarks/train.py sets side by side, and how one turn of one of them is run and timed.

A turn is a run of its own: as many processes as it has ranks, one thread of arithmetic each, that meet over gloo. A
step counts from the moment its batch is there to the moment the next one's is. Dimensions: B batch, C channels, H, W.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel  # here, since what the ranks are forked from has then imported it
from torch import Tensor, nn

# A turn that has not ended by then will not: ranks that wait for each other.
_TIMEOUT_S = 900.0

PARTS = ("averages", "logging", "checkpointing", "optimiser")
"""Of our loop, beside the network; see time_parts."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["_train_loops"])


@dataclass(frozen=True)
class Turn:
    """What one turn does. `loop` names a function of this module's LOOPS."""

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
        self.told_wait_s: float | None = None
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
        """Over the timed steps: `step_s` each, `seconds` of all, `data_wait`, a fraction of them (None where it was not
        measured here), `parts_s`, and `peak_mib`, the rank's own memory without mapped files at its highest."""
        timed = self._began_s[self._turn.warm_up :]
        seconds = timed[-1] - timed[0]
        waited_s = self.told_wait_s
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
    """What was to be measured has been: our loop lets every rank leave by this without a last checkpoint."""


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
        deadline = time.monotonic() + _TIMEOUT_S
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
    output = (folder / f"output-{rank}").open("wb")
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(turn.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    watch = Watch(turn)
    try:
        LOOPS[turn.loop](turn, folder, watch)
    except Measured:
        (folder / f"result-{rank}").write_text(json.dumps(watch.result()))
    # Not by way of the interpreter's end, where DataLoader's workers and gloo's threads wait for each other.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if (folder / f"result-{rank}").exists() else 1)


# --- (a) The published loop's design -----------------------------------------------------------------------------


def published(turn: Turn, folder: Path, watch: Watch) -> None:
    """fp32 and eager in torch's row-major layout, AdamW one tensor after the other, noise made on the CPU, the loss
    read in every step, no average of the weights; PNG files through a DataLoader.

    Written from that description. It ran on several GPUs by DataParallel, which there is none of on CPUs:
    DistributedDataParallel takes its place.
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from torch.utils.data import DataLoader, DistributedSampler
    from tqdm import tqdm

    assert turn.precision == "fp32"
    device = torch.device("cpu")
    model: nn.Module = make_unet(turn).to(device)
    pairs = PngPairs(turn.data / "pairs")
    sampler = None
    if turn.ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
        sampler = DistributedSampler(pairs)
    loader = DataLoader(
        pairs,
        batch_size=turn.micro_batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        num_workers=turn.workers,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=500, num_training_steps=200_000)
    bar = tqdm(disable=int(os.environ["RANK"]) > 0)
    for images_BCHW, masks_BCHW in watch.batches(loader):
        watch.begin_step()
        images_BCHW, masks_BCHW = images_BCHW.to(device), masks_BCHW.to(device)
        noise_BCHW = torch.randn(images_BCHW.shape).to(device)
        timestep_B = torch.randint(0, 1000, (len(images_BCHW),), device=device).long()
        x_t_BCHW = scheduler.add_noise(images_BCHW, noise_BCHW, timestep_B)
        prediction_BCHW = model(torch.cat((x_t_BCHW, masks_BCHW), dim=1), timestep_B, return_dict=False)[0]
        loss = F.mse_loss(prediction_BCHW, noise_BCHW)
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        bar.update(1)
        bar.set_postfix(loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])


# --- (b) diffusers' own style, with accelerate -------------------------------------------------------------------


def accelerated(turn: Turn, folder: Path, watch: Watch) -> None:
    """A training loop as diffusers' guide to unconditional generation describes it, with accelerate: mixed precision by
    autocast, one warmed-up average of the weights, gradients clipped, the loss read in every step. No tracker.

    Written from the public documentation. The mask is concatenated, so that the network is the others'.
    """
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    accelerator = Accelerator(cpu=True, mixed_precision={"fp32": "no", "bf16": "bf16"}[turn.precision])
    torch.set_num_threads(1)  # accelerate may have chosen another number
    model: Any = make_unet(turn)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    lr_scheduler: Any = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=200_000)
    loader: Any = DataLoader(
        PngPairs(turn.data / "pairs"),
        batch_size=turn.micro_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=turn.workers,
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    dtype = torch.bfloat16 if turn.precision == "bf16" else torch.float32
    bar = tqdm(disable=not accelerator.is_local_main_process)
    for images_BCHW, masks_BCHW in watch.batches(loader):
        watch.begin_step()
        images_BCHW = images_BCHW.to(dtype)
        noise_BCHW = torch.randn(images_BCHW.shape, dtype=dtype, device=images_BCHW.device)
        timestep_B = torch.randint(0, 1000, (len(images_BCHW),), device=images_BCHW.device).long()
        x_t_BCHW = scheduler.add_noise(images_BCHW, noise_BCHW, timestep_B)
        with accelerator.accumulate(model):
            inputs_BCHW = torch.cat((x_t_BCHW, masks_BCHW.to(dtype)), dim=1)
            prediction_BCHW = model(inputs_BCHW, timestep_B).sample
            loss = F.mse_loss(prediction_BCHW.float(), noise_BCHW.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
            bar.update(1)
        logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "ema_decay": ema.cur_decay_value}
        bar.set_postfix(**logs)


# --- Ours --------------------------------------------------------------------------------------------------------


def ours(turn: Turn, folder: Path, watch: Watch, *, bare: bool = False) -> None:
    """training.loop.train as the train stage calls it: loader, DeepSpeed engine (ZeRO 1), two averages, MLflow, a
    line of the log every other step, and one checkpoint halfway through the timed steps, of which it takes four at
    least. It is the run's first, which makes the memory that it is copied to.

    `bare` leaves averages, log lines, tracking and checkpoints out.
    """
    from data_shards.feed.loader import LoaderConfig
    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.diffusion import DiffusionConfig
    from segdiff_dist.denoising.task import DenoiserTask
    from segdiff_dist.tracking.tracker import Tracker, TrackingConfig
    from segdiff_dist.training.config import TrainConfig
    from segdiff_dist.training.engine import Engine
    from segdiff_dist.training.loop import train

    class TimedTask(DenoiserTask):
        def loss(self, forward: Callable[..., Any], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            watch.begin_step()
            return super().loss(forward, batch)

    never = 10**9
    batch, device = turn.global_batch_size, torch.device("cpu")
    config = TrainConfig(
        num_images=never,
        global_batch_size=batch,
        micro_batch_size=turn.micro_batch_size,
        precision="bf16" if turn.precision == "bf16" else "fp32",
        log_every_images=never if bare else 2 * batch,
        checkpoint_every_images=never if bare or turn.steps < 4 else batch * (turn.warm_up + turn.steps // 2),
        validate_every_images=never,
        hang_timeout_s=_TIMEOUT_S,
    )
    shards = ShardSet.open(turn.data / "shards")
    weights = folder / "weights"
    task = TimedTask(shards, turn.size, _denoiser_config(turn), DiffusionConfig(), config.seed, weights, device)
    if bare:
        Engine.update_averages = lambda *_: None  # type: ignore[method-assign]
    tracked = not bare and os.environ["RANK"] == "0"
    with Tracker(folder, TrackingConfig(enabled=tracked), "train") as tracker:
        while tracked and tracker.run_id is None:  # imports MLflow beside us, which takes seconds
            time.sleep(0.05)
        if turn.parts:
            time_parts(watch)
        loader, rows = LoaderConfig(num_threads=1), shards.select(split="train")
        try:
            train(task, shards, rows, loader, config, folder, tracker, device, {"train": asdict(config)})
        except Measured:
            if not bare:
                watch.told_wait_s = _logged_wait_s(folder / "log.jsonl", turn)
            raise


def time_parts(watch: Watch) -> None:
    """From here on the parts of our loop beside the network add their seconds to watch.parts_s.

    On a CPU nothing is asynchronous but the threads, so what a call takes is what the step pays for it. With several
    ranks it would hold waits for the others too.
    """
    from segdiff_dist.ranks.distributed import Agreement
    from segdiff_dist.training.checkpoint import CheckpointWriter
    from segdiff_dist.training.engine import Engine
    from segdiff_dist.training.loop import _Training
    from segdiff_dist.training.step_log import Guard, Window

    parts: dict[str, list[tuple[Any, str]]] = {
        "averages": [(Engine, "update_averages")],
        "logging": [
            *((Window, name) for name in ("add", "step_loss", "close_step")),
            *((Guard, name) for name in ("veto", "count")),
            (_Training, "_log"),
        ],
        "checkpointing": [
            *((CheckpointWriter, name) for name in ("flags", "poll", "drain")),
            (_Training, "_save"),
            (Agreement, "exchange"),
        ],
        "optimiser": [(Engine, "step")],
    }
    assert set(parts) == set(PARTS)
    for part, functions in parts.items():
        for owner, name in functions:
            setattr(owner, name, _timed(getattr(owner, name), part, watch.parts_s))


def _timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start

    return timed


def _logged_wait_s(log: Path, turn: Turn) -> float:
    """What the run itself says it waited for data, over the lines of the log that lie in the timed steps."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    images, waited_s = turn.global_batch_size * turn.warm_up, 0.0
    for row in rows:
        if row["images_seen"] > images:
            waited_s += row["data_wait_fraction"] * 2 * turn.global_batch_size / row["images_per_s"]
    return waited_s


LOOPS: dict[str, Callable[[Turn, Path, Watch], None]] = {
    "published": published,
    "accelerated": accelerated,
    "ours": ours,
    "ours, bare": functools.partial(ours, bare=True),
}


# --- What they share ---------------------------------------------------------------------------------------------


class PngPairs(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Pairs of PNG files, images/N.png and masks/N.png, as float32 [1, H, W]; the mask as 2 * label / 255 - 1."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = sorted(path.name for path in (folder / "images").iterdir())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = (self._read(part, self._names[index]) for part in ("images", "masks"))
        return image, mask

    def _read(self, part: str, name: str) -> Tensor:
        from PIL import Image

        pixels_HW = np.array(Image.open(self._folder / part / name))
        return torch.from_numpy(pixels_HW)[None].float().div(127.5).sub(1.0)


def make_unet(turn: Turn) -> UNet2DModel:
    """The network of every contender, with the same weights; two channels in, image and mask."""
    from data_shards.labels import AMOS
    from segdiff_dist.denoising.denoiser import Denoiser

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(_denoiser_config(turn), AMOS, turn.size).unet


def _denoiser_config(turn: Turn) -> Any:
    from segdiff_dist.denoising.denoiser import DenoiserConfig

    return DenoiserConfig(
        block_out_channels=turn.block_out_channels,
        attention_resolutions=turn.attention_resolutions,
        mask_encoding="scalar_signed",
        class_conditioning=False,
    )


# --- What a checkpoint costs a step ------------------------------------------------------------------------------


def checkpoint_costs(num_parameters: int, folder: Path, times: int) -> dict[str, Any]:
    """Write a made-up state of so many parameters (weights, two moments, two averages, fp32) `times` times, from a
    process of its own that works beside the writing; see _checkpoint_costs."""
    with _context.Pool(1) as pool:
        return pool.apply(_checkpoint_costs, (num_parameters, folder, times))


def _checkpoint_costs(num_parameters: int, folder: Path, times: int) -> dict[str, Any]:
    """`gib` a checkpoint; by checkpoint `waited_s`, what the loop stood still, and `written_s`, from the start of the
    writing until it is complete; and `slowed`, how much longer pieces of work take beside a writing than alone."""
    from segdiff_dist.ranks.distributed import Agreement
    from segdiff_dist.training.checkpoint import CheckpointWriter
    from segdiff_dist.training.sharded_state import Extent, ShardOfState

    torch.set_num_threads(1)
    kinds = ("online", "exp_avg", "exp_avg_sq", "ema_0.05", "ema_0.1")
    state = ShardOfState(
        {"weight": (num_parameters,)},
        (Extent("weight", 0, num_parameters, 0, 0),),
        {kind: [torch.full((num_parameters,), math.pi)] for kind in kinds},
        {"step": 1.0},
    )
    matrix = torch.ones(512, 512)
    waited_s, written_s, beside_s, alone_s = [], [], [], []

    def work(seconds: list[float]) -> None:
        start = time.perf_counter()
        for _ in range(8):
            matrix @ matrix
        seconds.append(time.perf_counter() - start)

    with CheckpointWriter(folder, config="", keep=1) as writer:
        agreement = Agreement(CheckpointWriter.FLAGS)
        for number in range(1, times + 1):
            for _ in range(100):
                work(alone_s)
            before_s, start = writer.waited_s, time.perf_counter()
            writer.start(state, {"images_seen": number})
            waited_s.append(writer.waited_s - before_s)
            begun = time.perf_counter()
            while writer.pending:
                work(beside_s)
                writer.poll(agreement.exchange(writer.flags()))
            written_s.append(time.perf_counter() - begun)
            assert begun - start < 1.1 * waited_s[-1] + 0.01, "start() took longer than it says"
    return {
        "gib": 4 * len(kinds) * num_parameters / 2**30,
        "waited_s": waited_s,
        "written_s": written_s,
        "slowed": statistics.median(beside_s) / statistics.median(alone_s) - 1.0,
    }
