"""DICOM series, frames and contours that are not what they seem: read right, said, or refused; never passed over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("highdicom")
pytest.importorskip("SimpleITK")

import highdicom
from dicom_support import save, segmentation, series, structure_set
from layouts_support import CONFIG, slices, volumes
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.masks import read_case_mask
from data_shards.ingest.prepare import check, find_problems
from data_shards.ingest.volumes import UnreadableVolume, read_volume

_Volume = tuple[list[Dataset], np.ndarray, np.ndarray]
_ALL_TRAIN = replace(CONFIG, split=(1.0, 0.0, 0.0))


@pytest.fixture
def volume() -> _Volume:
    """The first volume: its slices, image and label."""
    case, _, image, label = next(iter(volumes()))
    return series(image, case), image, label


def _too_few_pixels(planes: list[Any]) -> None:
    planes[3].PixelData = planes[3].PixelData[:-200]


def _two_frames(planes: list[Any]) -> None:
    planes[3].FrameOfReferenceUID = "1.2.3"


def _two_patients(planes: list[Any]) -> None:
    planes[3].PatientID = "other"


def _without_rescale(planes: list[Any]) -> None:
    del planes[3].RescaleSlope, planes[3].RescaleIntercept


def _by_a_table(planes: list[Any]) -> None:
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [2, 0, 16], "US"
    planes[3].ModalityLUTSequence = [lut]


@pytest.mark.parametrize(
    ("spoil", "value"),
    [
        (
            _too_few_pixels,
            "slice 4 of 8 cannot be decoded: it declares more bytes than it has",
        ),
        (_without_rescale, "RescaleSlope, RescaleIntercept: stated otherwise, or not at all, in 1 of 8 images"),
        (_two_frames, "FrameOfReferenceUID: 2 in one series"),
        (_two_patients, "PatientID: 2 in one series"),
        (_by_a_table, "ModalityLUTSequence: values by a table"),
    ],
)
def test_dicom_series_that_are_not_what_they_seem(
    spoil: Callable[[list[Any]], None], value: str, tmp_path: Path
) -> None:
    case, _, image, label = next(volumes())
    planes = series(image, case)
    drawn = segmentation(planes, label)
    spoil(planes)
    save(tmp_path / "data", [*planes, drawn])
    found = [f"{one.field}: {one.value}" for one in find_problems(tmp_path / "data", tmp_path / "set", _ALL_TRAIN)]
    if not found:
        with pytest.raises(UnreadableVolume) as failed:
            slices(tmp_path / "data", split=(1.0, 0.0, 0.0))
        found = [failed.value.reason]
    assert value in found[0]


def test_contours_of_every_second_slice_are_said(tmp_path: Path) -> None:
    for number, (case, patient) in enumerate((("a", "ID-a"), ("b", "id-A"))):
        _, _, image, _ = next(volumes())
        planes = series(image, case, patient=patient)
        boxes = {"liver": [(5, 20, 5, 20, k) for k in (1, 3, 5, 7)], "spleen": [(22, 24, 5, 9, k) for k in (1, 2, 6)]}
        save(tmp_path / "data", [*planes, structure_set(planes, boxes)], first=20 * number)
    found = check(tmp_path / "data", tmp_path / "set", _ALL_TRAIN)
    assert "differ in capitals or blanks alone, and count as two patients" in found.survey.notes[0]
    notes: list[str] = []
    list(slices_of(found.cases[0], CONFIG, None, notes, found.survey.labelling))
    assert "liver has contours in one of 2 slices alone" in " ".join(notes)
    assert "spleen has contours" not in " ".join(notes)


@pytest.mark.parametrize("kind", ["SEG", "RTSTRUCT"])
@pytest.mark.parametrize("present", [slice(0, 8), slice(0, 7), slice(2, 8)])
def test_slices_at_an_end_that_labels_alone_name_are_said(kind: str, present: slice, tmp_path: Path) -> None:
    """A gap shows between slices; behind the last one nothing does."""
    case, _, image, label = next(volumes())
    label[:, :, [0, 1, 7]] = 0
    planes = series(image, case)
    boxes = {"liver": [(5, 20, 5, 20, 3)], "spleen": [(22, 24, 5, 9, 3)]}
    drawn = segmentation(planes, label) if kind == "SEG" else structure_set(planes, boxes, names_slices=True)
    save(tmp_path / "data", [*planes[present], drawn])
    (found,) = check(tmp_path / "data", tmp_path / "set", _ALL_TRAIN).cases
    said = [note for note in found.notes if "further slice" in note]
    num = 8 - len(planes[present])
    assert [note.split(":")[0] for note in said] == (
        [f"its labels were drawn on {num} further slice{'s' * (num > 1)}"] if num else []
    )


@pytest.mark.parametrize(("numbers", "is_said"), [("12121212", True), ("11112222", False), ("12345678", False)])
def test_two_scans_that_take_turns_in_one_series_are_said(numbers: str, is_said: bool, tmp_path: Path) -> None:
    case, _, image, label = next(volumes())
    planes = series(image, case)
    for plane, number in zip(planes, numbers, strict=True):
        plane.AcquisitionNumber = int(number)
    save(tmp_path / "data", [*planes, segmentation(planes, label)])
    (found,) = check(tmp_path / "data", tmp_path / "set", _ALL_TRAIN).cases
    assert any("AcquisitionNumber changes to and fro" in note for note in found.notes) == is_said


@pytest.mark.parametrize("form", ["two contours", "a keyhole", "each contour twice"])
@pytest.mark.parametrize(
    "boxes",
    [
        [(9.5, 15.5, 11.5, 15.5, 3), (10.5, 12.5, 12.5, 14.5, 3), (9.5, 15.5, 11.5, 15.5, 4)],
        [(10, 15, 12, 15, 3), (10, 13, 12, 15, 3), (10, 15, 15, 12, 4)],
    ],
    ids=["around voxels", "through the centres of the outer ones"],
)
def test_contours_become_the_voxels_that_they_enclose(
    boxes: list[tuple[float, ...]], form: str, volume: _Volume, tmp_path: Path
) -> None:
    """A box of 6 x 4 voxels with a hole of 2 x 2, on two slices. A keyhole goes to the hole and back on one line."""
    contours = structure_set(volume[0], {"Box": boxes})
    if form == "each contour twice":
        found = contours.ROIContourSequence[0].ContourSequence
        found.extend(copy.deepcopy(list(found)))
    if form == "a keyhole":
        outer, hole, _ = found = contours.ROIContourSequence[0].ContourSequence
        around, inside = list(outer.ContourData), list(hole.ContourData)
        outer.ContourData = [*around, *around[:3], *inside, *inside[:3]]
        del found[1]
    save(tmp_path / "data", [*volume[0], contours])
    expected = np.zeros(volume[1].shape, bool)
    expected[10:16, 12:16, 3:5] = True
    expected[11:13, 13:15, 3] = False
    preparation = check(tmp_path / "data", tmp_path / "set", CONFIG)
    assert preparation.survey.labelling.table.names == ("background", "Box", "body")
    (case,) = preparation.cases
    mask = read_case_mask(case, read_volume(case.image), "amos", None, preparation.survey.labelling)
    assert mask.volume is not None
    np.testing.assert_array_equal(mask.volume.voxels_IJK == 1, expected)


@pytest.mark.parametrize(("second", "is_said"), [((13, 19), True), ((11, 14), False), ((16, 19), False)])
def test_contours_that_cross_are_said(second: tuple[int, int], is_said: bool, volume: _Volume, tmp_path: Path) -> None:
    """What two outlines share became background; a hole, and an area beside the other, are as they should be."""
    boxes = [(8.5, 15.5, 10.5, 15.5, 3), (second[0] - 0.5, second[1] + 0.5, 11.5, 14.5, 3)]
    save(tmp_path / "data", [*volume[0], structure_set(volume[0], {"Box": boxes})])
    preparation = check(tmp_path / "data", tmp_path / "set", _ALL_TRAIN)
    notes: list[str] = []
    list(slices_of(preparation.cases[0], CONFIG, None, notes, preparation.survey.labelling))
    assert any("Box has contours that cross one another in 1 slice:" in note for note in notes) == is_said


def test_regions_without_closed_contours_are_said(volume: _Volume, tmp_path: Path) -> None:
    contours = structure_set(volume[0], {"Box": [(9, 15, 11, 15, 3)], "Line": [(1, 4, 1, 4, 3)]})
    contours.ROIContourSequence[1].ContourSequence[0].ContourGeometricType = "OPEN_PLANAR"
    save(tmp_path / "data", [*volume[0], contours])
    (case,) = check(tmp_path / "data", tmp_path / "set", CONFIG).cases
    assert [note.rpartition(" ")[2] for note in case.notes] == ["Line"]


def test_images_compressed_with_loss_are_said(volume: _Volume, tmp_path: Path) -> None:
    found, _, label = volume
    labels = segmentation(found, label)
    found[2].LossyImageCompression = "01"
    save(tmp_path / "data", [*found, labels])
    (case,) = check(tmp_path / "data", tmp_path / "set", CONFIG).cases
    assert [note.split(" (")[0] for note in case.notes] == ["its images were compressed with loss"]


def _frame_without_rescale(frames: Any) -> None:
    del frames[3].PixelValueTransformationSequence


def _frame_of_atomic_numbers(frames: Any) -> None:
    frames[3].PixelValueTransformationSequence[0].RescaleType = "Z_EFF"


@pytest.mark.parametrize(
    ("spoil", "value"),
    [
        (_frame_without_rescale, "stated otherwise, or not at all, in 1 of 8 images"),
        (_frame_of_atomic_numbers, "'Z_EFF' of a CT, not HU"),
    ],
)
def test_frames_of_doubtful_values_are_refused(spoil: Any, value: str, volume: _Volume, tmp_path: Path) -> None:
    found, _, label = volume
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(found, generate_uid(), 3, generate_uid(), 1)
    spoil(enhanced.PerFrameFunctionalGroupsSequence)
    save(tmp_path / "data", [enhanced, segmentation(found, label)])
    (problem,) = find_problems(tmp_path / "data", tmp_path / "set", CONFIG)
    assert value in problem.value
