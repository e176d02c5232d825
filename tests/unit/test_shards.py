"""The shard set on disk: read back by us, by webdataset and by DALI; damage is found and named."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import SliceMeta
from data_shards.shards import FORMAT_VERSION, ShardSet, ShardWriter, encode

SIZE, PER_SHARD = 24, 4
COUNTS = {"train": 10, "val": 3, "test": 1}


def _samples() -> list[tuple[SliceMeta, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    made: list[tuple[SliceMeta, np.ndarray, np.ndarray]] = []
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
            )
            made.append((meta, *rng.integers(0, 17, (2, SIZE, SIZE)).astype(np.uint8)))
    return made


def _write(out: Path, codec: str) -> Path:
    writer = ShardWriter(out, codec, PER_SHARD)
    for meta, image, mask in _samples():
        writer.write(meta, encode(image, codec), encode(mask, codec))
    table = {"name": AMOS.name, "names": list(AMOS.names)}
    writer.finish({"label_table": table, "preprocessing": {"size": SIZE}, "failed": []})
    return out


@pytest.fixture(scope="module", params=["raw", "png"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp(request.param) / "set", request.param)


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    return _write(tmp_path / "set", "raw")


def test_what_was_written_is_read_back(written: Path) -> None:
    shards = ShardSet.open(written, verify=True)
    assert len(shards) == sum(COUNTS.values())
    assert (shards.size, shards.label_table) == (SIZE, AMOS)
    for row, (meta, image, mask) in enumerate(_samples()):
        record = shards.read(row)
        assert record.meta == meta == shards.meta(row)
        np.testing.assert_array_equal(record.image_HW, image)
        np.testing.assert_array_equal(record.mask_HW, mask)
        np.testing.assert_array_equal(shards.read_mask(row), mask)


def test_a_shard_holds_one_split_and_no_more_than_asked_for(written: Path) -> None:
    shards = ShardSet.open(written)
    held = [(s["file"], s["samples"]) for s in shards.index["shards"]]
    assert held == [
        ("shards/train-000000.tar", 4),
        ("shards/train-000001.tar", 4),
        ("shards/train-000002.tar", 2),
        ("shards/val-000000.tar", 3),
        ("shards/test-000000.tar", 1),
    ]


def test_raw_pairs_are_the_stored_bytes(written: Path) -> None:
    shards = ShardSet.open(written)
    for row, (_, image, mask) in enumerate(_samples()):
        for payload, pixels in zip(shards.raw_pair(row), (image, mask), strict=True):
            assert payload.dtype == np.uint8
            assert payload.ndim == 1
            if shards.codec == "raw":
                np.testing.assert_array_equal(payload, pixels.ravel())
            else:
                assert payload.tobytes() == encode(pixels, "png")


def test_select_takes_rows_that_fit_all_conditions(written: Path) -> None:
    shards = ShardSet.open(written)
    metas = [meta for meta, _, _ in _samples()]
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
    again = _write(tmp_path / "again", ShardSet.open(written).codec)
    for file in sorted(p for p in written.rglob("*") if p.is_file()):
        assert file.read_bytes() == (again / file.relative_to(written)).read_bytes(), file.name
    assert ShardSet.open(written).digest == ShardSet.open(again).digest


def test_webdataset_streams_the_same_pixels(written: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(written / f"shards/train-{number:06d}.tar") for number in range(3)]
    extension = "npy" if ShardSet.open(written).codec == "raw" else "png"
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(streamed) == COUNTS["train"]
    for sample, (meta, image, mask) in zip(streamed, _samples(), strict=False):
        assert sample["__key__"] == meta.key
        assert SliceMeta.from_json(json.loads(sample["meta.json"])) == meta
        for name, pixels in (("image", image), ("mask", mask)):
            content = io.BytesIO(sample[f"{name}.{extension}"])
            if extension == "npy":
                np.testing.assert_array_equal(np.load(content, allow_pickle=False), pixels)
            else:
                from PIL import Image

                np.testing.assert_array_equal(np.asarray(Image.open(content)), pixels)


def test_dali_reads_the_same_pixels_through_our_index(written: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    codec = ShardSet.open(written).codec
    extension = "npy" if codec == "raw" else "png"
    tars = [str(written / f"shards/train-{number:06d}.tar") for number in range(3)]

    @dali.pipeline_def(batch_size=COUNTS["train"], num_threads=1, device_id=None)
    def pipeline():
        image, mask = dali.fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.replace(".tar", ".idx") for tar in tars],
            ext=[f"image.{extension}", f"mask.{extension}"],
            missing_component_behavior="error",
        )
        if codec == "png":
            gray = dali.types.GRAY
            return tuple(dali.fn.decoders.image(x, device="cpu", output_type=gray) for x in (image, mask))
        return tuple(dali.fn.decoders.numpy(x) for x in (image, mask))

    built = pipeline()
    built.build()
    images, masks = (output.as_array().reshape(-1, SIZE, SIZE) for output in built.run())
    for row, (_, image, mask) in enumerate(_samples()[: COUNTS["train"]]):
        np.testing.assert_array_equal(images[row], image)
        np.testing.assert_array_equal(masks[row], mask)


def test_our_index_is_the_one_dali_s_own_tool_writes(written: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    tar = written / "shards/train-000000.tar"
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
    assert "same `segdiff prepare` command" in _refusal(spoilt)


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
    (spoilt / "samples.parquet").unlink()
    message = _refusal(spoilt)
    assert "train-000001.tar: file: missing" in message
    assert "val-000000.tar: bytes" in message
    assert "samples.parquet: file: missing" in message


def test_a_flipped_byte_is_found_when_verified(spoilt: Path) -> None:
    tar = spoilt / "shards/train-000002.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    ShardSet.open(spoilt)
    assert "train-000002.tar: sha256" in _refusal(spoilt, verify=True)


def test_an_undecodable_sample_is_named_with_its_shard(tmp_path: Path) -> None:
    path = _write(tmp_path / "set", "png")
    shards = ShardSet.open(path)
    offset, length = (shards.samples[name][5].as_py() for name in ("image_offset", "image_bytes"))
    tar = path / "shards/train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[offset : offset + length] = bytes(length)
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000001\.tar: sample amos_0005-axial-0005"):
        shards.read(5)


def test_a_writer_that_was_killed_leaves_an_unfinished_set_that_can_be_written_again(tmp_path: Path) -> None:
    out = tmp_path / "set"
    writer = ShardWriter(out, "raw", PER_SHARD)
    for meta, image, mask in _samples()[:7]:
        writer.write(meta, encode(image, "raw"), encode(mask, "raw"))
    del writer
    assert "unfinished" in _refusal(out)
    _write(out, "raw")
    assert len(ShardSet.open(out, verify=True)) == sum(COUNTS.values())
    shutil.rmtree(out)
