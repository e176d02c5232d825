"""benchmarks/gpu.py: that it all runs, at toy size on the CPU, and that one error does not cost ten rented minutes."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
    told = tmp_path / "gpu.json"
    asked = ["--dry-run", "--quick", "--loops", "abe", "--json", str(told), "--parts", *parts]
    assert gpu.main(asked) == 0, capsys.readouterr().out
    found = json.loads(told.read_text())
    assert found["dry_run"] is True
    assert {"hardware", "versions", "commit", "verdicts"} <= set(found)
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
    told = json.loads(results.read_text())
    assert list(told["parts"]) == ["first", "second", "third", "fourth"]
    assert told["parts"]["first"]["found"] == {"value": 1}
    assert [verdict["reached"] for verdict in told["verdicts"]] == [False, True]


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
    arguments = gpu.afresh(session, ["training_32", "norms"])
    assert arguments[-3:] == ["--parts", "training_32", "norms"]
    for given in (["--loops", "ab"], ["--budget-minutes", "3.00"], ["--json", str(tmp_path / "found.json")]):
        assert arguments[arguments.index(given[0]) + 1] == given[1]
    assert {"--quick", "--resume"} <= set(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--json", str(tmp_path / "none.json")]) == 0
    assert "no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "none.json").exists()


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--parts", "everything"])
    assert "everything: not among ceilings, parity" in capsys.readouterr().err
