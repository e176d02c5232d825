"""What the machine does while a stage works, sampled by MLflow's own monitors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from data_shards.problems import OutOfSpace

# MLflow's own sampling interval of system metrics (its SystemMetricsMonitor).
_SYSTEM_METRICS_S = 10.0


class SystemMetrics(threading.Thread):
    """MLflow's system metrics by MLflow's own monitors, given to `log` instead of a server that may be away.

    Their step is the number of seconds since the run was begun.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], began_s: float) -> None:
        from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        super().__init__(name="system-metrics", daemon=True)
        self._log, self._began_s, self._stopped = log, began_s, threading.Event()
        self._interval_s = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or _SYSTEM_METRICS_S
        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no NVIDIA GPU, or no nvidia-ml-py to ask it with
            self._monitors.append(GPUMonitor())
        self._sample()  # psutil counts processor time from one question to the next; the first has no answer
        self.start()

    def run(self) -> None:
        """Once an interval, until stopped."""
        while not self._stopped.wait(self._interval_s):
            values = {f"system/{name}": value for name, value in self._sample().items()}
            with contextlib.suppress(OutOfSpace, OSError):  # the stage itself says that its disk is full
                self._log(values, int(time.time() - self._began_s))

    def stop(self) -> None:
        """No sample is taken after this."""
        self._stopped.set()
        self.join()

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return values
