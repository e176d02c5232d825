"""Devices on which Triton's kernels can run."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kernels = Literal["auto", "triton", "torch"]


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU: TRITON_INTERPRET=1, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None if they can. On the meta device they give shapes."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with torch on Linux"
    if device.type == "meta" or (device.type == "cpu" and is_interpreted()):
        return None
    if device.type != "cuda":
        return f"Triton's kernels need a GPU, and this is {device.type}"
    import torch  # here, so that `Kernels` can be imported without it

    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than the kernels are made for (sm_80)"
    return None
