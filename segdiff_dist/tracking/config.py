"""The `tracking` section. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from data_shards.field_source import FROM_A_PERSON
from data_shards.problems import Problem
from data_shards.ranges import NonNegative, range_problems
from data_shards.settings import Execution
from segdiff_dist.tracking.records import MODEL_NAME


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded."""

    experiment: Execution[str] = "segdiff"
    """The name of the MLflow experiment."""
    enabled: Execution[bool] = True
    """Record runs with MLflow."""
    shared_store: Execution[bool] = True
    """Record new run folders in one database beside them (runs/mlflow.db for runs/a), so that MLflow compares them.
    false: in RUN/mlflow.db. A folder keeps the store that it began in. MLFLOW_TRACKING_URI names another one."""
    system_metrics: Execution[bool] = True
    """Record processor, memory, disk, network and GPU use of rank 0's machine, under MLflow's names."""
    flush_timeout_s: Execution[NonNegative] = 30.0
    """How long the end of a stage waits for a slow server. What is unsent after that stays in RUN/mlflow_spool."""
    register: Execution[str | None] = "segdiff"
    """The name in MLflow's model registry under which `segdiff evaluate` registers the model it has evaluated. null:
    none."""
    adopt: Annotated[Execution[bool], tyro.conf.arg(aliases=["--adopt"])] = field(default=False, metadata=FROM_A_PERSON)
    """Take over the tracking of a run folder that came from somebody else or from another machine: send what waits in
    it, and go on in its MLflow run."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        problems = range_problems(self, "config", "tracking.")
        if self.register is not None and not MODEL_NAME.fullmatch(self.register):
            remedy = "give up to 100 letters, digits, blanks, '.', '-' and '_', a letter or digit first; or null"
            problems.append(Problem("config", "tracking.register", repr(self.register), remedy))
        return problems
