"""Slices of all requests of a model, taken through its network together.

One thread computes. It takes a slice of each waiting request in turn, so that an image of one slice does not wait for
a volume before it. Slices with the same steps and guidance go together, whatever their modality, axis and seed: an
image does not depend on the others of its batch.

Dimensions: S slices of a request, H rows, W columns.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from segdiff_dist.pipeline import SegGuidedPipeline, SliceKey

# Python's own 5 ms are what the computing thread may wait, after each of the network's hundreds of operations, while
# another thread reads a mask or encodes an image. It helped on a busy machine, and made no difference on a quiet one.
_SWITCH_S = 1e-4
# How long a batch that is not full waits for requests whose masks are being read. Reading takes some ten milliseconds,
# and on a CPU a batch of one takes as long as one of four.
_READING_S = 0.05
# Passes made, and passes in all.
Progress = Callable[[int, int], None]


class Cancelled(Exception):
    """Nobody waits for the batch."""


@dataclass(eq=False)
class SliceJob:
    """The slices of one request. `passes`: evaluations of the network a slice. `on_progress` is called by the computing
    thread. `future`: the images, uint8 [S, H, W]; a cancelled one ends the work. `largest_batch`: slices that went
    through the network with it, its own included."""

    pipeline: SegGuidedPipeline
    mask_SHW: np.ndarray
    keys: list[SliceKey]
    passes: int
    on_progress: Progress
    future: Future[np.ndarray] = field(default_factory=Future)
    taken: int = 0
    made: int = 0
    largest_batch: int = 0

    def __post_init__(self) -> None:
        self.image_SHW = np.empty_like(self.mask_SHW)

    @property
    def is_open(self) -> bool:
        """Whether somebody waits for it."""
        return not self.future.done()


Batch = list[tuple[SliceJob, int]]


def let_network_go_first() -> None:
    """For a process that only serves: its threads hold the interpreter for a short time each."""
    sys.setswitchinterval(_SWITCH_S)


class Batcher:
    """Runs jobs. `most`: slices at once; `wait_s`: how long to wait for a batch to fill if nothing else is to do."""

    def __init__(self, most: int, wait_s: float) -> None:
        self.most, self._wait_s = most, wait_s
        self._jobs: list[SliceJob] = []
        self._running: Batch = []
        self._num_coming = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, job: SliceJob) -> int:
        """The number of requests before it."""
        with self._changed:
            before = {id(one) for one in [*self._jobs, *(running for running, _ in self._running)] if one.is_open}
            self._jobs.append(job)
            self._changed.notify()
        return len(before)

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While a request is read that will be submitted: a batch that is not full waits for it, for a short time."""
        with self._changed:
            self._num_coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_coming -= 1
                self._changed.notify()

    def close(self) -> None:
        """Cancel all work, and end the thread."""
        with self._changed:
            self._is_closed = True
            for job in [*self._jobs, *(running for running, _ in self._running)]:
                job.future.cancel()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while not self._is_closed:
            batch = self._next_batch()
            if batch:
                _run(batch)

    def _next_batch(self) -> Batch:
        """(job, number of the slice) of each slice of the next batch; empty if all work was cancelled."""
        with self._changed:
            self._running = []
            was_idle = not self._waiting()
            self._changed.wait_for(lambda: self._is_closed or bool(self._waiting()))
            began, wait_s = time.monotonic(), self._wait_s if was_idle else 0.0
            while not self._is_closed and self._num_waiting() < self.most:
                most_s = max(wait_s, _READING_S) if self._num_coming else wait_s
                if (left := began + most_s - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            self._jobs = self._waiting()
            self._running = [] if self._is_closed else self._chosen()
            return self._running

    def _waiting(self) -> list[SliceJob]:
        return [job for job in self._jobs if job.is_open and job.taken < len(job.keys)]

    def _num_waiting(self) -> int:
        return sum(len(job.keys) - job.taken for job in self._waiting())

    def _chosen(self) -> Batch:
        """A slice of each job in turn, of those that have the first one's sampler. Then the first one goes to the end
        of the line."""
        alike = [job for job in self._jobs if job.pipeline.sampler == self._jobs[0].pipeline.sampler]
        chosen: Batch = []
        while len(chosen) < self.most and alike:
            for job in alike[: self.most - len(chosen)]:
                chosen.append((job, job.taken))
                job.taken += 1
            alike = [job for job in alike if job.taken < len(job.keys)]
        self._jobs = [*self._jobs[1:], *self._jobs[:1]]
        return chosen


def _run(batch: Batch) -> None:
    """Make the slices of a batch; a job whose slices are all made gets its result. An error is that of all its jobs."""
    num_of = Counter(job for job, _ in batch)
    num_passes = 0

    def on_pass() -> None:
        nonlocal num_passes
        if not any(job.is_open for job in num_of):
            raise Cancelled
        num_passes += 1
        for job, num in num_of.items():
            done = job.made * job.passes + num * min(num_passes, job.passes)
            job.on_progress(done, len(job.keys) * job.passes)

    try:
        mask_BHW = np.stack([job.mask_SHW[number] for job, number in batch])
        keys = [job.keys[number] for job, number in batch]
        image_BHW = batch[0][0].pipeline.generate_at_once(mask_BHW, keys, on_pass)
    except Exception as error:
        for job in num_of:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
        return
    for (job, number), image_HW in zip(batch, image_BHW, strict=True):
        job.image_SHW[number] = image_HW
        job.made += 1
    for job in num_of:
        job.largest_batch = max(job.largest_batch, len(batch))
        if job.made == len(job.keys) and job.future.set_running_or_notify_cancel():
            job.future.set_result(job.image_SHW)
