"""Every kernel compiles for sm_80 and sm_90, at the real UNet's shapes, without spills and with wide loads; no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from segdiff_kernels import compiling

BAD_KERNELS = """
import triton
import triton.language as tl
from segdiff_kernels.compile_cases import CompileCase

@triton.jit
def spills(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x - tl.sum(x))  # all of x is alive until the sum is known

@triton.jit
def copies(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)

@triton.jit
def does_not_compile(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), tl.zeros((SIZE, 2), tl.float32))

def compile_cases():
    copy = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32"}
    aligned = ("x_ptr", "y_ptr", "n")
    floats = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    return [
        CompileCase("bad/spills", spills, floats, {"SIZE": 8192}, num_warps=1, divisible_by_16=("x_ptr", "y_ptr")),
        CompileCase("bad/wide", copies, copy, {"SIZE": 1024}, divisible_by_16=aligned),
        CompileCase("bad/narrow", copies, copy, {"SIZE": 1024}),
        CompileCase("bad/narrow and allowed", copies, copy, {"SIZE": 1024}, narrow_loads=8),
        CompileCase("bad/narrow and not streaming", copies, copy, {"SIZE": 1024}, streams=False),
        CompileCase("bad/does not compile", does_not_compile, {"x_ptr": "*fp32"}, {"SIZE": 64}),
    ]
"""


def compiled(arch: int, folder: Path, *modules: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and rows of the command, started as from here: under TRITON_INTERPRET."""
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=path)
    command = [sys.executable, "-m", "segdiff_kernels.compiling", "--arch", str(arch), "--json", *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


# What compiles without spills for the one has so far done so for the other.
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.exhaustive)])
def test_every_kernel_compiles_without_spills_and_reads_16_bytes_a_thread(arch: int, tmp_path: Path) -> None:
    code, rows = compiled(arch, tmp_path, *compiling.kernel_modules())
    assert [(row["name"], row["problems"]) for row in rows if row["problems"]] == []
    assert code == 0
    assert {row["arch"] for row in rows} == {arch}
    assert "philox/bits" in {row["name"] for row in rows}


def test_what_is_wrong_with_a_kernel_is_seen(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    code, rows = compiled(90, tmp_path, "bad_kernels")
    assert code == 1
    row = {row["name"].removeprefix("bad/"): row for row in rows}
    for name in ("wide", "narrow and allowed", "narrow and not streaming"):
        assert row[name]["problems"] == []
    assert row["wide"]["loads"] == {"16": 1}
    assert row["narrow and not streaming"]["loads"] is None
    assert row["narrow"]["problems"] == ["8 loads narrower than 16 bytes, 0 allowed"]
    assert row["narrow"]["loads"] == {"2": 8}
    assert row["spills"]["spilled_bytes"] > 0
    assert "spilled" in row["spills"]["problems"][0]
    assert row["does not compile"]["problems"][0].startswith("does not compile: ")


def test_a_module_without_cases_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"segdiff_kernels.checks: has no compile_cases"):
        compiling.compile_all(["segdiff_kernels.checks"], [90], 1)


def test_the_interpreter_compiles_nothing() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET: 1"):
        compiling.compile_all([], [90], 1)
