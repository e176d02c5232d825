"""Compiles the kernels that a function would launch, before it launches them, many at a time.

The function runs on the meta device, where it costs nothing. There this package's operators run their launching code,
and Triton compiles each kernel instead of launching it. The compiled kernels go into Triton's cache on disk, where
every process of the machine finds them. No GPU is needed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

# Device number of the stand-in for a GPU, so that Triton keeps its kernels apart from those of real devices.
_NO_DEVICE = -1

Compile = Callable[[], Any]


def compile_ahead(work: Callable[[], object], arch: int, num_workers: int) -> int:
    """Compile, for sm_`arch`, the kernels that `work` launches on the meta device; returns their number.

    It forks: call it in a separate process that has used no GPU. Raises the compiler's errors.
    """
    _planned[:] = planned_kernels(work, arch)
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(_compile, range(len(_planned))))
    return len(_planned)


def planned_kernels(work: Callable[[], object], arch: int) -> list[Compile]:
    """Functions that compile each kernel that `work` launches on the meta device, once. Afterwards the process cannot
    launch kernels."""
    from triton.runtime._async_compile import active_mode

    plan = _Plan()
    _stand_in(arch)
    active_mode.set(plan)
    with _Launching():
        work()
    return list(plan.kernels.values())


_planned: list[Compile] = []


def _compile(index: int) -> None:
    _planned[index]()


class _Plan:
    """Replaces triton.AsyncCompileMode: collects the kernels to be compiled."""

    def __init__(self) -> None:
        self.kernels: dict[str, Compile] = {}

    def submit(self, key: str, compile_kernel: Compile, _: Callable[[Any], None]) -> None:
        self.kernels.setdefault(key, compile_kernel)


class _Launching(TorchDispatchMode):
    """A context in which operators of this package launch their kernels on the meta device, instead of giving only
    shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        definition = OPDEFS.get(func._schema.name) if func.namespace == "segdiff" else None
        return (func if definition is None else definition._init_fn)(*args, **(kwargs or {}))


def _stand_in(arch: int) -> None:
    """From now on Triton uses a stand-in for its GPU, and a launch only compiles."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: kernel.warmup(*args, grid=grid, **kwargs)
    driver.set_active(_StandIn(GPUTarget("cuda", arch, 32)))


class _StandIn:
    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return _NO_DEVICE

    def get_current_stream(self, _: int) -> int:
        return 0
