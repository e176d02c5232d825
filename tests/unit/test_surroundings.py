"""A machine that lacks what programs take for granted: a home, a user's name, room, a place to write."""

from __future__ import annotations

import errno
import getpass
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from data_shards import locks
from data_shards.problems import OutOfSpace, describe, explain_full_disk, removed_on_failure
from segdiff_dist import cli, exit_status, surroundings
from segdiff_dist.stages.phantom import PhantomPlan

SEGDIFF = [sys.executable, "-c", "from segdiff_dist.cli import main; raise SystemExit(main())"]


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No passwd entry, no HOME, no name; returns the temporary folder."""

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRITON_HOME", "TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # undone after the test, whatever sets it
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_passwd_entry_there_is_a_home_and_a_name(nobody: Path) -> None:
    said = surroundings.complete()
    assert said is not None
    assert said.startswith("HOME is not set: ")
    assert Path.home().parent == nobody
    assert Path.home().stat().st_mode & 0o777 == 0o700
    assert getpass.getuser() == f"uid-{os.getuid()}"
    first = Path.home()
    assert surroundings.complete() is None  # it is there now
    os.environ.pop("HOME")
    surroundings.complete()
    assert Path.home() == first


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_threads_of_torch_wait_briefly_unless_told_otherwise(
    nobody: Path, given: dict[str, str], spins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, given.get(name, ""))  # undone after the test, whatever sets it
        if name not in given:
            monkeypatch.delenv(name)
    surroundings.complete()
    shown = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr


@pytest.mark.parametrize("home", ["/", "/nowhere/at/all"])
def test_a_home_that_is_none_is_replaced(nobody: Path, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(surroundings, "is_writable", lambda _: False)
    said = surroundings.complete()
    assert said is not None
    assert said.startswith(f"HOME is {home!r}, not a folder that can be written: ")
    assert Path.home().parent == nobody


def test_a_home_that_can_be_read_stays_and_caches_go_elsewhere(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = nobody / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(surroundings, "is_writable", lambda folder: folder != str(home))
    assert surroundings.complete() is None
    assert os.environ["HOME"] == str(home)
    assert Path(os.environ["TRITON_HOME"]).parent == nobody


def test_a_folder_that_another_has_prepared_is_not_used(nobody: Path) -> None:
    trap = nobody / f"segdiff-home-{os.getuid()}"
    trap.mkdir(mode=0o777)
    trap.chmod(0o777)
    surroundings.complete()
    assert Path.home() != trap
    shutil.rmtree(trap)
    trap.symlink_to(nobody)
    os.environ.pop("HOME")
    surroundings.complete()
    assert Path.home() != trap


def test_without_a_temporary_folder_it_says_tmpdir(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def nothing() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nothing)
    assert cli.main(["train", "--run", str(tmp_path / "run"), "--data", "set"]) == 2
    error = capsys.readouterr().err
    assert "error: environment: TMPDIR: no temporary folder can be written" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), "/data/x: Read-only file system; make it writable"),
        (PermissionError(errno.EACCES, "Permission denied", b"/data/x"), "/data/x: Permission denied; make it"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk: no space left (No space left on device); make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"), "/data/x: no space left (Disk quota exceeded)"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), "/a/b: Not a directory; choose another path"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/a"), "/a: File name too long; choose a shorter name"),
        (shutil.Error([("/a", "/b", "[Errno 5] Input/output error\n: '/b'")]), "/b: [Errno 5] Input/output error : "),
        (OSError("words of\n a library"), "words of a library; put that right and start the same command again"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    raised: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(*_: Any) -> Any:
        raise raised

    monkeypatch.setattr(PhantomPlan, "run", fails)
    monkeypatch.setattr(exit_status, "work_has_begun", lambda: True)
    assert cli.main(["phantom", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
    assert describe(raised) in error
    monkeypatch.setattr(exit_status, "work_has_begun", lambda: False)
    assert cli.main(["phantom", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"{error}nothing was started\n"


@pytest.mark.parametrize("name", ["x" * 300, "note/deeper"])
def test_a_name_that_cannot_be_one_is_refused(
    name: str, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note").touch()
    smoke = ("--config", str(Path(__file__).parents[2] / "launch" / "configs" / "smoke.yaml"))
    out = f"{tmp_path}/{name}"
    for args in (
        ("phantom", out, *smoke),
        ("convert", str(shapes), out),
        ("train", "--run", out, "--data", str(shapes), *smoke),
        ("evaluate", "--run", out),
        ("sample", "--run", out, "--data", str(shapes)),
        ("export", out, "--run", str(tmp_path)),
        ("inspect", out),
    ):
        assert cli.main(list(args)) in ((1, 2) if args[0] == "inspect" else (2,)), args[0]
        error = capsys.readouterr().err
        assert error.startswith("error: "), args[0]
        assert "Traceback" not in error
    assert [one.name for one in tmp_path.iterdir()] == ["note"]


def test_what_an_earlier_command_did_says_nothing_of_the_next(tmp_path: Path) -> None:
    with locks.locked(tmp_path / ".lock", tmp_path, "is at work"):
        assert locks.work_has_begun()
    (tmp_path / "note").touch()
    assert cli.main(["phantom", str(tmp_path / "note" / "deeper")]) == 2


def test_ctrl_c_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PhantomPlan, "run", interrupted)
    assert cli.main(["phantom", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command continues from here\n"


def test_ctrl_c_is_one_line_also_while_the_command_is_being_imported() -> None:
    code = (
        "import sys, types\n"
        "class Interrupted(types.ModuleType):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'segdiff_dist.stages.resources': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted('interrupted'))\n"
        "from segdiff_dist.program import run; raise SystemExit(run(['--version']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted; nothing was started\n")


def test_a_reader_that_leaves_and_an_output_without_room(shapes: Path) -> None:
    command = " ".join(f"'{word}'" for word in [*SEGDIFF, "inspect", str(shapes)])
    script = f"{command} 2>&1 | head -n 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("141\n", "")
    ended = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "no space left" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error_and_no_file_takes_their_place(closed: str, tmp_path: Path) -> None:
    out, size = tmp_path / "phantom", "--phantom.num-train 1 --phantom.num-val 0 --phantom.num-test 0"
    command = f"{sys.executable} -m segdiff_dist phantom '{out}' {size} {closed}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 2


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    def write(path: Path, error: BaseException) -> None:
        with explain_full_disk(tmp_path), removed_on_failure(path):
            path.mkdir() if path.suffix == "" else path.write_text("half")
            raise error

    for name in ("file.tmp", "folder"):
        with pytest.raises(OutOfSpace, match="no space left"):
            write(tmp_path / name, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / name, KeyboardInterrupt())
        with pytest.raises(OutOfSpace):  # as safetensors says it
            write(tmp_path / name, RuntimeError("Error while serializing: No space left on device (os error 28)"))
        with pytest.raises(RuntimeError, match="else"):
            write(tmp_path / name, RuntimeError("something else"))
    assert list(tmp_path.iterdir()) == []


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    from sampling_support import write_weights

    before = os.umask(0o027)
    try:
        weights = write_weights(tmp_path) / "weights" / "ema"
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in weights.iterdir()} == {0o640}


def test_a_rank_left_in_the_shell_is_not_refused_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--data", str(tmp_path / "nowhere"), "--run", str(tmp_path / "run")]) == 2
    assert "RANK: RANK=3 WORLD_SIZE=4 LOCAL_RANK=3, without MASTER_ADDR" in capsys.readouterr().err
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)  # a launch: its first rank on this machine says it
    assert cli.main(["train", "--data", str(tmp_path / "nowhere"), "--run", str(tmp_path / "run")]) == 2
    assert "nowhere" not in capsys.readouterr().err


def test_a_warning_is_one_line_without_a_place_in_the_source() -> None:
    code = (
        "import warnings; from segdiff_dist.cli import run; run(['--version']); warnings.warn('a:\\n b', stacklevel=1)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert printed == "warning: a: b\n"


def test_a_path_with_line_breaks_and_other_bytes_is_one_line(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/a\nb \xff\x1b[31m"
    code = "import sys; from segdiff_dist.cli import run; raise SystemExit(run(sys.argv[1:]))"
    smoke = ["--config", "smoke", "--phantom.num-train", "1", "--quiet"]
    made, refused = (
        subprocess.run([sys.executable, "-c", code, *args], capture_output=True, check=False)
        for args in (["phantom", folder, *smoke], ["inspect", folder + b"/none"])
    )
    assert (made.returncode, made.stderr) == (0, b"")
    assert b"\\udcff" in made.stdout
    assert refused.returncode == 2
    assert [line[:6] for line in refused.stderr.splitlines()] == [b"error:", b"1 prob"]
    assert b"/a\\nb \\udcff\\x1b[31m/none" in refused.stderr
