"""`train.cuda_graph`: a micro-batch's forward pass, loss and backward pass as one CUDA graph.

A graph launches thousands of kernels at the cost of one. It repeats one recorded execution, on the same memory. So a
batch is copied into fixed tensors, and the results of a micro-batch are added to fixed tensors: gradients
(flat_gradients.py) and sums of metrics (step_log.LogWindow). Noise and noise levels are functions of the batch's
positions, so nothing is drawn. A recording is used only if it gives the same bits as eager execution.

On one rank an update of the weights is a second graph: norm, clipping, AdamW, the working weights, and what is counted
of the step. Its learning rate and the veto are numbers on the device.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_shards.files import first_line
from data_shards.problems import Problem, problem
from data_shards.records import Batch
from segdiff_dist.ranks.cuda_graph import Recorder, recorder_for
from segdiff_dist.ranks.distributed import gather_objects, is_main
from segdiff_dist.training.config import TrainConfig

if TYPE_CHECKING:
    from segdiff_dist.training.engine import Engine
    from segdiff_dist.training.step_log import StepCheck

# Runs before the recording, required by torch.cuda.graph's documentation: they compile kernels and choose algorithms.
_WARM_UP_RUNS = 3


def why_not_captured(config: TrainConfig, device: torch.device) -> str | None:
    """Why these settings do not allow a recording; None if one can be tried."""
    if not config.adds_up_gradients:
        return (
            "DeepSpeed reduces gradients in the middle of the backward pass: it needs zero_stage 0 or 1, offload none"
        )
    if recorder_for(device) is None:
        return f"a CUDA graph needs a GPU, and this is {device.type}"
    return None


def device_problems(config: TrainConfig, section: str, device: torch.device) -> list[Problem]:
    """The problem of cuda_graph `on` if this device cannot record."""
    if config.cuda_graph != "on" or recorder_for(device) is not None:
        return []
    remedy = f"a CUDA graph needs a GPU, and this is {device.type}; give auto or off"
    return [Problem("config", f"{section}.cuda_graph", "on", remedy)]


class MicroStep:
    """`micro_step(batch)` has the effect of `run(batch)`; for batches of the first one's size it replays a recording.

    The only effect of `run` is what it adds to `sums()`: tensors that stay in place after its first call.
    """

    def __init__(
        self, run: Callable[[Batch], None], sums: Callable[[], list[Tensor]], config: TrainConfig, device: torch.device
    ) -> None:
        self._run, self._sums, self._config, self._device = run, sums, config, device
        self._recorder: Recorder | None = None
        self._fixed: Batch | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether batches are replayed."""
        return self._recorder is not None

    def __call__(self, batch: Batch) -> None:
        """Forward pass, loss and backward pass of one micro-batch."""
        if self._recorder is None or self._fixed is None or not _are_alike(self._fixed, batch):
            self._run(batch)
            return
        for fixed, new in zip(_tensors(self._fixed), _tensors(batch), strict=True):
            fixed.copy_(new, non_blocking=True)
        self._recorder.replay()

    def prepare(self, batches: Iterator[Batch], name: str) -> Iterator[Batch]:
        """Record with the first batch, if that is wanted and possible; returns the same batches.

        Call it on every rank, while `sums()` are zero. `name`: of the training, for messages. Raises InputProblems if
        cuda_graph is `on` and some rank cannot record.
        """
        config, device = self._config, self._device
        why = None if config.cuda_graph == "off" else why_not_captured(config, device)
        if why is None and config.cuda_graph != "off":
            first = next(batches)
            batches = itertools.chain((first,), batches)
            # All ranks or none, so that none is faster than the others, and the message holds for the whole run.
            why = next((reason for reason in gather_objects(self._record(first)) if reason is not None), None)
        if why is not None:
            self._recorder = self._fixed = None
            if device.type == "cuda":
                torch.cuda.empty_cache()  # of the recorded micro-batch
            if config.cuda_graph == "on":
                raise problem("config", "train.cuda_graph", "on", f"{why}; give auto or off")
            if is_main() and device.type != "cpu":
                sys.stderr.write(f"{name}: no CUDA graph, kernels are launched one by one: {why}\n")
        elif self._fixed is not None and is_main():
            images = len(self._fixed.position_B)
            sys.stderr.write(f"{name}: a micro-batch of {images} images is one CUDA graph, with eager's bits\n")
        return batches

    def _record(self, batch: Batch) -> str | None:
        """Record, and compare with eager. Returns why the recording cannot be used."""
        recorder = recorder_for(self._device)
        assert recorder is not None
        self._recorder, self._fixed = recorder, _copy_of(batch)
        run = partial(self._run, self._fixed)
        for _ in range(_WARM_UP_RUNS - 1):
            recorder.warm_up(run)
        eager = self._sums_of(partial(recorder.warm_up, run))
        try:
            recorder.capture(run)
            replayed = self._sums_of(recorder.replay)
        except torch.OutOfMemoryError:
            return "its memory does not fit in addition to that of eager steps"
        except RuntimeError as error:
            return f"it cannot be recorded: {first_line(error)}"
        finally:
            torch._foreach_zero_(self._sums())
        if all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(eager, replayed, strict=True)):
            return None
        return "replayed, loss or gradients are not those of an eager step, bit for bit"

    def _sums_of(self, work: Callable[[], None]) -> list[Tensor]:
        """The sums that the work adds, from zero."""
        torch._foreach_zero_(self._sums())
        work()
        return [total.clone() for total in self._sums()]


class UpdateStep:
    """`replay()` has the effect of `run`, an update of the weights, if it is recorded.

    `run` changes only the tensors of `state()`, in place. They exist after the first update, so that one is eager. The
    second is made eagerly, undone, recorded, replayed and compared.
    """

    def __init__(self, run: Callable[[], object], state: Callable[[], list[Tensor]], recorder: Recorder | None) -> None:
        """`recorder`: None if updates are not to be recorded."""
        self._run, self._state, self._recorder = run, state, recorder
        self._updates = 0

    def replay(self) -> bool:
        """Make an update; False if the caller must make it."""
        if self._recorder is None:
            return False
        self._updates += 1
        if self._updates == 2:
            return self._record(self._recorder)
        if self._updates > 2:
            self._recorder.replay()
        return self._updates > 2

    def _record(self, recorder: Recorder) -> bool:
        """Make this update, and record it. False if it was not made."""
        state = self._state()
        try:
            before, eager = ([tensor.clone() for tensor in state] for _ in range(2))
        except torch.OutOfMemoryError:
            self._stay_eager("no memory for a second copy of the optimiser's state, to compare them")
            return False
        recorder.warm_up(self._run)
        torch._foreach_copy_(eager, state)
        torch._foreach_copy_(state, before)
        try:
            recorder.capture(self._run)
            torch._foreach_copy_(state, before)
            recorder.replay()
            why = None if all(map(_have_same_bits, state, eager)) else "replayed, it is not the eager one, bit for bit"
        except RuntimeError as error:
            why = f"it cannot be recorded: {first_line(error)}"
        if why is not None:
            torch._foreach_copy_(state, eager)
            self._stay_eager(why)
        return True

    def _stay_eager(self, why: str) -> None:
        self._recorder = None
        sys.stderr.write(f"updates of the weights are launched one by one, without a CUDA graph: {why}\n")


def recorded_updates(engine: Engine, check: StepCheck, micro_step: MicroStep) -> UpdateStep:
    """The updates of engine.step(check): recorded if micro-batches are, and if the engine's can be."""
    recorder = recorder_for(engine.device) if micro_step.is_recorded and engine.can_record_updates else None
    if recorder is not None:
        engine.read_lr_from_device()

    def state() -> list[Tensor]:
        return [*engine.update_state(), *check.totals]

    return UpdateStep(partial(engine.step, check), state, recorder)


def _have_same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in vars(batch).values() if value is not None]


def _copy_of(batch: Batch) -> Batch:
    copies = {name: None if value is None else value.clone() for name, value in vars(batch).items()}
    return Batch(**copies)  # type: ignore[arg-type]


def _are_alike(one: Batch, other: Batch) -> bool:
    """Whether shapes and dtypes are the same."""
    pairs = itertools.zip_longest(_tensors(one), _tensors(other))
    return all(a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
