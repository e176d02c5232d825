"""What goes to workers, and what comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

# Number of workers that may die with a task before the task counts as the cause.
MOST_DEATHS = 3
# How long the set-up of a worker may take: it loads a model, and may download it at first use.
SET_UP_S = 1800.0
# How often a wait for tasks says what it waits for.
SAY_EVERY_S = 600.0


@dataclass(frozen=True)
class TaskFailure:
    """A task that raised, or whose worker died repeatedly. `error` is one line for the user."""

    error: str


@dataclass(frozen=True)
class Done(Generic[Task, Result]):
    """A finished task and its result."""

    task: Task
    result: Result | TaskFailure


@dataclass(frozen=True)
class Attempt(Generic[Task]):
    """A task, and the number of workers that have died with it."""

    task: Task
    num_deaths: int = 0

    def after_a_death(self) -> Attempt[Task] | None:
        """The next attempt; None if the task counts as the cause."""
        if self.num_deaths + 1 >= MOST_DEATHS:
            return None
        return replace(self, num_deaths=self.num_deaths + 1)


def first_event(
    wait: Callable[[float], Sequence[Any]],
    look: Callable[[], None],
    look_every_s: float | None,
    state: Callable[[], str],
    end_starting: Callable[[], None],
    say: Callable[[str], None],
) -> Any:
    """The first of what `wait(seconds)` finds, while workers work or are being set up.

    A task may take as long as it needs: the wait ends when a worker answers or dies. `look` ends workers that do
    nothing, every `look_every_s` seconds (None: whenever a wait ends). From time to time `say` gets the `state` of the
    workers. If a set-up does not finish, `end_starting` ends it, which also ends the wait.
    """
    begun = said = time.monotonic()
    while True:
        look()
        if ready := wait(SAY_EVERY_S if look_every_s is None else min(SAY_EVERY_S, look_every_s)):
            return ready[0]
        now = time.monotonic()
        if now - said < SAY_EVERY_S:
            continue
        said = now
        say(f"waiting for {(now - begun) / 60:.0f} minutes: {state()}")
        if now - begun >= SET_UP_S:
            end_starting()
