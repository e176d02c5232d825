"""Byte ranges of files on this machine: views that are filled, files that are short, few descriptors."""

from __future__ import annotations

import os
import pickle
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from byte_store_support import FILES, NAMES, SAMPLE, SIZES, check, got, wanted, write_files

from data_shards.store.byte_ranges import OpenFiles, Range
from data_shards.store.byte_store import (
    LocalFiles,
    open_byte_store,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "set")


@pytest.mark.parametrize("as_url", [False, True])
def test_local_ranges_fill_their_views(folder: Path, as_url: bool) -> None:
    store = open_byte_store(f"file://{folder}" if as_url else folder, NAMES, SIZES, "d1")
    assert isinstance(store, LocalFiles)
    check(store, [wanted(0, 0), wanted(1, 77), wanted(0, SIZES[0] - SAMPLE), wanted(1, 5, 101)])
    check(pickle.loads(pickle.dumps(store)), [wanted(1, 3)])


def test_a_short_or_missing_file_is_reported_and_the_others_are_read(folder: Path) -> None:
    (folder / NAMES[0]).write_bytes(FILES[0][:5000])
    store = LocalFiles([*(folder / name for name in NAMES), folder / "gone.tar"])
    ranges = [wanted(1, 0), wanted(0, 1000), wanted(0, 10**9), wanted(2, 0), wanted(1, 9)]
    reasons = store.read(ranges)
    assert [reason is None for reason in reasons] == [True, False, False, False, True]
    assert "ends after 4000 of 10000 bytes at 1000" in str(reasons[1])
    assert NAMES[0] in str(reasons[1])
    assert isinstance(reasons[3], FileNotFoundError)
    assert got(ranges[4]) == FILES[1][9 : 9 + SAMPLE]


def test_open_files_are_bounded_and_threads_may_share_them(folder: Path) -> None:
    """Eight threads over 40 files of which two may be open: descriptors come and go under way."""
    paths = [folder / f"{i}.bin" for i in range(40)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    store = LocalFiles(paths, max_open=2)
    wrong = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(40, size=300).tolist():
            read = Range(i, 10, 500, [memoryview(bytearray(500))])
            if store.read([read]) != [None] or got(read) != bytes([i]) * 500:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    open_here = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert sum(name.endswith(".bin") for name in open_here) <= 2


def test_a_process_that_may_open_few_files(folder: Path) -> None:
    paths = [folder / f"{i}.bin" for i in range(30)]
    for path in paths:
        path.write_bytes(b"x" * 1000)
    store = LocalFiles(paths)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 5, hard))
    try:
        reasons = store.read([wanted(i, 0, 500) for i in range(30)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert reasons == [None] * 30


def test_what_the_page_cache_has_dropped_is_read_from_the_disk(folder: Path) -> None:
    store = LocalFiles([folder / name for name in NAMES])
    for name in NAMES:
        with (folder / name).open("r+b") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    check(store, [wanted(i % 2, 9000 * i) for i in range(20)])


def test_a_descriptor_outlives_its_eviction(folder: Path) -> None:
    files = OpenFiles([str(folder / name) for name in NAMES], limit=1)
    first = files.get(0)
    files.get(1)
    assert len(files) == 1
    assert os.pread(first.fd, 4, 0) == FILES[0][:4]
