"""What the unit tests start or spoil: a small AMOS folder, Ray, a small disk, an MLflow server."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from archive_support import Archive
from tracking_support import Server


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """A fresh archive, to be spoilt at will."""
    return Archive(tmp_path / "amos")


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """Ray takes seconds to start: once for all tests of a file."""
    from data_shards.fan_out import ray_session

    with ray_session():
        yield


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Called with a number of MiB: a filesystem of that size, of its own."""
    mounted = []

    def make(mib: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"no right to mount a small filesystem: {made.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Not started yet; MLFLOW_TRACKING_URI names it."""
    server = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()
