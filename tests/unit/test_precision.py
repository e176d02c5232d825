"""`precision: auto`: bf16 where the device has arithmetic for it; a run and a job keep what they began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sampling_support import make_here, write_weights

from segdiff_dist.cli import main
from segdiff_dist.ranks import precision
from segdiff_dist.ranks.precision import cpu_has_bf16, fast_precision


def pretend(monkeypatch: pytest.MonkeyPatch, **features: bool) -> None:
    """A CPU with these features and no others of its kind."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **features}, raising=False)
    cpu_has_bf16.cache_clear()


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(
    ("features", "expected"),
    [({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_a_cpu_computes_in_bf16_where_it_has_instructions(
    features: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **features)
    assert fast_precision(torch.device("cpu")) == expected


def test_older_torch_reads_the_kernels_list(monkeypatch: pytest.MonkeyPatch) -> None:
    now = cpu_has_bf16()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    cpu_has_bf16.cache_clear()
    assert precision.cpu_has_bf16() == now


def test_a_run_keeps_its_precision_on_another_machine(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 8, "attention_resolutions": []}
    train = {"num_images": 16, "global_batch_size": 8, "micro_batch_size": 8, "checkpoint_every_images": 8}
    settings: dict[str, Any] = {
        "denoiser": {**net, "net": "unet"},
        "train": {**train, "log_every_images": 8, "warmup_images": 8, "precision": "auto"},
        "validation": {"num_images": 2, "num_pictures": 0, "num_steps": 1},
        "tracking": {"enabled": False},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    run = tmp_path / "run"
    given = ["train", "--config", str(tmp_path / "config.yaml"), "--data", str(shapes), "--run", str(run)]
    pretend(monkeypatch)
    assert main(given) == 0
    assert "train: cpu, fp32" in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["precision"] == "fp32"
    pretend(monkeypatch, amx_bf16=True)
    assert main([*given, "--dry-run"]) == 0
    assert main([*given, "--train.precision", "bf16"]) == 2
    assert "train.precision: 'fp32' there, 'bf16' now" in capsys.readouterr().err


def test_a_job_keeps_its_precision_on_another_machine(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_weights(tmp_path)
    pretend(monkeypatch, amx_bf16=True)
    store = make_here(run, shapes)
    assert store.job["sample"]["precision"] == "bf16"
    pretend(monkeypatch)
    assert make_here(run, shapes).missing() == []
