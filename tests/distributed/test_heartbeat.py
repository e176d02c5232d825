"""Real ranks over gloo, one of which dies, stops, hangs, fails or leaves: what the others say, and how soon."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from ranks_support import DEAD_AFTER_S, HANG_TIMEOUT_S, Ranks, ranks, watched


def wait_until_going(started: Ranks) -> None:
    deadline = time.monotonic() + 60
    while not all((started.folder / f"going-{rank}").exists() for rank in range(3)):
        assert time.monotonic() < deadline, started.stderr(0)
        time.sleep(0.05)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_dies_or_is_stopped_is_named(tmp_path: Path, number: int, blow: signal.Signals) -> None:
    with ranks(3, tmp_path, watched, "none of its own") as started:
        wait_until_going(started)
        os.kill(started.processes[number].pid or 0, blow)
        for rank in {0, 1, 2} - {number}:
            assert started.ended(rank, within_s=DEAD_AFTER_S + 8) == 75
            assert f"stops: rank {number} " in started.stderr(rank)
            assert (tmp_path / f"flushed-{rank}").exists()
        if number == 1:
            assert f"rank 1 ({socket.gethostname()}) gave no sign of life for 2 s" in started.stderr(2)


def test_a_rank_that_hangs_is_named_and_shows_where_it_is(tmp_path: Path) -> None:
    with ranks(3, tmp_path, watched, "hangs") as started:
        wait_until_going(started)
        for rank in range(3):
            assert started.ended(rank, within_s=HANG_TIMEOUT_S + 6) == 75
            assert "stops: rank 1 (" in started.stderr(rank)
            assert "hangs at 160 images in _commit (ranks_support.py:" in started.stderr(rank)
        assert "time.sleep(1000)" in started.stderr(1)
        assert "main thread is at" not in started.stderr(2)


def test_a_rank_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    with ranks(3, tmp_path, watched, "fails") as started:
        assert started.ended(1, within_s=60) == 1
        for rank in (0, 2):
            assert started.ended(rank, within_s=8) == 75
            assert "stops: rank 1 (" in started.stderr(rank)
            assert "failed: ValueError: no such organ;" in started.stderr(rank)
        assert "Traceback" in started.stderr(1)
        assert "stops" not in started.stderr(1)


def test_a_rank_that_leaves_the_others_waiting_is_named(tmp_path: Path) -> None:
    with ranks(3, tmp_path, watched, "leaves") as started:
        wait_until_going(started)
        for rank in (0, 2):
            assert started.ended(rank, within_s=DEAD_AFTER_S + 10) == 75
            assert "left while the others still needed it" in started.stderr(rank)


@pytest.mark.parametrize(("fault", "code"), [("none", 0), ("patient", 0), ("refuses", 1)])
def test_ranks_that_end_alike_hear_nothing(tmp_path: Path, fault: str, code: int) -> None:
    with ranks(3, tmp_path, watched, fault) as started:
        assert [started.ended(rank, within_s=60) for rank in range(3)] == [code] * 3
        assert not any("stops" in started.stderr(rank) for rank in range(3))
        assert not list(tmp_path.glob("flushed-*"))
