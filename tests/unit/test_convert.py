"""A set in every store and codec holds the same slices, and finds its way back byte by byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests_support import bytes_of, write_shapes

from data_shards.problems import InputProblems, ShardFailed
from data_shards.store.config import ConvertConfig
from data_shards.store.convert import check, convert
from data_shards.store.shards import ShardSet

EVERY_FORM = (("webdataset", "zstd"), ("zarr", "raw"), ("webdataset", "jpeg2000"), ("webdataset", "png"))


# Each step starts a worker, which loads its libraries: what does not depend on bits is gone through once.
@pytest.mark.parametrize(
    ("bits", "soft_edge", "forms"), [(8, False, (("zarr", "raw"), ("webdataset", "jpeg2000"))), (16, True, EVERY_FORM)]
)
def test_through_every_form_and_back(
    tmp_path: Path, bits: int, soft_edge: bool, forms: tuple[tuple[Any, Any], ...]
) -> None:
    first = write_shapes(tmp_path / "raw", num_patients=2, slices=3, bits=bits, soft_edge=soft_edge)
    before, original = first, ShardSet.open(first)
    for store, codec in forms:
        out = tmp_path / f"{store}-{codec}"
        convert(before, out, ConvertConfig(store, codec, samples_per_shard=5, num_workers=2 if before is first else 1))
        converted = ShardSet.open(out, verify=True)
        assert converted.index["store"] == store
        for row in range(len(original)):
            mine, theirs = converted.read(row), original.read(row)
            assert mine.meta == theirs.meta
            np.testing.assert_array_equal(mine.image_HW, theirs.image_HW)
            np.testing.assert_array_equal(mine.mask_HW, theirs.mask_HW)
            if soft_edge:
                np.testing.assert_array_equal(mine.edge_2HW, theirs.edge_2HW)
        before = out
    back = tmp_path / "back"
    convert(before, back, ConvertConfig("webdataset", "raw", samples_per_shard=10, num_workers=1))
    mine, theirs = bytes_of(back), bytes_of(first)
    assert {name for name in mine if mine[name] != theirs[name]} == {"index.json"}  # it says what it came from


def test_the_same_command_again_does_nothing_and_another_is_refused(tmp_path: Path) -> None:
    source = write_shapes(tmp_path / "source", num_patients=1, slices=1)
    made = convert(source, tmp_path / "out", ConvertConfig("zarr", num_workers=1))
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert convert(source, tmp_path / "out", ConvertConfig("zarr", num_workers=1)) == made
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == times
    with pytest.raises(InputProblems, match="holds another set"):
        convert(source, tmp_path / "out", ConvertConfig("webdataset"))
    with pytest.raises(InputProblems, match="is the set that is to be converted"):
        convert(source, source, ConvertConfig("zarr"))
    with pytest.raises(InputProblems, match="codec: 'jpg'"):
        convert(source, tmp_path / "new", ConvertConfig("webdataset", "jpg"))


def test_a_damaged_source_is_named_and_once_mended_the_finished_shards_stay(tmp_path: Path) -> None:
    source = write_shapes(tmp_path / "source", num_patients=2, slices=3)
    tar = source / "shards/test-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    config = ConvertConfig("webdataset", "png", samples_per_shard=5, num_workers=1)
    assert check(source, tmp_path / "out", config).seconds is None  # the work will say why
    with pytest.raises(ShardFailed, match=r"test-000000\.tar: sample amos_\d+-axial-0000"):
        convert(source, tmp_path / "out", config)
    with pytest.raises(InputProblems, match="unfinished"):
        ShardSet.open(tmp_path / "out")
    kept = tmp_path / "out/shards.unfinished/train-000000.tar"
    made_at = kept.stat().st_mtime_ns
    tar.write_bytes(whole)
    assert 0 < check(source, tmp_path / "out", config).seconds < 10
    convert(source, tmp_path / "out", config)
    assert (tmp_path / "out/shards/train-000000.tar").stat().st_mtime_ns == made_at
    assert len(ShardSet.open(tmp_path / "out", verify=True)) == len(ShardSet.open(source))


PNG = ConvertConfig("webdataset", "png", samples_per_shard=5, num_workers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("source") / "set", num_patients=1, slices=2)


@pytest.fixture(scope="module")
def digest(source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of what PNG makes of the source."""
    out = tmp_path_factory.mktemp("clean") / "set"
    convert(source, out, PNG)
    return ShardSet.open(out).digest


@pytest.mark.parametrize("moment", ["plan.json", ".done", "index.json"])
def test_a_kill_while_the_set_is_being_named_does_not_block_the_folder(
    source: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A kill just after each step of the naming; the same call then makes the same set."""

    def killed_after(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(path: Path, *rest: Any, **options: Any) -> Any:
            done = step(path, *rest, **options)
            if Path(path).name == moment:
                raise KeyboardInterrupt
            return done

        return run

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed_after(shutil.rmtree))
        patched.setattr(Path, "unlink", killed_after(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", PNG)
    with pytest.raises(InputProblems, match="unfinished"):
        ShardSet.open(tmp_path / "out")
    convert(source, tmp_path / "out", PNG)
    assert ShardSet.open(tmp_path / "out", verify=True).digest == digest
