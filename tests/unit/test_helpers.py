"""Threads that share the work on a batch."""

from __future__ import annotations

import threading
import time

import pytest

from data_shards.feed.helpers import Helpers


def test_calls_run_at_once_and_the_caller_waits_for_all() -> None:
    helpers, together, done = Helpers(2), threading.Barrier(3, timeout=20), []

    def work(item: int) -> None:
        together.wait()
        time.sleep(0.02 * item)
        done.append(item)

    for _ in range(3):
        helpers.share(work, range(3))
    assert done == [0, 1, 2] * 3
    helpers.share(done.remove, [])
    helpers.close()
    assert not any(thread.name == "loader helper" for thread in threading.enumerate())


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_comes_after_all_calls_have_ended(bad: int) -> None:
    helpers, done = Helpers(2), []

    def work(item: int) -> None:
        if item == bad:
            raise ValueError(f"{item} is bad")
        time.sleep(0.05)
        done.append(item)

    with pytest.raises(ValueError, match=f"{bad} is bad"):
        helpers.share(work, range(3))
    assert len(done) == 2
    helpers.close()
