"""What goes to workers, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

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
