"""The shard set on disk: read back by us, by webdataset, by DALI and by Zarr; damage is found and named."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import SliceMeta, SliceRecord
from data_shards.store import samples_table
from data_shards.store.codecs import CODECS, EXTENSIONS, crc32c, decode_into, encode
from data_shards.store.config import CacheConfig
from data_shards.store.set_index import FORMAT_VERSION, file_crc32c, file_sha256
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet

SIZE, PER_SHARD = 24, 4
COUNTS = {"train": 10, "val": 3, "test": 1}
# store, codec, bits, soft edges
FORMATS = [*(("webdataset", codec, 8, False) for codec in CODECS), ("zarr", "zstd", 8, False)]
DEEP = [*(("webdataset", codec, 16, True) for codec in CODECS), ("zarr", "zstd", 16, True)]


def _samples(bits: int = 8, soft_edge: bool = False) -> list[SliceRecord]:
    rng = np.random.default_rng(0)
    made: list[SliceRecord] = []
    for split, count in COUNTS.items():
        for index in range(count):
            meta = SliceMeta(
                case_id=f"amos_{len(made):04d}",
                modality="CT" if index % 2 == 0 else "MR",
                axis="axial" if index % 3 else "coronal",
                slice_index=index,
                split=split,
                spacing_mm=(1.5, 0.1),
                affine=tuple(np.linspace(-1, 1, 16).tolist()),
                intensity_scale=512 / 255,
                intensity_offset=-256.0,
                label_set="amos",
                labels_present=(1, 6, 16),
                labelled=index != 1,
                source_sha256="ab" * 32,
                mask_source="expert" if index != 1 else "none",
                bits=bits,
            )
            image = rng.integers(0, 2**bits, (SIZE, SIZE)).astype(f"uint{bits}")
            mask, *edge = rng.integers(0, 17, (3, SIZE, SIZE)).astype(np.uint8)
            made.append(SliceRecord(image, mask, meta, np.stack(edge) if soft_edge else None))
    return made


def _write(out: Path, store: str = "webdataset", codec: str = "raw", bits: int = 8, soft_edge: bool = False) -> Path:
    writer = ShardWriter(out, set_format(store, codec, PER_SHARD, size=SIZE, bits=bits, soft_edge=soft_edge))
    for record in _samples(bits, soft_edge):
        writer.write(record)
    table = {"name": AMOS.name, "names": list(AMOS.names)}
    writer.finish({"label_table": table, "preprocessing": {"size": SIZE, "bits": bits}, "failed": []})
    return out


def _of(path: Path) -> tuple[str, str, int, bool]:
    """How a set was written."""
    shards = ShardSet.open(path)
    return shards.index["store"], shards.codec, shards.bits, "edge" in shards.parts


@pytest.fixture(scope="module", params=[*FORMATS, *DEEP], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("written") / "set", *request.param)


@pytest.fixture(scope="module", params=FORMATS[:-1] + DEEP[:-1], ids=str)
def tars(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("tars") / "set", *request.param)


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    return _write(tmp_path / "set")


def test_what_was_written_is_read_back(written: Path) -> None:
    shards = ShardSet.open(written, verify=True)
    assert len(shards) == sum(COUNTS.values())
    assert (shards.size, shards.label_table) == (SIZE, AMOS)
    for row, sample in enumerate(_samples(*_of(written)[2:])):
        record = shards.read(row)
        assert record.meta == sample.meta == shards.meta(row)
        assert record.image_HW.dtype == sample.image_HW.dtype
        np.testing.assert_array_equal(record.image_HW, sample.image_HW)
        np.testing.assert_array_equal(record.mask_HW, sample.mask_HW)
        np.testing.assert_array_equal(shards.read_mask(row), sample.mask_HW)
        if sample.edge_2HW is not None:
            np.testing.assert_array_equal(record.edge_2HW, sample.edge_2HW)


def test_a_shard_holds_one_split_and_no_more_than_asked_for(tmp_path: Path) -> None:
    held = [(s["file"], s["samples"]) for s in ShardSet.open(_write(tmp_path / "tars")).index["shards"]]
    assert held == [
        ("shards/train-000000.tar", 4),
        ("shards/train-000001.tar", 4),
        ("shards/train-000002.tar", 2),
        ("shards/val-000000.tar", 3),
        ("shards/test-000000.tar", 1),
    ]
    held = [(s["file"], s["samples"]) for s in ShardSet.open(_write(tmp_path / "zarr", "zarr")).index["shards"]]
    assert held[:2] == [("shards/train/image/c/0/0/0", 4), ("shards/train/mask/c/0/0/0", 4)]
    assert [samples for _, samples in held] == [4, 4, 4, 4, 2, 2, 3, 3, 1, 1]


def test_a_sample_is_found_by_offset_alone(written: Path) -> None:
    """As docs/data.md says: file, offset, bytes and checksum of each part, with no header of the container in them."""
    shards = ShardSet.open(written)
    for row, sample in enumerate(_samples(*_of(written)[2:])):
        for part, pixels in (("image", sample.image_HW), ("mask", sample.mask_HW)):
            where = shards.parts[part]
            file = written / shards.index["shards"][where.file_N[row]]["file"]
            payload = file.read_bytes()[where.offset_N[row] :][: where.bytes_N[row]]
            assert crc32c(payload) == where.crc32c_N[row]
            out = np.empty_like(pixels)
            decode_into(payload, shards.codec, out)
            np.testing.assert_array_equal(out, pixels)
            if shards.codec == "raw":
                assert payload == pixels.tobytes()


def test_any_zarr_reader_opens_a_zarr_set(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    path = _write(tmp_path / "set", "zarr", "zstd", 16, True)
    group = zarr.open_group(path / "shards", mode="r")
    of_split = _samples(16, True)[: COUNTS["train"]]
    np.testing.assert_array_equal(group["train/image"][:], np.stack([s.image_HW for s in of_split]))
    np.testing.assert_array_equal(group["train/mask"][:], np.stack([s.mask_HW for s in of_split]))
    np.testing.assert_array_equal(group["train/edge"][:], np.stack([s.edge_2HW for s in of_split]))
    assert (group["val/image"].shape, group["val/image"].dtype) == ((3, SIZE, SIZE), np.uint16)
    assert group["train/image"].shards == (PER_SHARD, SIZE, SIZE)


def test_sets_that_agree_open_as_one(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a"), _write(tmp_path / "b")
    both = ShardSet.open([first, second], verify=True)
    n = len(_samples())
    assert len(both) == 2 * n
    assert both.member_N.tolist() == [0] * n + [1] * n
    assert both.digest not in (ShardSet.open(first).digest, ShardSet.open(second).digest)
    for row in (0, 5, n - 1, n, n + 7, 2 * n - 1):
        np.testing.assert_array_equal(both.read(row).image_HW, _samples()[row % n].image_HW)
        assert both.meta(row) == _samples()[row % n].meta
    again = pickle.loads(pickle.dumps(both))
    np.testing.assert_array_equal(again.read(n + 3).mask_HW, _samples()[3].mask_HW)
    with pytest.raises(InputProblems, match=r"codec: png where .*a has raw"):
        ShardSet.open([first, _write(tmp_path / "c", codec="png")])


def test_a_set_behind_a_url_is_read_as_one_on_disk(written: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(written), f"/{tmp_path.name}", recursive=True)
    try:
        shards = ShardSet.open(f"memory://{tmp_path.name}", cache=CacheConfig(tmp_path / "cache", 10_000))
        for _ in range(2):
            for row, sample in enumerate(_samples(*_of(written)[2:])):
                np.testing.assert_array_equal(shards.read(row).image_HW, sample.image_HW)
        assert shards.digest == ShardSet.open(written).digest
        with pytest.raises(InputProblems, match=r"index\.json: missing"):
            ShardSet.open("memory://nowhere")
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)


def test_select_takes_rows_that_fit_all_conditions(tmp_path: Path) -> None:
    shards = ShardSet.open(_write(tmp_path / "set"))
    metas = [sample.meta for sample in _samples()]
    expected = [
        row
        for row, m in enumerate(metas)
        if m.split == "train" and m.modality == "CT" and m.axis == "coronal" and m.labelled
    ]
    rows = shards.select(split="train", modalities=["CT"], axes=["coronal"])
    assert rows.dtype == np.int64
    assert rows.tolist() == expected
    assert len(shards.select()) == len(metas) - 2
    assert len(shards.select(labelled_only=False)) == len(metas)
    assert len(shards.select(modalities=[])) == 0


def test_same_samples_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = _write(tmp_path / "again", *_of(written))
    for file in sorted(p for p in written.rglob("*") if p.is_file()):
        assert file.read_bytes() == (again / file.relative_to(written)).read_bytes(), file.name
    assert ShardSet.open(written).digest == ShardSet.open(again).digest


def _unpacked(content: bytes, codec: str) -> np.ndarray:
    """Pixels of a member by the tools of its format, without our code."""
    if codec == "zstd":
        from numcodecs.zstd import Zstd

        content = Zstd().decode(content)
    if codec in ("raw", "zstd"):
        return np.load(io.BytesIO(content), allow_pickle=False)
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)))


def test_webdataset_streams_the_same_pixels(tars: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(tars / f"shards/train-{number:06d}.tar") for number in range(3)]
    _, codec, *depth = _of(tars)
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(streamed) == COUNTS["train"]
    for sample, expected in zip(streamed, _samples(*depth), strict=False):
        assert sample["__key__"] == expected.meta.key
        assert SliceMeta.from_json(json.loads(sample["meta.json"])) == expected.meta
        parts = {"image": expected.image_HW, "mask": expected.mask_HW}
        if expected.edge_2HW is not None:
            parts["edge"] = expected.edge_2HW.reshape(-1, SIZE)
        for part, pixels in parts.items():
            np.testing.assert_array_equal(_unpacked(sample[f"{part}.{EXTENSIONS[codec]}"], codec), pixels)


def test_dali_reads_the_same_pixels_through_our_index(tars: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    _, codec, *depth = _of(tars)
    names = [str(tars / f"shards/train-{number:06d}.tar") for number in range(3)]

    @dali.pipeline_def(batch_size=COUNTS["train"], num_threads=1, device_id=None)
    def pipeline():
        image, mask = dali.fn.readers.webdataset(
            paths=names,
            index_paths=[name.replace(".tar", ".idx") for name in names],
            ext=[f"image.{EXTENSIONS[codec]}", f"mask.{EXTENSIONS[codec]}"],
            missing_component_behavior="error",
        )
        return image, mask

    built = pipeline()
    built.build()
    images, masks = built.run()
    for row, expected in enumerate(_samples(*depth)[: COUNTS["train"]]):
        np.testing.assert_array_equal(_unpacked(images.at(row).tobytes(), codec), expected.image_HW)
        np.testing.assert_array_equal(_unpacked(masks.at(row).tobytes(), codec), expected.mask_HW)


def test_our_index_is_the_one_dali_s_own_tool_writes(tars: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    tar = tars / "shards/train-000000.tar"
    with wds2idx.IndexCreator(str(tar), str(tmp_path / "tool.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "tool.idx").read_text() == tar.with_suffix(".idx").read_text()


def test_a_pickled_set_opens_its_files_itself(written: Path) -> None:
    shards = ShardSet.open(written)
    shards.read(0)
    content = pickle.dumps(shards)
    assert len(content) < 2000
    np.testing.assert_array_equal(pickle.loads(content).read(3).image_HW, shards.read(3).image_HW)


def _refusal(path: Path, **options: bool) -> str:
    with pytest.raises(InputProblems) as caught:
        ShardSet.open(path, **options)
    return str(caught.value)


def test_a_set_without_index_is_unfinished(spoilt: Path) -> None:
    (spoilt / "index.json").unlink()
    assert "unfinished" in _refusal(spoilt)
    assert "start the command that was making it again" in _refusal(spoilt)


def test_no_folder_is_said(tmp_path: Path) -> None:
    assert "not a folder" in _refusal(tmp_path / "nowhere")


def test_a_broken_index_is_said(spoilt: Path) -> None:
    (spoilt / "index.json").write_text('{"format_version": ')
    assert "not a shard set's index" in _refusal(spoilt)


def test_a_newer_format_is_refused(spoilt: Path) -> None:
    index = json.loads((spoilt / "index.json").read_text())
    (spoilt / "index.json").write_text(json.dumps(index | {"format_version": FORMAT_VERSION + 1}))
    assert f"format_version: {FORMAT_VERSION + 1}" in _refusal(spoilt)


def test_missing_and_truncated_files_are_all_found_at_open(spoilt: Path) -> None:
    (spoilt / "shards/train-000001.tar").unlink()
    tar = spoilt / "shards/val-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    (spoilt / "samples.arrow").unlink()
    message = _refusal(spoilt)
    assert "train-000001.tar: file: missing" in message
    assert "val-000000.tar: bytes" in message
    assert "samples.arrow: file: missing" in message


def test_a_flipped_byte_is_found_when_verified(spoilt: Path) -> None:
    tar = spoilt / "shards/train-000002.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    ShardSet.open(spoilt)
    assert "train-000002.tar: sha256" in _refusal(spoilt, verify=True)


def test_a_flipped_byte_of_a_sample_is_named_with_its_shard(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "set"
    shutil.copytree(written, path)
    shards = ShardSet.open(path)
    where = shards.parts["mask"]
    shard = path / shards.index["shards"][where.file_N[5]]["file"]
    content = bytearray(shard.read_bytes())
    content[where.offset_N[5] + where.bytes_N[5] // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard.name}: sample amos_0005-axial-0005: mask: its bytes are not those"):
        shards.read(5)
    shards.read(4)
    assert "sha256" in _refusal(path, verify=True)


def test_a_shard_cut_short_while_it_is_open_is_an_error_and_no_crash(spoilt: Path) -> None:
    shards = ShardSet.open(spoilt)
    shards.read(5)
    with (spoilt / "shards/train-000001.tar").open("r+b") as stream:
        stream.truncate(3000)
    with pytest.raises(ValueError, match=r"train-000001\.tar: sample amos_0006.*the file ends"):
        shards.read(6)


def test_a_key_too_long_for_a_plain_tar_is_never_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "set", set_format("webdataset", "raw", 4, size=SIZE, bits=8, soft_edge=False))
    record = _samples()[0]
    writer.write(replace(record, meta=replace(record.meta, case_id="a" * 72, slice_index=10**9)))
    with pytest.raises(ValueError, match="name is too long"):
        writer.finish({})


def test_a_table_with_its_words_in_another_order_is_refused(spoilt: Path) -> None:
    """Codes are read as they stand, so MR would be taken for CT."""
    import pyarrow as pa

    table = samples_table.read(spoilt / "samples.arrow")
    codes = pa.array(1 - samples_table.numbers(table, "modality"), pa.uint8())
    swapped = pa.DictionaryArray.from_arrays(codes, pa.array(["MR", "CT"]))
    table = table.set_column(table.schema.get_field_index("modality"), "modality", swapped)
    samples_table.write(table, spoilt / "other.arrow")
    (spoilt / "other.arrow").replace(spoilt / "samples.arrow")
    _claim_the_table(spoilt)
    assert "column modality: its dictionary is not CT, MR" in _refusal(spoilt)


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
    assert "not a shard set's index" in _refusal(spoilt)


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
    message = _refusal(spoilt)
    assert "train-000000.tar: samples: 2 where samples.arrow has 4" in message
    assert "train-000002.tar: samples: 4 where samples.arrow has 2" in message
    _edit_index(spoilt, lambda index: index.update(num_samples=15))
    assert "num_samples: 15 where samples.arrow has 14 rows" in _refusal(spoilt)


def test_a_tar_that_disagrees_with_the_table_is_found_when_verified(spoilt: Path, tmp_path: Path) -> None:
    """Another set's tar of the same length, with the index patched to match."""
    tar = spoilt / "shards/val-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"amos_0011", b"amos_0099"))
    _rename_member_checksums(tar)
    _edit_index(spoilt, lambda index: index["shards"][3].update(sha256=file_sha256(tar)))
    ShardSet.open(spoilt)
    assert "amos_0011-axial-0001.image: not in the tar" in _refusal(spoilt, verify=True)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "shards/../../x"])
def test_paths_that_lead_out_of_the_set_are_refused(spoilt: Path, name: str) -> None:
    _edit_index(spoilt, lambda index: index["shards"][1].update(file=name))
    assert "leads out of the set" in _refusal(spoilt)


def test_tar_members_with_path_tricks_are_refused_when_verified(spoilt: Path) -> None:
    tar = spoilt / "shards/test-000000.tar"
    with tarfile.open(tar, "a") as stream:
        for name in ("../../escape.sh", "/etc/cron.d/x"):
            stream.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link.image.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        stream.addfile(link)
    _edit_index(spoilt, lambda index: index["shards"][4].update(sha256=file_sha256(tar), bytes=tar.stat().st_size))
    message = _refusal(spoilt, verify=True)
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
    for record in _samples()[:7]:
        writer.write(record)
    del writer
    assert "unfinished" in _refusal(out)
    _write(out, store)
    assert len(ShardSet.open(out, verify=True)) == sum(COUNTS.values())


@pytest.mark.parametrize("bit", [0x01, 0x10, 0x80])
def test_a_flipped_bit_in_the_table_is_found_when_the_set_is_opened(spoilt: Path, bit: int) -> None:
    """An offset of `key` leads out of its buffer, and a split's code is another split: neither is followed."""
    file, content = spoilt / "samples.arrow", (spoilt / "samples.arrow").read_bytes()
    for at in range(len(content) // 40, len(content), len(content) // 40):
        changed = bytearray(content)
        changed[at] ^= bit
        file.write_bytes(changed)
        assert "crc32c" in _refusal(spoilt)
    file.write_bytes(content)
    _edit_index(spoilt, lambda index: index["samples"].pop("crc32c"))  # as older writers left it out
    ShardSet.open(spoilt)
    file.write_bytes(changed)
    assert "sha256" in _refusal(spoilt)


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
    assert "preprocessing.size" in _refusal(spoilt)


def test_parts_outside_their_file_are_refused(spoilt: Path) -> None:
    import pyarrow as pa

    table = samples_table.read(spoilt / "samples.arrow")
    where = table.schema.get_field_index("mask_offset")
    for offset in (-512, 2**40):
        moved = pa.array([offset, *table["mask_offset"].to_pylist()[1:]], pa.int64())
        samples_table.write(table.set_column(where, "mask_offset", moved), spoilt / "other.arrow")
        (spoilt / "other.arrow").replace(spoilt / "samples.arrow")
        _claim_the_table(spoilt)
        assert "mask_offset" in _refusal(spoilt)
