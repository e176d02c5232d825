"""A CUDA graph's behaviour on a CPU: what was recorded is done again on the same memory, and no Python runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Recording:
    """captured.Recorder for the CPU, of ATen's operators. Tensors from before the recording are addresses: where one
    is given other memory afterwards, the replay does not notice."""

    def __init__(self) -> None:
        self.replays = 0
        self.operators: list[tuple[Any, Any, Any, Any]] = []

    def warm_up(self, function: Callable[[], object]) -> None:
        function()

    def capture(self, function: Callable[[], object]) -> None:
        with _Tape(self.operators):
            function()

    def replay(self) -> None:
        self.replays += 1
        made: dict[int, Tensor] = {}
        with torch.no_grad():
            for operator, args, kwargs, results in self.operators:
                again = _call(operator, *tree_map_only(Tensor, partial(_now, made), (args, kwargs)))
                made |= {id(a): b for a, b in zip(tree_leaves(results), tree_leaves(again), strict=True)}


def _now(made: dict[int, Tensor], tensor: Tensor) -> Tensor:
    return made.get(id(tensor), tensor)


def _call(operator: Any, args: Any, kwargs: Any) -> Any:
    return operator(*args, **kwargs)


class _Tape(TorchDispatchMode):
    def __init__(self, operators: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._operators = operators
        self._made: dict[int, Tensor] = {}
        self._outside: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fixed = tree_map_only(Tensor, self._fixed, (args, kwargs))
        results = func(*args, **kwargs)
        # An operator in place returns its argument, which stays what it is.
        given = {id(leaf): kept for leaf, kept in zip(tree_leaves((args, kwargs)), tree_leaves(fixed), strict=True)}
        kept = tree_map_only(Tensor, lambda t: given.get(id(t), t), results)
        self._made |= {id(t): t for t in tree_leaves(results) if isinstance(t, Tensor) and id(t) not in given}
        self._operators.append((func, *fixed, kept))
        return results

    def _fixed(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._made:
            return tensor
        if id(tensor) not in self._outside:
            self._outside[id(tensor)] = (tensor, tensor.detach())  # the first keeps its id from being used again
        return self._outside[id(tensor)][1]
