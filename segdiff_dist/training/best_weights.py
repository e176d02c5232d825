"""The choice of the weights that a run exports: validation during the training, and its recorded results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from segdiff_dist.training.checkpoint import read_state

if TYPE_CHECKING:
    from segdiff_dist.training.checkpoint_writer import CheckpointWriter
    from segdiff_dist.training.config import TrainConfig
    from segdiff_dist.training.engine import Engine
    from segdiff_dist.training.step_log import RunLog
    from segdiff_dist.training.task import Task


@dataclass
class RunState:
    """The progress of a run, in addition to the engine's state. state.json of a checkpoint has these fields."""

    images_seen: int = 0
    best_score: float | None = None
    best_images_seen: int | None = None
    """The checkpoint whose weights are exported: the one with the best score, or without a score the newest."""
    validated_images_seen: int | None = None
    """The last count whose weights were validated."""


class BestWeights:
    """Validates the first average of the weights and keeps in `state` which checkpoint is the best.

    Make it, and call it, on every rank.
    """

    def __init__(self, task: Task, engine: Engine, config: TrainConfig, state: RunState, log: RunLog) -> None:
        self._task, self._engine, self._config, self._state, self._log = task, engine, config, state, log
        self._previous = state.best_score, state.best_images_seen

    def is_due(self) -> bool:
        """Whether the weights of this moment are to be validated."""
        every = self._config.validate_every_images or self._config.checkpoint_every_images
        images_seen = self._state.images_seen
        is_done = images_seen >= self._config.num_images
        return is_done or crosses(images_seen - self._config.global_batch_size, images_seen, every)

    def validate(self) -> bool:
        """Validate the weights of this moment and log the metrics; returns whether their score is the best so far."""
        state, name = self._state, self._task.score
        with self._engine.using_average(self._config.averages[0]):
            metrics = self._task.validate(self._engine, state.images_seen)
        state.validated_images_seen = state.images_seen
        is_best = False
        if name is not None:
            score, best = metrics[name], state.best_score
            self._previous = best, state.best_images_seen
            if best is None or math.isnan(best) or score > best:
                is_best, best, state.best_images_seen = True, score, state.images_seen
            state.best_score = best
            metrics = {**metrics, f"best_{name}": best}
        self._log.track(state.images_seen, metrics)
        return is_best

    def resume_pending(self, writer: CheckpointWriter, resumed_from: Path | None) -> None:
        """Complete the checkpoint that the run resumes from, if a stop or a kill prevented its export or a due
        validation. So a stop does not change which weights are best."""
        state = self._state
        if resumed_from is None:
            return
        is_best = self.is_due() and state.validated_images_seen != state.images_seen and self.validate()
        writer.resume_pending(resumed_from, {**read_state(resumed_from), **vars(state)} if is_best else None)

    def discard_unsaved_best(self, lost: int) -> None:
        """Return to the previous best weights if checkpoint `lost`, which held the best, could not be written."""
        if self._task.score is not None and lost == self._state.best_images_seen:
            self._state.best_score, self._state.best_images_seen = self._previous

    def choose_newest(self) -> None:
        """Without a score, mark the present weights for export."""
        if self._task.score is None:
            self._state.best_images_seen = self._state.images_seen


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` is in (before, after]."""
    return before // every != after // every
