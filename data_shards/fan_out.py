"""Many tasks on a few workers, each of which is set up once: processes of this machine for small jobs, else Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic

from data_shards.local_workers import LocalWorkers
from data_shards.ray_session import is_running, num_cores, ray_session
from data_shards.ray_workers import PATIENCE_S, RayWorkers, Resources, resources
from data_shards.tasks import Done, Result, Task, TaskFailure

__all__ = ["Done", "Resources", "TaskFailure", "Workers", "fan_out", "num_cores", "ray_session", "resources", "runner"]

# Ray starts in 5 to 15 s, local workers in 1. From this number of tasks on (volumes, regions of 16 images, ...) a job
# is long enough for that not to matter.
MOST_LOCAL_TASKS = 32


def fan_out(
    make_worker: Callable[[], Callable[[Task], Result]],
    tasks: Iterable[Task],
    *,
    num_workers: int,
    threads_per_worker: int = 1,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
    patience_s: float = PATIENCE_S,
    watched: bool = True,
) -> Iterator[Done[Task, Result]]:
    """Run every task on one of `num_workers` workers; yield results as they come, in no fixed order. See Workers."""
    waiting = list(tasks)
    if not waiting:
        return
    with Workers(
        make_worker,
        num_workers=min(num_workers, len(waiting)),
        num_tasks=len(waiting),
        threads_per_worker=threads_per_worker,
        gpus_per_worker=gpus_per_worker,
        address=address,
        patience_s=patience_s,
        watched=watched,
    ) as workers:
        yield from workers.run(waiting)


class Workers(Generic[Task, Result]):
    """Workers that outlive a list of tasks: a context, in which `run` may be called for one list after the other.

    `make_worker` runs once in each worker and returns the function that does a task, so that a model is loaded once.
    Workers start when there is a task for them. A lost worker is replaced; until then the others do its work. One whose
    processes use no processor time for an hour counts as lost (liveness.BOUND changes the hour); it is reported after
    ten minutes. `watched=False` disables this, for tasks that wait for other processes, for example in a container.
    Leaving the context early (an exception, Ctrl-C) stops them.

    They are Ray actors if there is an address (ray_session.THIS_MACHINE starts Ray here), if they need GPUs, if Ray
    runs already, or if `num_tasks` is more than MOST_LOCAL_TASKS or not known. Otherwise they are processes of this
    machine. Results are the same.
    """

    def __init__(
        self,
        make_worker: Callable[[], Callable[[Task], Result]],
        *,
        num_workers: int,
        num_tasks: int | None = None,
        threads_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
        patience_s: float = PATIENCE_S,
        watched: bool = True,
    ) -> None:
        is_small = num_tasks is not None and num_tasks <= MOST_LOCAL_TASKS
        self.on_ray = not is_small or address is not None or gpus_per_worker > 0 or is_running()
        self._workers: LocalWorkers[Task, Result] | RayWorkers[Task, Result]
        if not self.on_ray:
            self._workers = LocalWorkers(
                make_worker, num_workers=num_workers, threads_per_worker=threads_per_worker, watched=watched
            )
        else:
            self._workers = RayWorkers(
                make_worker,
                num_workers=num_workers,
                threads_per_worker=threads_per_worker,
                gpus_per_worker=gpus_per_worker,
                address=address,
                patience_s=patience_s,
                watched=watched,
            )

    def __enter__(self) -> Workers[Task, Result]:
        self._workers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)

    def run(self, tasks: Iterable[Task]) -> Iterator[Done[Task, Result]]:
        """Do every task; yield results as they come, in no fixed order.

        A task that raises, or kills its worker three times, is returned as TaskFailure; the other tasks go on. If no
        worker can be set up, or no machine has room for one for `patience_s`, all remaining tasks are returned as
        TaskFailure.
        """
        return self._workers.run(tasks)


def runner() -> Callable[[Any], Any]:
    """The worker for tasks that have a run() method: it calls that."""
    return lambda task: task.run()
