"""Work that does not fit is refused before it starts, with the setting that would; --force starts it all the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from archive_support import Archive

from data_shards import workers
from data_shards.host_memory import HostMemory, cpu_quota
from data_shards.workers import WorkersConfig
from segdiff_dist.cli import main
from segdiff_dist.stages.cost import Cost
from segdiff_dist.stages.resources import FORCE, announce, disk_problems, plan_line

GIB = 2**30


def test_long_or_large_work_has_one_line_and_other_work_none(tmp_path: Path) -> None:
    assert plan_line(Cost(images=10, seconds=30.0, num_bytes=10**6), tmp_path) is None
    cost = Cost(images=12_800_000, seconds=3600 * 625.0, num_bytes=4 * 10**9, what="113.7 M parameters")
    line = plan_line(cost, tmp_path / "not" / "yet" / "there")
    assert line is not None
    assert line.startswith("113.7 M parameters, 12,800,000 images, about 26.0 days, at most 4.0 GB of the ")


def test_a_disk_without_room_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = Cost(num_bytes=10**18, smaller="--train.keep-checkpoints 1")
    [found] = disk_problems(cost, tmp_path)
    assert found.field == "disk"
    assert "--train.keep-checkpoints 1" in found.remedy
    assert disk_problems(Cost(num_bytes=10**18, sure_share=0.0), tmp_path) == []
    monkeypatch.setenv(FORCE, "0")
    with pytest.raises(ValueError, match="or start it all the same: --force"):
        announce("train", cost, tmp_path)


def test_a_small_set_and_a_short_training_without_room_are_refused_before_work(
    archive: Archive,
    shapes: Path,
    disk_of: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = disk_of(1)
    prepare = ["prepare", str(archive.root), str(disk / "set"), "--config", "smoke", "--prepare.size", "256"]
    for command in (prepare, ["train", "--config", "smoke", "--data", str(shapes), "--run", str(disk / "run")]):
        monkeypatch.setenv(FORCE, "0")
        assert main(command) == 2
        assert re.search(r"disk: needs about [\d.]+ MB, and 1.0 MB are free; .*--force", capsys.readouterr().err)
        assert list(disk.iterdir()) == []
        assert main([*command, "--dry-run", "--force"]) == 0
        assert "are free (--force)" in capsys.readouterr().err


def test_more_than_a_day_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    announce("sample", Cost(seconds=200_000.0, shorter="fewer masks: --num N"), tmp_path)
    assert "warning: sample: about 2.3 days on this machine; fewer masks: --num N" in capsys.readouterr().err


def test_workers_are_as_many_as_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "host_memory", lambda: HostMemory(2 * GIB, 2 * GIB))
    monkeypatch.setattr("data_shards.fan_out.num_cores", lambda: 64)
    least = workers.LEAST_BYTES_WITH_TORCH
    assert WorkersConfig("sample", least_bytes=least).pool().num_workers == 3
    assert WorkersConfig("prepare").num_on_cores == 8
    assert WorkersConfig("sample", 4, least_bytes=least).memory_problems() == []
    [found] = WorkersConfig("sample", 40, least_bytes=least).memory_problems()
    assert (found.field, found.remedy) == ("sample.num_workers", "give --sample.num-workers 3")


def test_force_starts_what_is_refused(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(shapes), str(tmp_path / "out"), "--convert.num-workers", "1", "--dry-run"]
    monkeypatch.setattr(workers, "host_memory", lambda: HostMemory(GIB, 10 * 2**20))
    monkeypatch.setenv(FORCE, "0")
    assert main(command) == 2
    assert "memory: convert.num_workers: 1 need at least" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert "warning: memory: convert.num_workers" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "quota"), [("150000 100000", 1.5), ("max 100000", None), ("nonsense", None)])
def test_the_cores_of_a_container_count(content: str, quota: float | None, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup/cpu.max").write_text(f"{content}\n")
    assert cpu_quota(tmp_path / "proc", tmp_path / "cgroup") == quota


def test_the_cores_of_a_container_of_version_1_count(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,cpuacct:/x\n")
    folder = tmp_path / "cgroup/cpu/x"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path / "proc", tmp_path / "cgroup") == 2.0
