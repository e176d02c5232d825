"""What a command shows while it works, and how it ends, for people, files and programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.progress import QUIET, progress_bar
from segdiff_dist.cli import main


def test_a_file_gets_whole_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=500, desc="train", unit="img", mininterval=0.0) as bar:
        for _ in range(100):
            bar.update(5)
            bar.set_postfix_str("loss 0.5")
    assert list(progress_bar(range(3), desc="figures", unit="figure")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert "\x1b" not in shown
    begun, ended, *others = shown.splitlines()
    assert begun.startswith("train: 0 %, 0 of 500, 00:00 elapsed, ? left")
    assert ended.startswith("train: 100 %, 500 of 500, ")
    assert ended.endswith("img/s, loss 0.5")
    assert [line.split(",")[0] for line in others] == ["figures: 0 %", "figures: 100 %"]


def test_quiet_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUIET, "")
    size = ["--phantom.num-train", "1", "--phantom.num-val", "0", "--phantom.num-test", "0"]
    out = tmp_path / "phantom"
    assert main(["phantom", str(out), "--quiet", "--json", *size]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    result = json.loads(shown.out)
    assert result["exit_code"] == 0
    assert str(out) in " ".join(result["message"])
    assert result["next_command"].startswith("segdiff ")
    assert main(["phantom", str(out), "--json", *size]) == 0  # nothing left to do
    assert json.loads(capsys.readouterr().out)["exit_code"] == 0
    assert main(["inspect", str(tmp_path / "nowhere"), "--json"]) == 2
    shown = capsys.readouterr()
    refused = json.loads(shown.out)
    assert (refused["exit_code"], refused["message"], refused["next_command"]) == (2, [], None)
    assert f"error: {refused['warnings'][0]}\n" in shown.err


def test_a_bar_that_is_left_at_the_end_of_the_interpreter_says_nothing() -> None:
    """A library in C may keep a module, and a traceback a bar, until Python takes away the module's globals."""
    program = (
        "import ctypes; from data_shards import progress; ctypes.pythonapi.Py_IncRef(ctypes.py_object(progress))\n"
        "progress.kept = progress.progress_bar(total=3); progress.kept.update(1)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr == "0 %, 0 of 3, 00:00 elapsed, ? left, ?it/s\n"
