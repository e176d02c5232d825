"""Kernels compiled before they are launched: all that a net needs, once, and found again in Triton's cache."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from data_shards.labels import AMOS
from segdiff_dist.denoising import kernels_ahead
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.kernels_ahead import KernelPlan, compile_kernels

NET = DenoiserConfig(block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, attention_resolutions=())
PLAN = KernelPlan(json.loads(json.dumps(asdict(NET))), (AMOS.name, AMOS.names), 16, 2, "bf16", 90)
# Plans again in a new process, and counts what is compiled although it is in the cache.
AGAIN = """
import json, sys
from segdiff_dist.denoising.kernels_ahead import KernelPlan
from segdiff_kernels.ahead import planned_kernels
from triton.backends.nvidia.compiler import CUDABackend
kernels = planned_kernels(KernelPlan(**json.loads(sys.argv[1])).work, 90)
compiled = []
make = CUDABackend.make_cubin
CUDABackend.make_cubin = lambda *args: compiled.append(1) or make(*args)
names = sorted({kernel().name for kernel in kernels})
print(json.dumps([len(kernels), len(compiled), names]))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Triton's, and a process that would use a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return tmp_path / "cache"


def test_a_nets_kernels_are_in_the_cache_before_they_are_launched(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_kernels(PLAN)
    said = capsys.readouterr().err
    command = [sys.executable, "-c", AGAIN, json.dumps(asdict(PLAN))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    planned, compiled, names = json.loads(done.stdout)
    assert (compiled, said.split(" on ")[0]) == (0, f"kernels: {planned}"), said
    assert {"normalise_kernel", "sums_kernel", "dx_kernel", "residual_add_kernel", "label_conv_in_kernel"} <= set(names)
    compile_kernels(PLAN)
    assert capsys.readouterr().err == "", "compiled once; no process is started again"


def test_what_does_not_compile_is_said_and_costs_no_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels_ahead.sys, "executable", "false")
    compile_kernels(PLAN)
    assert "not compiled ahead, but when they are first launched: no message" in capsys.readouterr().err
    monkeypatch.setattr(kernels_ahead, "local_rank", lambda: 1)
    compile_kernels(PLAN)
    assert capsys.readouterr().err == "", "one process of a machine compiles"
