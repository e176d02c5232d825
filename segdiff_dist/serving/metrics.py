"""Counts and times of a service, in Prometheus' text format."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# From one image on a GPU to a volume on a CPU.
_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_RECENT = 32


class Metrics:
    """One registry of its own. Labels are names of models, kinds and statuses: never what a client sent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("segdiff_requests", "Answers by path and status", ["path", "status"], registry=own)
        self.slices = Counter("segdiff_slices", "Slices made", ["model"], registry=own)
        self.active = Gauge("segdiff_active_requests", "Requests that wait or are worked on", ["model"], registry=own)
        self.seconds = Histogram(
            "segdiff_paint_seconds", "Seconds of a request", ["model"], buckets=_SECONDS, registry=own
        )
        self.batch = Histogram("segdiff_batch_slices", "Slices of a batch", ["model"], buckets=_BATCHES, registry=own)
        self.cancelled = Counter("segdiff_cancelled", "Requests whose client left", ["model"], registry=own)
        self.retried = Counter("segdiff_retried", "Requests made again after a process died", ["model"], registry=own)
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def finished(self, model: str, began: float, num_slices: int, batch: int) -> None:
        """Count a request that was answered; `began`: by time.monotonic."""
        seconds = time.monotonic() - began
        self._recent.append(seconds)
        self.seconds.labels(model).observe(seconds)
        self.slices.labels(model).inc(num_slices)
        self.batch.labels(model).observe(batch)

    def retry_after_s(self) -> int:
        """When a place is likely to be free: after the mean time of the last requests."""
        mean = sum(self._recent) / len(self._recent) if self._recent else 1.0
        return min(max(1, round(mean)), 120)

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
