"""Ray started on this machine is this user's alone, and no wait for it is without end."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from data_shards import liveness
from data_shards import ray_session as sessions
from data_shards.end_signals import Ended, ended_by_signals
from data_shards.fan_out import fan_out, ray_session
from data_shards.problems import InputProblems
from data_shards.tasks import TaskFailure

# A module that one of our workers, or Ray's own, imports somewhere on its way.
SHADOWS = ("numcodecs", "webdataset", "scipy", "google_crc32c", "nibabel", "zarr", "numpy", "aiohttp")
DRIVER = """
import os, sys
from data_shards.fan_out import fan_out, ray_session
from pathlib import Path

def make_worker():
    def look(name):
        __import__(name)
        return sys.path, sys.modules[name].__file__
    return look

with ray_session(num_cpus=2):
    for done in fan_out(make_worker, ["nibabel", "zarr"], num_workers=1):
        path, file = done.result
        assert os.getcwd() not in path and "" not in path, path
        assert not file.startswith(os.getcwd()), file
print("looked")
"""
ENDED_DRIVER = """
import sys, time
from pathlib import Path
from data_shards.end_signals import ended_by_signals
from data_shards.fan_out import fan_out
from segdiff_dist.exit_status import ExitStatus

def make_worker():
    def work(begun):
        Path(begun).touch()
        time.sleep(60)
    return work

with ended_by_signals(), ExitStatus() as status:
    list(fan_out(make_worker, [sys.argv[1]], num_workers=1, address="local"))
raise SystemExit(status.code)
"""


def below() -> list[psutil.Process]:
    """Ray's processes of this one."""
    return [one for one in psutil.Process().children(recursive=True) if one.is_running()]


def listening_at(process: psutil.Process) -> list[str]:
    """Addresses; none of a process that has ended meanwhile."""
    try:
        return [one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def test_it_listens_on_loopback_alone_with_a_token_in_a_private_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(dir="/tmp"))
    before = set(os.listdir(tempfile.gettempdir()))
    with ray_session(num_cpus=1):
        made = set(os.listdir(tempfile.gettempdir())) - before
        [folder] = [Path(tempfile.gettempdir(), name) for name in made if name.startswith("sd-")]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for done in fan_out(lambda: lambda task: (os.environ["RAY_AUTH_MODE"], os.nice(0)), [0], num_workers=1):
            assert done.result == ("token", os.nice(0)), "workers have the priority of the command"
        for done in fan_out(lambda: lambda task: os.environ[sessions.SCRATCH], [0], num_workers=1):
            assert Path(str(done.result)).is_dir()
            assert Path(str(done.result)).is_relative_to(folder), "temporary files of a killed worker end with it"
        listening = [address for process in [psutil.Process(), *below()] for address in listening_at(process)]
        assert len(listening) >= 3
        assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}
        import ray

        gcs = ray.get_runtime_context().gcs_address
        stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {"RAY_AUTH_MODE": "disabled"}
        asked = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", gcs]
        refused = subprocess.run(asked, env=stranger, capture_output=True, text=True, timeout=120)
        assert refused.returncode != 0
    assert not folder.exists()
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", sessions.SCRATCH} & set(os.environ)
    # A second session of the process, with a secret of its own.
    assert [done.result for done in fan_out(lambda: lambda task: task + 1, [1], num_workers=1)] == [2]
    # Ray itself would start another one, for all users of the machine and without an end.
    with pytest.raises(Exception, match="Ray has not been started yet"):
        ray.put(0)
    assert not sessions.is_running()


def test_workers_do_not_search_the_current_folder(tmp_path: Path) -> None:
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    driver = tmp_path / "elsewhere" / "driver.py"
    driver.parent.mkdir()
    driver.write_text(DRIVER)
    done = subprocess.run([sys.executable, driver], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "looked\n", done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("whole_group", [False, True])
def test_sigterm_ends_it_in_order(whole_group: bool, tmp_path: Path) -> None:
    """Of the driver alone, as by `kill`, or of Ray's processes too, as by `timeout`, which sends the driver two."""
    begun, folder = tmp_path / "begun", Path(tempfile.mkdtemp(dir="/tmp"))
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED_DRIVER, begun],
        env={**os.environ, "TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + 180
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[1]
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    if whole_group:
        os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert said.splitlines()[-1] == "ended by SIGTERM; the same command continues from here"
    assert "SIGTERM received" not in said, "of Ray's own handler"
    assert process.returncode == 143
    assert psutil.wait_procs(started, timeout=20)[1] == []
    assert not list(folder.iterdir())
    folder.rmdir()


def test_a_start_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(sessions, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr(sessions, "START_TIMEOUT_S", 0.3)
    monkeypatch.setattr(ray, "init", lambda *_, **__: time.sleep(30))
    with (
        pytest.warns(UserWarning, match="waiting for Ray on this machine to start"),
        pytest.raises(InputProblems, match="did not start within"),
        ray_session(num_cpus=1),
    ):
        pass


def test_nothing_is_left_of_a_start_that_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(dir="/tmp"))
    started: list[Path] = []

    def init(*_: object, _temp_dir: str, **__: object) -> None:
        started.append(Path(_temp_dir))
        started[0].mkdir()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Ended), ended_by_signals(), ray_session(num_cpus=1):
        pass
    assert started
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_a_ray_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(sessions, "STOP_TIMEOUT_S", 0.5)
    shutdown = ray.shutdown
    monkeypatch.setattr(ray, "shutdown", lambda: time.sleep(60))
    before = below()  # what other tests of this process keep, such as multiprocessing's resource tracker
    with pytest.warns(UserWarning, match="did not stop within 0 s; its processes were killed"), ray_session(num_cpus=1):
        processes = [one for one in below() if one not in before]
    _, alive = psutil.wait_procs(processes, timeout=20)
    shutdown()
    assert processes
    assert alive == []


def test_a_ray_that_is_killed_is_not_waited_for() -> None:
    def make_worker() -> Callable[[int], None]:
        def kill_its_server(_: int) -> None:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)

        return kill_its_server

    with ray_session(num_cpus=1):
        assert not sessions.has_ended()
        begun = time.monotonic()
        with pytest.warns(UserWarning, match="a worker was lost"):
            [done] = fan_out(make_worker, [0], num_workers=1)
        assert sessions.has_ended()
    assert isinstance(done.result, TaskFailure)
    assert "Ray on this machine has ended" in done.result.error
    assert time.monotonic() - begun < 60


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray for the tests below; those above start it themselves."""
    with ray_session(num_cpus=2):
        yield


@pytest.mark.usefixtures("ray")
def test_a_worker_killed_as_it_starts_is_replaced() -> None:
    killed: list[int] = []

    def kill_the_first() -> None:
        while not killed:
            for process in below():
                try:
                    program, *rest = process.cmdline() or [""]
                    is_python = Path(program).name.startswith("python")
                    if program.startswith("ray::_Worker") or (is_python and "default_worker.py" in " ".join(rest)):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return
                except (psutil.Error, ProcessLookupError):
                    continue
            time.sleep(0.005)

    threading.Thread(target=kill_the_first, daemon=True).start()
    results = [done.result for done in fan_out(lambda: lambda task: task, [1, 2, 3], num_workers=1)]
    assert sorted(results) == [1, 2, 3]
    assert killed


@pytest.mark.usefixtures("ray")
def test_a_stopped_worker_is_reported_then_ended_and_its_task_done_by_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    monkeypatch.setenv(liveness.BOUND, "0.2")
    # As if the worker were on another machine than the driver.
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "another"))
    first = tmp_path / "first"

    def make_worker() -> Callable[[int], int]:
        def stop_once(task: int) -> int:
            if not first.exists():
                first.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            return os.getpid()

        return stop_once

    with pytest.warns(UserWarning, match="has done nothing") as said:
        [done] = fan_out(make_worker, [0], num_workers=1)
    stopped = int(first.read_text())
    assert done.result != stopped
    assert not psutil.pid_exists(stopped)
    lines = [str(one.message) for one in said if f"worker {stopped} on {socket.gethostname()}" in str(one.message)]
    assert "has done nothing for 0.033 minutes: it uses no processor time" in lines[0]
    assert "After 0.2 minutes it is ended" in lines[0]
    assert liveness.BOUND in lines[0]
    assert "it is ended" in lines[1]
    assert len(lines) == 2


def test_the_exit_code_survives_what_c_does_as_the_process_ends() -> None:
    """Here an exit function of C that aborts, in place of a thread of Ray that writes to a log that is no more."""
    code = (
        "import ctypes, ray\nfrom segdiff_dist.cli import run\nlibc = ctypes.CDLL(None)\n"
        "libc.__cxa_atexit(libc.abort, None, None)\nraise SystemExit(run(['--version']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.split()[0]) == (0, "segdiff")
