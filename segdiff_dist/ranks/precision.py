"""`precision: auto`: bf16 on hardware with bf16 arithmetic, fp32 elsewhere.

A CPU without bf16 instructions can also compute in bf16, but about ten times slower than in fp32. For example, a 3x3
convolution of 64 channels at 32x32 takes 132 ms forward and backward in fp32 and 1,638 ms in bf16 on an AMD EPYC with
AVX2 (torch 2.13, one thread).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]
Settled = Literal["bf16", "fp32"]

_CPU_FEATURES = ("amx_bf16", "avx512_bf16")


def settled(precision: Precision, device: torch.device) -> Settled:
    """The precision itself; for `auto`, the fast one of this machine's device."""
    return fast_precision(device) if precision == "auto" else precision


def fast_precision(device: torch.device) -> Settled:
    """bf16 where the device has arithmetic for it: a GPU since Ampere, a CPU with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if cpu_has_bf16() else "fp32"


@cache
def cpu_has_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16 products."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in _CPU_FEATURES)
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(name in flags for name in _CPU_FEATURES)
