"""Ray, and nothing but Ray: run many tasks on a few workers that each set themselves up once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

# A store of this size holds what one task passes back; tasks pass paths and rows, not pixels.
_OBJECT_STORE_BYTES = 200 * 1024**2
# How often a task whose worker process died is given to a fresh one before it counts as failed.
_RETRIES_AFTER_A_DEAD_WORKER = 2


@dataclass(frozen=True)
class TaskFailure:
    """A task that raised, or whose worker died again and again. `error` is one line for a person."""

    error: str


@dataclass(frozen=True)
class Done(Generic[Task, Result]):
    """A finished task and what came of it."""

    task: Task
    result: Result | TaskFailure


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Join the cluster at `address`, or start Ray on this machine; whoever started it here also stops it.

    Nested sessions share the outer one, so a command made of several stages starts Ray once.
    """
    # Set before Ray is imported: it reads them at import, and neither belongs in a person's terminal.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    import ray

    if ray.is_initialized():
        yield
        return
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    if address is None:
        ray.init(
            num_cpus=num_cpus or os.cpu_count(),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **common,
        )
    else:
        ray.init(address=address, **common)
    try:
        yield
    finally:
        ray.shutdown()


def fan_out(
    make_worker: Callable[[], Callable[[Task], Result]],
    tasks: Iterable[Task],
    *,
    num_workers: int,
    threads_per_worker: int = 1,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
) -> Iterator[Done[Task, Result]]:
    """Run every task on one of `num_workers` Ray actors; yield results as they come, in no fixed order. See Workers."""
    waiting = list(tasks)
    if not waiting:
        return
    with Workers(
        make_worker,
        num_workers=min(num_workers, len(waiting)),
        threads_per_worker=threads_per_worker,
        gpus_per_worker=gpus_per_worker,
        address=address,
    ) as workers:
        yield from workers.run(waiting)


class Workers(Generic[Task, Result]):
    """Ray actors that outlive a list of tasks: a context, in which `run` may be called for one list after the other.

    `make_worker` runs once in each actor and returns the function that does a task (so a model is loaded once). Actors
    start when there is a task for them. Leaving the context early (an exception, Ctrl-C) stops them.
    """

    def __init__(
        self,
        make_worker: Callable[[], Callable[[Task], Result]],
        *,
        num_workers: int,
        threads_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
    ) -> None:
        self._make_worker, self._num_workers, self._threads = make_worker, num_workers, threads_per_worker
        self._session = ray_session(address, num_cpus=max(num_workers * threads_per_worker, os.cpu_count() or 1))
        self._gpus = gpus_per_worker
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, Task]] = {}

    def __enter__(self) -> Workers[Task, Result]:
        self._session.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        import ray

        for actor in self._idle + [actor for actor, _ in self._running.values()]:
            ray.kill(actor)
        self._session.__exit__(*error)

    def run(self, tasks: Iterable[Task]) -> Iterator[Done[Task, Result]]:
        """Do every task; yield results as they come, in no fixed order.

        A task that raises, or kills its worker three times, comes back as TaskFailure and costs only itself.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        waiting = list(tasks)[::-1]
        while waiting or self._running:
            while waiting and (self._idle or len(self._running) < self._num_workers):
                actor = self._idle.pop() if self._idle else self._start()
                task = waiting.pop()
                self._running[actor.run.remote(task)] = (actor, task)
            [reference], _ = ray.wait(list(self._running), num_returns=1)
            actor, task = self._running.pop(reference)
            try:
                result: Any = ray.get(reference)
                self._idle.append(actor)
            except RayTaskError as error:
                result = TaskFailure(_one_line(error.cause))
                self._idle.append(actor)
            except RayActorError as error:
                result = TaskFailure(f"its worker process died: {_one_line(error)}")
                ray.kill(actor)
            yield Done(task, result)

    def _start(self) -> Any:
        import ray

        actor_class = ray.remote(_Worker).options(
            num_cpus=self._threads,
            num_gpus=self._gpus,
            max_restarts=-1,
            max_task_retries=_RETRIES_AFTER_A_DEAD_WORKER,
        )
        return actor_class.remote(self._make_worker, self._threads)


def runner() -> Callable[[Any], Any]:
    """The worker for tasks that know what to do: it calls their run()."""
    return lambda task: task.run()


class _Worker:
    """The actor. Threads are fixed before torch loads, so that results do not depend on how many workers run."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]], num_threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)
        self._do = make_worker()

    def run(self, task: Any) -> Any:
        return self._do(task)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]
