"""Batches of a service's process: requests that are being read go with those that wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from serve_support import LIVER, small_pipeline

from segdiff_dist.painting.model import Model, open_model
from segdiff_dist.pipeline import SliceKey
from segdiff_dist.serving.batching import Batcher, SliceJob


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(small_pipeline(tmp_path_factory.mktemp("batching")), device="cpu")


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    batcher = Batcher(most=4, wait_s=0.0)
    yield batcher
    batcher.close()


def job_of(model: Model, seed: int) -> SliceJob:
    mask_HW = np.full((model.pipeline.size, model.pipeline.size), LIVER, np.uint8)
    return SliceJob(model.pipeline, mask_HW[None], [SliceKey(0, "CT", "axial", seed)], 1, lambda done, of: None)


def test_a_batch_waits_for_a_request_that_is_being_read(model: Model, batcher: Batcher) -> None:
    first, second = job_of(model, 1), job_of(model, 2)

    def read_and_submit() -> None:
        with batcher.coming():
            reading.set()
            time.sleep(0.01)
            batcher.submit(second)

    reading = threading.Event()
    thread = threading.Thread(target=read_and_submit)
    thread.start()
    reading.wait()
    batcher.submit(first)
    images = [job.future.result(timeout=30) for job in (first, second)]
    thread.join()
    assert (first.largest_batch, second.largest_batch) == (2, 2)
    assert not np.array_equal(images[0], images[1])


def test_it_does_not_wait_for_a_request_that_takes_long_to_read(model: Model, batcher: Batcher) -> None:
    with batcher.coming():
        job = job_of(model, 1)
        batcher.submit(job)
        job.future.result(timeout=30)  # while the other one is still being read
    assert job.largest_batch == 1
