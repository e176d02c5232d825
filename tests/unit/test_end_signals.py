"""SIGTERM and SIGHUP end a command as Ctrl-C does: in one line, and without a lock or temporary folder left."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests_support import bytes_of

from data_shards.end_signals import Ended, ended_by_signals
from segdiff_dist import cli
from segdiff_dist.stages.inspect import InspectPlan
from segdiff_dist.stages.phantom import PhantomPlan
from segdiff_dist.training.stop_signals import StopSignals

SIZE = ["--phantom.num-train", "2", "--phantom.num-val", "0", "--phantom.num-test", "0"]
ENDED = [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """As in a program of its own, also where the tests run under nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def phantom(out: Path, *flags: str, **settings: Any) -> subprocess.Popen[str]:
    """`segdiff phantom` as a process of its own, whose temporary files are beside `out`."""
    temporary = out.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    settings = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True} | settings
    command = [sys.executable, "-m", "segdiff_dist", "phantom", str(out), *SIZE, *flags]
    return subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}, **settings)


def wait_for_first_image(out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not list(out.glob("imagesTr/*.nii.gz")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def raised_in(monkeypatch: pytest.MonkeyPatch, plan: type, *signals: signal.Signals) -> None:
    """The plan gets these signals as it runs, each while it handles the one before."""

    def run(*_: Any, left: tuple[signal.Signals, ...] = signals) -> None:
        try:
            signal.raise_signal(left[0])
        finally:
            if left[1:]:
                run(left=left[1:])

    monkeypatch.setattr(plan, "run", run)


def test_a_command_that_is_ended_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    process = phantom(out, "--quiet")
    wait_for_first_image(out, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)
    assert (process.returncode, said[1]) == (143, "ended by SIGTERM; the same command continues from here\n")
    assert len(list(out.glob("imagesTr/*.nii.gz"))) < 4
    assert not list(out.rglob(".*"))
    assert not list((tmp_path / "temporary").iterdir())
    assert [cli.main(["phantom", str(folder), *SIZE]) for folder in (out, undisturbed)] == [0, 0]
    assert bytes_of(out) == bytes_of(undisturbed)


def test_a_terminal_that_is_closed_is_no_error(tmp_path: Path) -> None:
    """Printing into it would be one, also where it is tried between two other things that must be done."""
    main, side = pty.openpty()

    def lead() -> None:
        fcntl.ioctl(side, termios.TIOCSCTTY, 0)

    streams = {"stdin": side, "stdout": side, "stderr": side}
    process = phantom(tmp_path / "out", start_new_session=True, preexec_fn=lead, **streams)
    os.close(side)
    wait_for_first_image(tmp_path / "out", process)
    os.close(main)
    assert process.wait(timeout=60) == 129
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize(("number", "name", "code"), ENDED)
def test_a_program_gets_it_as_json(
    number: signal.Signals,
    name: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raised_in(monkeypatch, PhantomPlan, number)
    assert cli.main(["phantom", str(tmp_path / "out"), "--json"]) == code
    out, error = capsys.readouterr()
    assert json.loads(out)["warnings"] == [f"ended by {name}"]
    assert json.loads(out)["exit_code"] == code
    assert error == f"ended by {name}; the same command continues from here\n"
    assert signal.getsignal(number) == signal.SIG_DFL


def test_what_only_reads_is_just_ended(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised_in(monkeypatch, InspectPlan, signal.SIGTERM)
    assert cli.main(["inspect", str(shapes)]) == 143
    assert capsys.readouterr().err == "ended by SIGTERM\n"


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM, signal.SIGHUP), (signal.SIGINT, signal.SIGTERM)])
def test_further_signals_do_not_disturb_the_end(
    signals: tuple[signal.Signals, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    raised_in(monkeypatch, PhantomPlan, *signals)
    code = cli.main(["phantom", str(tmp_path / "out")])
    signal.signal(signal.SIGINT, before)
    said = {130: "\ninterrupted", 143: "ended by SIGTERM"}
    assert code == 128 + signals[0]
    assert capsys.readouterr().err == f"{said[code]}; the same command continues from here\n"


def test_a_library_that_makes_an_error_of_it_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("a part of a library failed to import") from error

    monkeypatch.setattr(PhantomPlan, "run", run)
    assert cli.main(["phantom", str(tmp_path / "out")]) == 143
    assert capsys.readouterr().err == "ended by SIGTERM; the same command continues from here\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_was_swallowed_can_be_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    now = time.monotonic()
    with ended_by_signals():
        Swallows()
        signal.raise_signal(signal.SIGTERM)  # the same request, as of `timeout`, which sends two
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGTERM)


def test_while_the_command_is_being_imported_too() -> None:
    code = (
        "import signal, sys, types\n"
        "class Ended(types.ModuleType):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'segdiff_dist.stages.resources': signal.raise_signal(signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Ended('ended'))\n"
        "from segdiff_dist.program import run; raise SystemExit(run(['--version']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (143, "ended by SIGTERM; nothing was started\n")


def test_a_forked_process_is_not_the_command() -> None:
    """As multiprocessing ends its processes."""
    code = (
        "import multiprocessing, time\n"
        "from data_shards.end_signals import ended_by_signals\n"
        "with ended_by_signals():\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    child.start(); time.sleep(0.3); child.terminate(); child.join(); print(child.exitcode)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.stdout, ended.stderr) == ("-15\n", "")


def test_what_is_ignored_stays_ignored() -> None:
    """As nohup wants it, by commands and trainings."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ended_by_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.asked
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_training_saves_first_where_its_terminal_is_closed() -> None:
    with ended_by_signals(), StopSignals() as signals:
        assert not signals.asked
        signal.raise_signal(signal.SIGHUP)
        assert signals.asked


def test_the_handler_of_before_is_restored() -> None:
    got = []

    def handler(number: int, _: FrameType | None) -> None:
        got.append(number)

    signal.signal(signal.SIGTERM, handler)
    with pytest.raises(Ended), ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert got == [signal.SIGTERM]


def test_another_thread_sets_no_handler() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]
