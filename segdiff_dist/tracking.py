"""Tracking with MLflow: one MLflow run for each run folder, added to by every stage. This file owns MLflow.

The store is sqlite in the folder unless MLFLOW_TRACKING_URI says otherwise. Numbers also go to a JSONL file beside
the run, so that they outlive any server.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segdiff_dist.config import flatten

_LINK = "mlflow.json"
# MLflow refuses longer parameter values.
_MAX_PARAM = 6000


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded."""

    experiment: str = "segdiff"
    enabled: bool = True


class Tracker:
    """One stage's view of the folder's MLflow run. Use as a context manager; an exception marks the run as failed."""

    def __init__(self, folder: Path, config: TrackingConfig, stage: str) -> None:
        self.folder, self.config, self.stage = folder, config, stage
        self.run_id: str | None = None
        if config.enabled:
            self._client, self.run_id = _open_run(folder, config)
            self._client.set_tag(self.run_id, f"stage.{stage}", "running")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.run_id is None:
            return
        state = "finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        self._client.set_tag(self.run_id, f"stage.{self.stage}", state)
        self._client.set_terminated(self.run_id, {"finished": "FINISHED", "interrupted": "KILLED"}.get(state, "FAILED"))

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record settings, nested sections as dotted names. A value already recorded stays as it was."""
        if self.run_id is None:
            return
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        params = [Param(key, str(value)[:_MAX_PARAM]) for key, value in flatten(values).items() if key not in known]
        for start in range(0, len(params), 100):
            self._client.log_batch(self.run_id, params=params[start : start + 100])

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers under stable names at `step` (images seen, for training)."""
        if self.run_id is None:
            return
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items() if value == value]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file, or of a folder's files, with the run."""
        if self.run_id is None or not path.exists():
            return
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder or path.name)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)


def tracking_uri(folder: Path) -> str:
    """MLFLOW_TRACKING_URI, or sqlite in the folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def _open_run(folder: Path, config: TrackingConfig) -> tuple[Any, str]:
    """A client, and the id of the folder's run: the one recorded in mlflow.json, or a new one."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri(folder)
    client = MlflowClient(tracking_uri=uri)
    link = folder / _LINK
    if link.is_file():
        known = json.loads(link.read_text())
        if known["tracking_uri"] == uri:
            try:
                client.update_run(known["run_id"], status="RUNNING")
                return client, known["run_id"]
            except MlflowException:
                pass  # the store was emptied since: begin a new run in it
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        local = uri.startswith("sqlite:")
        location = (folder.resolve() / "mlartifacts").as_uri() if local else None
        experiment_id = client.create_experiment(config.experiment, artifact_location=location)
    run = client.create_run(experiment_id, run_name=folder.resolve().name, tags={"run_folder": str(folder.resolve())})
    link.write_text(json.dumps({"tracking_uri": uri, "run_id": run.info.run_id}) + "\n")
    return client, run.info.run_id
