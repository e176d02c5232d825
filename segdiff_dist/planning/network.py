"""The work and memory of a network for an image, counted on the meta device, where tensors have shapes and no
content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data_shards.labels import LabelTable
from segdiff_dist.training.throughput import count_flops


class Classes(Protocol):
    """What networks take from a set: the classes of its masks, and its modalities."""

    @property
    def label_table(self) -> LabelTable:
        """The classes."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """In the order of their codes."""


class Network:
    """The cost of training a network: parameters, FLOPs and activations."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        inputs: Callable[[int], tuple[Any, ...]],
        passes: int = 1,
        forwards: int = 0,
    ) -> None:
        """`make` builds the network; it is called under the meta device. `inputs` gives the arguments of its forward
        for a number of images, on the meta device. `passes`: how many it computes for each image of a batch;
        `forwards`: how many without gradients in addition, each of which is a third of the work."""
        self.make, self.inputs, self.passes, self.forwards = make, inputs, passes, forwards
        self._kept: dict[tuple[str, bool], float] = {}

    def with_forwards(self, forwards: int) -> Network:
        """The same beside a teacher, which computes `forwards` images for each of a batch."""
        return Network(self.make, self.inputs, self.passes, forwards)

    @cached_property
    def num_parameters(self) -> int:
        """Number of weights that are trained."""
        return sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    @cached_property
    def num_frozen(self) -> int:
        """Number of weights that are not."""
        return sum(p.numel() for p in self._model.parameters() if not p.requires_grad)

    @cached_property
    def flops_per_image(self) -> int:
        """FLOPs of the forward and backward passes on one image."""
        return int((self.passes + self.forwards / 3) * count_flops(self._model, *self.inputs(1)))

    @property
    def most_flops_per_image(self) -> float:
        """An upper bound without running a pass: every weight at every pixel, three times (forward, backward)."""
        passes = self.passes + self.forwards / 3
        return passes * 2 * 6.0 * (self.num_parameters + self.num_frozen) * self.inputs(1)[0].shape[-1] ** 2

    def activations(self, images: int, precision: str, checkpointing: bool) -> int:
        """Bytes that autograd keeps of a forward pass, without the weights. With activation checkpointing they include
        those of the largest block, which is computed again."""
        key = (precision, checkpointing)
        if key not in self._kept:
            self._kept[key] = self._kept_of_two(*key) / 2
        return int(self.passes * images * self._kept[key])

    @cached_property
    def _model(self) -> nn.Module:
        with torch.device("meta"):
            return self.make().train()

    def _kept_of_two(self, precision: str, checkpointing: bool) -> int:
        model = self._model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        kept, inputs = _KeptBytes(model), self.inputs(2)
        if not checkpointing:
            return kept.of(*inputs)
        largest = kept.of_largest(_checkpointed(model), *inputs)
        networks: list[Any] = [m for m in model.children() if hasattr(m, "enable_gradient_checkpointing")]
        for network in networks:
            network.enable_gradient_checkpointing()
        try:
            return kept.of(*inputs) + largest
        finally:
            for network in networks:
                network.disable_gradient_checkpointing()


class _KeptBytes:
    """Counts the bytes that autograd keeps of a forward pass: each storage once, without weights."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._storages: dict[int, Any] = {}
        self._bytes = 0

    def of(self, *inputs: Any) -> int:
        self._storages, self._bytes = {}, 0
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept)
        with torch.enable_grad(), hooks, _AttentionWithoutMatrix():
            self._model(*inputs)
        return self._bytes

    def of_largest(self, blocks: Iterable[nn.Module], *inputs: Any) -> int:
        """Bytes kept by the block that keeps the most."""
        before: dict[nn.Module, int] = {}
        most = 0

        def enter(block: nn.Module, *_: Any) -> None:
            before[block] = self._bytes

        def leave(block: nn.Module, *_: Any) -> None:
            nonlocal most
            most = max(most, self._bytes - before[block])

        hooks = [h for b in blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
        self.of(*inputs)
        for hook in hooks:
            hook.remove()
        return most

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # The storage is held too, so that no later one gets its address.
        if storage._cdata not in self._weights and storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            self._bytes += storage.nbytes()
        return tensor


class _AttentionWithoutMatrix(TorchFunctionMode):
    """Attention that keeps no matrix of weights, as on a GPU. On the meta device torch uses one that keeps it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            return _Attention.apply(query, key, value)
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("only what is kept is of interest")


def _checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that diffusers recomputes one at a time: its resnets."""
    return (module for module in model.modules() if hasattr(module, "time_emb_proj") and hasattr(module, "conv1"))


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of this shape without content, for Network's `inputs`."""
    return torch.empty(shape, dtype=dtype, device="meta")
