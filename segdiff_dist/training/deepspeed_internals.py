"""All uses of DeepSpeed's undocumented parts. Other modules use only its public interface.

A shard in this package is a partition in DeepSpeed: the flat fp32 tensors that a rank updates.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from data_shards import lean_imports
from segdiff_dist.library_versions import require_supported
from segdiff_dist.ranks.distributed import rank
from segdiff_dist.training.flat_gradients import FlatGradients
from segdiff_dist.training.sharded_state import Extent

# DeepSpeed's default of reduce_bucket_size.
_LARGEST_BUCKET = 500_000_000


def import_deepspeed() -> Any:
    """The deepspeed module, imported without its warnings and without torch's compiler.

    Raises InputProblems if its version is not one that this file knows.
    """
    require_supported("deepspeed")
    with warnings.catch_warnings(), lean_imports.without("mlflow", "pandas"):
        warnings.simplefilter("ignore")
        import deepspeed

        _import_muon_uncompiled()
    # Without DeepSpeed's shared-memory collective: it is compiled behind a lock file, and a rank that is killed there
    # leaves a lock on which every later run hangs. gloo does the same work.
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    return deepspeed


def bucket_elements(num_parameters: int) -> int:
    """Elements of the buffer in which DeepSpeed's hooks collect gradients for a reduction (ZeRO 2 and 3, offload).

    Its default takes 1 or 2 GB for any net. No more than all gradients are ever in it, so a smaller one changes no bit.
    """
    return min(_LARGEST_BUCKET, num_parameters)


class ZeroPartitions:
    """The fp32 weights that this rank updates, of DeepSpeed's ZeRO optimiser (stage 1 to 3) or of plain AdamW (0).

    `shards`: flat tensors, not copies. `extents`: the position of each parameter's elements in them.
    """

    def __init__(self, zero_optimizer: Any, zero_stage: int, module: nn.Module, names: dict[int, str]) -> None:
        """`names`: id of a parameter -> its name, as before DeepSpeed took the module."""
        self._zero, self._stage, self._names = zero_optimizer, zero_stage, names
        layouts = {0: lambda: self._unpartitioned(module), 1: self._cut_groups, 2: self._cut_groups}
        shards, extents = layouts.get(zero_stage, self._cut_parameters)()
        self.shards: list[Tensor] = shards
        self.extents = tuple(e for e in extents if e.start < e.stop)

    def flat_gradients(self) -> FlatGradients:
        """Gradients laid out as the weights are (stages 0 and 1)."""
        if self._stage == 0:
            offsets = [0, *accumulate(p.numel() for p in self.shards)]
            return FlatGradients([list(zip(self.shards, offsets, strict=False))], [offsets[-1]])
        zero = self._zero
        groups = [
            list(zip(group, offsets, strict=True))
            for group, offsets in zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        ]
        return FlatGradients(groups, [flat.numel() for flat in zero.bit16_groups_flat])

    def give_gradients(self, parts: list[Tensor], factor: Tensor | None) -> None:
        """Let the next step update from these flat gradients of this rank's shards, times `factor` (stage 1).

        They are read in float32 and may be overwritten.
        """
        for group, (part, shard) in enumerate(zip(parts, self.shards, strict=True)):
            wide = part.to(shard.dtype)
            gradient = wide if factor is None else wide.mul_(factor)
            self._zero.averaged_gradients[group] = _Flattened([gradient], gradient)

    def grad_norm(self) -> Tensor:
        """Norm of the gradient before clipping, on the device, at the beginning of the optimiser's step, if DeepSpeed
        keeps the gradients."""
        norm: Tensor = self._zero._global_grad_norm
        return norm

    def refresh(self) -> None:
        """Make the working weights from the fp32 ones, after other code has changed the latter."""
        zero = self._zero
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            zero._partition_all_parameters()
            for group, shard in enumerate(self.shards):
                zero.fp16_partitioned_groups_flat[group].data.copy_(shard.data)
                zero._unflatten_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _unpartitioned(self, module: nn.Module) -> tuple[list[Tensor], list[Extent]]:
        """ZeRO 0: every rank holds all parameters that are trained."""
        shards: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        return shards, [Extent(self._names[id(p)], 0, p.numel(), i, 0) for i, p in enumerate(shards)]

    def _cut_groups(self) -> tuple[list[Tensor], list[Extent]]:
        """ZeRO 1 and 2 put the parameters of a group end to end and divide them into one piece for each rank."""
        zero = self._zero
        shards, extents = list(zero.single_partition_of_fp32_groups), []
        for shard, group in enumerate(zero.round_robin_bit16_groups):
            low = rank() * shards[shard].numel()
            high = low + shards[shard].numel()
            for parameter, first in zip(group, zero.round_robin_bit16_offsets[shard], strict=True):
                start, stop = max(low, first), min(high, first + parameter.numel())
                extents.append(Extent(self._names[id(parameter)], start - first, stop - first, shard, start - low))
        return shards, extents

    def _cut_parameters(self) -> tuple[list[Tensor], list[Extent]]:
        """ZeRO 3 divides every parameter into one piece for each rank."""
        zero = self._zero
        shards, extents = list(zero.fp32_partitioned_groups_flat), []
        for shard, (group, parts) in enumerate(zip(zero.fp16_groups, zero.fp16_partitioned_groups, strict=True)):
            offset = 0
            for parameter, part in zip(group, parts, strict=True):
                start = min(rank() * part.ds_numel, parameter.ds_numel)
                stop = min(start + part.ds_numel, parameter.ds_numel)
                extents.append(Extent(self._names[id(parameter)], start, stop, shard, offset))
                offset += part.ds_numel
        return shards, extents


class _Flattened(list[Tensor]):
    """Gradients of a group. DeepSpeed's step reads `flat_partition`; its own class is GradPartitionBufferGroup."""

    def __init__(self, parts: list[Tensor], flat: Tensor) -> None:
        super().__init__(parts)
        self.flat_partition = flat


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which never runs here, without torch's compiler.

    deepspeed.initialize imports it to check the optimiser's type. Its decorators load torch._inductor, which takes a
    fifth of the start of a training.
    """
    from deepspeed.runtime import compiler

    before, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        with suppress(ImportError):  # as DeepSpeed does
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = before
