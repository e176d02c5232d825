"""One command at a time on what it writes; what a dead one left is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from data_shards import locks
from data_shards.lock_holder import Holder, shown
from data_shards.locks import locked, refuse_where_locked, short_turn
from data_shards.problems import InputProblems, OutOfSpace

HOLD = """
import sys, time
from pathlib import Path
from data_shards.locks import locked
with locked(Path(sys.argv[1]), Path(sys.argv[1]).parent, "is preparing it"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def other_process(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "set" / locks.FOLDER_LOCK


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "TIMES", replace(locks.TIMES, watch_s=0.4, beat_s=0.05, poll_s=0.02, settle_s=0.05))


def take(file: Path) -> None:
    with locked(file, file.parent, "is preparing it"):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def without_flock(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def left_by(file: Path, **changes: Any) -> Holder:
    """A lock file whose holder differs from this process in `changes`."""
    holder = replace(Holder.here(), **changes)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(asdict(holder)))
    return holder


def test_the_second_is_refused_and_learns_who_is_at_work(file: Path) -> None:
    with other_process(file) as process, pytest.raises(InputProblems) as refused:
        take(file)
    [found] = refused.value.problems
    assert found.where == str(file.parent)
    assert found.remedy == "wait for it, or stop it"
    assert found.value.startswith(f"process {process.pid} on ")
    assert found.value.endswith(") is preparing it")
    assert "\n" not in str(found)
    with locked(file, file.parent, "is preparing it"), pytest.raises(InputProblems, match=f"process {os.getpid()} on"):
        take(file)


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_a_dead_process_left_is_taken_over(
    file: Path, end: signal.Signals, flock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flock:
        monkeypatch.setattr(fcntl, "flock", without_flock)
    with other_process(file) as process:
        if not flock:
            with pytest.raises(InputProblems, match=f"process {process.pid} on"):
                take(file)
        process.send_signal(end)
        process.wait()
    assert file.exists() == (end != signal.SIGINT)  # Ctrl-C leaves in order
    take(file)


def test_nothing_stays_behind(file: Path) -> None:
    deep = file.parent / "deeper" / file.name
    take(deep)
    assert not file.parent.exists()
    file.parent.mkdir()
    take(deep)
    assert list(file.parent.iterdir()) == []
    with locked(file, file.parent, ""):
        (file.parent / "index.json").touch()
    assert [one.name for one in file.parent.iterdir()] == ["index.json"]


def test_a_stage_inside_a_stage_passes_where_the_lock_is_lent(file: Path) -> None:
    with locked(file, file.parent, "", lends=True):
        take(file)
        assert file.exists()
    take(file)
    with locked(file, file.parent, ""), pytest.raises(InputProblems):
        take(file)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("flock", [True, False])
def test_of_another_machine_only_who_gives_no_sign_is_taken_for_dead(
    file: Path, flock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flock:
        monkeypatch.setattr(fcntl, "flock", without_flock)
    left_by(file, host="node-3", machine="another:1")
    with pytest.warns(UserWarning, match="on node-3 .* has not said that it ended; waiting up to"):
        take(file)
    assert not file.exists()

    holder = left_by(file, host="node-3", machine="another:1")
    beating = locks.Held(file, os.open(file, os.O_RDWR), holder)
    try:
        with pytest.warns(match="waiting"), pytest.raises(InputProblems, match=r"on node-3 .* is preparing it"):
            take(file)
    finally:
        beating.release()


@pytest.mark.usefixtures("quick")
def test_a_clock_that_is_wrong_does_not_make_a_holder_dead(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = left_by(file, host="node-3", machine="another:1")
    beating = locks.Held(file, os.open(file, os.O_RDWR), holder)
    for jumped in (time.time() + 10**6, time.time() - 10**6):
        monkeypatch.setattr(time, "time", lambda jumped=jumped: jumped)
        with pytest.warns(match="waiting"), pytest.raises(InputProblems, match="is preparing it"):
            take(file)
    beating.release()


@pytest.mark.usefixtures("quick")
def test_a_lock_that_a_server_keeps_of_a_dead_machine_is_taken_over(file: Path) -> None:
    left_by(file, host="node-3", machine="another:1")
    with file.open("a") as dead:
        fcntl.flock(dead, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match="waiting"):
            take(file)


def test_a_process_id_that_went_to_another_is_no_holder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_flock)
    here = left_by(file)
    with pytest.raises(InputProblems, match=f"process {os.getpid()}"):
        take(file)
    left_by(file, started=here.started - 1)
    take(file)


@pytest.mark.usefixtures("quick")
def test_who_was_taken_for_dead_and_wakes_up_stops(file: Path) -> None:
    def sleep() -> None:
        with locked(file, file.parent, ""):
            left_by(file, token="another")
            time.sleep(5)

    # In a shell's background SIGINT is ignored, and the signal that takes its place ends the process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.warns(match="has taken over; this command stops"), pytest.raises(KeyboardInterrupt):
            sleep()
    finally:
        signal.signal(signal.SIGINT, before)
    assert file.exists()


def test_ranks_beside_the_main_one_refuse_another_job_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "node-0"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    refuse_where_locked(file, file.parent, "is training")  # rank 0 is not there yet
    left_by(file)
    refuse_where_locked(file, file.parent, "is training")  # rank 0 of this job
    left_by(file, job="/node-7:29500")
    with pytest.raises(InputProblems, match="is training; wait for it"):
        refuse_where_locked(file, file.parent, "is training")
    left_by(file, job="/node-7:29500", started=1)
    refuse_where_locked(file, file.parent, "is training")  # dead


@pytest.mark.usefixtures("quick")
def test_a_job_that_is_started_again_waits_for_its_rank_to_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "node-0"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with other_process(file) as before:
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill {before.pid}"])
        take(file)
    with other_process(file):
        monkeypatch.setattr(locks, "TIMES", replace(locks.TIMES, same_job_s=0.1))
        with pytest.raises(InputProblems, match="is preparing it"):
            take(file)


@pytest.mark.parametrize("content", ["", "process 7 on node", "[1]", '{"pid": "x"}', "[" * 4000, "\0" * 100])
def test_what_is_not_legible_is_nobodys(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    take(file)


def test_a_lock_file_of_a_stranger_leads_nowhere(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir()
    mine = tmp_path / "mine.txt"
    mine.write_text("years of work")
    for make in (lambda: file.symlink_to(mine), file.mkdir, lambda: os.mkfifo(file)):
        make()
        with pytest.raises(InputProblems, match="lock file: not a file; remove it"):
            take(file)
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
    assert mine.read_text() == "years of work"
    left_by(file, host="\x1b[31mred\n" + "x" * 500, machine="another:1")
    os.utime(file, (0, 0))
    take(file)
    assert shown("\x1b[31mred\n" + "x" * 500) == "?[31mred?" + "x" * 111 + "..."


def test_a_folder_that_cannot_be_written_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "note").touch()
    with pytest.raises(InputProblems, match=r"output folder: cannot be written \(.*Not a directory"):
        take(tmp_path / "note" / "set" / "lock")
    real = os.open

    def refusing(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT and Path(path) == file:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    for refused in (errno.EROFS, errno.EACCES, errno.ENAMETOOLONG):
        code = refused
        with pytest.raises(InputProblems, match="output folder: cannot be written"):
            take(file)
        assert not file.parent.exists()
    code = errno.ENOSPC
    with pytest.raises(OutOfSpace):
        take(file)
    assert not file.parent.exists()


def test_passwords_do_not_enter_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/segdiff", "train", "--data", "https://me:secret@host/set"])
    assert Holder.here().command == "segdiff train --data https://host/set"
    monkeypatch.setattr(sys, "argv", ["/opt/segdiff_dist/__main__.py", "train"])
    assert Holder.here().command == "python -m segdiff_dist train"


def test_short_turns_follow_each_other_and_leave_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from data_shards.locks import short_turn\n"
        "for _ in range(50):\n"
        "    with short_turn(Path(sys.argv[1])):\n"
        "        file = Path(sys.argv[1], 'count'); file.write_text(str(int(file.read_text()) + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert (tmp_path / "count").read_text() == "100"
    assert [one.name for one in tmp_path.iterdir()] == ["count"]
    with short_turn(tmp_path), short_turn(tmp_path, patience_s=0.1):
        pass  # who waits too long goes on
    with short_turn(tmp_path / "nowhere"):
        pass
