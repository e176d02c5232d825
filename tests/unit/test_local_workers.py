"""Workers that are processes of this machine: the same contract as Ray's, without Ray."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from data_shards import fan_out as fan_out_module
from data_shards import liveness
from data_shards.fan_out import TaskFailure, Workers, fan_out, runner
from data_shards.ray_session import is_running


def results(make_worker: Callable[[], Any], tasks: list[Any], **how: Any) -> dict[Any, Any]:
    return {done.task: done.result for done in fan_out(make_worker, tasks, **{"num_workers": 2, **how})}


def dies_until(number: int, file: Path) -> Callable[[], Any]:
    """Workers that are killed by task 3 until that has happened `number` times."""

    def make() -> Callable[[int], int]:
        def do(task: int) -> int:
            if task == 3 and (not file.is_file() or len(file.read_text()) < number):
                with file.open("a") as stream:
                    stream.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
            return 10 * task

        return do

    return make


def test_every_task_is_done_once_by_workers_that_were_set_up_once(tmp_path: Path) -> None:
    def make() -> Callable[[int], tuple[int, int, str]]:
        (tmp_path / str(os.getpid())).touch()
        return lambda task: (task * task, os.getpid(), os.environ["OMP_NUM_THREADS"])

    found = results(make, list(range(20)), threads_per_worker=3)
    assert {task: square for task, (square, _, _) in found.items()} == {n: n * n for n in range(20)}
    assert {threads for _, _, threads in found.values()} == {"3"}
    pids = {pid for _, pid, _ in found.values()}
    assert pids <= {int(file.name) for file in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) <= 2
    assert not is_running()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_task_that_raises_costs_only_itself() -> None:
    found = results(lambda: lambda task: 1 / task, [0, 1, 2])
    assert found == {0: TaskFailure("ZeroDivisionError: division by zero"), 1: 1.0, 2: 0.5}


def test_a_lost_worker_is_replaced_and_a_task_that_kills_three_is_given_up(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"a worker was lost \(killed by signal 9\); its task goes to another"):
        found = results(dies_until(1, tmp_path / "once"), [1, 2, 3, 4])
    assert found == {1: 10, 2: 20, 3: 30, 4: 40}
    with pytest.warns(UserWarning, match="its task goes to another"):
        found = results(dies_until(9, tmp_path / "always"), [1, 2, 3, 4])
    assert found == {1: 10, 2: 20, 3: TaskFailure("its worker process died: killed by signal 9"), 4: 40}
    assert len((tmp_path / "always").read_text()) == 3


def test_workers_that_cannot_be_set_up_are_named() -> None:
    def refuses() -> Any:
        raise RuntimeError("no model here")

    reason = "a worker could not set itself up: RuntimeError: no model here"
    with pytest.warns(UserWarning, match=f"{reason}; going on without it"):
        assert results(refuses, [1, 2, 3]) == dict.fromkeys([1, 2, 3], TaskFailure(reason))
    with pytest.warns(UserWarning, match=r"a worker was lost as it started \(exit code 7\)"):
        found = results(lambda: os._exit(7), [1], num_workers=1)
    assert found == {1: TaskFailure("workers die as they start: exit code 7")}


def test_a_worker_that_does_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(liveness.BOUND, "0.05")

    def make() -> Callable[[int], int]:
        def do(task: int) -> int:
            if task == 1 and not (tmp_path / "slept").exists():
                (tmp_path / "slept").touch()
                time.sleep(600)
            return task

        return do

    with pytest.warns(UserWarning, match="has done nothing for 0.05 minutes"):
        assert results(make, [0, 1, 2]) == {0: 0, 1: 1, 2: 2}


def test_leaving_early_ends_workers_and_what_they_started(tmp_path: Path) -> None:
    def make() -> Callable[[int], int]:
        def do(task: int) -> int:
            if task:
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                (tmp_path / "written").write_text(f"{os.getpid()} {child.pid}")
                (tmp_path / "written").rename(tmp_path / "pids")
                time.sleep(600)
            while not (tmp_path / "pids").is_file():
                time.sleep(0.05)
            return task

        return do

    with Workers(make, num_workers=2, num_tasks=2) as workers:
        assert next(iter(workers.run([0, 1]))).task == 0
    worker, child = map(int, (tmp_path / "pids").read_text().split())
    assert not psutil.pid_exists(worker)
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:  # killed, and on its way
            time.sleep(0.05)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """And a script without a main guard may use them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nfrom data_shards.fan_out import fan_out\n"
        f"def make():\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    return time.sleep\n"
        "list(fan_out(make, [600], num_workers=1))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    worker.wait(timeout=20)


@pytest.mark.parametrize(
    ("job", "on_ray"),
    [
        ({"num_tasks": 32}, False),
        ({"num_tasks": 33}, True),
        ({}, True),
        ({"num_tasks": 1, "address": "local"}, True),
        ({"num_tasks": 1, "gpus_per_worker": 0.5}, True),
    ],
    ids=["small", "large", "unknown", "address", "gpu"],
)
def test_small_jobs_on_this_machine_alone_do_without_ray(
    job: dict[str, Any], on_ray: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fan_out_module, "is_running", lambda: False)
    assert Workers(runner, num_workers=1, **job).on_ray is on_ray
    monkeypatch.setattr(fan_out_module, "is_running", lambda: True)
    assert Workers(runner, num_workers=1, **job).on_ray


def test_a_worker_whose_parent_was_killed_as_it_wrote_says_nothing() -> None:
    """The parent leaves unread what the worker sent, so that the worker's next read is a reset, not an end."""
    ours, theirs = socket.socketpair()
    code = f"from data_shards.local_worker import main; main({theirs.fileno()}, {os.getpid()})"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=path, stderr=subprocess.PIPE, text=True
    )
    theirs.close()
    Connection(os.dup(ours.fileno())).send_bytes(cloudpickle.dumps(lambda: len))
    select.select([ours], [], [], 60)  # it is ready, and we do not read that
    ours.close()
    assert worker.communicate(timeout=60) == (None, "")
    assert worker.returncode == 0
