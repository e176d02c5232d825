"""What the kernel tests share: where they run, fresh inputs, and how far a result may be from float64."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# On the CPU Triton's interpreter runs the kernels (conftest.py).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative to the largest value of the float64 result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def fresh_generator() -> torch.Generator:
    """Another seed in every run; pytest shows it where a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, on DEVICE; of four dimensions channels-last."""
    x = torch.randn(*shape, generator=generator).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = float(expected.double().abs().max()) or 1.0
    return float((found.double().cpu() - expected.double().cpu()).abs().max()) / scale


def assert_near(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Within TOLERANCE of the dtype of `found`, and no NaN in it."""
    assert not found.isnan().any(), "left unwritten, or NaN"
    error = relative_error(found, expected)
    assert error <= (TOLERANCE[found.dtype] if tolerance is None else tolerance), error
