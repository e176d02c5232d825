"""Workers that are Ray actors, on this machine or on those of a cluster. With ray_session.py the only use of Ray."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

from data_shards import lean_imports, liveness, plain_warnings
from data_shards.liveness import IdleWatch, WorkerProcess
from data_shards.ray_session import has_ended, num_cores, one_line, ray_session, within
from data_shards.tasks import MOST_DEATHS, Attempt, Done, Result, Task, TaskFailure, first_event

# How long a job without any worker waits for machines before it gives up.
PATIENCE_S = 300.0
# Requests to Ray (kill a worker, read its processor time) may get no answer.
_KILL_S, _LOOK_S = 30.0, 60.0
# The result of a task is small; a worker that has ended its task but does not return the result is lost.
_RESULT_S = 300.0


@dataclass(frozen=True)
class Resources:
    """The total resources of the machines of a Ray cluster."""

    num_cpus: int
    num_gpus: int


def resources() -> Resources:
    """The resources of the Ray cluster that the surrounding ray_session has joined or started."""
    import ray

    found = ray.cluster_resources()
    return Resources(int(found.get("CPU", 0)), int(found.get("GPU", 0)))


class RayWorkers(Generic[Task, Result]):
    """Ray actors that outlive a list of tasks: a context, in which `run` may be called for one list after the other.

    `make_worker` runs once in each actor and returns the function that does a task (so a model is loaded once). Actors
    start when there is a task for them. A lost actor, alone or with its machine, is replaced as soon as there is room;
    until then the others do its work. An actor whose processes use no processor time for an hour counts as lost
    (liveness.BOUND changes the hour); it is reported after ten minutes. `watched=False` disables this, for tasks that
    wait for other processes, for example in a container. Leaving the context early (an exception, Ctrl-C) stops them.
    """

    def __init__(
        self,
        make_worker: Callable[[], Callable[[Task], Result]],
        *,
        num_workers: int,
        threads_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
        patience_s: float = PATIENCE_S,
        watched: bool = True,
    ) -> None:
        self._make_worker, self._num_workers, self._threads = make_worker, num_workers, threads_per_worker
        self._session = ray_session(address, num_cpus=max(num_workers * threads_per_worker, num_cores()))
        self._gpus, self._patience_s = gpus_per_worker, patience_s
        self._placing: dict[Any, Any] = {}
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, Attempt[Task]]] = {}
        self._deaths_at_start = 0
        self._processes: dict[Any, WorkerProcess] = {}
        self._watched = watched
        self._idle_watch: IdleWatch | None = None

    def __enter__(self) -> RayWorkers[Task, Result]:
        bound_s = liveness.bound_s() if self._watched else None
        self._idle_watch = None if bound_s is None else IdleWatch(bound_s)
        self._session.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        import ray

        at_work = [actor for actor, _ in self._running.values()]
        actors = [*self._idle, *self._placing.values(), *self._starting.values(), *at_work]
        within(_KILL_S, lambda: [ray.kill(actor) for actor in actors])
        self._session.__exit__(*error)

    def run(self, tasks: Iterable[Task]) -> Iterator[Done[Task, Result]]:
        """Do every task; yield results as they come, in no fixed order.

        A task that raises, or kills its worker three times, is returned as TaskFailure; the other tasks go on. If no
        worker can be set up, or no machine has room for one for `patience_s`, all remaining tasks are returned as
        TaskFailure.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        room, why_not = self._num_workers, ""
        waiting = [Attempt(task) for task in list(tasks)[::-1]]
        while waiting or self._running:
            self._ask_for(min(len(waiting), room - len(self._running)) - len(self._idle))
            while waiting and self._idle:
                actor, attempt = self._idle.pop(), waiting.pop()
                self._running[actor.run.remote(attempt.task)] = (actor, attempt)
            reference = self._next_event()
            if reference is None:
                waited = f"no machine had room for a worker within {self._patience_s:.0f} s ({self._needs()})"
                ended = "Ray on this machine has ended (killed, or out of memory): start the same command again"
                failure = TaskFailure(why_not or (ended if has_ended() else waited))
                yield from (Done(attempt.task, failure) for attempt in waiting)
                return
            if reference in self._placing or reference in self._starting:
                if refused := self._greet(reference):
                    room, why_not = room - 1, refused
                continue
            actor, attempt = self._running.pop(reference)
            try:
                result: Any = ray.get(reference, timeout=_RESULT_S)
                self._idle.append(actor)
            except RayTaskError as error:
                result = TaskFailure(one_line(error.cause))
                self._idle.append(actor)
            except RayError as error:  # the worker's process or its machine died
                ray.kill(actor)
                if (again := attempt.after_a_death()) is not None:
                    _say(f"a worker was lost ({one_line(error, 160)}); its task goes to another")
                    waiting.append(again)
                    continue
                result = TaskFailure(f"its worker process died: {one_line(error)}")
            yield Done(attempt.task, result)

    def _ask_for(self, num: int) -> None:
        """Make sure that `num` workers exist or are starting."""
        import ray

        actor_class = ray.remote(_Worker).options(num_cpus=self._threads, num_gpus=self._gpus, max_restarts=0)
        for _ in range(num - len(self._placing) - len(self._starting)):
            actor = actor_class.remote(self._threads)
            self._placing[actor.process.remote()] = actor

    def _greet(self, reference: Any) -> str | None:
        """Start the set-up of a worker that has a machine, or add a worker whose set-up has ended. A worker that cannot
        be set up is given up: returns the reason."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        is_placed = reference in self._placing
        actor = (self._placing if is_placed else self._starting).pop(reference)
        try:
            process = ray.get(reference, timeout=_RESULT_S)
        except RayTaskError as error:
            reason = f"a worker could not set itself up: {one_line(error.cause)}"
        except RayError as error:
            ray.kill(actor)
            self._deaths_at_start += 1
            if self._deaths_at_start < MOST_DEATHS:
                _say(f"a worker was lost as it started ({one_line(error, 160)})")
                return None
            reason = f"workers die as they start: {one_line(error)}"
        else:
            if is_placed:
                self._processes[actor] = process
                self._starting[actor.set_up.remote(self._make_worker)] = actor
            else:
                self._idle.append(actor)
                self._deaths_at_start = 0
            return None
        ray.kill(actor)
        _say(f"{reason}; going on without it")
        return reason

    def _next_event(self) -> Any | None:
        """The reference of a task or start that has ended; None if nothing runs and no machine has had room for too
        long."""
        import ray

        references = [*self._running, *self._starting, *self._placing]
        if self._running or self._starting:
            return self._event_at_work(references)
        if not references or has_ended():
            return None
        ready, _ = ray.wait(references, timeout=self._patience_s / 10)
        if not ready and has_ended():
            return None
        if not ready:
            # If a worker's process died before Ray knew of it, Ray may wait for it for ever, so new workers are
            # requested.
            for actor in self._placing.values():
                ray.kill(actor)
            num = len(self._placing)
            self._placing.clear()
            self._ask_for(num)
            references = list(self._placing)
            _say(f"no worker has started: cores are busy, or it is waiting for a machine with room ({self._needs()})")
            ready, _ = ray.wait(references, timeout=9 * self._patience_s / 10)
        return ready[0] if ready else None

    def _event_at_work(self, references: list[Any]) -> Any:
        """The same while workers work or are being set up."""
        import ray

        return first_event(
            lambda seconds: ray.wait(references, timeout=seconds)[0],
            self._end_the_stuck,
            None if self._idle_watch is None else self._idle_watch.look_every_s,
            lambda: (
                f"{len(self._running)} tasks at work, {len(self._starting)} workers setting themselves up, "
                f"{len(self._placing)} without a machine"
            ),
            self._end_starting,
            _say,
        )

    def _end_starting(self) -> None:
        import ray

        for actor in self._starting.values():
            ray.kill(actor)

    def _end_the_stuck(self) -> None:
        """From time to time, report workers whose task uses no processor time, and kill those that have used none for
        too long, so that their tasks go to others."""
        import ray

        if self._idle_watch is None or not self._idle_watch.is_due(now := time.monotonic()):
            return
        actors = {self._processes[actor]: actor for actor, _ in self._running.values()}
        for process in self._idle_watch.end_the_stuck(list(actors), now, _on_machines, _say):
            within(_KILL_S, partial(ray.kill, actors[process]))

    def _needs(self) -> str:
        return f"{self._threads} CPU" + (f" and {self._gpus:g} GPU" if self._gpus else "")


def _on_machines(do: Callable[[WorkerProcess], Any], processes: Iterable[WorkerProcess]) -> list[Any]:
    """do(process) on each process's machine; None if the machine does not answer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here, asked = ray.get_runtime_context().get_node_id(), []
    for process in processes:
        if process.node == here:
            asked.append(do(process))
            continue
        strategy = NodeAffinitySchedulingStrategy(process.node, soft=False)
        asked.append(ray.remote(do).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(process))
    references = [answer for answer in asked if isinstance(answer, ray.ObjectRef)]
    answered = set(ray.wait(references, num_returns=len(references), timeout=_LOOK_S)[0]) if references else set()

    def answer_of(asked: Any) -> Any:
        if not isinstance(asked, ray.ObjectRef):
            return asked
        try:
            return ray.get(asked) if asked in answered else None
        except RayError:
            return None

    return [answer_of(one) for one in asked]


class _Worker:
    """The actor. Threads are fixed before torch loads, so that results do not depend on the number of workers."""

    def __init__(self, num_threads: int) -> None:
        lean_imports.begin()
        plain_warnings.begin()
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)

    def process(self) -> WorkerProcess:
        import ray

        return WorkerProcess.of_this_process(ray.get_runtime_context().get_node_id())

    def set_up(self, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        with lean_imports.uncollected():
            self._do = make_worker()

    def run(self, task: Any) -> Any:
        return self._do(task)


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=4)
