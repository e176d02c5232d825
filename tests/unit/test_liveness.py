"""Which workers do nothing, by looking at their processor time: a pure function of what was seen when."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from data_shards import liveness
from data_shards.liveness import IdleWatch, WorkerProcess
from data_shards.problems import InputProblems

ONE, OTHER = (WorkerProcess("host", "node", pid, 0.0) for pid in (1, 2))


def looked(
    watch: IdleWatch, used: list[float | None], *, start: float = 0.0
) -> list[tuple[list[WorkerProcess], list[WorkerProcess]]]:
    """Looks at worker ONE every minute, with OTHER at work beside it."""
    return [watch.look({ONE: s, OTHER: 60.0 * i}, start + 60.0 * i) for i, s in enumerate(used)]


def test_a_worker_without_processor_time_is_reported_once_and_ended_at_the_bound() -> None:
    # The bound is an hour, so that the report comes after ten minutes. 0.1 s a minute is what Ray's own threads use.
    looks = looked(IdleWatch(3600.0), [5.0 + 0.1 * i for i in range(61)])
    assert [i for i, (report, _) in enumerate(looks) if report == [ONE]] == [10]
    assert [i for i, (_, over) in enumerate(looks) if over == [ONE]] == [60]
    assert all(OTHER not in report + over for report, over in looks)


def test_little_work_is_work_and_a_second_silence_is_reported_again() -> None:
    busy = [0.02 * 60 * i for i in range(200)]
    assert all(look == ([], []) for look in looked(IdleWatch(3600.0), busy))
    used = [0.0] * 15 + [30.0] * 15
    assert [i for i, (report, _) in enumerate(looked(IdleWatch(3600.0), used)) if report] == [10, 25]


def test_what_is_not_known_is_no_silence() -> None:
    assert all(look == ([], []) for look in looked(IdleWatch(3600.0), [None] * 100))
    # A process that it had started has ended.
    assert all(over == [] for _, over in looked(IdleWatch(3600.0), [100.0] * 50 + [1.0] * 50))


def test_a_driver_that_was_stopped_itself_counts_anew() -> None:
    watch = IdleWatch(3600.0)
    looked(watch, [5.0] * 9)
    assert watch.look({ONE: 5.0}, 9000.0) == ([], [])


def test_processes_that_a_worker_started_count_and_are_ended_with_it() -> None:
    work = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    process = subprocess.Popen([sys.executable, "-c", work])
    place = replace(
        WorkerProcess.of_this_process(""), pid=process.pid, created=psutil.Process(process.pid).create_time()
    )
    until = time.monotonic() + 60
    while (liveness.cpu_seconds(place) or 0.0) < 0.5 and time.monotonic() < until:
        time.sleep(0.05)
    assert (liveness.cpu_seconds(place) or 0.0) >= 0.5
    [child] = psutil.Process(process.pid).children()
    # Another process of the same id is left alone.
    liveness.end(replace(place, created=place.created - 60))
    assert process.poll() is None
    liveness.end(place)
    process.wait(timeout=20)
    child.wait(timeout=20)
    assert liveness.cpu_seconds(place) is None


def test_the_bound_is_in_minutes_and_zero_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(liveness.BOUND, raising=False)
    assert liveness.bound_s() == 3600
    monkeypatch.setenv(liveness.BOUND, "0")
    assert liveness.bound_s() is None
    monkeypatch.setenv(liveness.BOUND, "soon")
    with pytest.raises(InputProblems, match="SEGDIFF_STUCK_MINUTES"):
        liveness.bound_s()
