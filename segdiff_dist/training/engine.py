"""The training engine: DeepSpeed's sharded mixed-precision optimiser, and averages of its fp32 weights sharded alike.

Owns DeepSpeed. What DeepSpeed calls partitions is described to the rest of the package as extents (sharded_state.py),
so that a checkpoint belongs to no number of ranks and to no ZeRO stage.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_shards.problems import problem, refuse
from segdiff_dist.ranks.cpu_memory import keep_freed_memory
from segdiff_dist.ranks.distributed import (
    gather_objects,
    is_main,
    naming_who_is_missing,
    prepare_environment,
    rank,
    world_size,
)
from segdiff_dist.training import ema
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.muon import MuonAdamW
from segdiff_dist.training.sharded_state import Extent, SavedState, ShardOfState, share
from segdiff_kernels.ema_update import MAX_AVERAGES, EmaUpdate, ema_update_reference

ONLINE = "online"
# Longer than any wait is meant to be: ranks/heartbeat.py finds who waits in vain, and knows more.
_LONGEST_WAIT = timedelta(hours=2)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Among a checkpoint's scalars where its first moments are Muon's.
_MUON = "muon"


class Engine:
    """A model under DeepSpeed: backward and step, fp32 averages sharded like the optimiser, its state out and in."""

    def __init__(self, model: nn.Module, config: TrainConfig, micro_batch_size: int, device: torch.device) -> None:
        deepspeed = start_distributed(device)
        self.config, self.device = config, device
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = config.global_batch_size // (micro_batch_size * world_size())
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._adam = _optimizer_of(model, config)
        self._veto = torch.zeros((), device=device)
        self._norm: Tensor | float = float("nan")
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=self._adam, config=self._deepspeed_config()
        )
        self.module: nn.Module = self._engine.module
        self._shards, self._extents = self._layout()
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
            return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._engine.backward(loss)

    def step(self, veto: Tensor | None = None) -> Tensor:
        """After each micro-batch; updates the weights at the end of a global batch.

        `veto`: a number on the device; where it is not 0 the update is not made. Returns 1.0 on the device where no
        update was made, by veto or because the gradient is no number.
        """
        if veto is not None:
            self._veto.copy_(veto)
        self._engine.step()
        if self.config.zero_stage > 0 and not self._engine.was_step_applied():
            return torch.ones_like(self._veto)  # DeepSpeed itself found that the gradient is no number
        return self._veto.clone()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next update."""
        for group in self._adam.param_groups:
            group["lr"] = lr

    def grad_norm(self) -> float:
        """Norm of the last update's gradient before clipping; waits for the device."""
        norm = self._norm if self.config.zero_stage == 0 else self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def update_averages(self, images_seen: int, images: int) -> None:
        """Bring every average from images_seen - images to images_seen, in fp32, each rank on its own shard."""
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
        self._refresh()
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            torch._foreach_copy_(shards, kept)
            self._refresh()

    def state(self) -> ShardOfState:
        """This rank's part of everything that training goes on from: live tensors, not copies."""
        moments = {kind: [self._moment(s, kind) for s in self._shards] for kind in _MOMENTS}
        steps = [float(self._adam.state[s]["step"]) for s in self._shards if "step" in self._adam.state[s]]
        extents = self._extents if self.config.zero_stage > 0 else share(self._extents, rank(), world_size())
        shards = {ONLINE: [s.detach() for s in self._shards], **moments, **self._averages}
        scalars = {"step": steps[0] if steps else 0.0}
        if self.config.optimizer == "muon":
            scalars[_MUON] = 1.0
        return ShardOfState(self.shapes, extents, shards, scalars)

    def load(self, folder: Path, num_files: int) -> None:
        """Take up what any number of ranks wrote. Raises InputProblems where it is another architecture's."""
        saved = SavedState(folder, num_files)
        refuse(saved.problems_for(self.shapes))
        before = "muon" if _MUON in saved.scalars else "adamw"
        if before != self.config.optimizer:  # the moments of one mean nothing to the other
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
        self._refresh()

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self._engine.destroy()

    def _before_update(self) -> None:
        """Called by AdamW as its step begins; the fused kernels leave everything as it is where found_inf is not 0."""
        if self.config.zero_stage == 0:
            # DeepSpeed clips here too, but keeps the norm to itself.
            limit = self.config.gradient_clip or float("inf")
            self._norm = norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        else:
            norm = self._zero._global_grad_norm
        self._veto.copy_(torch.maximum(self._veto, (~torch.isfinite(norm)).to(self._veto)))
        self._adam.found_inf = self._veto.to(self._shards[0].device)  # type: ignore[attr-defined]

    def _autocast(self) -> AbstractContextManager[Any]:
        """bf16 with ZeRO 0 is fp32 weights under autocast: DeepSpeed's own way there (0.19.8) is an unfused fp16
        optimiser, whose losses leave those of the other stages."""
        if self.config.precision == "bf16" and self.config.zero_stage == 0:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _deepspeed_config(self) -> dict[str, Any]:
        config = self.config
        zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_scatter": self.device.type == "cuda"}
        # ZeRO 3 would replace torch.nn.functional.linear for the whole process, by one that rounds bf16 otherwise; the
        # net's products are few, so what it saves is 22 MB.
        zero["memory_efficient_linear"] = False
        place = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if config.offload != "none":
            zero["offload_optimizer"] = place
        if config.offload == "all":
            zero["offload_param"] = place
        return {
            # Its list of optimizers that it has tried has torch's and its own.
            "zero_allow_untested_optimizer": config.optimizer == "muon",
            "train_batch_size": config.global_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": config.gradient_clip if config.zero_stage > 0 else 0.0,
            # Its own check for gradients that are no number makes the host wait once more in every step;
            # _before_update does not. ZeRO 1 and 2 wait for the norm even so, once an update.
            "bf16": {"enabled": config.precision == "bf16" and config.zero_stage > 0, "check_grad_overflow": False},
            "zero_optimization": zero,
            # AdamW stays ours with offload too: its fused CPU kernel is as fast as DeepSpeed's, which must be compiled.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def _layout(self) -> tuple[list[Tensor], tuple[Extent, ...]]:
        """The fp32 weights that this rank updates, and which parameters' elements lie where in them."""
        zero, stage = self._zero, self.config.zero_stage
        if stage == 0:
            shards: list[Tensor] = list(self.module.parameters())
            return shards, tuple(Extent(self._names[id(p)], 0, p.numel(), i, 0) for i, p in enumerate(shards))
        extents = []
        if stage == 3:
            shards = list(zero.fp32_partitioned_groups_flat)
            for shard, (group, parts) in enumerate(
                zip(zero.fp16_groups, zero.fp16_partitioned_groups, strict=True)
            ):  # every parameter is cut into as many pieces as there are ranks
                offset = 0
                for parameter, part in zip(group, parts, strict=True):
                    start = min(rank() * part.ds_numel, parameter.ds_numel)
                    stop = min(start + part.ds_numel, parameter.ds_numel)
                    extents.append(Extent(self._names[id(parameter)], start, stop, shard, offset))
                    offset += part.ds_numel
        else:
            shards = list(zero.single_partition_of_fp32_groups)
            for shard, group in enumerate(zero.round_robin_bit16_groups):  # the row of all parameters is cut
                low = rank() * shards[shard].numel()
                high = low + shards[shard].numel()
                for parameter, first in zip(group, zero.round_robin_bit16_offsets[shard], strict=True):
                    start, stop = max(low, first), min(high, first + parameter.numel())
                    if start < stop:
                        name = self._names[id(parameter)]
                        extents.append(Extent(name, start - first, stop - first, shard, start - low))
        return shards, tuple(e for e in extents if e.start < e.stop)

    def _refresh(self) -> None:
        """The working weights from the fp32 ones, after these were written to from outside."""
        zero, stage = self._zero, self.config.zero_stage
        if stage in (1, 2):
            zero.update_lp_params()
        elif stage == 3:
            zero._partition_all_parameters()
            for group, shard in enumerate(self._shards):
                zero.fp16_partitioned_groups_flat[group].data.copy_(shard.data)
                zero._unflatten_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _moment(self, shard: Tensor, kind: str) -> Tensor:
        """Adam's average of a shard's gradients or of their squares; zeros before the first step."""
        found = self._adam.state[shard].get(kind)
        return torch.zeros_like(shard) if found is None else found


def _optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **settings, fused=True)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return MuonAdamW(model.named_parameters(), dtype, **settings, fused=True)


def start_distributed(device: torch.device) -> Any:
    """torch.distributed, if it is not up; returns DeepSpeed, set to this device and quiet."""
    prepare_environment()
    if device.type == "cpu":
        keep_freed_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:  # Triton launches on the current device, whatever its tensors lie on
        torch.cuda.set_device(device)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.utils import logger

        _import_muon_uncompiled()
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # Never DeepSpeed's shared-memory collective: it is compiled behind a lock file, and a rank killed there leaves the
    # lock to hang every later run. gloo does the same.
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world_size() == 1:  # nobody to meet: no port, which another process might take first
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        with naming_who_is_missing():
            deepspeed.init_distributed(
                dist_backend=backend, auto_mpi_discovery=False, verbose=is_main(), timeout=_LONGEST_WAIT
            )
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's log is for users: its word on optimizers that it does not know is not."""
    return "untested optimizer" not in record.getMessage()


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which never runs here, without torch's compiler.

    deepspeed.initialize imports it to see whether the optimiser is one, and its decorators (DeepSpeed 0.19) load
    torch._inductor for that: a fifth of the time in which a training starts.
    """
    from deepspeed.runtime import compiler

    before, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        with suppress(ImportError):  # as DeepSpeed does
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = before
