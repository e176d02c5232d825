"""A function's work on a GPU, recorded once and repeated: a CUDA graph launches thousands of kernels as one.

The repetition runs no Python. It uses the memory of the recording: input tensors stay in place, and new values are
copied into them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Recorder(Protocol):
    """Records a function's work on the device, and repeats it."""

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run the function under the conditions of capture()."""

    def capture(self, function: Callable[[], object]) -> None:
        """Call the function once and record its kernels. They need not be executed yet."""

    def replay(self) -> None:
        """Execute the recording, on the same memory."""


class CudaGraph:
    """torch.cuda.CUDAGraph as a Recorder."""

    def __init__(self, device: torch.device) -> None:
        # Not the default stream, which cannot be recorded. Warm-up and recording share it, because a parameter's
        # gradient is added up on the stream that first used the parameter.
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], object]) -> None:
        """On the recording's stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, function: Callable[[], object]) -> None:
        """Records only this thread: the loader's thread continues its own work."""
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            function()

    def replay(self) -> None:
        """On the current stream."""
        self._graph.replay()


def recorder_for(device: torch.device) -> Recorder | None:
    """The recorder for this device; None if there is none."""
    return CudaGraph(device) if device.type == "cuda" else None
