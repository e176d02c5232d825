"""What `segdiff inspect` counts, finds and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import SliceMeta, SliceRecord
from data_shards.store.contact_sheet import class_colours, overlay
from data_shards.store.inspect import format_report, inspect_shards
from data_shards.store.shard_writer import ShardWriter, set_format

SIZE = 16


def _write(
    out: Path,
    cases: list[tuple[str, str, str]],
    failed: list[dict[str, str]] | None = None,
    store: str = "webdataset",
    source: str | None = None,
) -> Path:
    """A set of (case, modality, split), two axial and one coronal slice each; masks hold 40 of liver and 60 of body."""
    writer = ShardWriter(out, set_format(store, "raw", 100, size=SIZE, bits=8, soft_edge=False))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask.ravel()[:40], mask.ravel()[40:100] = 6, 16
    for case, modality, split in cases:
        for axis, index in (("axial", 0), ("axial", 1), ("coronal", 0)):
            meta = SliceMeta(
                case,
                modality,
                axis,
                index,
                split,
                (1.0, 1.0),
                (0.0,) * 16,
                1.0,
                0.0,
                "amos",
                (6, 16),
                split != "test",
                source or f"sha256 of {case}",
                "none" if split == "test" else "expert",
            )
            writer.write(SliceRecord(mask * 9, mask, meta))
    table = {"name": AMOS.name, "names": list(AMOS.names)}
    writer.finish({"label_table": table, "preprocessing": {"size": SIZE}, "failed": failed or []})
    return out


CASES = [("a_1", "CT", "train"), ("a_2", "CT", "train"), ("a_600", "MR", "val"), ("a_3", "CT", "test")]


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
def test_counts_are_right(tmp_path: Path, store: str) -> None:
    report = inspect_shards(_write(tmp_path / "set", CASES, store=store), tmp_path / "pictures")
    assert report.ok
    assert (report.store, report.verified, report.masks) == (store, True, {"expert": 9, "none": 3})
    assert report.num_samples == 12
    assert report.slices[("train", "CT", "axial")] == 4
    assert report.slices[("val", "MR", "coronal")] == 1
    assert report.patients == {("train", "CT"): (2, 0), ("val", "MR"): (1, 0), ("test", "CT"): (0, 1)}
    assert report.pixels[("train", "CT")][[0, 6, 16]].tolist() == [6 * 156, 6 * 40, 6 * 60]
    assert report.class_slices[("train", "CT")][[5, 6, 16]].tolist() == [0, 6, 6]
    assert report.pixels[("test", "CT")].sum() == 0


def test_the_table_is_readable(tmp_path: Path) -> None:
    text = format_report(inspect_shards(_write(tmp_path / "set", CASES)))
    assert "12 slices of 16x16, 8 bits, webdataset, raw" in text
    assert "masks: 9 by expert; every checksum holds" in text
    (liver,) = (line.split() for line in text.splitlines() if " liver " in line)
    assert liver == ["6", "liver", "6", "15.62", "%", "3", "15.62", "%"]
    assert "no patient is in more than one split" in text


def test_a_patient_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    report = inspect_shards(_write(tmp_path / "set", [*CASES, ("a_1", "CT", "test")]))
    assert not report.ok
    assert report.leaking == (("a_1", ("test", "train")),)
    assert "LEAK: patient a_1" in format_report(report)


def test_the_same_image_under_two_names_is_a_leak(tmp_path: Path) -> None:
    cases = [("a_1", "CT", "train"), ("a_7", "CT", "test")]
    report = inspect_shards(_write(tmp_path / "set", cases, source="ab" * 32))
    assert report.leaking == (("a_1 = a_7", ("test", "train")),)
    assert not report.ok


def test_a_set_behind_a_url_is_inspected_too(tmp_path: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    local = _write(tmp_path / "set", CASES)
    memory.put(str(local), f"/{tmp_path.name}", recursive=True)
    try:
        remote = inspect_shards(f"memory://{tmp_path.name}", tmp_path / "pictures")
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)
    assert remote.slices == inspect_shards(local).slices
    assert remote.contact_sheet.is_file()


def test_the_histogram_shows_classes_by_their_share(tmp_path: Path) -> None:
    from PIL import Image

    report = inspect_shards(_write(tmp_path / "set", CASES))
    pixels = np.asarray(Image.open(report.histogram)).astype(int)
    # Bars of train CT, whose shares are 156, 40 and 60 of 256: the lengths fall with the logarithm of the share.
    reds = (pixels == [230, 25, 75]).all(axis=2)[30:]
    lengths = sorted(np.unique(reds.sum(axis=1)))[1:]
    assert len(lengths) == 3
    for length, share in zip(lengths, (40 / 256, 60 / 256, 156 / 256), strict=True):
        assert abs(length - 560 * (1 + np.log10(share) / 6)) <= 2


def test_volumes_that_failed_are_reported(tmp_path: Path) -> None:
    failed = [{"case_id": "a_9", "file": "imagesTr/a_9.nii.gz", "reason": "truncated file"}]
    report = inspect_shards(_write(tmp_path / "set", CASES, failed))
    assert not report.ok
    assert "a_9: imagesTr/a_9.nii.gz: truncated file" in format_report(report)


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "set", CASES)
    tar = path / "shards/train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(InputProblems, match="sha256"):
        inspect_shards(path)


def test_the_contact_sheet_shows_organs_in_their_colours(tmp_path: Path) -> None:
    from PIL import Image

    report = inspect_shards(_write(tmp_path / "set", CASES))
    assert report.contact_sheet == tmp_path / "set" / "contact_sheet.png"
    pixels = np.asarray(Image.open(report.contact_sheet)).reshape(-1, 3)
    liver = class_colours(AMOS)[6]
    assert (pixels == liver).all(axis=1).any()  # in the legend
    assert np.unique(pixels, axis=0).shape[0] > 20


def test_the_overlay_tints_organs_and_outlines_the_body() -> None:
    mask = np.zeros((12, 12), np.uint8)
    mask[2:10, 2:10] = 16
    mask[5:7, 5:7] = 6
    image = np.full((12, 12), 100, np.uint8)
    shown = overlay(image, mask, AMOS)
    colours = class_colours(AMOS)
    np.testing.assert_array_equal(shown[0, 0], [100] * 3)
    np.testing.assert_array_equal(shown[2, 5], colours[16])
    np.testing.assert_array_equal(shown[4, 4], [100] * 3)
    assert not np.array_equal(shown[5, 5], [100] * 3)
    assert len({tuple(c) for c in colours}) == AMOS.num_classes
