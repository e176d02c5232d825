"""How a network is trained: the `train` section, its checks, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt

from data_shards.problems import Problem
from data_shards.ranges import Count, NonNegative, Some, WholeNumber, names_of, range_problems
from data_shards.settings import Execution, Result, ResultWhereSet, Resumable
from segdiff_dist.config.choices import Device, Switch
from segdiff_dist.training import ema

AverageLength = Annotated[float, Gt(0), Le(ema.WIDEST)]
_Beta = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. Everything that happens over time is counted in images, not steps."""

    seed: Result[int] = 0
    """Seed of weights, order, augmentation, noise and noise levels."""
    num_images: Result[Count] = 12_800_000
    """Number of images to train on, with repetitions."""
    global_batch_size: Result[Count] = 64
    """Images of one step, over all ranks."""
    micro_batch_size: Resumable[Count | Literal["auto"]] = 16
    """Images a rank takes through the net at once. Gradient accumulation makes up the rest of the global
    batch. auto: the fastest size that fits, found at the start of the run. The losses do not depend on it."""
    optimizer: ResultWhereSet[Literal["adamw", "muon"]] = "adamw"
    """muon: orthogonal updates for the weights of hidden layers, AdamW for the others, with one lr for both (Jordan et
    al. 2024; Liu et al. 2025). It reaches the same loss with about half the images. It needs zero_stage 0 to 2 and no
    offload."""
    lr: Result[NonNegative] = 1e-4
    """Learning rate after the warm-up."""
    lr_decay: Result[Literal["cosine", "constant"]] = "cosine"
    """The learning rate after the warm-up: down to 0 along a cosine, or constant."""
    warmup_images: Result[WholeNumber] = 32_000
    """Images over which the learning rate rises from 0."""
    weight_decay: Result[NonNegative] = 0.01
    """Weight decay of the optimiser."""
    betas: Result[tuple[_Beta, _Beta]] = (0.9, 0.999)
    """Beta_1 and beta_2 of AdamW."""
    gradient_clip: Result[NonNegative] = 1.0
    """Largest gradient norm. 0 leaves gradients as they are."""
    precision: Result[Literal["auto", "bf16", "fp32"]] = "auto"
    """Precision of weights and activations in the forward and backward pass. auto: bf16 where the device has arithmetic
    for it (a GPU since Ampere, a CPU with AMX or AVX-512 BF16), fp32 elsewhere. A run keeps the precision that it began
    with."""
    zero_stage: Resumable[Annotated[int, Interval(ge=0, le=3)]] = 1
    """What DeepSpeed shards over ranks. 0: nothing. 1: optimiser state. 2: gradients too. 3: weights too. 2 and 3
    save memory of large nets, and are slower."""
    offload: Resumable[Literal["none", "optimizer", "all"]] = "none"
    """What is kept in the host's memory instead of the GPU's. optimizer: fp32 weights and Adam's state (zero_stage 1 to
    3). all: the working weights too (zero_stage 3)."""
    activation_checkpointing: Resumable[bool] = False
    """Keep only the blocks' inputs and compute the rest again in the backward pass. It is a third more work and takes
    far less memory."""
    compile: Resumable[bool] = False
    """torch.compile the network. Its gradients are first compared with eager's, and it is refused if they differ."""
    cuda_graph: Execution[Switch] = "auto"
    """Whether a micro-batch's forward and backward pass are recorded once and replayed as a CUDA graph, which saves the
    host the launches. No result changes: a recording is used only if it gives the same bits as eager execution. auto:
    on a GPU, if zero_stage is 0 or 1, offload is none, and recording works. on: the run is refused if it does not
    work."""
    ema_lengths: Result[Some[AverageLength]] = (0.05, 0.1)
    """Relative widths (sigma_rel) of the averages of the weights that are kept (training/ema.py). Validation uses the
    first, and so does sampling by default. `segdiff average` makes any other from the snapshots."""
    snapshot_every_images: Result[Count | None] = None
    """Keep the averages of the first checkpoint at or past each multiple of this, for `segdiff average`. null keeps
    none."""
    checkpoint_every_images: Result[Count] = 256_000
    """Images between two checkpoints. A lost run repeats half of them on average."""
    keep_checkpoints: Resumable[Count] = 3
    """How many of the newest checkpoints are kept."""
    keep_every_images: Resumable[Count | None] = None
    """Also keep the first checkpoint at or past each multiple of this. The one with the best weights is always kept."""
    log_every_images: Result[Count] = 6_400
    """Images between two records of loss and speed."""
    validate_every_images: Result[Count | None] = None
    """Images between two validations. null: with each checkpoint."""
    spike_factor: Result[NonNegative] = 10.0
    """A step is skipped if its loss is more than this many times the running mean, or if loss or gradient are NaN or
    infinite. With 0 only the latter are skipped."""
    max_skipped_steps: Resumable[Count] = 10
    """The run stops after this many skipped steps in a row."""
    hang_timeout_s: Resumable[Annotated[float, Ge(1)]] = 600.0
    """The run stops if a rank has finished no step for this many seconds."""
    device: Execution[Device] = "auto"
    """auto: the GPU if there is one."""

    def problems(self, section: str, ranks: int = 1) -> list[Problem]:
        """Values out of range, and settings that do not go together, for a run on `ranks` ranks."""
        problems = range_problems(self, "config", f"{section}.")
        wrong = names_of(problems)

        def add(name: str, value: object, remedy: str) -> None:
            problems.append(Problem("config", f"{section}.{name}", str(value), remedy))

        if "ema_lengths" not in wrong and len(set(map(ema.name_of, self.ema_lengths))) != len(self.ema_lengths):
            add("ema_lengths", list(self.ema_lengths), "give each once")
        every = self.snapshot_every_images
        if "checkpoint_every_images" not in wrong and every and every % self.checkpoint_every_images:
            remedy = f"give a multiple of checkpoint_every_images ({self.checkpoint_every_images})"
            add("snapshot_every_images", every, remedy)
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "all" else 1):
            stages = "3" if self.offload == "all" else "1, 2 or 3"
            add("offload", self.offload, f"needs zero_stage {stages}; it is {self.zero_stage}")
        if self.optimizer == "muon" and (self.zero_stage == 3 or self.offload != "none"):
            value = f"muon with zero_stage {self.zero_stage}, offload {self.offload}"
            add("optimizer", value, "muon needs zero_stage 0, 1 or 2 and offload none; or use adamw")
        if self.cuda_graph == "on" and not self.adds_up_gradients:
            value = f"on with zero_stage {self.zero_stage}, offload {self.offload}"
            add("cuda_graph", value, "a graph needs zero_stage 0 or 1 and offload none; or give auto")
        if self.compile and self.zero_stage == 3:
            add("compile", True, "zero_stage 3 gathers weights in between, which cannot be compiled; use 0 to 2")
        if problems:
            return problems
        divisor = ranks * (1 if self.micro_batch_size == "auto" else self.micro_batch_size)
        if self.global_batch_size % divisor:
            of = "ranks" if self.micro_batch_size == "auto" else "micro_batch_size * ranks"
            add("global_batch_size", self.global_batch_size, f"give a multiple of {of} = {divisor}")
        return problems

    @property
    def adds_up_gradients(self) -> bool:
        """Whether micro-batches add to gradients in fixed tensors, which the ranks add up once a step. Not if ZeRO
        shards gradients, or if they go to the host's memory."""
        return self.zero_stage <= 1 and self.offload == "none"

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the averages, as under weights/."""
        return tuple(ema.name_of(length) for length in self.ema_lengths)


@dataclass(frozen=True)
class AverageConfig:
    """Which average `segdiff average` makes."""

    length: Result[AverageLength] = 0.07
    """Relative width of the average (sigma_rel; segdiff_dist/training/ema.py)."""
    images_seen: Result[Count | None] = None
    """The training images seen at the end of the average. null: those of the newest snapshot."""

    def problems(self) -> list[Problem]:
        """Values out of range."""
        return range_problems(self, "config", "average.")

    @property
    def name(self) -> str:
        """The folder under weights/."""
        return ema.name_of(self.length) + (f"_at_{self.images_seen}" if self.images_seen else "")


def learning_rate(images_seen: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017) or a constant."""
    if images_seen < config.warmup_images:
        return config.lr * (images_seen + 1) / (config.warmup_images + 1)
    if config.lr_decay == "constant":
        return config.lr
    span = max(1, config.num_images - config.warmup_images)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (images_seen - config.warmup_images) / span)))
