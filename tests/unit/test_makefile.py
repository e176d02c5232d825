"""`make install`: which build of torch it asks for; `make starter`: its commands.

Interpreter, pip and nvidia-smi are stand-ins that keep a log."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from segdiff_dist.cli import main

ROOT = Path(__file__).parents[2]
CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(
    ("has_gpu", "index_answers", "torch", "extras"),
    [
        (False, True, f"{CPU_INDEX} torch", "dev,docs"),
        (False, False, "constraints.txt torch", "dev,docs"),
        (True, True, "constraints.txt torch", "dev,docs,cuda"),
    ],
)
def test_torch_is_the_cpu_build_where_there_is_no_gpu(
    tmp_path: Path, has_gpu: bool, index_answers: bool, torch: str, extras: str
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    log = tmp_path / "pip.log"
    _program(tmp_path / ".venv" / "bin" / "python", f"exit {int(not index_answers)}")
    _program(tmp_path / ".venv" / "bin" / "pip", f'echo "$@" >> {log}')
    _program(tmp_path / "path" / "nvidia-smi", f"exit {int(not has_gpu)}")
    environment = {**os.environ, "PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}"}
    for name in ("EXTRAS", "MAKEFLAGS", "VENV", "GPU"):
        environment.pop(name, None)
    subprocess.run(["make", "install", "PYTHON=true"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    first, second = log.read_text().splitlines()
    assert first.endswith(torch)
    assert second.endswith(f".[{extras}]")


def test_starter_is_one_command_whose_parts_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands are known to `segdiff`; before it has trained, all that is missing is the run."""
    printed = subprocess.run(["make", "-n", "starter"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = printed.replace("\\\n", "").splitlines()
    commands = [shlex.split(line.partition("/segdiff ")[2]) for line in lines if "/segdiff " in line]
    assert [words[0] for words in commands] == ["demo", "export"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "segdiff_dist").symlink_to(ROOT / "segdiff_dist")
    assert main([*commands[0], "--dry-run"]) == 0
    assert "# time: 60 min" in capsys.readouterr().out
    assert main([*commands[1], "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert "runs/starter/run: --run: no such folder" in shown
    assert "1 problem" in shown


def _program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
