"""A command stops by itself, in words, before memory runs out; other processes go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_shards import memory_guard
from data_shards.host_memory import LIMIT, host_memory, own_limit

# Holds more and more memory, in Python, or in one call that hears no signal; with a worker that holds some too.
_GROWS = """
import subprocess, sys, time
from data_shards.end_signals import ended_by_signals
from data_shards.memory_guard import guarded
from segdiff_dist.exit_status import ExitStatus

worker = subprocess.Popen([sys.executable, "-c", "import time; held = bytearray(40_000_000); time.sleep(60)"])
print(worker.pid, flush=True)
with ended_by_signals(), ExitStatus() as status, guarded("train", "--train.micro-batch-size") as status.guard:
    held = []
    while True:
        held.append({grow})
        time.sleep(0.02)
worker.kill()
print("ended in order", flush=True)
raise SystemExit(status.code)
"""


# Two ranks, of which the second holds the memory, and what started them.
_RANKS = """
import os, subprocess, sys, time
from data_shards.memory_guard import guarded
from segdiff_dist.exit_status import ExitStatus

def start(*arguments, **values):
    return subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[1], *arguments], env={**os.environ, **values})

if len(sys.argv) == 2:
    second, first = (start("", RANK=rank, LOCAL_RANK=rank) for rank in "10")
    code = first.wait()
    second.kill()
    raise SystemExit(code)
held = bytearray(200_000_000 * int(os.environ["RANK"]))
with ExitStatus() as status, guarded("train", "--train.micro-batch-size") as status.guard:
    time.sleep(30)
raise SystemExit(status.code)
"""


def test_what_the_ranks_of_a_machine_hold_counts_together() -> None:
    # As DeepSpeed's launcher says it.
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), LIMIT: "0.2", "LOCAL_SIZE": "2"}
    command = [sys.executable, "-c", _RANKS, _RANKS]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("error: train: stopped before memory runs out: this command and its workers hold 0.")


@pytest.mark.parametrize(
    ("grow", "begin"),
    [
        ("bytearray(4_000_000)", ""),
        ("sorted(range(2_000_000), key=lambda one: -one)", ""),
        ("bytearray(4_000_000)", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"),  # a shell's background
    ],
)
def test_a_command_stops_by_itself_and_says_what_to_lower(grow: str, begin: str) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), LIMIT: "0.25"}
    command = [sys.executable, "-c", f"{begin}\n{_GROWS.replace('{grow}', grow)}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1
    assert not begin or "ended in order" in ended.stdout
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: train: stopped before memory runs out: this command and its workers hold 0.")
    assert line.endswith(f"{LIMIT} allows 0.25 GiB; lower --train.micro-batch-size; then start the same command again")


def test_memory_that_cannot_be_had_is_one_line() -> None:
    torch = pytest.importorskip("torch")
    for take in (lambda: bytearray(2**62), lambda: torch.empty(2**60)):
        with pytest.raises((MemoryError, RuntimeError)) as raised:
            take()
        assert memory_guard.is_of_memory(raised.value)
        line = memory_guard.out_of_memory("sample", "--sample.batch-size", raised.value)
        assert line.startswith("sample: out of memory (")
        assert "; lower --sample.batch-size; then" in line
    assert not memory_guard.is_of_memory(RuntimeError("another"))


def test_the_limit_counts_in_plans_and_stops_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = host_memory()
    monkeypatch.setenv(LIMIT, "0.01")
    now = host_memory()
    assert before is not None
    assert now is not None
    assert (now.total, now.available) == (own_limit(), 0)
    # In a process of its own, since one that holds so much more is ended at once if it does not stop.
    command = [sys.executable, "-m", "segdiff_dist", "phantom", str(tmp_path / "amos"), "--phantom.num-train", "200"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1
    assert "error: phantom: stopped before memory runs out" in ended.stderr
    monkeypatch.setenv(LIMIT, "much")
    assert own_limit() is None
