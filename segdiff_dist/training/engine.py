"""The training engine: DeepSpeed's sharded mixed-precision optimiser, and averages of its fp32 weights sharded alike.

deepspeed_internals.py imports DeepSpeed. It describes DeepSpeed's partitions as extents (sharded_state.py), so that a
checkpoint does not depend on the number of ranks or on the ZeRO stage.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.problems import problem, refuse
from segdiff_dist.ranks.cpu_memory import keep_freed_memory
from segdiff_dist.ranks.distributed import (
    gather_objects,
    is_main,
    naming_missing_ranks,
    prepare_environment,
    rank,
    world_size,
)
from segdiff_dist.ranks.precision import settled
from segdiff_dist.training import ema
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.deepspeed_internals import ZeroPartitions, bucket_elements, import_deepspeed
from segdiff_dist.training.flat_gradients import FlatGradients, norm_over_ranks
from segdiff_dist.training.muon import MuonAdamW
from segdiff_dist.training.sharded_state import SavedState, StateShard, share
from segdiff_dist.training.step_log import StepCheck, is_not_finite
from segdiff_kernels.ema_update import MAX_AVERAGES, EmaUpdate, ema_update_reference

ONLINE = "online"
# Longer than any wait should be: ranks/heartbeat.py ends a useless wait earlier, and names the rank.
_LONGEST_WAIT = timedelta(hours=2)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# A scalar of a checkpoint whose first moments are Muon's.
_MUON = "muon"


class Engine:
    """A model under DeepSpeed: backward pass and step, fp32 averages sharded like the optimiser's state, saving and
    loading of its state. Parameters that require no gradient are frozen."""

    def __init__(self, model: nn.Module, config: TrainConfig, micro_batch_size: int, device: torch.device) -> None:
        deepspeed = start_distributed(device)
        config = replace(config, precision=settled(config.precision, device))
        self.config, self.device = config, device
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = config.global_batch_size // (micro_batch_size * world_size())
        # Frozen parameters belong to no optimiser, average or checkpoint.
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.shapes = {name: tuple(p.shape) for name, p in trained}
        names = {id(p): name for name, p in trained}
        self._adam = _optimizer_of(trained, config)
        self._veto = torch.zeros((), device=device)
        self._norm = torch.zeros((), device=device)
        self._lr: Tensor | None = None
        self._engine, zero_optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self._adam, config=self._deepspeed_config()
        )
        self.module: nn.Module = self._engine.module
        self._partitions = ZeroPartitions(zero_optimizer, config.zero_stage, self.module, names)
        self._shards, self._extents = self._partitions.shards, self._partitions.extents
        # The gradients' sums. None: DeepSpeed reduces gradients by its own hooks, in the middle of a backward pass.
        self._gradients = self._partitions.flat_gradients() if config.adds_up_gradients else None
        if self._gradients is None:
            for part in self.module.modules():
                if hasattr(part, "joins_weights"):
                    part.joins_weights = False
        self._forward = self._engine if self._gradients is None else self.module
        if self._gradients is not None:
            self._engine.set_gradient_accumulation_boundary(True)  # it does not see micro-batches, only updates
        if isinstance(self._adam, MuonAdamW):
            of_ranks = gather_objects(self._extents) if config.zero_stage > 0 else [self._extents]
            self._adam.lay_out(self.shapes, self._shards, of_ranks, rank() if config.zero_stage > 0 else 0)
        self._adam.register_step_pre_hook(lambda *_: self._before_update())
        self._averages = {name: [s.detach().clone() for s in self._shards] for name in config.averages}
        # The kernel reads each weight once for all averages; the result is the same.
        is_fused = getattr(model, "uses_kernels", False) and len(self._averages) <= MAX_AVERAGES
        is_fused &= config.offload == "none"
        self._fused_averages = EmaUpdate(list(self._averages.values()), self._shards) if is_fused else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            return self._forward(*args, **kwargs)

    @property
    def gradients(self) -> list[Tensor]:
        """The tensors that backward() adds to, in place; empty if DeepSpeed keeps the gradients."""
        return [] if self._gradients is None else self._gradients.flats

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        if self._gradients is None:
            self._engine.backward(loss)
            return
        self._gradients.add(loss / self.num_micro_batches)

    def step(self, check: StepCheck | None = None, *, is_last: bool = True) -> Tensor:
        """Call after each micro-batch; after the last one of a global batch it updates the weights.

        `check`: may veto the update, and counts it. Returns, on the device, 1.0 if the update was skipped, by the veto
        or because the gradient is not finite. The value is valid until the next call.
        """
        if is_last and check is not None:
            self._veto.copy_(check.veto())
        if self._gradients is None:
            self._engine.step()
            if is_last and not self._engine.was_step_applied():
                self._veto.fill_(1.0)  # DeepSpeed itself found a gradient that is not finite
        elif is_last:
            self._reduce(self._gradients)
            self._engine.step()
            self._gradients.zero()
        if is_last and check is not None:
            check.close(self._veto)
        return self._veto

    @property
    def can_record_updates(self) -> bool:
        """Whether an update always does the same work on the same memory: AdamW's, on one rank."""
        return world_size() == 1 and self.config.optimizer == "adamw" and self._gradients is not None

    def read_lr_from_device(self) -> None:
        """Let updates read the learning rate from the device, so that a recorded one follows the schedule."""
        # AdamW's kernel for GPUs reads float32.
        on_gpu = self.device.type == "cuda"
        self._lr = torch.zeros((), device=self.device, dtype=torch.float32 if on_gpu else torch.float64)
        self._lr.fill_(self._adam.param_groups[0]["lr"])
        for group in self._adam.param_groups:
            group |= {"lr": self._lr, "capturable": on_gpu}
        # The first two updates are eager, of which torch would warn.
        self._adam._warned_capturable_if_run_uncaptured = True

    def update_state(self) -> list[Tensor]:
        """The tensors that an update changes in place, from the second update on."""
        weights = [p.data for p in self.module.parameters() if p.requires_grad] if self.config.zero_stage else []
        steps = [self._adam.state[s]["step"] for s in self._shards]
        moments = [self._moment(s, kind) for s in self._shards for kind in _MOMENTS]
        return [
            *weights,
            *(s.detach() for s in self._shards),
            *moments,
            *steps,
            *self.gradients,
            self._veto,
            self._norm,
        ]

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next update. On a GPU rounded to float32, as a recorded update reads it."""
        if self._lr is not None:
            self._lr.fill_(lr)
            return
        for group in self._adam.param_groups:
            group["lr"] = float(np.float32(lr)) if self.device.type == "cuda" else lr

    def grad_norm(self) -> float:
        """Norm of the last update's gradient before clipping; waits for the device."""
        norm = self._engine.get_global_grad_norm() if self._gradients is None else self._norm
        return float("nan") if norm is None else float(norm)

    def update_averages(self, images_seen: int, images: int) -> None:
        """Update every average from images_seen - images to images_seen, in fp32, each rank for its own shard."""
        decays = [ema.decay(length, images_seen, images) for length in self.config.ema_lengths]
        if self._fused_averages is not None:
            self._fused_averages(decays)
        else:
            weights = [s.detach() for s in self._shards]
            ema_update_reference([self._averages[name] for name in self.config.averages], weights, decays)

    @contextmanager
    def using_average(self, name: str) -> Iterator[None]:
        """The model computes with an average, in evaluation mode, until the context ends. Call on every rank."""
        shards = [s.detach() for s in self._shards]
        kept = [s.clone() for s in shards]
        torch._foreach_copy_(shards, self._averages[name])
        self._partitions.refresh()
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            torch._foreach_copy_(shards, kept)
            self._partitions.refresh()

    def state(self) -> StateShard:
        """This rank's part of everything that a resumed training needs: the tensors themselves, not copies."""
        moments = {kind: [self._moment(s, kind) for s in self._shards] for kind in _MOMENTS}
        steps = [float(self._adam.state[s]["step"]) for s in self._shards if "step" in self._adam.state[s]]
        extents = self._extents if self.config.zero_stage > 0 else share(self._extents, rank(), world_size())
        shards = {ONLINE: [s.detach() for s in self._shards], **moments, **self._averages}
        scalars = {"step": steps[0] if steps else 0.0}
        if self.config.optimizer == "muon":
            scalars[_MUON] = 1.0
        return StateShard(self.shapes, extents, shards, scalars)

    def load(self, folder: Path, num_files: int) -> None:
        """Load a state that any number of ranks wrote. Raises InputProblems if it belongs to another architecture."""
        saved = SavedState(folder, num_files)
        refuse(saved.problems_for(self.shapes))
        before = "muon" if _MUON in saved.scalars else "adamw"
        if before != self.config.optimizer:  # the moments of one optimiser are of no use to the other
            remedy = f"give --train.optimizer {before}, or another run folder"
            raise problem(folder, "train.optimizer", f"begun with {before}, not {self.config.optimizer}", remedy)
        for name in self._averages:
            if name not in saved.kinds:
                raise problem(folder, name, f"not among {', '.join(saved.kinds)}", "keep train.ema_lengths as it was")
        saved.fill(ONLINE, self._extents, [s.detach() for s in self._shards])
        for name, shards in self._averages.items():
            saved.fill(name, self._extents, shards)
        for shard in self._shards:
            self._adam.state[shard] = {
                "step": torch.full((), saved.scalars["step"], dtype=torch.float32, device=shard.device),
                **{kind: torch.zeros_like(shard) for kind in _MOMENTS},
            }
        for kind in _MOMENTS:
            saved.fill(kind, self._extents, [self._adam.state[s][kind] for s in self._shards])
        self._partitions.refresh()

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self._engine.destroy()

    def _reduce(self, gradients: FlatGradients) -> None:
        """Let DeepSpeed's next step update from the means over the ranks, clipped."""
        means, limit = gradients.reduce(in_parts=self.config.zero_stage > 0), self.config.gradient_clip
        if self.config.zero_stage == 0:
            gradients.attach()
            self._norm.copy_(torch.nn.utils.clip_grad_norm_(self._shards, limit or float("inf")))
            return
        self._norm.copy_(norm_over_ranks(means))
        shrink = torch.clamp((self._norm + 1e-6) / limit, min=1.0).reciprocal() if limit else None
        self._partitions.give_gradients(means, shrink)

    def _before_update(self) -> None:
        """AdamW calls it as its step begins. Its fused kernels skip the update where found_inf is not 0."""
        norm = self._partitions.grad_norm() if self._gradients is None else self._norm
        self._veto.masked_fill_(is_not_finite(norm.to(self._veto.device)), 1.0)
        self._adam.found_inf = self._veto.to(self._shards[0].device)  # type: ignore[attr-defined]

    def _autocast(self) -> AbstractContextManager[Any]:
        """bf16 with ZeRO 0 is fp32 weights under autocast: DeepSpeed itself (0.19.8) would use an unfused fp16
        optimiser, whose losses differ from those of the other stages."""
        if self.config.precision == "bf16" and self.config.zero_stage == 0:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _deepspeed_config(self) -> dict[str, Any]:
        config = self.config
        zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_scatter": self.device.type == "cuda"}
        # ZeRO 3 would replace torch.nn.functional.linear for the whole process, by one that rounds bf16 differently.
        # The net has few products, so it would save only 22 MB.
        zero["memory_efficient_linear"] = False
        zero["reduce_bucket_size"] = bucket_elements(sum(math.prod(shape) for shape in self.shapes.values()))
        if config.adds_up_gradients and config.zero_stage == 1:
            # No hooks on parameters, no bucket, and no norm for which the host waits.
            zero |= {"contiguous_gradients": False, "compute_grad_norm": False}
        place = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if config.offload != "none":
            zero["offload_optimizer"] = place
        if config.offload == "all":
            zero["offload_param"] = place
        return {
            # DeepSpeed's list of tested optimisers has only torch's and its own.
            "zero_allow_untested_optimizer": config.optimizer == "muon",
            "train_batch_size": config.global_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": 0.0 if config.adds_up_gradients else config.gradient_clip,
            # Its timer makes the host wait for the GPU twice in every micro-batch.
            "timers": {"throughput": {"enabled": False}},
            # DeepSpeed's own check for gradients that are not finite makes the host wait once more in every step;
            # _before_update does not. ZeRO 2 still waits for the norm once an update.
            "bf16": {"enabled": config.precision == "bf16" and config.zero_stage > 0, "check_grad_overflow": False},
            "zero_optimization": zero,
            # AdamW stays ours with offload too: its fused CPU kernel is as fast as DeepSpeed's, which must be compiled.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def _moment(self, shard: Tensor, kind: str) -> Tensor:
        """Adam's average of a shard's gradients or of their squares; zeros before the first step."""
        moment = self._adam.state[shard].get(kind)
        return torch.zeros_like(shard) if moment is None else moment


def _optimizer_of(trained: list[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW([p for _, p in trained], **settings, fused=True)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return MuonAdamW(trained, dtype, **settings, fused=True)


def start_distributed(device: torch.device) -> Any:
    """torch.distributed, if it is not up; returns DeepSpeed, set to this device and quiet."""
    prepare_environment()
    if device.type == "cpu":
        keep_freed_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:  # Triton launches on the current device, wherever its tensors are
        torch.cuda.set_device(device)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    deepspeed = import_deepspeed()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(_is_for_users)
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world_size() == 1:  # a single rank needs no port, which another process might take first
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        with naming_missing_ranks():
            deepspeed.init_distributed(
                dist_backend=backend, auto_mpi_discovery=False, verbose=is_main(), timeout=_LONGEST_WAIT
            )
    return deepspeed


def _is_for_users(record: logging.LogRecord) -> bool:
    """Whether to print a line of DeepSpeed's log. Its warning about unknown optimisers is left out."""
    return "untested optimizer" not in record.getMessage()
