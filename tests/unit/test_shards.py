"""The shard set on disk: read back by us, by webdataset, by DALI and by Zarr."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shards_support import COUNTS, PER_SHARD, SIZE, format_of, refusal, samples, write_set
from tests_support import write_shapes

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import SliceMeta
from data_shards.store.codecs import CODECS, EXTENSIONS, crc32c, decode_into
from data_shards.store.config import CacheConfig
from data_shards.store.patient_overlap import overlap_notes
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet

# store, codec, bits, soft edges
FORMATS = [*(("webdataset", codec, 8, False) for codec in CODECS), ("zarr", "zstd", 8, False)]
DEEP = [*(("webdataset", codec, 16, True) for codec in CODECS), ("zarr", "zstd", 16, True)]


@pytest.fixture(scope="module", params=[*FORMATS, *DEEP], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("written") / "set", *request.param)


@pytest.fixture(scope="module", params=FORMATS[:-1] + DEEP[:-1], ids=str)
def tars(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("tars") / "set", *request.param)


def test_what_was_written_is_read_back(written: Path) -> None:
    shards = ShardSet.open(written, verify=True)
    assert len(shards) == sum(COUNTS.values())
    assert (shards.size, shards.label_table) == (SIZE, AMOS)
    for row, sample in enumerate(samples(*format_of(written)[2:])):
        record = shards.read(row)
        assert record.meta == sample.meta == shards.meta(row)
        assert record.image_HW.dtype == sample.image_HW.dtype
        np.testing.assert_array_equal(record.image_HW, sample.image_HW)
        np.testing.assert_array_equal(record.mask_HW, sample.mask_HW)
        np.testing.assert_array_equal(shards.read_mask(row), sample.mask_HW)
        if sample.edge_2HW is not None:
            np.testing.assert_array_equal(record.edge_2HW, sample.edge_2HW)


def test_a_shard_holds_one_split_and_no_more_than_asked_for(tmp_path: Path) -> None:
    held = [(s["file"], s["samples"]) for s in ShardSet.open(write_set(tmp_path / "tars")).index["shards"]]
    assert held == [
        ("shards/train-000000.tar", 4),
        ("shards/train-000001.tar", 4),
        ("shards/train-000002.tar", 2),
        ("shards/val-000000.tar", 3),
        ("shards/test-000000.tar", 1),
    ]
    held = [(s["file"], s["samples"]) for s in ShardSet.open(write_set(tmp_path / "zarr", "zarr")).index["shards"]]
    assert held[:2] == [("shards/train/image/c/0/0/0", 4), ("shards/train/mask/c/0/0/0", 4)]
    assert [samples for _, samples in held] == [4, 4, 4, 4, 2, 2, 3, 3, 1, 1]


def test_a_sample_is_found_by_offset_alone(written: Path) -> None:
    """As docs/data.md says: file, offset, bytes and checksum of each part, with no header of the container in them."""
    shards = ShardSet.open(written)
    for row, sample in enumerate(samples(*format_of(written)[2:])):
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
    path = write_set(tmp_path / "set", "zarr", "zstd", 16, True)
    group = zarr.open_group(path / "shards", mode="r")
    of_split = samples(16, True)[: COUNTS["train"]]
    np.testing.assert_array_equal(group["train/image"][:], np.stack([s.image_HW for s in of_split]))
    np.testing.assert_array_equal(group["train/mask"][:], np.stack([s.mask_HW for s in of_split]))
    np.testing.assert_array_equal(group["train/edge"][:], np.stack([s.edge_2HW for s in of_split]))
    assert (group["val/image"].shape, group["val/image"].dtype) == ((3, SIZE, SIZE), np.uint16)
    assert group["train/image"].shards == (PER_SHARD, SIZE, SIZE)


def test_sets_that_agree_open_as_one(tmp_path: Path) -> None:
    first, second = write_set(tmp_path / "a"), write_set(tmp_path / "b")
    both = ShardSet.open([first, second], verify=True)
    n = len(samples())
    assert len(both) == 2 * n
    assert both.member_N.tolist() == [0] * n + [1] * n
    assert both.digest not in (ShardSet.open(first).digest, ShardSet.open(second).digest)
    for row in (0, 5, n - 1, n, n + 7, 2 * n - 1):
        np.testing.assert_array_equal(both.read(row).image_HW, samples()[row % n].image_HW)
        assert both.meta(row) == samples()[row % n].meta
    again = pickle.loads(pickle.dumps(both))
    np.testing.assert_array_equal(again.read(n + 3).mask_HW, samples()[3].mask_HW)
    with pytest.raises(InputProblems, match=r"codec: png where .*a has raw"):
        ShardSet.open([first, write_set(tmp_path / "c", codec="png")])


@pytest.mark.parametrize("of_name", [True, False], ids=["name", "file"])
def test_patients_that_one_set_trains_on_and_another_holds_out_are_named(tmp_path: Path, of_name: bool) -> None:
    first = ShardSet.open(write_shapes(tmp_path / "a", slices=1))
    writer = ShardWriter(tmp_path / "b", set_format("webdataset", "raw", 10, size=first.size, bits=8, soft_edge=False))
    for row in first.select(split="val").tolist()[:2]:
        record = first.read(row)
        changed = {"source_sha256": "0" * 64} if of_name else {"case_id": f"other{row}"}
        writer.write(replace(record, meta=replace(record.meta, split="train", **changed)))
    names = ("label_table", "preprocessing")
    writer.finish({name: first.index[name] for name in names})
    [note] = overlap_notes(ShardSet.open([first.path, tmp_path / "b"]))
    assert note.startswith(f"{tmp_path / 'b'} trains on 2 patients of {first.path}'s val split (amos_0101, amos_0607)")
    assert overlap_notes(ShardSet.open([first.path, write_shapes(tmp_path / "c", slices=1)])) == []


def test_cases_of_one_name_in_two_sets_are_one_patient_only_if_they_are_of_one_file(tmp_path: Path) -> None:
    """case_001 of two archives are two people; a slice of the same file, or an image made of a patient's mask, is not
    another patient."""

    def write(name: str, *cases: tuple[str, str], patient: str | None = None) -> Path:
        writer = ShardWriter(tmp_path / name, set_format("webdataset", "raw", 10, size=SIZE, bits=8, soft_edge=False))
        for (case, file), record in zip(sorted(cases), samples(), strict=False):
            meta = replace(record.meta, case_id=case, source_sha256=file * 64, slice_index=0)
            writer.write(replace(record, meta=meta))
        source = {} if patient is None else {case: {"patient": patient} for case, _ in cases}
        table = {"name": AMOS.name, "names": list(AMOS.names)}
        preprocessing = {"size": SIZE, "bits": 8}
        writer.finish({"label_table": table, "preprocessing": preprocessing, "source": source})
        return tmp_path / name

    first, other = write("a", ("c1", "a"), ("c2", "b")), write("b", ("c1", "c"), ("c2", "b"))
    again, made = write("c", ("c1", "c")), write("d", ("c1_ct_0", "e"), ("c1_ct_1", "f"), patient="c1")
    assert ShardSet.open(first).patients([0, 1]) == ["c1", "c2"]
    shards = ShardSet.open([first, other, again, made])
    assert shards.patients(range(7)) == ["c1", "c2", "c1 (set 2)", "c2", "c1 (set 2)", "c1", "c1"]
    assert shards.patients([2]) == ["c1 (set 2)"]


def test_a_set_behind_a_url_is_read_as_one_on_disk(written: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(written), f"/{tmp_path.name}", recursive=True)
    try:
        shards = ShardSet.open(f"memory://{tmp_path.name}", cache=CacheConfig(tmp_path / "cache", 10_000))
        for _ in range(2):
            for row, sample in enumerate(samples(*format_of(written)[2:])):
                np.testing.assert_array_equal(shards.read(row).image_HW, sample.image_HW)
        assert shards.digest == ShardSet.open(written).digest
        with pytest.raises(InputProblems, match=r"index\.json: missing"):
            ShardSet.open("memory://nowhere")
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)


def test_select_takes_rows_that_fit_all_conditions(tmp_path: Path) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set"))
    metas = [sample.meta for sample in samples()]
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
    again = write_set(tmp_path / "again", *format_of(written))
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
    _, codec, *depth = format_of(tars)
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(streamed) == COUNTS["train"]
    for sample, expected in zip(streamed, samples(*depth), strict=False):
        assert sample["__key__"] == expected.meta.key
        assert SliceMeta.from_json(json.loads(sample["meta.json"])) == expected.meta
        parts = {"image": expected.image_HW, "mask": expected.mask_HW}
        if expected.edge_2HW is not None:
            parts["edge"] = expected.edge_2HW.reshape(-1, SIZE)
        for part, pixels in parts.items():
            np.testing.assert_array_equal(_unpacked(sample[f"{part}.{EXTENSIONS[codec]}"], codec), pixels)


def test_dali_reads_the_same_pixels_through_our_index(tars: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    _, codec, *depth = format_of(tars)
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
    for row, expected in enumerate(samples(*depth)[: COUNTS["train"]]):
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
    assert "sha256" in refusal(path, verify=True)
