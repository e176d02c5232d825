"""The training engine: DeepSpeed's sharded mixed-precision optimiser and an EMA of its fp32 weights. Owns DeepSpeed."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_shards.problems import Problem
from segdiff_dist.distributed import barrier, is_main, pretend_launcher, rank, world_size


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. Everything that happens over time is counted in images, not steps."""

    seed: int = 0
    num_images: int = 12_800_000
    """Images to train on in all."""
    global_batch_size: int = 64
    micro_batch_size: int = 16
    """Images a rank takes through the net at once; accumulation makes up the rest of the global batch."""
    lr: float = 1e-4
    lr_decay: Literal["cosine", "constant"] = "cosine"
    warmup_images: int = 32_000
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip: float = 1.0
    """Largest gradient norm; 0 leaves gradients as they are."""
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: int = 1
    """What DeepSpeed shards over ranks: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too."""
    ema_halflife_images: int = 500_000
    ema_rampup_ratio: float = 0.05
    """Early on the half-life is at most this fraction of the images seen (Karras et al. 2022, their code)."""
    checkpoint_every_images: int = 256_000
    keep_checkpoints: int = 3
    log_every_images: int = 6_400
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def problems(self, section: str, ranks: int = 1) -> list[Problem]:
        """What is out of range, for a run on `ranks` ranks."""
        found = []
        for name, low, high in (
            ("num_images", 1, None),
            ("global_batch_size", 1, None),
            ("micro_batch_size", 1, None),
            ("lr", 0.0, None),
            ("warmup_images", 0, None),
            ("weight_decay", 0.0, None),
            ("gradient_clip", 0.0, None),
            ("zero_stage", 0, 3),
            ("ema_halflife_images", 0, None),
            ("checkpoint_every_images", 1, None),
            ("keep_checkpoints", 1, None),
            ("log_every_images", 1, None),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                bound = f"at least {low}" if high is None else f"{low} to {high}"
                found.append(Problem("config", f"{section}.{name}", str(value), f"give {bound}"))
        if self.precision == "bf16" and self.zero_stage == 0:
            # DeepSpeed 0.19.8 then takes its unfused fp16 optimiser, whose losses leave those of stages 1 to 3.
            remedy = "use 1, which on one rank shards nothing either, or precision fp32"
            found.append(Problem("config", f"{section}.zero_stage", "0 with precision bf16", remedy))
        if not found and self.global_batch_size % (self.micro_batch_size * ranks):
            found.append(
                Problem(
                    "config",
                    f"{section}.global_batch_size",
                    str(self.global_batch_size),
                    f"give a multiple of micro_batch_size * ranks = {self.micro_batch_size} * {ranks}",
                )
            )
        return found


class Engine:
    """A model under DeepSpeed: backward and step, an fp32 EMA sharded like the optimiser, save and load."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        deepspeed = _import_deepspeed(device)
        self.config = config
        self.num_micro_batches = config.global_batch_size // (config.micro_batch_size * world_size())
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._deepspeed_config()
        )
        self.module: nn.Module = self._engine.module
        self.ema = [m.detach().clone() for m in self._masters()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._engine.backward(loss)

    def step(self) -> None:
        """After each micro-batch; updates the weights at the end of a global batch."""
        self._engine.step()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def grad_norm(self) -> float:
        """Norm of the last update's gradient before clipping; NaN where DeepSpeed does not keep it."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def update_ema(self, decay: float) -> None:
        """ema <- decay * ema + (1 - decay) * weights, in fp32, each rank on its own shard."""
        torch._foreach_lerp_(self.ema, [m.detach() for m in self._masters()], 1.0 - decay)

    def full_weights(self) -> dict[str, Tensor]:
        """The EMA weights, gathered: fp32 on the CPU, keys as in the model's state_dict. Call on every rank."""
        masters = [m.detach() for m in self._masters()]
        kept = [m.clone() for m in masters]
        torch._foreach_copy_(masters, self.ema)
        try:
            weights = {self._names[id(p)]: self._full(p) for p in self.module.parameters()}
        finally:
            torch._foreach_copy_(masters, kept)
        weights |= {name: buffer.detach().float().cpu() for name, buffer in self.module.named_buffers()}
        return weights

    def save(self, folder: Path) -> None:
        """Write this rank's part of the checkpoint into `folder`. Call on every rank."""
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        torch.save(self.ema, folder / f"ema_rank_{rank():05d}.pt")
        barrier()

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on as many ranks."""
        self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        saved = torch.load(folder / f"ema_rank_{rank():05d}.pt", weights_only=True, map_location=self._engine.device)
        torch._foreach_copy_(self.ema, saved)

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self._engine.destroy()

    def _deepspeed_config(self) -> dict[str, Any]:
        config = self.config
        return {
            "train_batch_size": config.global_batch_size,
            "train_micro_batch_size_per_gpu": config.micro_batch_size,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": config.gradient_clip,
            "bf16": {"enabled": config.precision == "bf16"},
            "zero_optimization": {"stage": config.zero_stage, "reduce_scatter": torch.cuda.is_available()},
            "steps_per_print": 10**9,
        }

    def _masters(self) -> list[Tensor]:
        """The fp32 weights that the optimiser updates: this rank's flat shards, or the parameters themselves."""
        for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # ZeRO 1 and 2; 3
            shards = getattr(self.optimizer, attribute, None)
            if shards is not None:
                return list(shards)
        return list(self.module.parameters())

    def _full(self, parameter: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter)
        return (parameter if full is None else full).detach().float().cpu().clone()


def ema_decay(images_seen: int, global_batch_size: int, config: TrainConfig) -> float:
    """The decay of one step: half-life in images, ramped up early. Karras et al. 2022, appendix F.2 and their code."""
    halflife = min(float(config.ema_halflife_images), images_seen * config.ema_rampup_ratio)
    return 0.5 ** (global_batch_size / max(halflife, 1e-8))


def learning_rate(images_seen: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017) or a constant."""
    import math

    if images_seen < config.warmup_images:
        return config.lr * (images_seen + 1) / (config.warmup_images + 1)
    if config.lr_decay == "constant":
        return config.lr
    span = max(1, config.num_images - config.warmup_images)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (images_seen - config.warmup_images) / span)))


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, set to this device, quiet, and with torch.distributed up."""
    pretend_launcher()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.utils import logger
    logger.setLevel(logging.WARNING)
    if world_size() == 1:
        # One process has nobody to share memory with; without this, DeepSpeed compiles an op on its first CPU run.
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=is_main()
        )
    return deepspeed
