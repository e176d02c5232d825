"""benchmarks/gpu.py: that it all runs, at toy size on the CPU, and that one error does not cost ten rented minutes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from segdiff_kernels.tiles import one_pass_channels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
gpu: Any = importlib.import_module("gpu")
sessions: Any = importlib.import_module("support.gpu_session")


def _session(results: Path, minutes: float = 1.0) -> Any:
    args = argparse.Namespace(json=results, budget_minutes=minutes, dry_run=False)
    return sessions.Session(args, sessions.TOY, torch.device("cpu"), {})


def _raise(_: Any) -> None:
    raise RuntimeError("out of luck\nand a long story")


def test_a_dry_run_trains_samples_and_attends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["ceilings", "training_2", "sampling", "attention"]
    report = tmp_path / "gpu.json"
    asked = ["--dry-run", "--quick", "--loops", "abe", "--json", str(report), "--parts", *parts]
    assert gpu.main(asked) == 0, capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["dry_run"] is True
    assert {"hardware", "versions", "commit", "target_checks"} <= set(found)
    assert list(found["parts"]) == parts
    training = found["parts"]["training_2"]["found"]
    assert training["errors"] == {}
    assert set(training["images_per_s"]) == {"a published", "b diffusers", "e ours"}
    assert {row["way"] for row in found["parts"]["sampling"]["found"] if "error" not in row} == {"diffusers", "ours"}
    assert all(row["disagreement"] < 1e-5 for row in found["parts"]["attention"]["found"])


def test_a_part_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    results = tmp_path / "found.json"
    session = _session(results)
    session.part("first", lambda _: {"value": 1})
    session.part("second", _raise)
    assert json.loads(results.read_text())["parts"]["second"]["error"] == "RuntimeError: out of luck"
    session.part("third", lambda _: session.check_target("share", 0.4, 0.5))
    session.part("fourth", lambda _: session.check_target("memory", 0.4, 0.5, is_limit=True))
    report = json.loads(results.read_text())
    assert list(report["parts"]) == ["first", "second", "third", "fourth"]
    assert report["parts"]["first"]["found"] == {"value": 1}
    assert [check["reached"] for check in report["target_checks"]] == [False, True]


def test_no_part_begins_that_the_time_is_too_short_for(tmp_path: Path) -> None:
    session = _session(tmp_path / "found.json", minutes=0.5)
    session.part("long", _raise, least_s=60.0)
    session.part("short", lambda _: "done", least_s=1.0)
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert parts["long"]["skipped"].endswith("60 s are needed")
    assert parts["short"]["found"] == "done"


def test_where_the_device_is_lost_the_rest_goes_on_without_the_loop_to_blame(tmp_path: Path) -> None:
    session = _session(tmp_path / "found.json", minutes=3.0)
    session.args.quick, session.args.loops, session.lost_to = True, "abe", "e ours"
    session.args.three_launches = True
    arguments = gpu.afresh(session, ["training_32", "norms"])
    assert arguments[-3:] == ["--parts", "training_32", "norms"]
    for given in (["--loops", "ab"], ["--budget-minutes", "3.00"], ["--json", str(tmp_path / "found.json")]):
        assert arguments[arguments.index(given[0]) + 1] == given[1]
    assert {"--quick", "--resume", "--three-launches"} <= set(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--json", str(tmp_path / "none.json")]) == 0
    assert "no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "none.json").exists()


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--parts", "everything"])
    assert "everything: not among ceilings, one_pass, parity" in capsys.readouterr().err


def test_the_engine_is_measured_replayed_and_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--quick", "--json", str(results), "--parts", "engine"]) == 0, capsys.readouterr().out
    rows = json.loads(results.read_text())["parts"]["engine"]["found"]
    assert [(row["at_once"], row["cuda_graph"]) for row in rows] == [(n, g) for n in (1, 2) for g in ("auto", "off")]
    assert all(row["images_per_s"] > 0 and row["host_ms"] > 0 and row["replays"] is False for row in rows)


def test_what_a_part_found_before_it_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _session(tmp_path / "found.json")

    def endless(session: Any) -> None:
        session.keep({"first loop": 1})
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(sessions, "LONGEST_PART_S", 0.1)
    session.part("long", endless)
    kept = json.loads((tmp_path / "found.json").read_text())["parts"]["long"]
    assert (kept["so_far"], kept["error"]) == ({"first loop": 1}, "TimeoutError: longer than 0 s")


def test_the_kernels_that_wait_are_compared_with_three_launches(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--json", str(results), "--parts", "one_pass"]) == 0
    found = json.loads(results.read_text())["parts"]["one_pass"]["found"]
    size = "4 x 32 x 4 x 4"
    assert list(found) == [f"forward  {size}", f"forward  {size} with partials", f"backward {size}"]
    assert one_pass_channels(4 * 4, 32, 0, 32, torch.bfloat16.itemsize) == 32


def _pending(call: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(Path(gpu.__file__).with_name("gpu_pending.sh")), call, str(out)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_every_pending_call_names_parts_that_there_are(tmp_path: Path) -> None:
    calls = _pending("list", tmp_path).stdout.split()
    commands = {call: _pending(call, tmp_path, DRY_RUN="1").stdout.splitlines() for call in calls[1:]}
    assert calls[1] == "parity"
    assert commands["parity"][0].endswith("--parts one_pass")
    lines = [line for lines in commands.values() for line in lines if "--parts" in line]
    named = {part for line in lines for part in line.split("--parts")[1].split()}
    assert {*named, "training_64"} == set(gpu.parts_of(sessions.REAL.batches))
    assert "best_ct_mr" in commands["train"][0]


def test_where_the_kernel_hangs_all_that_follows_takes_three_launches(tmp_path: Path) -> None:
    log, programs, out = tmp_path / "log", tmp_path / "programs", tmp_path / "out"
    programs.mkdir()
    python = programs / "python"
    python.write_text(f'#!/bin/bash\necho "$*" >> {log}\n[[ $* != *one_pass* ]] || kill -KILL $$\n')
    python.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    parity = _pending("parity", out, PATH=path)
    assert parity.returncode == 1
    assert "137" in parity.stderr
    assert _pending("steps", out, PATH=path).returncode == 0
    first, *later = log.read_text().split("benchmarks/gpu.py")[1:]
    assert "--parts one_pass" in first
    assert ["--three-launches" in command for command in later] == [True, True]
    assert "tiles.PART_BYTES = 0" in log.read_text()  # for pytest, and in the same way for a training
