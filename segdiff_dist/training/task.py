"""The interface between the training loop and a network's training task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from data_shards.records import Batch


class Task(Protocol):
    """A network, its loss, the validation of its weights, and their export."""

    name: str
    model: nn.Module
    passes: int
    """Images that the model computes in `loss`, for each of a batch."""
    score: str | None
    """The metric of `validate` by which the best weights are chosen: the highest value is best, and only the best are
    exported. A new best is saved at once, so that the exported weights are those that were validated. None: no metric
    chooses, and the newest weights are exported."""

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a micro-batch, and further metrics to log.

        `forward` is the model as the engine runs it. A metric is float [2]: a sum over the micro-batch, and the number
        of its terms. Every call gives the same names.
        """

    def validate(self, forward: Callable[..., Any], images_seen: int) -> dict[str, float]:
        """Metrics of the averaged weights; `forward` runs them without gradients.

        The loop calls it on every rank. Every rank calls `forward` equally often, and returns the same numbers.
        """

    def export(self, average: str, weights: dict[str, Tensor]) -> None:
        """Write weights where later stages read them. Keys are those of the model's state_dict.

        Rank 0 calls it, from a thread, while the training goes on.
        """
