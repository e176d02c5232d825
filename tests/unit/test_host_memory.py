from __future__ import annotations

from pathlib import Path

import pytest

from data_shards.host_memory import HostMemory, host_memory, rank_share

GIB = 2**30


def machine(root: Path, cgroup: str = "", swap_gib: int = 0) -> tuple[Path, Path]:
    """A /proc of 64 GiB, of which 32 are free, and an empty /sys/fs/cgroup."""
    proc, cgroups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    kib = {"MemTotal": 64 << 20, "MemAvailable": 32 << 20, "SwapFree": swap_gib << 20}
    (proc / "meminfo").write_text("".join(f"{name}:  {value} kB\n" for name, value in kib.items()))
    (proc / "self/cgroup").write_text(cgroup)
    return proc, cgroups


def limit(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_a_machine_without_a_limit(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, swap_gib=4)
    limit(cgroups, memory__max="max")
    assert host_memory(proc, cgroups) == HostMemory(64 * GIB, 36 * GIB)
    assert host_memory(tmp_path / "elsewhere", cgroups) is None


def test_a_container_of_version_2(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, "0::/\n")
    limit(cgroups, memory__max=24 * GIB, memory__current=10 * GIB, memory__stat=f"anon 5\ninactive_file {4 * GIB}")
    assert host_memory(proc, cgroups) == HostMemory(24 * GIB, 18 * GIB)


def test_a_slice_within_a_job_of_version_2(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, "0::/slurm/job_7/step_0\n")
    limit(cgroups / "slurm/job_7", memory__max=16 * GIB, memory__current=15 * GIB)
    limit(cgroups / "slurm/job_7/step_0", memory__max="max")
    assert host_memory(proc, cgroups) == HostMemory(16 * GIB, GIB)


@pytest.mark.parametrize("path", ["/", "/docker/not/seen/from/inside"])
def test_a_container_of_version_1(tmp_path: Path, path: str) -> None:
    proc, cgroups = machine(tmp_path, f"11:cpuset:/x\n6:memory:{path}\n")
    limit(cgroups / "memory", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=2 * GIB)
    assert host_memory(proc, cgroups) == HostMemory(8 * GIB, 6 * GIB)
    limit(cgroups / "memory", memory__limit_in_bytes=9223372036854771712)
    assert host_memory(proc, cgroups) == HostMemory(64 * GIB, 32 * GIB)


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"])
def test_ranks_share_a_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "4")
    assert rank_share(HostMemory(64 * GIB, 32 * GIB)) == HostMemory(64 * GIB, 32 * GIB)  # no rank of a launch
    monkeypatch.setenv("RANK", "5")
    assert rank_share(HostMemory(64 * GIB, 32 * GIB)) == HostMemory(16 * GIB, 8 * GIB)
