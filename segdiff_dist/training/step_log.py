"""Metrics of the steps, the decision whether a step's update may be made, and the log of both.

Values stay on the device until they are logged, so that no step waits for the host.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_shards.files import write_atomic
from segdiff_dist.ranks.distributed import is_main, sum_over_ranks

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker

# The running mean of the loss: the weight of one step, and the number of steps before the mean is used.
_MEAN_WEIGHT = 0.01
_STEPS_BEFORE_SPIKES_COUNT = 100


def is_not_finite(values: Tensor) -> Tensor:
    """Where a value is NaN or infinite. torch.isfinite launches twice as many kernels."""
    return (values - values) != 0


class LogWindow:
    """Means of the loss and of the task's other metrics over the steps since the last line of the log.

    A step's sums are added up over its micro-batches and over ranks before they join the window's. So it is the same on
    every rank: one rank saves it, and any number of ranks restores it.
    """

    def __init__(self, device: torch.device, values: dict[str, list[float]] | None = None) -> None:
        self._device = device
        self._names = tuple(values or ())
        self._sums_N2 = self._tensor(list((values or {}).values()))
        self._one = torch.ones((), dtype=torch.float64, device=device)
        self._zero = torch.zeros_like(self._one)
        self._step_N2: Tensor | None = None
        self._reduced_N2: Tensor | None = None

    @property
    def step_sums(self) -> Tensor:
        """The sums of a step, to which add() adds in place. They exist after the first add()."""
        assert self._step_N2 is not None
        return self._step_N2

    def add(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """One micro-batch: its mean loss, and name -> (sum, count)."""
        names = ("loss", *metrics)
        if not self._names:
            self._names, self._sums_N2 = names, self._tensor([[0.0, 0.0]] * len(names))
        assert names == self._names, f"metrics {names}, earlier {self._names}"
        if self._step_N2 is None:
            self._step_N2 = torch.zeros_like(self._sums_N2)
        self._step_N2 += torch.stack([torch.stack((loss.detach().double(), self._one)), *metrics.values()])

    def step_loss(self) -> Tensor:
        """The whole step's mean loss, on the device. Call once a step, on every rank, after its last add()."""
        self._reduced_N2 = sum_over_ranks(self.step_sums.clone())
        self.step_sums.zero_()
        return self._reduced_N2[0, 0] / self._reduced_N2[0, 1]

    def close_step(self, skipped: Tensor) -> None:
        """Let the step join the window, unless its update was not made."""
        assert self._reduced_N2 is not None
        self._sums_N2 += torch.where(skipped > 0, self._zero, self._reduced_N2)

    @property
    def totals(self) -> list[Tensor]:
        """The tensors that an update changes in place."""
        return [self.step_sums, self._sums_N2]

    def means(self) -> dict[str, float]:
        """name -> mean, NaN if nothing was counted. The window starts again."""
        means = {name: s / n if n else float("nan") for name, (s, n) in self.values().items()}
        self._sums_N2.zero_()
        return means

    def values(self) -> dict[str, list[float]]:
        """name -> [sum, count]: what to save."""
        return dict(zip(self._names, self._sums_N2.tolist(), strict=True))

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)


class UpdateGuard:
    """Decides whether a step's update may be made, and counts those that were not."""

    def __init__(self, spike_factor: float, device: torch.device, values: list[float] | None = None) -> None:
        self._spike_factor = spike_factor
        # Running mean of the loss, steps in it, steps skipped in all, in a row up to now, and in a row at most.
        values = list(values or [0.0] * 4)
        values += values[3:] if len(values) == 4 else []  # as checkpoints of before have it
        self._values_5 = torch.tensor(values, dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._zero, self._one = torch.zeros_like(self._loss), torch.ones_like(self._loss)

    def veto(self, step_loss: Tensor) -> Tensor:
        """1.0 if the loss is not finite or far above the mean, else 0.0; on the device."""
        self._loss = step_loss
        mean, steps, *_ = self._values_5
        stands_out = (steps >= _STEPS_BEFORE_SPIKES_COUNT) & (step_loss > self._spike_factor * mean)
        if self._spike_factor == 0:
            stands_out = torch.zeros_like(stands_out)
        return (is_not_finite(step_loss) | stands_out).float()

    def count(self, skipped: Tensor) -> None:
        """Call after the step, with 1.0 if its update was not made for any reason."""
        mean, steps, total, in_a_row, longest = self._values_5
        one_more, in_a_row = steps + self._one, in_a_row + self._one
        weight = torch.clamp(one_more.reciprocal(), min=_MEAN_WEIGHT)
        made = torch.stack((mean + weight * (self._loss - mean), one_more, total, self._zero, longest))
        not_made = torch.stack((mean, steps, total + self._one, in_a_row, torch.maximum(longest, in_a_row)))
        torch.where(skipped > 0, not_made, made, out=self._values_5)

    @property
    def totals(self) -> list[Tensor]:
        """The tensor that an update changes in place."""
        return [self._values_5]

    @property
    def num_skipped(self) -> int:
        """Steps skipped since the run began; waits for the device."""
        return int(self._values_5[2])

    @property
    def num_in_a_row(self) -> int:
        """Steps skipped since the last update; waits for the device."""
        return int(self._values_5[3])

    @property
    def longest_in_a_row(self) -> int:
        """The most steps skipped in a row since the run began, also if updates followed; waits for the device."""
        return int(self._values_5[4])

    def is_sound(self, max_skipped_steps: int) -> bool:
        """Whether the weights are from outside a streak of skipped steps. Weights from within may be its cause.

        A streak of `max_skipped_steps`, which stops the run, counts even if updates followed."""
        return self.num_in_a_row == 0 and self.longest_in_a_row < max_skipped_steps

    def values(self) -> list[float]:
        """What to save."""
        return self._values_5.tolist()


@dataclass(frozen=True)
class StepCheck:
    """The loss of a step: whether the update may be made, and what is counted once it was made or not."""

    window: LogWindow
    guard: UpdateGuard

    def veto(self) -> Tensor:
        """1.0 if the update must not be made, else 0.0; on the device. Call once a step."""
        return self.guard.veto(self.window.step_loss())

    def close(self, skipped: Tensor) -> None:
        """Call after the update, with 1.0 if it was not made for any reason."""
        self.window.close_step(skipped)
        self.guard.count(skipped)

    @property
    def totals(self) -> list[Tensor]:
        """The tensors that an update changes in place."""
        return [*self.window.totals, *self.guard.totals]


class RunLog:
    """Metrics of a run, by images seen, in log.jsonl and in the tracker. Only rank 0 writes."""

    def __init__(self, file: Path, tracker: Tracker, prefix: str, images_seen: int) -> None:
        """The log continues after `images_seen`. Names in the tracker begin with `prefix` and a slash."""
        self._file, self._tracker, self._prefix = file, tracker, prefix
        if is_main():
            _cut_log(file, images_seen)

    def write(self, images_seen: int, row: Mapping[str, float]) -> None:
        """Write a line of the file, with null for NaN and infinity, and the tracker's metrics."""
        if not is_main():
            return
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN
        with self._file.open("a") as file:
            file.write(json.dumps({"images_seen": images_seen, **finite}) + "\n")
        self.track(images_seen, row)

    def track(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Write only the tracker's metrics."""
        named = {f"{self._prefix}/{name}": value for name, value in metrics.items()}
        self._tracker.log_metrics(named, images_seen)


def _cut_log(path: Path, images_seen: int) -> None:
    """Remove lines that a killed run wrote after its last checkpoint, or wrote only partly: they are written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in complete if json.loads(line)["images_seen"] <= images_seen]
        write_atomic(path, "".join(kept))
