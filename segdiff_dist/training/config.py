"""How a network is trained: the `train` section, its checks, and what it says of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from data_shards.problems import Problem
from data_shards.settings import Execution, Result, ResultWhereSet, Resumable
from segdiff_dist.training import ema


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. Everything that happens over time is counted in images, not steps."""

    seed: Result[int] = 0
    num_images: Result[int] = 12_800_000
    """Images to train on in all."""
    global_batch_size: Result[int] = 64
    micro_batch_size: Resumable[int | Literal["auto"]] = 16
    """Images a rank takes through the net at once; accumulation makes up the rest of the global batch. auto: the
    fastest size that fits, tried at the start of the run. The losses do not depend on it."""
    optimizer: ResultWhereSet[Literal["adamw", "muon"]] = "adamw"
    """muon: orthogonal updates for the weights of hidden layers, AdamW for the others, with one lr for both (Jordan et
    al. 2024; Liu et al. 2025). The same loss from about half the images; zero_stage 0 to 2, no offload."""
    lr: Result[float] = 1e-4
    lr_decay: Result[Literal["cosine", "constant"]] = "cosine"
    warmup_images: Result[int] = 32_000
    weight_decay: Result[float] = 0.01
    betas: Result[tuple[float, float]] = (0.9, 0.999)
    gradient_clip: Result[float] = 1.0
    """Largest gradient norm; 0 leaves gradients as they are."""
    precision: Result[Literal["bf16", "fp32"]] = "bf16"
    zero_stage: Resumable[int] = 1
    """What DeepSpeed shards over ranks: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too."""
    offload: Resumable[Literal["none", "optimizer", "all"]] = "none"
    """What lies in the host's memory instead of the GPU's: fp32 weights and Adam's state (zero_stage 1 to 3), or the
    working weights too (zero_stage 3)."""
    activation_checkpointing: Resumable[bool] = False
    """Keep only the blocks' inputs and compute the rest again in the backward pass: a third more work, far less
    memory."""
    compile: Resumable[bool] = False
    """torch.compile the network. Its gradients are compared with eager's first, and it is refused where they differ."""
    ema_lengths: Result[tuple[float, ...]] = (0.05, 0.1)
    """Relative widths (sigma_rel) of the averages of the weights that are kept: training/ema.py. The first is what
    validation and, by default, sampling use; `segdiff average` makes any other from the snapshots."""
    snapshot_every_images: Result[int | None] = None
    """Keep the averages of the first checkpoint at or past each multiple of this for `segdiff average`; null keeps
    none."""
    checkpoint_every_images: Result[int] = 256_000
    keep_checkpoints: Resumable[int] = 3
    """The newest checkpoints to keep."""
    keep_every_images: Resumable[int | None] = None
    """Also keep the first at or past each multiple of this, for ever. The one with the best weights is always kept."""
    log_every_images: Result[int] = 6_400
    validate_every_images: Result[int | None] = None
    """Null: when a checkpoint is written."""
    spike_factor: Result[float] = 10.0
    """A step whose loss is more than this many times the running mean is skipped, like one whose loss or gradient is no
    number; 0 skips the latter alone."""
    max_skipped_steps: Resumable[int] = 10
    """The run stops after this many skipped steps in a row."""
    hang_timeout_s: Resumable[float] = 600.0
    """The run stops when a rank has made no step for so long."""
    device: Execution[Literal["auto", "cpu", "cuda"]] = "auto"

    def problems(self, section: str, ranks: int = 1) -> list[Problem]:
        """What is out of range, for a run on `ranks` ranks."""
        found = []

        def add(name: str, value: object, remedy: str) -> None:
            found.append(Problem("config", f"{section}.{name}", str(value), remedy))

        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not low <= value <= (math.inf if high is None else high):
                add(name, value, f"give at least {low}" if high is None else f"give {low} to {high}")
        if not all(0 < length <= ema.WIDEST for length in self.ema_lengths) or not self.ema_lengths:
            add("ema_lengths", list(self.ema_lengths), f"give one or more in (0, {ema.WIDEST:.3f}]")
        if len(set(map(ema.name_of, self.ema_lengths))) != len(self.ema_lengths):
            add("ema_lengths", list(self.ema_lengths), "give each once")
        if not all(0 <= beta < 1 for beta in self.betas):
            add("betas", list(self.betas), "give two in [0, 1)")
        if self.snapshot_every_images and self.snapshot_every_images % self.checkpoint_every_images:
            remedy = f"give a multiple of checkpoint_every_images ({self.checkpoint_every_images})"
            add("snapshot_every_images", self.snapshot_every_images, remedy)
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "all" else 1):
            stages = "3" if self.offload == "all" else "1, 2 or 3"
            add("offload", self.offload, f"needs zero_stage {stages}; it is {self.zero_stage}")
        if self.optimizer == "muon" and (self.zero_stage == 3 or self.offload != "none"):
            value = f"muon with zero_stage {self.zero_stage}, offload {self.offload}"
            add("optimizer", value, "muon needs zero_stage 0, 1 or 2 and offload none; or use adamw")
        if self.compile and self.zero_stage == 3:
            add("compile", True, "zero_stage 3 gathers weights in between, which cannot be compiled; use 0 to 2")
        divisor = ranks * (1 if self.micro_batch_size == "auto" else self.micro_batch_size)
        if not found and self.global_batch_size % divisor:
            of = "ranks" if self.micro_batch_size == "auto" else "micro_batch_size * ranks"
            add("global_batch_size", self.global_batch_size, f"give a multiple of {of} = {divisor}")
        return found

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the averages, as under weights/."""
        return tuple(ema.name_of(length) for length in self.ema_lengths)


@dataclass(frozen=True)
class AverageConfig:
    """Which average `segdiff average` makes."""

    length: Result[float] = 0.07
    """Its relative width (sigma_rel): segdiff_dist/training/ema.py."""
    images_seen: Result[int | None] = None
    """Where it ends; null: at the newest snapshot."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        if 0 < self.length <= ema.WIDEST:
            return []
        return [Problem("config", "average.length", str(self.length), f"give a number in (0, {ema.WIDEST:.3f}]")]

    @property
    def name(self) -> str:
        """The folder under weights/."""
        return ema.name_of(self.length) + (f"_at_{self.images_seen}" if self.images_seen else "")


_BOUNDS: tuple[tuple[str, float, float | None], ...] = (
    ("num_images", 1, None),
    ("global_batch_size", 1, None),
    ("micro_batch_size", 1, None),
    ("lr", 0.0, None),
    ("warmup_images", 0, None),
    ("weight_decay", 0.0, None),
    ("gradient_clip", 0.0, None),
    ("zero_stage", 0, 3),
    ("snapshot_every_images", 1, None),
    ("checkpoint_every_images", 1, None),
    ("keep_checkpoints", 1, None),
    ("keep_every_images", 1, None),
    ("log_every_images", 1, None),
    ("validate_every_images", 1, None),
    ("spike_factor", 0.0, None),
    ("max_skipped_steps", 1, None),
    ("hang_timeout_s", 1.0, None),
)


def learning_rate(images_seen: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017) or a constant."""
    if images_seen < config.warmup_images:
        return config.lr * (images_seen + 1) / (config.warmup_images + 1)
    if config.lr_decay == "constant":
        return config.lr
    span = max(1, config.num_images - config.warmup_images)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (images_seen - config.warmup_images) / span)))
