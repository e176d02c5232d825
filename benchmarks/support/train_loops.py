"""The training loops that benchmarks/train.py compares: the published design, accelerate's, and ours.

Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel  # here, since what the ranks are forked from has then imported it
from torch import Tensor, nn

from support.train_turns import TIMEOUT_S, Measured, Turn, Watch

PARTS = ("averages", "logging", "checkpointing", "optimiser")
"""The parts of our loop, beside the network; see time_parts."""


def published(turn: Turn, folder: Path, watch: Watch) -> None:
    """fp32 and eager in torch's row-major layout, AdamW one tensor after the other, noise made on the CPU, the loss
    read in every step, no average of the weights; PNG files through a DataLoader.

    Written from that description. It ran on several GPUs by DataParallel, which does not exist for CPUs, so
    DistributedDataParallel is used.
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
    bar = tqdm(disable=not _is_main())
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


def ours(turn: Turn, folder: Path, watch: Watch, *, bare: bool = False) -> None:
    """training.loop.train as the train stage calls it: loader, DeepSpeed engine (ZeRO 1), two averages, MLflow, a
    line of the log every other step, and one checkpoint halfway through the timed steps, of which it takes four at
    least. It is the run's first, which makes the memory that it is copied to.

    `bare` leaves averages, log lines, tracking and checkpoints out.
    """
    from data_shards.feed.config import LoaderConfig
    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.config import DiffusionConfig
    from segdiff_dist.denoising.task import DenoiserTask
    from segdiff_dist.tracking.config import TrackingConfig
    from segdiff_dist.tracking.tracker import Tracker
    from segdiff_dist.training.config import TrainConfig
    from segdiff_dist.training.engine import Engine
    from segdiff_dist.training.loop import TrainingJob, train

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
        hang_timeout_s=TIMEOUT_S,
    )
    shards = ShardSet.open(turn.data / "shards")
    weights = folder / "weights"
    task = TimedTask(shards, turn.size, _denoiser_config(turn), DiffusionConfig(), config.seed, weights, device)
    if bare:
        Engine.update_averages = lambda *_: None  # type: ignore[method-assign]
    tracked = not bare and _is_main()
    with Tracker(folder, TrackingConfig(enabled=tracked), "train") as tracker:
        while tracked and tracker.run_id is None:  # imports MLflow beside us, which takes seconds
            time.sleep(0.05)
        if turn.parts:
            time_parts(watch)
        loader, rows = LoaderConfig(num_threads=1), shards.select(split="train")
        try:
            train(TrainingJob(task, shards, rows, loader, config, folder, tracker, device, {"train": asdict(config)}))
        except Measured:
            if not bare:
                watch.logged_wait_s = _logged_wait_s(folder / "log.jsonl", turn)
            raise


def time_parts(watch: Watch) -> None:
    """From here on the parts of our loop beside the network add their seconds to watch.parts_s.

    On a CPU only the threads are asynchronous, so the duration of a call is its cost for the step. With several ranks
    it would include waits for the others.
    """
    from segdiff_dist.training.checkpoint_writer import CheckpointWriter
    from segdiff_dist.training.engine import Engine
    from segdiff_dist.training.step_log import LogWindow, RunLog, UpdateGuard

    parts: dict[str, list[tuple[Any, str]]] = {
        "averages": [(Engine, "update_averages")],
        "logging": [
            *((LogWindow, name) for name in ("add", "step_loss", "close_step")),
            *((UpdateGuard, name) for name in ("veto", "count")),
            *((LogWindow, "means"), (RunLog, "write")),
        ],
        "checkpointing": [
            *((CheckpointWriter, name) for name in ("start", "after_step", "drain")),
            (Engine, "state"),
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
    """The wait for data that the run itself reports, over the log lines of the timed steps."""
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


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _denoiser_config(turn: Turn) -> Any:
    from segdiff_dist.denoising.config import DenoiserConfig

    return DenoiserConfig(
        block_out_channels=turn.block_out_channels,
        attention_resolutions=turn.attention_resolutions,
        mask_encoding="scalar_signed",
        class_conditioning=False,
    )
