"""What a step tells: sums that are alike on all ranks, gathered for the log; and whether its update may be made.

Everything stays on the device until it is logged, so that no step waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segdiff_dist.ranks.distributed import sum_over_ranks

# The running mean of the loss: its weight for one step, and how many steps must have gone into it before it counts.
_MEAN_WEIGHT = 0.01
_STEPS_BEFORE_SPIKES_COUNT = 100


class Window:
    """Means over the steps since the last line of the log: of the loss and of whatever else a task tells.

    A step's sums are added up over its micro-batches and over ranks before they join the window's, so the window is the
    same on every rank and may be saved by one and restored on any number.
    """

    def __init__(self, device: torch.device, values: dict[str, list[float]] | None = None) -> None:
        self._device = device
        self._names = tuple(values or ())
        self._sums_N2 = self._tensor(list((values or {}).values()))
        self._step: dict[str, Tensor] = {}
        self._reduced_N2: Tensor | None = None

    def add(self, loss: Tensor, told: dict[str, Tensor]) -> None:
        """One micro-batch: its mean loss, and name -> (sum, count)."""
        one = torch.ones((), dtype=torch.float64, device=self._device)
        values = {"loss": torch.stack((loss.detach().double(), one))} | {k: v.double() for k, v in told.items()}
        self._step = {name: self._step[name] + v if self._step else v for name, v in values.items()}

    def step_loss(self) -> Tensor:
        """The whole step's mean loss, on the device. Call once a step, on every rank, after its last add()."""
        names = tuple(self._step)
        if not self._names:
            self._names, self._sums_N2 = names, self._tensor([[0.0, 0.0]] * len(names))
        assert names == self._names, f"told {names}, earlier {self._names}"
        self._reduced_N2 = sum_over_ranks(torch.stack(list(self._step.values())))
        self._step = {}
        return self._reduced_N2[0, 0] / self._reduced_N2[0, 1]

    def close_step(self, skipped: Tensor) -> None:
        """Let the step join the window, unless its update was not made."""
        assert self._reduced_N2 is not None
        self._sums_N2 += torch.where(skipped > 0, torch.zeros_like(self._reduced_N2), self._reduced_N2)

    def means(self) -> dict[str, float]:
        """name -> mean; the window begins anew. NaN where nothing was counted."""
        found = {name: s / n if n else float("nan") for name, (s, n) in self.values().items()}
        self._sums_N2 = torch.zeros_like(self._sums_N2)
        return found

    def values(self) -> dict[str, list[float]]:
        """name -> [sum, count]: what to save."""
        return dict(zip(self._names, self._sums_N2.tolist(), strict=True))

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)


class Guard:
    """Decides whether a step's update may be made, and counts those that were not."""

    def __init__(self, spike_factor: float, device: torch.device, values: list[float] | None = None) -> None:
        self._spike_factor = spike_factor
        # Running mean of the loss, steps in it, steps skipped in all, in a row up to now, and in a row at most.
        values = list(values or [0.0] * 4)
        values += values[3:] if len(values) == 4 else []  # as checkpoints of before have it
        self._values_5 = torch.tensor(values, dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def veto(self, step_loss: Tensor) -> Tensor:
        """1.0 where the loss is no number or stands out, else 0.0; on the device."""
        self._loss = step_loss
        mean, steps, *_ = self._values_5
        stands_out = (steps >= _STEPS_BEFORE_SPIKES_COUNT) & (step_loss > self._spike_factor * mean)
        if self._spike_factor == 0:
            stands_out = torch.zeros_like(stands_out)
        return (~torch.isfinite(step_loss) | stands_out).float()

    def count(self, skipped: Tensor) -> None:
        """After the step: whether its update was not made (1.0), whoever prevented it."""
        mean, steps, total, in_a_row, longest = self._values_5
        weight = torch.clamp(1.0 / (steps + 1.0), min=_MEAN_WEIGHT)
        one = torch.ones_like(mean)
        made = torch.stack((mean + weight * (self._loss - mean), steps + one, total, torch.zeros_like(mean), longest))
        not_made = torch.stack((mean, steps, total + one, in_a_row + one, torch.maximum(longest, in_a_row + one)))
        self._values_5 = torch.where(skipped > 0, not_made, made)

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
        """The most steps skipped in a row since the run began, also where updates followed; waits for the device."""
        return int(self._values_5[4])

    def values(self) -> list[float]:
        """What to save."""
        return self._values_5.tolist()
