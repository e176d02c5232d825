"""Shard sets that are unfinished, damaged or forged: what is found, when, and in which words."""

from __future__ import annotations

import json
import tarfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards_support import COUNTS, PER_SHARD, SIZE, refusal, samples, write_set

from data_shards.problems import InputProblems
from data_shards.store import samples_table
from data_shards.store.codecs import decode_into, encode
from data_shards.store.set_index import NEWEST_VERSION, file_crc32c, file_sha256
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def test_a_set_without_index_is_unfinished(spoilt: Path) -> None:
    (spoilt / "index.json").unlink()
    assert "unfinished" in refusal(spoilt)
    assert "start the command that made it again" in refusal(spoilt)


def test_no_folder_is_said(tmp_path: Path) -> None:
    for name in ("nowhere", "x" * 5000):
        assert "not a folder" in refusal(tmp_path / name)


def test_a_broken_index_is_said(spoilt: Path) -> None:
    (spoilt / "index.json").write_text('{"format_version": ')
    assert "not a shard set's index" in refusal(spoilt)


def test_a_newer_format_is_refused(spoilt: Path) -> None:
    index = json.loads((spoilt / "index.json").read_text())
    (spoilt / "index.json").write_text(json.dumps(index | {"format_version": NEWEST_VERSION + 1}))
    assert f"format_version: {NEWEST_VERSION + 1}" in refusal(spoilt)


def test_missing_and_truncated_files_are_all_found_at_open(spoilt: Path) -> None:
    (spoilt / "shards/train-000001.tar").unlink()
    tar = spoilt / "shards/val-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    (spoilt / "samples.arrow").unlink()
    message = refusal(spoilt)
    assert "train-000001.tar: file: missing" in message
    assert "val-000000.tar: bytes" in message
    assert "samples.arrow: file: missing" in message


def test_a_flipped_byte_is_found_when_verified(spoilt: Path) -> None:
    tar = spoilt / "shards/train-000002.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    ShardSet.open(spoilt)
    assert "train-000002.tar: sha256" in refusal(spoilt, verify=True)


def test_a_shard_cut_short_while_it_is_open_is_an_error_and_no_crash(spoilt: Path) -> None:
    shards = ShardSet.open(spoilt)
    shards.read(5)
    with (spoilt / "shards/train-000001.tar").open("r+b") as stream:
        stream.truncate(3000)
    with pytest.raises(ValueError, match=r"train-000001\.tar: sample amos_0006.*the file ends"):
        shards.read(6)


def test_a_key_too_long_for_a_plain_tar_is_never_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "set", set_format("webdataset", "raw", 4, size=SIZE, bits=8, soft_edge=False))
    record = samples()[0]
    writer.write(replace(record, meta=replace(record.meta, case_id="a" * 72, slice_index=10**9)))
    with pytest.raises(ValueError, match="name is too long"):
        writer.finish({})


def test_a_table_with_its_words_in_another_order_is_refused(spoilt: Path) -> None:
    """Codes are read as they are, so MR would be taken for CT."""
    import pyarrow as pa

    table = samples_table.read(spoilt / "samples.arrow")
    codes = pa.array(1 - samples_table.numbers(table, "modality"), pa.uint8())
    swapped = pa.DictionaryArray.from_arrays(codes, pa.array(["MR", "CT"]))
    table = table.set_column(table.schema.get_field_index("modality"), "modality", swapped)
    samples_table.write(table, spoilt / "other.arrow")
    (spoilt / "other.arrow").replace(spoilt / "samples.arrow")
    _claim_the_table(spoilt)
    assert "column modality: its dictionary is not that of a set's modalities" in refusal(spoilt)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("num_samples"),
        lambda index: index.pop("store"),
        lambda index: index.update(codec="lz4"),
        lambda index: index.update(format_version=2.9),
        lambda index: index["preprocessing"].pop("size"),
        lambda index: index["shards"][0].pop("parts"),
        lambda index: index["shards"][0].update(bytes="many"),
        lambda index: index["label_table"].update(names=["spleen"]),
    ],
)
def test_an_index_that_lacks_something_is_refused_in_words(spoilt: Path, change: Callable[[Any], Any]) -> None:
    _edit_index(spoilt, change)
    assert "not a shard set's index" in refusal(spoilt)


def _claim_the_table(path: Path) -> None:
    """Have index.json say what samples.arrow is now, as whoever forges a set would."""
    file = path / "samples.arrow"
    about = {"bytes": file.stat().st_size, "sha256": file_sha256(file), "crc32c": file_crc32c(file)}
    _edit_index(path, lambda index: index["samples"].update(about))


def _edit_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((path / "index.json").read_text())
    change(index)
    (path / "index.json").write_text(json.dumps(index))


def test_an_index_that_disagrees_with_its_shards_is_refused(spoilt: Path) -> None:
    def swap(index: dict[str, Any]) -> None:
        index["shards"][0]["samples"], index["shards"][2]["samples"] = 2, 4

    _edit_index(spoilt, swap)
    message = refusal(spoilt)
    assert "train-000000.tar: samples: 2 where samples.arrow has 4" in message
    assert "train-000002.tar: samples: 4 where samples.arrow has 2" in message
    _edit_index(spoilt, lambda index: index.update(num_samples=15))
    assert "num_samples: 15 where samples.arrow has 14 rows" in refusal(spoilt)


def test_a_tar_that_disagrees_with_the_table_is_found_when_verified(spoilt: Path, tmp_path: Path) -> None:
    """Another set's tar of the same length, with the index patched to match."""
    tar = spoilt / "shards/val-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"amos_0011", b"amos_0099"))
    _rename_member_checksums(tar)
    _edit_index(spoilt, lambda index: index["shards"][3].update(sha256=file_sha256(tar)))
    ShardSet.open(spoilt)
    assert "amos_0011-axial-0001.image: not in the tar" in refusal(spoilt, verify=True)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "shards/../../x"])
def test_paths_that_lead_out_of_the_set_are_refused(spoilt: Path, name: str) -> None:
    _edit_index(spoilt, lambda index: index["shards"][1].update(file=name))
    assert "leads out of the set" in refusal(spoilt)


def test_a_name_that_is_too_long_for_a_file_is_missing(spoilt: Path) -> None:
    _edit_index(spoilt, lambda index: index["shards"][1].update(file=5000 * "x"))
    assert "file: missing" in refusal(spoilt)


def test_tar_members_with_path_tricks_are_refused_when_verified(spoilt: Path) -> None:
    tar = spoilt / "shards/test-000000.tar"
    with tarfile.open(tar, "a") as stream:
        for name in ("../../escape.sh", "/etc/cron.d/x"):
            stream.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link.image.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        stream.addfile(link)
    _edit_index(spoilt, lambda index: index["shards"][4].update(sha256=file_sha256(tar), bytes=tar.stat().st_size))
    message = refusal(spoilt, verify=True)
    assert "'../../escape.sh' is a path" in message
    assert "'/etc/cron.d/x' is a path" in message
    assert "'link.image.npy' is not a plain file" in message


def _rename_member_checksums(tar: Path) -> None:
    """Put the header checksums right after names were changed in place (ustar: the sum of the header's bytes)."""
    content = bytearray(tar.read_bytes())
    for start in range(0, len(content), 512):
        if content[start + 257 : start + 262] == b"ustar":
            header = bytearray(content[start : start + 512])
            header[148:156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    tar.write_bytes(content)


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
def test_a_writer_that_was_killed_leaves_an_unfinished_set_that_can_be_written_again(
    tmp_path: Path, store: str
) -> None:
    out = tmp_path / "set"
    writer = ShardWriter(out, set_format(store, "raw", PER_SHARD, size=SIZE, bits=8, soft_edge=False))
    for record in samples()[:7]:
        writer.write(record)
    del writer
    assert "unfinished" in refusal(out)
    write_set(out, store)
    assert len(ShardSet.open(out, verify=True)) == sum(COUNTS.values())


@pytest.mark.parametrize("bit", [0x01, 0x10, 0x80])
def test_a_flipped_bit_in_the_table_is_found_when_the_set_is_opened(spoilt: Path, bit: int) -> None:
    """An offset of `key` leads out of its buffer, and a split's code is another split: neither is followed."""
    file, content = spoilt / "samples.arrow", (spoilt / "samples.arrow").read_bytes()
    for at in range(len(content) // 40, len(content), len(content) // 40):
        changed = bytearray(content)
        changed[at] ^= bit
        file.write_bytes(changed)
        assert "crc32c" in refusal(spoilt)
    file.write_bytes(content)
    _edit_index(spoilt, lambda index: index["samples"].pop("crc32c"))  # as older writers left it out
    ShardSet.open(spoilt)
    file.write_bytes(changed)
    assert "sha256" in refusal(spoilt)


def test_a_forged_table_is_refused_or_read_but_ends_no_process(spoilt: Path) -> None:
    """Whoever forges a set makes the checksums fit: then the values themselves must not lead anywhere."""
    rng = np.random.default_rng(0)
    content = (spoilt / "samples.arrow").read_bytes()
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        for at in rng.integers(0, len(content), rng.integers(1, 4)):
            changed[at] = rng.integers(0, 256)
        (spoilt / "samples.arrow").write_bytes(changed)
        _claim_the_table(spoilt)
        try:
            opened = ShardSet.open(spoilt)
        except InputProblems:
            refused += 1
            continue
        opened.select(split="train", modalities=["CT"])
        for row in range(len(opened)):
            opened.key(row)
            with suppress(ValueError):  # names shard and sample
                opened.read(row)
    assert refused > 30


def test_a_frame_that_unpacks_to_more_than_the_pixels_is_refused_before_it_is() -> None:
    from numcodecs.zstd import Zstd

    out = np.empty((SIZE, SIZE), np.uint8)
    bomb = Zstd(level=19).encode(bytes(200_000_000))
    assert len(bomb) < 10_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="200,000,000 bytes"):
        decode_into(bomb, "zstd", out)
    streamed = bomb[:4] + bytes([bomb[4] & 0x1F]) + b"\x88" + bomb[9:]  # its length left out, a window instead
    with pytest.raises(ValueError, match="zstd frame"):
        decode_into(streamed, "zstd", out)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("codec", ["png", "jpeg2000"])
def test_a_picture_larger_than_the_slices_is_refused_before_it_is_decoded(codec: str) -> None:
    large = encode(np.zeros((4000, 4000), np.uint8), codec)
    tracemalloc.start()
    with pytest.raises(ValueError, match="4000 x 4000"):
        decode_into(large, codec, np.empty((SIZE, SIZE), np.uint8))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("size", [0, -1, 300_000, True, 1.5])
def test_absurd_sizes_are_refused(spoilt: Path, size: object) -> None:
    _edit_index(spoilt, lambda index: index["preprocessing"].update(size=size))
    assert "preprocessing.size" in refusal(spoilt)


def test_parts_outside_their_file_are_refused(spoilt: Path) -> None:
    import pyarrow as pa

    table = samples_table.read(spoilt / "samples.arrow")
    where = table.schema.get_field_index("mask_offset")
    for offset in (-512, 2**40):
        moved = pa.array([offset, *table["mask_offset"].to_pylist()[1:]], pa.int64())
        samples_table.write(table.set_column(where, "mask_offset", moved), spoilt / "other.arrow")
        (spoilt / "other.arrow").replace(spoilt / "samples.arrow")
        _claim_the_table(spoilt)
        assert "mask_offset" in refusal(spoilt)
