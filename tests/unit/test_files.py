"""Files and folders appear whole or not at all, and what a killed writer left is ignored and removed."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from data_shards import files
from data_shards.files import (
    first_line,
    hidden_folder,
    is_leftover,
    new_file,
    new_folder,
    remove_leftovers,
    unfinished_name,
    updated_folder,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["grüße\n", b"\x00\xff"])
def test_content_replaces_what_was_there(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "new" / "state.json"
    write_atomic(file, "before")
    write_atomic(file, content)
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names(file.parent) == ["state.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_atomic(file, "before")

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(file, "after")
    assert (file.read_text(), names(tmp_path)) == ("before", ["state.json"])


def test_a_durable_file_is_on_the_disk_before_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, list[str]]] = []

    def fsync(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, names(tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "plain", "x")
    assert synced == []
    hidden = f".marker.{os.getpid()}.unfinished"
    write_atomic(tmp_path / "marker", "x", durable=True)
    assert synced == [(hidden, [hidden, "plain"]), (tmp_path.name, ["marker", "plain"])]
    with new_file(tmp_path / "index", durable=True) as unfinished:
        unfinished.write_text("y")
    assert [name for name, _ in synced[2:]] == [".index.unfinished", tmp_path.name]


def test_a_file_of_a_library_is_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    unfinished_name(tmp_path / "weights").write_text("what a killed writer left, and more")
    with new_file(tmp_path / "weights") as unfinished:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert names(tmp_path) == ["usual", "weights"]


@pytest.mark.parametrize("writer", [new_file, new_folder, updated_folder, hidden_folder])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, writer) -> None:
    def fail() -> None:
        with writer(tmp_path / "out") as unfinished:
            (unfinished / "part" if unfinished.is_dir() else unfinished).write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []


def test_a_folder_appears_whole_and_replaces_only_where_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    unfinished_name(out).mkdir()
    (unfinished_name(out) / "left").write_text("by a killed writer")
    with new_folder(out) as unfinished:
        (unfinished / "first").write_text("")
        assert names(out) == []
    assert names(out) == ["first"]
    with pytest.raises(OSError, match="not empty"), new_folder(out) as unfinished:
        pass
    with new_folder(out, replaces=True) as unfinished:
        (unfinished / "second").write_text("")
    assert (names(out), names(tmp_path)) == (["second"], ["out"])


def test_an_updated_folder_keeps_its_other_files(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name in ("net", "notes"):
        (tmp_path / "weights" / name).write_text("before")
    with updated_folder(tmp_path / "weights") as unfinished:
        (unfinished / "net").write_text("after")
    assert {path.name: path.read_text() for path in (tmp_path / "weights").iterdir()} == {
        "net": "after",
        "notes": "before",
    }
    assert names(tmp_path) == ["weights"]


def test_leftovers_of_every_version_are_removed(tmp_path: Path) -> None:
    hidden = [".a.json.17.unfinished", ".a.json.17.tmp"]
    for name in (*hidden, "case.unfinished", "page.html.partial", "kept.json", ".kept"):
        (tmp_path / name).write_text("")
    (tmp_path / "predictions.zarr.partial").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir() if is_leftover(path)) == sorted(hidden)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".kept", "kept.json"]


def is_free(lock: Path) -> bool:
    with lock.open("r+") as file:  # another open file, as another process has
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_lock_is_held_in_its_block_and_free_again_after_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for _ in range(2):
        with files.file_lock(lock):
            assert not is_free(lock)
        assert is_free(lock)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("  no kernel\nfor sm_61"), "RuntimeError: no kernel"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("x" * 400), f"ValueError: {'x' * 288}"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
