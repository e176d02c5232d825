"""DICOM SEG of the type LABELMAP."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("highdicom")

import highdicom
from dicom_support import save, segmentation, series
from layouts_support import slices, volumes

from data_shards.ingest.volumes import UnreadableVolume
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from segdiff_dist.painting.masks import open_mask


def test_a_label_map_with_values_of_no_segment_is_refused(tmp_path: Path) -> None:
    """As labels and as a mask to paint. They were background without a word."""
    case, _, image, label = next(iter(volumes()))
    found = series(image, case)
    segments = segmentation(found, label, "LABELMAP")
    segments.PixelData = bytes([7]) + segments.PixelData[1:]
    save(tmp_path / "data", [*found, segments])
    with pytest.raises(UnreadableVolume, match=r"values of no segment: \[7\]"):
        slices(tmp_path / "data")
    segments.save_as(tmp_path / "mask.dcm")
    with pytest.raises(InputProblems, match=r"values of no segment: \[7\]"):
        open_mask(tmp_path / "mask.dcm").read(AMOS, None, "refuse")


def test_a_label_map_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each of its segments."""
    case, _, image, label = next(iter(volumes()))
    found = series(image, case)
    segments = segmentation(found, label, "LABELMAP")
    save(tmp_path / "data", [*found, segments])
    decoded, decode = [], highdicom.image.decode_frame
    monkeypatch.setattr(highdicom.image, "decode_frame", lambda *a, **k: decoded.append(k["index"]) or decode(*a, **k))
    records = slices(tmp_path / "data", split=(1.0, 0.0, 0.0))
    assert {int(i) for one in records for i in one.mask_HW.ravel()} >= {1, 2}
    assert sorted(decoded) == list(range(segments.NumberOfFrames))
