"""The memory traffic of a step on a GPU, counted without one: bytes, launches and activations kept.

`Counter` sees every operator of forward and backward pass. Convolutions and matrix products are counted apart, since
nothing here changes them; what PyTorch's CUDA path does beside a convolution (the bias, its gradient, copies from one
layout to the other) is not. Every operator reads its inputs and writes its outputs once, unless they are in a cache or
a rule below differs. Sources: ATen of PyTorch 2.11 to 2.13, files named at each rule.

Dimensions: N images, C channels, H rows, W columns, O output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segdiff_kernels.partials import num_slices
from segdiff_kernels.tiles import one_pass_channels

# Convolutions and matrix products, attention among them: bytes apart, launches with all others.
PRODUCTS = "convolutions, products, attention"


@dataclass
class Tally:
    """Bytes read and written, and kernels launched."""

    bytes: int = 0
    launches: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.bytes + other.bytes, self.launches + other.launches)

    def __sub__(self, other: Tally) -> Tally:
        return Tally(self.bytes - other.bytes, self.launches - other.launches)


@dataclass
class Budget:
    """What a step cost, by kind of work."""

    kinds: dict[str, Tally] = field(default_factory=dict)
    saved_bytes: int = 0
    """Activations that the forward pass keeps for the backward pass, each storage once, parameters left out."""

    def add(self, kind: str, tally: Tally) -> None:
        self.kinds[kind] = self.kinds.get(kind, Tally()) + tally

    @property
    def bytes(self) -> int:
        """Outside convolutions and matrix products."""
        return sum(tally.bytes for kind, tally in self.kinds.items() if kind != PRODUCTS)

    @property
    def launches(self) -> int:
        """Launches of everything, convolutions and matrix products too."""
        return sum(tally.launches for tally in self.kinds.values())

    def __sub__(self, other: Budget) -> Budget:
        kinds = {k: self.kinds.get(k, Tally()) - other.kinds.get(k, Tally()) for k in self.kinds | other.kinds}
        return Budget(kinds, self.saved_bytes - other.saved_bytes)


def count(
    step: Callable[[], Tensor], model: nn.Module, backward: Callable[[Tensor], object] = torch.Tensor.backward
) -> Budget:
    """The budget of `step`, which computes a loss on the meta device, and of `backward` of that loss."""
    counter, saved = Counter(), {}
    kept_out = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def save(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in kept_out:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with counter, _FusedAttention():
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = step()
        counter.budget.saved_bytes = sum(saved.values())
        backward(loss)
    model.zero_grad(set_to_none=True)
    return counter.budget


def per_image(budget_of: Callable[[int], Budget]) -> tuple[Budget, Budget]:
    """The cost of an image, and the further cost of a step, from batches of two and three: with one image alone PyTorch
    cannot tell some layouts apart.

    A launch is of the step, whatever the batch; all are record with the image.
    """
    two, three = budget_of(2), budget_of(3)
    image = three - two
    step = two - image - image
    for kind, tally in step.kinds.items():
        image.kinds[kind].launches, tally.launches = two.kinds[kind].launches, 0
    return image, step


class Counter(TorchDispatchMode):
    """Adds up every operator that is called; `budget` is the sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func._schema.name in _FREE:
            return result
        name = func._schema.name
        if name in _CONVOLUTIONS:
            return _CONVOLUTIONS[name](self.budget, args, result)
        if name.startswith("segdiff::") and name not in _RULES:
            raise KeyError(f"{name}: say in _RULES what it launches and how often it reads what")
        kind, rule = _RULES.get(name, (_KINDS.get(name, "other"), _once))
        self.budget.add(kind, rule((*args, *kwargs.values()), result))
        return result


class _FusedAttention(TorchFunctionMode):
    """Attention as one operator, as on a GPU; on the meta device PyTorch takes it apart into products and a softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            scale = kwargs.get("scale")
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], 0.0, False, scale=scale)[0]
        return func(*args, **kwargs)


# Neither views by their schema nor kernels.
_FREE = {f"aten::{name}" for name in ("detach", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided")}
_FREE |= {"aten::new_empty", "aten::new_empty_strided"}

_KINDS = {
    "aten::silu": "SiLU",
    "aten::silu_backward": "SiLU",
    "aten::add": "additions",
    "aten::add_": "additions",
    "aten::sum": "sums",
    "aten::div": "divisions",
    "aten::stack": "concatenations",
    "aten::clone": "copies to another layout",
    "aten::_to_copy": "changes of dtype",
    "aten::upsample_nearest2d": "upsampling",
    "aten::upsample_nearest2d_backward": "upsampling",
    "aten::mse_loss": "loss",
    "aten::mse_loss_backward": "loss",
}

# The tally of an operator's arguments and result.
Rule = Callable[[Sequence[Any], Any], Tally]


def touched(*tensors: Any) -> int:
    """Bytes of the elements that are in memory: a dimension that is only expanded counts once. None counts nothing."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            num = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                num *= size if stride else min(size, 1)
            total += num * tensor.element_size()
    return total


def _launching(num: int) -> Rule:
    """So many kernels that together read every input once and write every output once."""
    return lambda args, result: Tally(touched(*tree_leaves(args), *tree_leaves(result)), num)


_once = _launching(1)


def _copy(args: Sequence[Any], result: Any) -> Tally:
    """What is copied to is written alone."""
    return Tally(touched(args[1], result), 1)


def _cat(args: Sequence[Any], result: Any) -> Tally:
    """Up to 64 tensors of any layout a launch, of contiguous ones 128: aten/src/ATen/native/cuda/Shape.cu,
    cat_out_cuda."""
    at_once = 128 if all(tensor.is_contiguous() for tensor in args[0]) else 64
    return Tally(touched(*args[0], result), -(-len(args[0]) // at_once))


def _foreach_add(args: Sequence[Any], result: Any) -> Tally:
    """Lists of tensors, added in place: aten/src/ATen/native/cuda/MultiTensorApply.cuh, multi_tensor_apply.
    One launch for each tensor if the strides of some pair differ (ForeachUtils.h)."""
    sums, added = args[:2]
    bytes_ = 3 * touched(*sums)
    if any(_strides(one) != _strides(other) for one, other in zip(sums, added, strict=True)):
        return Tally(bytes_, len(sums))
    launches = tensors = blocks = 0
    for tensor in sums:
        tensors += 1
        left = -(-tensor.numel() // 65_536)
        while blocks + left >= 320:
            left, blocks, launches = left - (320 - blocks), 0, launches + 1
            tensors = int(left > 0)
        blocks += left
        if tensors == 64:
            launches, tensors, blocks = launches + 1, 0, 0
    return Tally(bytes_, launches + (blocks > 0))


def _strides(tensor: Tensor) -> list[int]:
    """Of the dimensions that have any."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _group_norm(args: Sequence[Any], result: Any) -> Tally:
    """Moments read x; the affine map is joined with them in a small kernel; x is read again and y written.
    aten/src/ATen/native/cuda/group_norm_kernel.cu, GroupNormKernelImplInternal. It knows rows only, so PyTorch copies
    a channels-last x before (aten::clone)."""
    return Tally(touched(args[0], *args, *result), 3)


def _group_norm_backward(args: Sequence[Any], result: Any) -> Tally:
    """Sums over dy and x; three small kernels; dy and x are read again and dx written. The same file,
    GroupNormBackwardKernelImplInternal."""
    return Tally(touched(*args[:2], *args, *result), 5)


def _slices(x_NCHW: Tensor) -> int:
    """Bytes of two float32 for each slice of pixels and channel: partial statistics, or the backward pass' sums."""
    num, channels, height, width = x_NCHW.shape
    return 8 * num * num_slices(height * width) * channels


def _norm(
    xs: Sequence[Tensor], partials: Sequence[Tensor | None], others: Sequence[Any], norm: Sequence[Any], result: Any
) -> Tally:
    """_norm_triton.py: moments of each tensor that comes without partials (read, partials written), a merge that reads
    partials and writes statistics, and the pass that reads x and statistics and writes y. In one launch
    (_norm_forward_one_pass_triton.py) x comes from the L2 cache the second time; with partials it is read once."""
    without = [x for x, given in zip(xs, partials, strict=True) if given is None]
    y_NCHW, statistics_N4C, *_ = result
    num_groups, *_ = norm
    at_once = len(without) == len(xs) and _is_one_pass(xs, num_groups)
    moments = sum((0 if at_once else touched(x)) + _slices(x) for x in without)
    merged = sum(map(_slices, xs)) + touched(statistics_N4C)
    bytes_ = moments + merged + touched(*xs, *others, statistics_N4C, y_NCHW)
    if at_once:
        return Tally(bytes_, 1)
    return Tally(bytes_, len(without) + (1 if _is_one_pass(xs, num_groups, reads_twice=False) else 2))


def _is_one_pass(xs: Sequence[Tensor], num_groups: int, *, reads_twice: bool = True) -> bool:
    channels, pixels = [x.shape[1] for x in xs], xs[0].shape[2] * xs[0].shape[3]
    shape = (pixels, channels[0], sum(channels[1:]), num_groups, xs[0].element_size())
    return one_pass_channels(*shape, reads_twice=reads_twice) > 0


def _norm_backward(xs: Sequence[Tensor], dy_NCHW: Tensor, others: Sequence[Any], result: Any) -> Tally:
    """_norm_backward_triton.py: sums read x and dy and are written by slice, merged, and x, dy and what is added to dx
    are read for dx. In one pass (_norm_one_pass_triton.py) x and dy come from the L2 cache the second time."""
    *_, num_groups, _ = others
    at_once = _is_one_pass(xs, num_groups)
    reads = 1 if at_once else 2
    bytes_ = reads * touched(*xs, dy_NCHW) + 2 * sum(map(_slices, xs)) + touched(*others, *result)
    return Tally(bytes_, 1 if at_once else 3)


def _group_norm_silu(args: Sequence[Any], result: Any) -> Tally:
    x_NCHW, weight_C, bias_C, shift_NC, partials_NS2C, _, *norm = args
    return _norm([x_NCHW], [partials_NS2C], (weight_C, bias_C, shift_NC), norm, result)


def _group_norm_silu_backward(args: Sequence[Any], result: Any) -> Tally:
    dy_NCHW, residual_NCHW, more_NCHW, x_NCHW, *others = args
    return _norm_backward([x_NCHW], dy_NCHW, (residual_NCHW, more_NCHW, *others), result)


def _skip_group_norm_silu(args: Sequence[Any], result: Any) -> Tally:
    x_NCHW, skip_NCHW, *affine = args[:6]
    return _norm([x_NCHW, skip_NCHW], args[6:8], affine, args[9:], result)


def _skip_group_norm_silu_backward(args: Sequence[Any], result: Any) -> Tally:
    dy_NCHW, residual_NCHW, skip_residual_NCHW, x_NCHW, skip_NCHW, *others = args
    return _norm_backward([x_NCHW, skip_NCHW], dy_NCHW, (residual_NCHW, skip_residual_NCHW, *others), result)


_RULES: dict[str, tuple[str, Rule]] = {
    "aten::cat": ("concatenations", _cat),
    "aten::copy_": ("copies to another layout", _copy),
    "aten::_foreach_add_": ("sums of gradients", _foreach_add),
    "aten::native_group_norm": ("GroupNorm", _group_norm),
    "aten::native_group_norm_backward": ("GroupNorm", _group_norm_backward),
    "aten::mm": (PRODUCTS, _once),
    "aten::addmm": (PRODUCTS, _once),
    "aten::addmm_": (PRODUCTS, _once),
    "aten::bmm": (PRODUCTS, _once),
    "aten::_scaled_dot_product_flash_attention": (PRODUCTS, _once),
    # dO * O, then dq, dk, dv, then dq to its dtype: flash_api.cpp, mha_bwd.
    "aten::_scaled_dot_product_flash_attention_backward": (PRODUCTS, _launching(3)),
    # Differences, then their mean: aten/src/ATen/native/Loss.cpp, mse_loss_out.
    "aten::mse_loss": ("loss", _launching(2)),
    # Zeros, then a sum by row: aten/src/ATen/native/cuda/Embedding.cu, up to 3072 indices.
    "aten::embedding_dense_backward": ("other", _launching(2)),
    "segdiff::group_norm_silu": ("GroupNorm", _group_norm_silu),
    "segdiff::group_norm_silu_backward": ("GroupNorm", _group_norm_silu_backward),
    "segdiff::skip_group_norm_silu": ("GroupNorm", _skip_group_norm_silu),
    "segdiff::skip_group_norm_silu_backward": ("GroupNorm", _skip_group_norm_silu_backward),
    "segdiff::residual_add": ("additions", _once),
    # The gradient of its bias: sums of chunks, then of those (where a batch is small, one launch does both).
    "segdiff::residual_add_backward": ("bias of convolutions", _launching(2)),
    # The weights as a table (two), then the convolution. A table of ids, the products, their sum, its layout.
    "segdiff::label_conv_in": (PRODUCTS, _launching(3)),
    "segdiff::label_conv_in_weight_gradient": (PRODUCTS, _launching(10)),
    # Errors of slices and differences, then their mean; and the differences times the incoming gradient.
    "segdiff::weighted_mse": ("loss", _launching(2)),
    "segdiff::weighted_mse_backward": ("loss", _once),
}


def _is_channels_last(tensor_NCHW: Tensor) -> bool:
    """As ATen's suggest_memory_format decides: by strides, so that a 1x1 kernel's tell too."""
    return torch._prims_common.suggest_memory_format(tensor_NCHW) == torch.channels_last


def _relayout(budget: Budget, is_wanted: bool, *tensors: Tensor) -> None:
    """Copies that cuDNN's wrapper makes of tensors in the other layout (cudnn/ConvShared.cpp)."""
    for tensor in tensors:
        if is_wanted and not tensor.is_contiguous(memory_format=torch.channels_last):
            budget.add("copies to another layout", Tally(2 * touched(tensor), 1))


def _convolution(budget: Budget, args: Sequence[Any], result: Tensor) -> Tensor:
    """x, weight, bias. The output follows x or the weight, whichever is channels-last (ConvUtils.h,
    cudnn_conv_suggest_memory_format); the bias is added in place afterwards (Convolution.cpp, _convolution)."""
    x_NCHW, weight_OCHW, bias_O = args[:3]
    is_last = _is_channels_last(x_NCHW) or _is_channels_last(weight_OCHW)
    _relayout(budget, is_last, x_NCHW, weight_OCHW)
    budget.add(PRODUCTS, Tally(touched(x_NCHW, weight_OCHW, result), 1))
    if bias_O is not None:
        budget.add("bias of convolutions", Tally(2 * touched(result) + touched(bias_O), 1))
    return _laid_out(result, is_last)


def _convolution_backward(budget: Budget, args: Sequence[Any], result: Any) -> Any:
    """dy, x, weight: dx, dweight and dbias, which is a sum over dy (Convolution.cpp, convolution_backward)."""
    dy_NOHW, x_NCHW, weight_OCHW = args[:3]
    needs_dx, needs_dweight, needs_dbias = args[-1]
    is_last = _is_channels_last(x_NCHW) or _is_channels_last(weight_OCHW)
    _relayout(budget, is_last, dy_NOHW)
    if needs_dweight:
        _relayout(budget, is_last, x_NCHW)
        budget.add(PRODUCTS, Tally(touched(dy_NOHW, x_NCHW, weight_OCHW), 1))
    if needs_dx:
        _relayout(budget, is_last, weight_OCHW)
        budget.add(PRODUCTS, Tally(touched(dy_NOHW, x_NCHW, weight_OCHW), 1))
    if needs_dbias:
        budget.add("bias of convolutions", Tally(touched(dy_NOHW, result[2]), 1))
    dx_NCHW, dweight_OCHW, dbias_O = result
    return _laid_out(dx_NCHW, is_last), _laid_out(dweight_OCHW, is_last), dbias_O


def _laid_out(tensor: Tensor | None, is_last: bool) -> Tensor | None:
    """The meta device leaves convolutions' outputs in rows; a GPU does not."""
    if tensor is None:
        return None
    return tensor.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


_CONVOLUTIONS: dict[str, Callable[[Budget, Sequence[Any], Any], Any]] = {
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
