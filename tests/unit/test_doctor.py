"""`segdiff doctor` reports this machine as it is, with remedies."""

from __future__ import annotations

import pytest
import torch

from segdiff_dist import doctor
from segdiff_dist.cli import main
from segdiff_dist.trials import attempt


def test_this_machine_can_run_the_pipeline_and_every_engine_works(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for name in (
        "torch",
        "DeepSpeed",
        "DALI",
        "diffusers",
        "Ray",
        "MLflow",
        "Zarr",
        "MONAI",
        "xformers",
        "Triton",
        "FID",
    ):
        assert f"\n  {name} " in said
    tried = said.split("\ntried\n")[1]
    for name in ("Ray", "DALI", "DeepSpeed", "MLflow"):
        assert f"\n  {name} " in f"\n{tried}"
    assert "can run the whole pipeline" in said


def test_columns_align_and_each_remedy_is_below_its_row():
    rows = [doctor.Row("a", "ok", "1.0"), doctor.Row("longer name", "missing", "not installed", "get it")]
    lines = doctor.format_report([("engines", rows)]).splitlines()
    assert lines[0] == "engines"
    assert lines[1].index("ok") == lines[2].index("missing")
    assert lines[1].index("1.0") == lines[2].index("not installed") == lines[3].index("->")


@pytest.mark.parametrize("absent", ["ray", "deepspeed", "nvidia-dali-cuda130", "nibabel"])
def test_a_missing_requirement_is_named_with_its_remedy_and_exits_1(absent, monkeypatch, capsys):
    installed = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == absent else installed(name))
    assert main(["doctor", "--no-try"]) == 1
    said = capsys.readouterr().out
    assert "1 missing" in said
    assert f"pip install -c constraints.txt {absent}" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs Triton")
def test_triton_is_not_needed_without_a_gpu(monkeypatch, capsys):
    installed = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "triton" else installed(name))
    assert main(["doctor", "--no-try"]) == 0
    assert "not installed: without a GPU the kernels' torch references are used" in capsys.readouterr().out


def test_a_version_outside_the_range_is_missing(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.4.0")
    row, works = doctor.requirement_row("torch", "torch", "")
    assert not works
    assert row.state == "missing"
    assert "2.4.0 does not fit" in row.found


def test_a_trial_that_hangs_or_fails_is_one_line():
    assert attempt("DALI", most_s=0.01).failure == "did not end within 0 s"
    failure = attempt("no engine", most_s=60.0).failure
    assert failure
    assert "\n" not in failure
