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
# In a process that Triton does not interpret: what the net launches, then the command on two operators, planned again
# with a count of what is compiled although it is in the cache.
SCRIPT = """
import json, sys
import torch
from segdiff_dist.denoising import kernels_ahead
from segdiff_dist.denoising.kernels_ahead import KernelPlan
from segdiff_kernels.ahead import planned_kernels
from segdiff_kernels.residual_add import residual_add
from triton.backends.nvidia.compiler import CUDABackend

plan = KernelPlan(**json.loads(sys.argv[1]))
of_net = len(planned_kernels(plan.work, 90))

def work(self=None):
    for size in (8, 8, 16):
        x = torch.empty(2, 16, size, size, device="meta", dtype=torch.bfloat16, requires_grad=True)
        x = x.contiguous(memory_format=torch.channels_last)
        bias = torch.empty(16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        y, _ = residual_add(x, x, bias)
        y.float().sum().backward()

KernelPlan.work = work
kernels_ahead.main(json.dumps(vars(plan)))
compiled = []
make = CUDABackend.make_cubin
CUDABackend.make_cubin = lambda *args: compiled.append(1) or make(*args)
names = sorted(kernel().name for kernel in planned_kernels(work, 90))
print(json.dumps([of_net, len(compiled), names, plan.marker().is_file()]))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Triton's, and a process that would use a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("SEGDIFF_LEAN_IMPORTS", "1")  # as in a command's processes
    return tmp_path / "cache"


def test_what_is_launched_is_in_the_cache_before(cache: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, json.dumps(asdict(PLAN))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, found = done.stdout.splitlines()
    of_net, compiled, names, is_marked = json.loads(found)
    assert of_net > 20, "norms, residual sums, the label convolution, the loss, forward and backward"
    assert set(names) == {"residual_add_kernel", "channel_sums_kernel"}
    assert (said.split(" on ")[0], compiled, is_marked) == (str(len(names)), 0, True)


def test_one_rank_compiles_once_and_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tmp_path / "python"
    command.write_text("#!/bin/sh\necho $2 $CUDA_VISIBLE_DEVICES\n")
    command.chmod(0o755)
    monkeypatch.setattr(kernels_ahead.sys, "executable", str(command))
    monkeypatch.setattr(kernels_ahead, "local_rank", lambda: 1)
    compile_kernels(PLAN)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(kernels_ahead, "local_rank", lambda: 0)
    compile_kernels(PLAN)
    said = capsys.readouterr().err
    assert said.startswith("kernels: segdiff_dist.denoising.kernels_ahead compiled for sm_90 in ")
    PLAN.marker().parent.mkdir(exist_ok=True)
    PLAN.marker().touch()
    compile_kernels(PLAN)
    assert capsys.readouterr().err == "", "what the cache has is not compiled again"


def test_what_does_not_compile_is_said_and_costs_no_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels_ahead.sys, "executable", "false")
    compile_kernels(PLAN)
    assert "not compiled ahead, but when they are first launched: no message" in capsys.readouterr().err
