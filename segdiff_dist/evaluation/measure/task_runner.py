"""The tasks of an evaluation on its workers: what an earlier try has measured is not done again."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_shards.fan_out import TaskFailure, Workers
from data_shards.problems import WorkFailed
from segdiff_dist.evaluation.measure.partial_results import PartialResults
from segdiff_dist.evaluation.measure.real_slices import RealSlices
from segdiff_dist.evaluation.measure.tool_labels import LabelVolume
from segdiff_dist.evaluation.measure.trust import NearestInTraining, UnseenQueries
from segdiff_dist.evaluation.measure.worker import Chunk

# Items of a task: enough that Ray's overhead does not matter, few enough that the progress bar moves.
ITEMS_A_TASK = 64


class EvaluationFailed(WorkFailed):
    """Some items could not be measured: which, and why. Nothing of an earlier evaluation has changed."""


@dataclass(frozen=True)
class TaskRunner:
    """Runs tasks on `workers`. Results that are in `kept` are read there, and new ones are put there."""

    workers: Workers[Any, Any]
    kept: PartialResults | None = None

    def in_order(self, tasks: Sequence[Any], bar: Any = None) -> Iterator[tuple[Any, Any]]:
        """Tasks with their results in the order of `tasks`: an early result waits for those before it.

        EvaluationFailed as soon as one fails: no more tasks start, and the results of running ones are dropped.
        """
        kept = self.kept
        done = self._done([task for task in tasks if kept is None or task not in kept])
        waiting: dict[Any, Any] = {}
        for expected in tasks:
            while expected not in waiting:
                if kept is not None and expected in kept:
                    waiting[expected] = kept.read(expected)
                else:
                    task, result = next(done)
                    waiting[task] = result
            result = waiting.pop(expected)
            if bar is not None:
                bar.update(expected.stop - expected.start)
            yield expected, result
        next(done, None)  # its end

    def results(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """The results alone, in the order of `tasks`."""
        return (result for _, result in self.in_order(tasks))

    def _done(self, tasks: Sequence[Any]) -> Generator[tuple[Any, Any]]:
        """Tasks with their results as they come, which are kept."""
        results: Any = self.workers.run(tasks)
        for done in results:
            if isinstance(done.result, TaskFailure):
                results.close()
                others = (other for other in self.workers.run(()) if isinstance(other.result, TaskFailure))
                errors = sorted(f"{_name_of(one.task)}: {one.result.error}" for one in (done, *others))
                raise EvaluationFailed(f"could not be measured: {'; '.join(errors)}")
            if self.kept is not None:
                self.kept.write(done.task, done.result)
            yield done.task, done.result


def _name_of(task: Any) -> str:
    """The name of a task in an error message."""
    if isinstance(task, Chunk):
        return f"items {task.start} to {task.stop - 1}"
    if isinstance(task, NearestInTraining):
        return f"training slices {task.rows[0]} to {task.rows[-1]}"
    if isinstance(task, UnseenQueries | RealSlices):
        return f"real slices {task.rows[0]} to {task.rows[-1]}"
    if isinstance(task, LabelVolume):
        return f"the volume of items {task.ids[0]} to {task.ids[-1]} ({task.side})"
    return f"items {task.ids[0]} to {task.ids[-1]}"


def split_up(values: list[int], most: int) -> list[tuple[int, ...]]:
    """The values in parts of at most `most`, for tasks."""
    return [tuple(values[start : start + most]) for start in range(0, len(values), most)]
