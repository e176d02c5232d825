"""`segdiff doctor` tells the truth about this machine, and what it says helps."""

from __future__ import annotations

import os
import time

import pytest

from segdiff_dist import doctor


def test_this_machine_can_run_the_pipeline_and_every_engine_has_a_line(capsys):
    assert doctor.main([]) == 0
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
    assert "can run the whole pipeline" in said


def test_columns_align_and_each_remedy_stands_below_its_row():
    rows = [doctor.Row("a", "ok", "1.0"), doctor.Row("longer name", "missing", "not installed", "get it")]
    lines = doctor.format_report([("engines", rows)]).splitlines()
    assert lines[0] == "engines"
    assert lines[1].index("ok") == lines[2].index("missing")
    assert lines[1].index("1.0") == lines[2].index("not installed") == lines[3].index("->")


@pytest.mark.parametrize("absent", ["ray", "deepspeed", "nvidia-dali-cuda130", "nibabel"])
def test_a_missing_requirement_is_named_with_its_remedy_and_exits_1(absent, monkeypatch, capsys):
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == absent else installed(name))
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "1 missing" in said
    assert f"pip install -c constraints.txt {absent}" in said


def test_a_version_outside_the_range_is_missing(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.4.0")
    row, works = doctor._requirement("torch", "torch", "")
    assert not works
    assert row.state == "missing"
    assert "2.4.0 does not fit" in row.found


def test_without_a_compiler_it_says_what_cannot_run_and_refuses_to_build(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main([]) == 0
    assert "only one rank can train" in capsys.readouterr().out
    assert doctor.main(["--build-ops"]) == 1
    assert "g++" in capsys.readouterr().err


def test_an_op_not_built_yet_is_named_with_the_command_that_builds_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    row = doctor._collective()
    assert row.state == "instead"
    assert row.remedy == "segdiff doctor --build-ops"
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    assert doctor._collective().state == "ok"


def test_only_a_lock_that_nobody_can_still_hold_is_dropped(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    doctor.drop_stale_lock(tmp_path)
    assert lock.exists()
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    doctor.drop_stale_lock(tmp_path)
    assert not lock.exists()
