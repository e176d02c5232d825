"""Several exponential averages of the weights, updated at once: each weight is read once, in one launch.

    average_i <- lerp(average_i, weight, 1 - decay_i)

The lists may hold any number of tensors of any size: a table on the device holds their addresses, and a table of chunks
says which program computes which piece of which tensor. The formula is that of torch._foreach_lerp_: with s = 1 -
decay, a + s (w - a) if s < 0.5 and else w + (s - 1) (w - a), so that decays of 1 and of 0 give a and w exactly; the
multiplication and the addition are one operation, rounded once.

Dimensions: A averages, T tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segdiff_kernels.checks import check_dtype, check_same_device, check_shape, refuse
from segdiff_kernels.dense import check_can_run

_NAME = "ema_update"
# A program's elements of one tensor: 16 floats a thread.
BLOCK = 4096
# Scalar arguments of the kernel; training keeps two or three.
MAX_AVERAGES = 4


def ema_update_reference(
    averages_AT: Sequence[Sequence[Tensor]], weights_T: Sequence[Tensor], decays_A: Sequence[float]
) -> None:
    """The same in torch, in place: at least one multi-tensor launch for each average, which reads the weights each
    time."""
    for average_T, decay in zip(averages_AT, decays_A, strict=True):
        torch._foreach_lerp_(list(average_T), list(weights_T), 1.0 - decay)


class EmaUpdate:
    """`update(decays)` for these averages of these weights, which are checked once.

    averages_AT[i][j] is average i of weights_T[j]: all float32 on one device, dense, average and weight of one shape
    and strides. Raises ValueError for anything else, and if Triton cannot run.
    """

    def __init__(self, averages_AT: Sequence[Sequence[Tensor]], weights_T: Sequence[Tensor]) -> None:
        _check(averages_AT, weights_T)
        # The tensors themselves, not detached copies: if one gets other memory (`.data = ...`), that is used.
        self._averages = [average for average_T in averages_AT for average in average_T]
        self._weights = list(weights_T)
        self._num_averages = len(averages_AT)

    def __call__(self, decays_A: Sequence[float]) -> None:
        """Update in place; a decay in [0, 1] for each average. Nothing waits for the device after the first call."""
        if len(decays_A) != self._num_averages or not all(0.0 <= decay <= 1.0 for decay in decays_A):
            raise refuse(_NAME, "decays", list(decays_A), f"{self._num_averages} numbers in [0, 1]")
        with torch.no_grad():
            torch.ops.segdiff.ema_update(self._averages, self._weights, [1.0 - decay for decay in decays_A])


def ema_update(averages_AT: Sequence[Sequence[Tensor]], weights_T: Sequence[Tensor], decays_A: Sequence[float]) -> None:
    """EmaUpdate once. For many updates keep the object."""
    EmaUpdate(averages_AT, weights_T)(decays_A)


def chunks(sizes_T: Sequence[int]) -> list[tuple[int, int]]:
    """(tensor, number of the BLOCK in it) for every program; tensors without elements get none."""
    return [(tensor, block) for tensor, size in enumerate(sizes_T) for block in range(-(-size // BLOCK))]


@torch.library.custom_op("segdiff::ema_update", mutates_args={"averages"})
def _ema_update(averages: list[Tensor], weights: list[Tensor], shares: list[float]) -> None:
    """averages: all tensors of the first average, then those of the next. shares: 1 - decay of each."""
    from segdiff_kernels._ema_update_triton import launch

    with torch.cuda.device_of(weights[0]):
        launch(averages, weights, shares)


@_ema_update.register_fake
def _(averages: list[Tensor], weights: list[Tensor], shares: list[float]) -> None:
    return None


def _check(averages_AT: Sequence[Sequence[Tensor]], weights_T: Sequence[Tensor]) -> None:
    if not weights_T:
        raise refuse(_NAME, "weights", "no tensors", "at least one")
    if not 1 <= len(averages_AT) <= MAX_AVERAGES:
        raise refuse(_NAME, "averages", f"{len(averages_AT)} of them", f"1 to {MAX_AVERAGES}")
    for j, weight in enumerate(weights_T):
        check_dtype(_NAME, f"weights[{j}]", weight, (torch.float32,))
        if not _is_dense(weight):
            raise refuse(_NAME, f"weights[{j}]", f"strides {weight.stride()}", "a contiguous or channels-last tensor")
        check_same_device(_NAME, **{"weights[0]": weights_T[0], f"weights[{j}]": weight})
    for i, average_T in enumerate(averages_AT):
        if len(average_T) != len(weights_T):
            raise refuse(
                _NAME, f"averages[{i}]", f"{len(average_T)} tensors", f"{len(weights_T)}, as there are weights"
            )
        for j, (average, weight) in enumerate(zip(average_T, weights_T, strict=True)):
            argument = f"averages[{i}][{j}]"
            check_dtype(_NAME, argument, average, (torch.float32,))
            check_shape(_NAME, argument, average, weight.shape)
            check_same_device(_NAME, **{"weights[0]": weights_T[0], argument: average})
            if average.stride() != weight.stride():
                raise refuse(_NAME, argument, f"strides {average.stride()}", f"{weight.stride()}, as its weight")
    check_can_run(_NAME, weights_T[0].device)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
