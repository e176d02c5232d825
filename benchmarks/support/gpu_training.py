"""benchmarks/gpu.py: whole training steps, ours and those of others, in turns.

    a  the published loop   fp32, rows, AdamW as torch chooses, noise made on the CPU, the loss read in every step
    b  diffusers            bf16, channels-last, fused AdamW, noise on the device, no wait
    c  b + torch.compile
    d  MONAI                its DiffusionModelUNet of the same widths, as b
    e  ours                 DenoiserTask with `kernels: triton`, fused AdamW
    f  e + torch.compile
    g  ours, as trained     e under the training engine (DeepSpeed, fp32 weights beside), two averages

b to f hold bf16 weights alone, which is the least that any of them can move; g keeps fp32 ones and averages besides.
a to d are given the mask as one more channel, e to g the label map. Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.labels import AMOS
from data_shards.records import Batch
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.training.throughput import count_flops
from support.baselines import make_pair
from support.gpu_session import Session, describe
from support.harness import Contender, Spread, compare, measure

TRAINING_STEPS = 1000
# With less time left no further round is begun, so that the measurements are written.
_RESERVE_S = 30.0


@dataclass
class Loop:
    """A way to train. `micro_step(num)` adds the gradients of so many images; the loss is their mean, times `share`."""

    micro_step: Callable[[int, float], Tensor]
    update: Callable[[], None]
    reads_loss: bool = False
    micro_batch_size: int = 0
    """Images at once; smaller than the batch where that does not fit."""
    state_bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def step(self, batch: int) -> None:
        """One update of the weights on `batch` images."""
        for first in range(0, batch, self.micro_batch_size):
            num = min(self.micro_batch_size, batch - first)
            loss = self.micro_step(num, num / batch)
        self.update()
        if self.reads_loss:
            loss.item()


def training_steps(session: Session, batch: int, compiled: bool = False) -> dict[str, Any]:
    """Images a second, memory and share of the GEMM ceiling of loops at one batch: those that torch.compile builds,
    which takes minutes, or the others. The result of each loop is kept immediately."""
    scale, device = session.scale, session.device
    found: dict[str, Any] = {"batch": batch, "errors": {}, "peak_gib": {}, "micro_batch": {}, "first_images_per_s": {}}
    with TemporaryDirectory(prefix="bench-gpu-") as folder:
        loops: dict[str, Loop] = {}
        for name, make in builders(session, Path(folder)).items():
            if name.endswith("compiled") != compiled:
                continue
            try:
                loops[name], found["peak_gib"][name] = warmed_up(session, make, batch)
                found["micro_batch"][name] = loops[name].micro_batch_size
                print(f"  {name}: ready, {session.left_s():.0f} s left", flush=True)
            except Exception as error:  # the results of the other loops are still useful
                if not session.device_works():
                    session.lost_to = name
                    raise
                found["errors"][name] = describe(error)
                print(f"  {name}: {found['errors'][name]}", flush=True)
            session.keep(found)
            gc.collect()
        found["peak_of_micro_batch"] = dict(found["micro_batch"])
        for name in list(loops):
            try:  # with the others' weights in memory some may no longer fit
                images, seconds = _turn(session, loops[name], batch, 1)
                found["micro_batch"][name] = loops[name].micro_batch_size
                found["first_images_per_s"][name] = images / seconds
            except torch.cuda.OutOfMemoryError as error:
                found["errors"][name] = describe(error)
                print(f"  {name}: {found['errors'][name]}", flush=True)
                del loops[name]
            session.keep(found)
        contenders: dict[str, Contender] = {
            name: partial(_turn, session, loop, batch, scale.steps) for name, loop in loops.items()
        }
        rates = measure(contenders, scale.rounds, lambda: session.left_s() > _RESERVE_S)
        profile = _profile(session, loops["e ours"], batch) if device.type == "cuda" and "e ours" in loops else None
    flops = flops_per_image(session)
    ceiling = session.record["parts"].get("ceilings", {}).get("found", {}).get("gemm_tflops")
    found["images_per_s"] = {name: spread.to_json() for name, spread in rates.items()}
    found["tflop_per_image"] = flops / 1e12
    found["profile_of_e_ours"] = profile
    found["of_gemm_ceiling"] = {n: s.median * flops / 1e12 / ceiling for n, s in rates.items()} if ceiling else {}
    for name, spread in rates.items():
        peak, share = found["peak_gib"][name], found["of_gemm_ceiling"].get(name, float("nan"))
        print(f"  {name:<44} {spread.median:>9.1f} img/s {share:>7.1%} of the product {peak:>7.1f} GiB", flush=True)
    _check_targets(session, found, rates)
    return found


def _check_targets(session: Session, found: dict[str, Any], rates: dict[str, Spread]) -> None:
    """Ratios of loops, the share of the GEMM ceiling and memory against their targets; ratios go into `found`."""
    batch = found["batch"]
    for ours, against, target in (
        ("e ours", "a published", 3.0),
        ("e ours", "b diffusers", 1.40),
        ("e ours", "c diffusers, compiled", 1.12),
        ("f ours, compiled", "c diffusers, compiled", None),
        ("e ours", "d MONAI", None),
    ):
        if {ours, against} <= set(rates):
            ratio = compare(rates, ours, against, target)
            found.setdefault("ratios", {})[f"{ours} / {against}"] = ratio.spread.to_json()
            if target is not None:
                session.check_target(f"batch {batch}: {ours} / {against}", ratio.spread.median, target)
    if "e ours" in found["of_gemm_ceiling"]:
        session.check_target(f"batch {batch}: e ours, of the GEMM ceiling", found["of_gemm_ceiling"]["e ours"], 0.52)
    at_once = found["peak_of_micro_batch"]
    if {"e ours", "b diffusers"} <= set(at_once) and at_once["e ours"] == at_once["b diffusers"]:
        share = found["peak_gib"]["e ours"] / found["peak_gib"]["b diffusers"]
        session.check_target(f"batch {batch}: memory, e ours / b diffusers", share, 0.65, is_limit=True)


def builders(session: Session, folder: Path) -> dict[str, Callable[[int], Loop]]:
    """The loops by name, each made for a batch when called."""
    every: dict[str, Callable[[int], Loop]] = {
        "a published": lambda batch: published(session),
        "b diffusers": lambda batch: tuned(session, _eager_unet(session)),
        "d MONAI": lambda batch: tuned(session, _monai_unet(session)),
        "e ours": lambda batch: ours(session, folder / "e", batch),
        "g ours, as trained": lambda batch: trained(session, folder / "g", batch),
        "c diffusers, compiled": lambda batch: tuned(session, _eager_unet(session), compiled=True),
        "f ours, compiled": lambda batch: ours(session, folder / "f", batch, compiled=True),
    }
    asked = {name: make for name, make in every.items() if name[0] in session.args.loops}
    return asked if session.scale.compiler else {n: make for n, make in asked.items() if not n.endswith("compiled")}


def warmed_up(session: Session, make: Callable[[int], Loop], batch: int) -> tuple[Loop, float]:
    """A loop after two steps, its micro-batch halved until it fits; and its peak memory in GiB, nan on a CPU."""
    is_cuda = session.device.type == "cuda"
    before = torch.cuda.memory_allocated() if is_cuda else 0
    loop = make(batch)
    loop.micro_batch_size = batch
    while True:
        try:
            loop.step(batch)
            break
        except torch.cuda.OutOfMemoryError:
            loop.micro_batch_size //= 2
            if loop.micro_batch_size == 0 or loop.notes.get("one micro-batch"):
                raise
        gc.collect()
        torch.cuda.empty_cache()
    if not is_cuda:
        return loop, float("nan")
    session.synchronize()
    loop.state_bytes = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - loop.state_bytes
    loop.step(batch)
    session.synchronize()
    return loop, (torch.cuda.max_memory_allocated() - others) / 2**30


def published(session: Session) -> Loop:
    """(a), written from its description: docs/training.md says where it differs from ours."""
    from diffusers import DDPMScheduler

    net = _unet(session).to(session.device).train()
    scheduler = DDPMScheduler(num_train_timesteps=TRAINING_STEPS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    pairs = random_pairs(max(session.scale.batches), session.scale.size)

    def micro_step(num: int, share: float) -> Tensor:
        images_BCHW, masks_BCHW = (pixels[:num].to(session.device) for pixels in pairs)
        noise_BCHW = torch.randn(images_BCHW.shape).to(session.device)
        timestep_B = torch.randint(0, TRAINING_STEPS, (num,), device=session.device).long()
        x_t_BCHW = scheduler.add_noise(images_BCHW, noise_BCHW, timestep_B)
        prediction_BCHW = net(torch.cat((x_t_BCHW, masks_BCHW), dim=1), timestep_B, return_dict=False)[0]
        loss = F.mse_loss(prediction_BCHW, noise_BCHW)
        (loss * share if share < 1 else loss).backward()
        return loss.detach()

    return Loop(micro_step, partial(_update, optimizer), reads_loss=True)


def tuned(session: Session, net: Callable[..., Tensor], *, compiled: bool = False) -> Loop:
    """(b) to (d): a library's network, used carefully."""
    device = session.device
    assert isinstance(net, nn.Module)
    net.to(device, torch.bfloat16).to(memory_format=torch.channels_last).train()
    if compiled:
        net.compile(backend=session.scale.compiler, dynamic=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    images_BCHW, masks_BCHW = (p.to(device) for p in random_pairs(max(session.scale.batches), session.scale.size))
    alphas_cumprod_T = torch.linspace(0.9999, 0.01, TRAINING_STEPS, device=device)

    def micro_step(num: int, share: float) -> Tensor:
        x_0_BCHW = images_BCHW[:num]
        noise_BCHW = torch.randn_like(x_0_BCHW)
        timestep_B = torch.randint(0, TRAINING_STEPS, (num,), device=device)
        a_B111 = alphas_cumprod_T[timestep_B][:, None, None, None]
        x_t_BCHW = a_B111.sqrt() * x_0_BCHW + (1 - a_B111).sqrt() * noise_BCHW
        inputs_BCHW = torch.cat((x_t_BCHW, masks_BCHW[:num]), dim=1).to(torch.bfloat16)
        prediction_BCHW = net(inputs_BCHW.contiguous(memory_format=torch.channels_last), timestep_B)
        loss = F.mse_loss(prediction_BCHW.float(), noise_BCHW)
        (loss * share if share < 1 else loss).backward()
        return loss.detach()

    return Loop(micro_step, partial(_update, optimizer))


def ours(session: Session, folder: Path, batch: int, *, compiled: bool = False) -> Loop:
    """(e) and (f): the task's own loss, kernels and all, without the training engine."""
    task = denoiser_task(session, folder)
    task.model.to(torch.bfloat16).to(memory_format=torch.channels_last).train()
    if compiled:
        task.model.compile(backend=session.scale.compiler, dynamic=False)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-4, fused=True)
    whole = random_batch(batch, session.scale.size, session.device)

    def micro_step(num: int, share: float) -> Tensor:
        loss, _ = task.loss(task.model, _first(whole, num))
        (loss * share if share < 1 else loss).backward()
        return loss.detach()

    return Loop(micro_step, partial(_update, optimizer))


def trained(session: Session, folder: Path, batch: int) -> Loop:
    """(g): as `segdiff train` steps on one GPU, without loader, log and checkpoints."""
    from segdiff_dist.training.config import TrainConfig
    from segdiff_dist.training.engine import Engine

    task = denoiser_task(session, folder)
    config = TrainConfig(global_batch_size=batch, micro_batch_size=batch)
    engine = Engine(task.model, config, batch, session.device)
    engine.module.train()
    whole = random_batch(batch, session.scale.size, session.device)
    images_seen = 0

    def micro_step(num: int, share: float) -> Tensor:
        loss, _ = task.loss(engine, whole)
        engine.backward(loss)
        return loss.detach()

    def update() -> None:
        nonlocal images_seen
        engine.step()
        images_seen += batch
        engine.update_averages(images_seen, batch)

    return Loop(micro_step, update, notes={"one micro-batch": True})


def flops_per_image(session: Session) -> int:
    """FLOPs of one training image, forward and backward, counted."""
    size = session.scale.size
    with torch.device("meta"):
        denoiser = Denoiser(replace(session.scale.net, kernels="torch"), AMOS, size)
        one = torch.zeros(1, dtype=torch.int64)
        return count_flops(
            denoiser, torch.empty(1, 1, size, size), one, torch.empty(1, size, size, dtype=torch.uint8), one
        )


def random_pairs(num: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and masks in [-1, 1], float32 [num, 1, size, size], on the host."""
    images_BHW, masks_BHW = _pixels(num, size)
    return images_BHW[:, None].float().div(127.5).sub(1.0), masks_BHW[:, None].float().div(127.5).sub(1.0)


def random_batch(num: int, size: int, device: torch.device) -> Batch:
    """As the loader gives it, on the device."""
    index_B = torch.arange(num, device=device)
    pixels = (pixels_BHW.to(device) for pixels_BHW in _pixels(num, size))
    return Batch(*pixels, modality_B=index_B % 2, axis_B=index_B % 3, position_B=index_B)


@functools.cache
def _pixels(num: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and label maps, uint8 [num, size, size]."""
    images, masks = zip(*(make_pair(n, size) for n in range(num)), strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


def denoiser_task(session: Session, folder: Path, kernels: Literal["triton", "torch"] = "triton") -> Any:
    """The denoiser's task on a set that has the right size and labels."""
    from train import write_data

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.task import DenoiserTask

    scale = session.scale
    write_data(folder, 2, scale.size)  # the task reads only a set's size and labels
    shards = ShardSet.open(folder / "shards")
    net = replace(scale.net, kernels=kernels)
    return DenoiserTask(shards, scale.size, net, DiffusionConfig(), 0, folder / "weights", session.device)


def _unet(session: Session) -> nn.Module:
    """diffusers' UNet with image and mask as two channels."""
    net = replace(session.scale.net, mask_encoding="scalar_signed", class_conditioning=False, kernels="torch")
    return Denoiser(net, AMOS, session.scale.size).unet


class _Returning(nn.Module):
    """diffusers' UNet, its tensor instead of its output class."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        return self.unet(x_BCHW, timestep_B, return_dict=False)[0]


def _eager_unet(session: Session) -> nn.Module:
    return _Returning(_unet(session))


def _monai_unet(session: Session) -> nn.Module:
    from monai.networks.nets import DiffusionModelUNet

    net, size = session.scale.net, session.scale.size
    levels = range(len(net.block_out_channels))
    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=1,
        num_res_blocks=net.layers_per_block,
        channels=net.block_out_channels,
        attention_levels=[size // 2**level in net.attention_resolutions for level in levels],
        norm_num_groups=net.norm_num_groups,
        num_head_channels=net.attention_head_dim,
    )


def _first(batch: Batch, num: int) -> Batch:
    if num == len(batch):
        return batch
    return Batch(*(getattr(batch, f)[:num] for f in ("image_BHW", "mask_BHW", "modality_B", "axis_B", "position_B")))


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _turn(session: Session, loop: Loop, batch: int, steps: int) -> tuple[float, float]:
    if session.device.type == "cuda":
        torch.cuda.empty_cache()  # memory of another loop may be in pieces of the wrong size
    while True:
        try:
            return float(batch), session.seconds(partial(loop.step, batch), steps)
        except torch.cuda.OutOfMemoryError:
            if loop.micro_batch_size == 1 or loop.notes.get("one micro-batch"):
                raise
            loop.micro_batch_size //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _profile(session: Session, loop: Loop, batch: int) -> list[dict[str, Any]] | str:
    """The twenty kernels that take most of a step's time; or the reason why they are not known."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            loop.step(batch)
            session.synchronize()
    except Exception as error:  # the rates are still useful
        return describe(error)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    return [{"kernel": e.key, "ms": e.self_device_time_total / 1e3, "calls": e.count} for e in events[:20]]
