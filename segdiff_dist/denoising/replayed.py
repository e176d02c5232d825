"""`sample.cuda_graph`: the network's forward pass as one CUDA graph for each batch size.

With few images the GPU waits for Python, which launches a thousand kernels a pass. A replay launches them at once. Only
the network is recorded: solvers, guidance and bounds do not change. A recording is used only if it gives the same bits
as eager execution.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data_shards.files import first_line
from data_shards.labels import LabelTable
from segdiff_dist.denoising.cascade import LowerStage, NetSpace
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.ranks.cuda_graph import Recorder, recorder_for

# A kind of batch is recorded when it comes for the third time. Its first two passes compile kernels and choose
# algorithms, and a batch that comes only twice costs no recording.
_EAGER_PASSES = 2
# Each recording has activations of its own. A job has at most four kinds: whole and last batches, with and without
# guidance.
_MOST_RECORDINGS = 4


class Net(Protocol):
    """The interface of a denoiser that a sampler uses."""

    uses_kernels: bool
    space: NetSpace | None
    lower: LowerStage | None
    label_table: LabelTable

    @property
    def lower_net(self) -> Net | None:
        """The net of `lower`."""

    def __call__(
        self, x_t_BCHW: Tensor, timestep_B: Tensor, mask_BHW: Tensor, class_B: Tensor, *more: Tensor | None
    ) -> Tensor:
        """As Denoiser.forward."""


@dataclass(frozen=True)
class _Recording:
    recorder: Recorder
    given: list[Tensor | None]
    made_BCHW: Tensor


class ReplayedNet:
    """Calls a denoiser, by replay where a batch of the same shapes was recorded. No gradients.

    Batches of the same shapes must come one after another, from one thread.
    """

    def __init__(self, model: Denoiser, device: torch.device) -> None:
        self._model, self._device = model, device
        self.uses_kernels, self.space, self.lower = model.uses_kernels, model.space, model.lower
        self.label_table = model.label_table
        self.lower_net = None if model.lower_net is None else ReplayedNet(model.lower_net, device)
        self._passes: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._can_record = recorder_for(device) is not None

    def __call__(
        self, x_t_BCHW: Tensor, timestep_B: Tensor, mask_BHW: Tensor, class_B: Tensor, *more: Tensor | None
    ) -> Tensor:
        """As Denoiser.forward: float32 [B, *shape], which the next call leaves as it is."""
        given = [x_t_BCHW, timestep_B, mask_BHW, class_B, *more]
        kind = tuple(None if x is None else (x.shape, x.dtype) for x in given)
        if kind in self._recordings:
            return self._replay(self._recordings[kind], given)
        self._passes[kind] += 1
        if self._passes[kind] <= _EAGER_PASSES or not self._can_record or len(self._recordings) == _MOST_RECORDINGS:
            made_BCHW: Tensor = self._model(*given)
            return made_BCHW
        return self._record(kind, given)

    def _replay(self, recording: _Recording, given: list[Tensor | None]) -> Tensor:
        for fixed, new in zip(recording.given, given, strict=True):
            if fixed is not None and new is not None:
                fixed.copy_(new, non_blocking=True)
        recording.recorder.replay()
        return recording.made_BCHW.clone()

    def _record(self, kind: tuple[object, ...], given: list[Tensor | None]) -> Tensor:
        """The eager prediction of a batch, whose kind is recorded on the way where that works."""
        recorder = recorder_for(self._device)
        assert recorder is not None
        fixed = [None if x is None else x.clone() for x in given]
        assert given[0] is not None
        made_BCHW = torch.empty_like(given[0])

        def run() -> None:
            made_BCHW.copy_(self._model(*fixed))

        recorder.warm_up(run)
        eager_BCHW = made_BCHW.clone()
        try:
            recorder.capture(run)
            made_BCHW.zero_()
            recording = _Recording(recorder, fixed, made_BCHW)
            replayed_BCHW = self._replay(recording, given)
        except torch.OutOfMemoryError:
            self._give_up("its memory does not fit in addition to that of eager passes")
        except RuntimeError as error:
            self._give_up(f"it cannot be recorded: {first_line(error)}")
        else:
            if torch.equal(eager_BCHW.view(torch.uint8), replayed_BCHW.view(torch.uint8)):
                self._recordings[kind] = recording
            else:
                self._give_up("replayed, a prediction is not the eager one, bit for bit")
        return eager_BCHW

    def _give_up(self, why: str) -> None:
        self._can_record = False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # of what was recorded
        sys.stderr.write(f"sample: no CUDA graph, kernels are launched one by one: {why}\n")
