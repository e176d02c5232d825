"""Byte ranges from fsspec's memory filesystem and from a web server; the cache across restarts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from byte_store_support import FILES, NAMES, SIZES, check, wanted, write_files

from data_shards.problems import InputProblems
from data_shards.store.byte_store import (
    local_copy,
    local_path,
    open_byte_store,
    read_file,
)
from data_shards.store.remote_files import RemoteFiles, Retries

QUICK = Retries(attempts=3, base_delay_s=0.001, timeout_s=20)
ROOMY = 10**7


class Server(BaseHTTPRequestHandler):
    """Answers Range requests for FILES; `fail` may send something else instead."""

    protocol_version = "HTTP/1.1"
    num_requests: ClassVar[int] = 0
    fail: ClassVar[Callable[[int], int]] = staticmethod(lambda number: 0)  # request number -> status, or 0
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_GET(self) -> None:
        with Server.lock:
            number = Server.num_requests
            Server.num_requests += 1
        status, body = Server.fail(number), b""
        name = self.path.removeprefix("/data/")
        if not status:
            status, body = (200, FILES[NAMES.index(name)]) if name in NAMES else (404, b"")
        if status == 200 and "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            status, body = 206, body[int(first) : int(last) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who asked has given up
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    ThreadingHTTPServer.request_queue_size = 128  # a batch comes all at once
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}/data"
        served.shutdown()


@pytest.fixture
def url(server: str) -> str:
    Server.num_requests, Server.fail = 0, staticmethod(lambda number: 0)
    return server


def remote(url: str, cache: Path | None = None, limit: int = ROOMY, digest: str = "d1") -> RemoteFiles:
    return RemoteFiles(url, NAMES, SIZES, digest, cache_dir=cache, cache_bytes=limit, retries=QUICK)


def test_a_batch_from_a_server(url: str) -> None:
    check(remote(url), [wanted(i % 2, 1000 * i) for i in range(50)])
    assert Server.num_requests == 50


def test_a_filesystem_that_is_not_asynchronous() -> None:
    import fsspec

    root = f"memory://{uuid.uuid4().hex}/set"
    for name, content in zip(NAMES, FILES, strict=True):
        fsspec.filesystem("memory").pipe(f"{root}/{name}", content)
    check(remote(root), [wanted(i % 2, 1000 * i) for i in range(20)])
    assert read_file(root, NAMES[1]) == FILES[1]
    (reason,) = RemoteFiles(root, ["no.tar"], [10**6], "d", retries=QUICK).read([wanted(0, 0)])
    assert isinstance(reason, FileNotFoundError)


def test_what_was_read_once_is_not_fetched_again(url: str, tmp_path: Path) -> None:
    store = remote(url, tmp_path)
    check(store, [wanted(0, 0), wanted(1, 20_000)])
    check(store, [wanted(1, 20_000), wanted(0, 50_000), wanted(0, 0)])
    assert (Server.num_requests, store.num_hits, store.num_misses) == (3, 2, 3)
    check(remote(url, tmp_path), [wanted(0, 0), wanted(0, 50_000), wanted(1, 20_000)])  # a restart
    check(pickle.loads(pickle.dumps(store)), [wanted(0, 0)])
    assert Server.num_requests == 3
    check(remote(url, tmp_path, digest="d2"), [wanted(0, 0)])  # another set
    assert Server.num_requests == 4
    check(remote(url, tmp_path, limit=0), [wanted(0, 0)])  # no cache
    assert Server.num_requests == 5


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*.bytes"))


def test_the_cache_fills_to_its_bound_and_stays(url: str, tmp_path: Path) -> None:
    """Twenty ranges of at most four blocks of 4 KiB, room for half of them: each epoch hits the same ones."""
    store = remote(url, tmp_path, limit=150_000)
    offsets = [12_288 * i for i in range(20)]
    for _ in range(3):
        check(store, [wanted(0, offset) for offset in np.random.default_rng(1).permutation(offsets).tolist()])
    kept = store.num_hits // 2
    assert kept == 150_000 // 12_288
    assert 100_000 < disk_bytes(tmp_path) <= 150_000
    other = remote(url, tmp_path, limit=150_000, digest="another set, the same folder")
    check(other, [wanted(1, 0)])
    check(other, [wanted(1, 0)])
    assert disk_bytes(tmp_path) <= 150_000


def test_a_cache_full_of_another_set_says_so(url: str, tmp_path: Path) -> None:
    check(remote(url, tmp_path), [wanted(0, 0)])
    with pytest.warns(UserWarning, match="full of other sets"):
        remote(url, tmp_path, limit=10_000, digest="d2")


@pytest.mark.parametrize("damage", ["torn", "garbage", "hole", "flipped"])
def test_a_damaged_cache_costs_only_what_is_damaged(url: str, tmp_path: Path, damage: str) -> None:
    ranges = [wanted(0, 20_000 * i) for i in range(5)]
    check(remote(url, tmp_path), ranges)
    log, mirror = next(tmp_path.glob("*/ranges.log")), next(tmp_path.glob("*/000000.bytes"))
    records = log.read_bytes()
    if damage == "torn":
        log.write_bytes(records[:-7])
    elif damage == "garbage":
        log.write_bytes(records[:-20] + b"\xff" * 33)
    elif damage == "hole":  # a machine that lost power: the record is there, its bytes never reached the disk
        with mirror.open("r+b") as stream:
            stream.truncate(80_000)
    else:
        with mirror.open("r+b") as stream:
            stream.seek(80_123)
            stream.write(b"??")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            check(remote(url, tmp_path), ranges)
    assert Server.num_requests == 6
    assert any("damaged" in str(w.message) for w in said) == (damage in ("hole", "flipped"))


def fill_cache(url: str, cache: str, seed: int, limit: int) -> None:
    store = remote(url, Path(cache), limit)
    order = np.random.default_rng(seed).permutation(20)
    for chunk in order.reshape(5, 4).tolist():
        check(store, [wanted(0, 12_288 * i) for i in chunk])


def test_processes_share_a_cache_and_its_bound(url: str, tmp_path: Path) -> None:
    started = [
        multiprocessing.get_context("fork").Process(target=fill_cache, args=(url, str(tmp_path), seed, 150_000))
        for seed in range(4)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * 4
    assert disk_bytes(tmp_path) <= 150_000
    store = remote(url, tmp_path, 150_000)
    check(store, [wanted(0, 12_288 * i) for i in range(20)])
    assert store.num_hits == 150_000 // 12_288  # none twice: the space of each went to another range


def test_a_running_process_sees_what_another_adds(url: str, tmp_path: Path) -> None:
    first, second = remote(url, tmp_path), remote(url, tmp_path)
    check(first, [wanted(0, 0)])
    check(second, [wanted(0, 0)])
    assert Server.num_requests == 1


def test_many_ranges_stay_findable(url: str, tmp_path: Path) -> None:
    """More than the cache keeps in its dictionary of recent ones, some of them replaced."""
    from data_shards.store.range_cache import RECORD, Present

    present, rng = Present(), np.random.default_rng(0)
    offsets = rng.permutation(100_000)
    for start in range(0, 100_000, 1000):
        part = offsets[start : start + 1000]
        present.add(np.array([(o * 10, o % 7, o % 99 + 1, o) for o in part.tolist()], RECORD))
    present.forget(3 % 7, 30)
    present.add(np.array([(50, 5, 1, 4242)], RECORD))
    present.add(np.array([(o * 10, 9, 1, 1) for o in range(30_000)], RECORD))
    for o in (0, 4, 99_999, 12_345):
        assert present.find(o % 7, o * 10) == (o % 99 + 1, o)
    assert present.find(5, 50) == (1, 4242)
    assert present.find(3, 30) == present.find(8, 0) == (0, 0)


def test_a_store_that_recovers(url: str) -> None:
    Server.fail = staticmethod(lambda number: 503 if number < 5 else 0)
    with pytest.warns(UserWarning, match=r"failed 3 requests.*503") as said:
        check(remote(url), [wanted(0, 1000 * i) for i in range(3)])
    assert len(said) == 1


def test_a_store_that_never_recovers_names_what_it_failed(url: str) -> None:
    Server.fail = staticmethod(lambda number: 500)
    with pytest.warns(UserWarning, match="failed"):
        (reason,) = remote(url).read([wanted(1, 4321)])
    assert isinstance(reason, OSError)
    assert all(part in str(reason) for part in (f"{url}/{NAMES[1]}", "4321", "3 attempts", "500"))
    assert Server.num_requests == 3


def test_only_what_failed_is_asked_for_again(url: str) -> None:
    Server.fail = staticmethod(lambda number: 503 if number == 1 else 0)
    with pytest.warns(UserWarning, match="failed 1 request"):
        check(remote(url), [wanted(0, 1000 * i) for i in range(4)])
    assert Server.num_requests == 5


def test_what_is_not_there_is_not_asked_for_again(url: str) -> None:
    store = RemoteFiles(url, ["shards/no.tar", NAMES[0]], [10**6, SIZES[0]], "d", retries=QUICK)
    missing, past_end, fine = store.read([wanted(0, 0), wanted(1, SIZES[0] - 10), wanted(1, 0)])
    assert isinstance(missing, FileNotFoundError)
    assert "shards/no.tar" in str(missing)
    assert "ends at 300000" in str(past_end)
    assert fine is None
    assert Server.num_requests == 2


def test_a_file_shorter_than_its_index_says(url: str) -> None:
    store = RemoteFiles(url, NAMES, [10**6, 10**6], "d", retries=QUICK)
    with pytest.warns(UserWarning, match="it gave 100"):
        (reason,) = store.read([wanted(0, SIZES[0] - 100)])
    assert "it gave 100" in str(reason)


def test_a_request_that_hangs_is_given_up_alone(url: str) -> None:
    def hang_once(number: int) -> int:
        time.sleep(1.5 if number == 0 else 0)
        return 0

    Server.fail = staticmethod(hang_once)
    retries = Retries(attempts=2, base_delay_s=0.001, timeout_s=0.3)
    with pytest.warns(UserWarning, match="failed 1 requests.*Timeout"):
        check(RemoteFiles(url, NAMES, SIZES, "d", retries=retries), [wanted(0, 1000 * i) for i in range(10)])


def test_a_cache_that_cannot_be_written(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputProblems, match=r"file/cache: loader\.cache_dir: .*Not a directory.*give a folder"):
        remote(url, tmp_path / "file/cache")


def test_a_full_disk_ends_caching_not_the_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = remote(url, tmp_path)
    check(store, [wanted(0, 0)])
    monkeypatch.setattr(os, "pwrite", lambda *arguments: 100)
    with pytest.warns(UserWarning, match="no space left"):
        check(store, [wanted(0, 20_000)])
    monkeypatch.undo()
    check(store, [wanted(0, 0), wanted(0, 20_000)])
    assert Server.num_requests == 3


def test_an_unknown_kind_of_url() -> None:
    with pytest.raises(InputProblems, match=r"nonsense://bucket/set: URL: .*nonsense"):
        open_byte_store("nonsense://bucket/set", NAMES, SIZES, "d")


def test_small_files_and_copies(url: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set")
    assert read_file(folder, NAMES[0]) == read_file(url, NAMES[0], QUICK) == FILES[0]
    assert local_copy(folder, NAMES[0], None, "d") == folder / NAMES[0]
    assert local_path("s3://bucket/x") is None
    Server.num_requests = 0
    copies = {local_copy(url, NAMES[0], tmp_path / "cache", "d", num_bytes=SIZES[0]) for _ in range(2)}
    (copy,) = copies
    assert copy.read_bytes() == FILES[0]
    num_requests = Server.num_requests
    copy.write_bytes(b"cut short")
    assert local_copy(url, NAMES[0], tmp_path / "cache", "d", num_bytes=SIZES[0]).read_bytes() == FILES[0]
    assert Server.num_requests > num_requests
    assert local_copy(url, NAMES[1], None, "d").read_bytes() == FILES[1]
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        read_file(url, "no.json", QUICK)
    with pytest.raises(OSError, match=r"a\.tar.*gave 300000 of 5 bytes|gave 300000 of 5 bytes.*a\.tar"):
        local_copy(url, NAMES[0], tmp_path / "cache", "d3", num_bytes=5, retries=QUICK)
