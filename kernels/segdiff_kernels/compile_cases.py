"""Cases for compiling without a GPU, to check the compiled code: kernel, types, constants.

Each `_<name>_triton.py` lists its cases in `compile_cases()`: the shapes and dtypes of the real UNet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel."""

    name: str
    """The kernel's public name and the case: "group_norm_silu/normalise C=128 bf16"."""
    function: Any
    """The @triton.jit function."""
    signature: dict[str, str]
    """Types of the arguments that are not constants, by name: "*bf16", "*fp32", "*u8", "i32", "fp32"."""
    constants: dict[str, Any]
    """tl.constexpr arguments by name."""
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = field(default=())
    """Pointers and integers that a launch with the real shapes specialises as divisible by 16."""
    streams: bool = True
    """Whether memory is its limit, so that its wide inputs must be read 16 bytes a thread."""
    narrow_loads: int = 0
    """Allowed number of global loads narrower than 16 bytes: for parameters and statistics, not for activations."""
