"""DICOM series give the slices of the same volumes as NIfTI; doubtful ones are refused; no patient is named."""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

pytest.importorskip("highdicom")
pytest.importorskip("SimpleITK")

import highdicom
from dicom_support import CLASSES, SECRETS, read, save, segmentation, series, write_dicom
from layouts_support import CASES, CONFIG, LIVER, slices, volumes, write_amos
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.dicom_files import digest
from data_shards.ingest.prepare import PrepareConfig, check, find_problems
from data_shards.ingest.volumes import UnreadableVolume
from data_shards.records import SliceRecord
from segdiff_dist.cli import main

_Volume = tuple[list[Dataset], np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def of_amos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[SliceRecord]]:
    """By case."""
    root = tmp_path_factory.mktemp("amos") / "data"
    write_amos(root)
    found: dict[str, list[SliceRecord]] = {}
    for one in slices(root):
        found.setdefault(one.meta.case_id, []).append(one)
    return found


@pytest.fixture
def volume() -> _Volume:
    """The first volume: its slices, image and label."""
    case, _, image, label = next(iter(volumes()))
    return series(image, case), image, label


def _assert_same(found: list[SliceRecord], wanted: list[SliceRecord]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.image_HW, theirs.image_HW)
        np.testing.assert_array_equal(ours.mask_HW, theirs.mask_HW)
        assert ours.meta.affine == pytest.approx(theirs.meta.affine, abs=1e-4)
        assert (ours.meta.axis, ours.meta.slice_index) == (theirs.meta.axis, theirs.meta.slice_index)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_series_with_seg_give_the_slices_of_the_same_volumes_in_nifti(
    kind: str, of_amos: dict[str, list[SliceRecord]], tmp_path: Path
) -> None:
    """File names say nothing; slope and intercept differ from slice to slice; patients keep to one split."""
    uids = write_dicom(tmp_path / "data", kind)
    found = slices(tmp_path / "data", labels="amos")
    splits = {}
    for uid, (case, *_) in zip(uids, CASES, strict=True):
        ours = [one for one in found if one.meta.case_id == f"dcm-{digest(uid)}"]
        _assert_same(ours, of_amos[case])
        splits[case] = ours[0].meta.split
    assert splits["p1_1"] == splits["p1_2"]
    assert set(splits.values()) == {"train", "val", "test"}
    assert check(tmp_path / "data", tmp_path / "set", CONFIG).survey.labelling.table.names[1:3] == ("liver", "spleen")


def test_no_patient_is_in_a_set_or_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uids = write_dicom(tmp_path / "data")
    save(tmp_path / "data/Mustermann", series(np.zeros((8, 8, 1), np.int16), "scout"), first=90)
    settings = "--prepare.size 32 --prepare.spacing-mm 4 --prepare.axes axial --prepare.num-workers 1"
    command = ["prepare", str(tmp_path / "data"), str(tmp_path / "set"), *settings.split()]
    assert main([*command, "--dry-run"]) == 2
    assert main([*command, "--prepare.on-bad-case", "skip"]) == 1
    printed = "".join(capfd.readouterr())
    assert "a single slice" in printed
    assert "layout: dicom" in printed
    everything = printed.encode() + b"".join(
        file.read_bytes() + file.name.encode() for file in (tmp_path / "set").rglob("*") if file.is_file()
    )
    for secret in (*SECRETS, *(uid.encode() for uid in uids)):
        assert secret not in everything


def test_a_person_can_keep_the_ids(tmp_path: Path) -> None:
    uids = write_dicom(tmp_path / "data")
    config = PrepareConfig(**{**vars(CONFIG), "keep_dicom_ids": True})
    cases = check(tmp_path / "data", tmp_path / "set", config).cases
    assert {case.case_id for case in cases} == {uid.replace(".", "-") for uid in uids}
    assert {case.patient for case in cases} == {"ID-4711-p1", "ID-4711-p2", "ID-4711-p3"}


def _every(**values: Any) -> Callable[[list[Dataset]], None]:
    def spoil(found: list[Dataset]) -> None:
        for one in found:
            for name, value in values.items():
                setattr(one, name, value)

    return spoil


def _gap(found: list[Dataset]) -> None:
    del found[5]


def _copied(found: list[Dataset]) -> None:
    found.append(copy.deepcopy(found[2]))


def _two_phases(found: list[Dataset]) -> None:
    later = copy.deepcopy(found)
    for number, one in enumerate(later):
        one.SOPInstanceUID, one.AcquisitionNumber = generate_uid(entropy_srcs=["later", str(number)]), 2
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
    found += later


def _turned(found: list[Dataset]) -> None:
    found[3].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def _tilted(found: list[Dataset]) -> None:
    for k, one in enumerate(found):
        one.ImagePositionPatient[1] += 2.0 * k


def _beside(found: list[Dataset]) -> None:
    found[3].ImagePositionPatient[0] += 3.0


def _without_position(found: list[Dataset]) -> None:
    del found[3].ImagePositionPatient


@pytest.mark.parametrize(
    ("spoil", "value"),
    [
        (_gap, "missing slices: slices are 6 mm apart, but 12 mm behind slice 5 of 7"),
        (_copied, "duplicate positions: 9 images at 8 positions"),
        (_two_phases, "several acquisitions: 16 images at 8 positions, by AcquisitionNumber"),
        (_turned, "mixed orientations: 1 of 8"),
        (_tilted, "degrees off a right angle"),
        (_beside, "slice 4 of 8 is 3 mm beside"),
        (_without_position, "1 of 8 images have no position"),
        (_every(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localiser"),
        (_every(Modality="US"), "'US'"),
        (_every(RescaleType="Z_EFF"), "'Z_EFF' of a CT, not HU"),
        (_every(PhotometricInterpretation="MONOCHROME1"), "not one MONOCHROME2 value"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_doubtful_series_is_refused(spoil: Any, value: str, volume: _Volume, tmp_path: Path) -> None:
    found, _, label = volume
    save(tmp_path / "data", [segmentation(found, label)], first=99)
    spoil(found)
    save(tmp_path / "data", found)
    (problem,) = find_problems(tmp_path / "data", tmp_path / "set", CONFIG)
    assert value in problem.value
    assert problem.where == f"series dcm-{digest(found[0].SeriesInstanceUID)}"
    assert problem.remedy


def test_a_series_without_labels_is_left_out_and_named(volume: _Volume, tmp_path: Path) -> None:
    save(tmp_path / "data", [*volume[0], segmentation(volume[0], volume[2])])
    bare = series(volume[1], "bare", patient="other")
    save(tmp_path / "data/bare", bare)
    config = PrepareConfig(**{**vars(CONFIG), "on_bad_case": "skip"})
    (left_out,) = check(tmp_path / "data", tmp_path / "set", config).left_out
    assert left_out["case_id"] == f"dcm-{digest(bare[0].SeriesInstanceUID)}"
    assert "there is none" in left_out["reason"]


def _fractional(found: list[Dataset], label: np.ndarray) -> Dataset:
    return segmentation(found, label, "FRACTIONAL")


def _drawn_elsewhere(found: list[Dataset], label: np.ndarray) -> Dataset:
    moved = copy.deepcopy(found)
    for one in moved:
        one.ImagePositionPatient[0] += 1.0
    return segmentation(moved, label)


def _of_an_absent_series(found: list[Dataset], label: np.ndarray) -> Dataset:
    return segmentation(series(np.zeros((32, 32, 8), np.int16), "absent"), label)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (_fractional, "FRACTIONAL"),
        (_drawn_elsewhere, "on another grid"),
        (_of_an_absent_series, "its series is not there"),
    ],
)
def test_seg_that_does_not_belong_is_refused(make: Any, value: str, volume: _Volume, tmp_path: Path) -> None:
    save(tmp_path / "data", [*volume[0], make(volume[0], volume[2])])
    problems = find_problems(tmp_path / "data", tmp_path / "set", CONFIG)
    assert value in problems[0].value
    bare = [one for one in problems if one.value == "there is none"]
    assert len(problems) == 1 + len(bare)
    assert not any(secret.decode() in str(problem) for problem in problems for secret in SECRETS)


def test_segments_that_overlap_are_named_and_a_table_solves_it(volume: _Volume, tmp_path: Path) -> None:
    found, _, label = volume
    stack = np.stack([(label == value).T for value, _ in CLASSES], axis=-1)
    stack[..., 0] |= (label == LIVER).T
    save(tmp_path / "data", [*found, segmentation(found, stack)])
    with pytest.raises(UnreadableVolume, match="spleen and liver overlap"):
        slices(tmp_path / "data")
    table = tmp_path / "table.yaml"
    table.write_text("name: mine\nnames: [liver]\nlabel_map: {spleen: background}\n")
    present = {i for one in slices(tmp_path / "data", labels=str(table)) for i in one.meta.labels_present}
    assert present == {1, 2}  # liver and body


def test_a_slice_without_a_preamble_is_not_passed_over(volume: _Volume, tmp_path: Path) -> None:
    """The last of a stack would be missed by nothing else."""
    files = save(tmp_path / "data", [*volume[0], segmentation(volume[0], volume[2])])
    files[0].write_bytes(files[0].read_bytes()[132:])
    found = find_problems(tmp_path / "data", tmp_path / "set", CONFIG)
    assert "without a preamble" in found[0].value
    assert found[0].where.startswith("series dcm-")


@pytest.mark.parametrize("at", [b"\x28\x00\x10\x00", b"\x20\x00\x0d\x00"], ids=["before Rows", "before the series"])
def test_a_damaged_file_costs_its_series_alone(at: bytes, tmp_path: Path) -> None:
    """A file that ends in its header; if it does not name its series any more, it is listed."""
    uids = write_dicom(tmp_path / "data")
    found = {file: read(file) for file in (tmp_path / "data").rglob("*") if file.is_file()}
    found = {file: one for file, one in found.items() if one.SeriesInstanceUID == uids[0]}
    file = max(found, key=lambda file: float(found[file].ImagePositionPatient[2]))  # no gap shows that it is missing
    file.write_bytes(file.read_bytes().split(at)[0])
    is_known = uids[0].encode() in file.read_bytes()
    wanted = f"dcm-{digest(uids[0])}" if is_known else "unreadable-files"
    assert [one.field for one in find_problems(tmp_path / "data", tmp_path / "set", CONFIG)] == ["files"]
    config = PrepareConfig(**{**vars(CONFIG), "on_bad_case": "skip"})
    preparation = check(tmp_path / "data", tmp_path / "set", config)
    (left_out,) = preparation.left_out
    assert left_out["case_id"] == wanted
    assert "1 that cannot be read as DICOM" in left_out["reason"]
    assert str(tmp_path) not in str(left_out)
    assert len(preparation.cases) == len(uids) - is_known


def test_a_file_of_zeros_called_dcm_is_not_passed_over(volume: _Volume, tmp_path: Path) -> None:
    save(tmp_path / "data", [*volume[0], segmentation(volume[0], volume[2])])
    (tmp_path / "data/9.dcm").write_bytes(bytes(2000))
    (found,) = find_problems(tmp_path / "data", tmp_path / "set", CONFIG)
    assert "1 that cannot be read as DICOM" in found.value


def _by_gdcm(kind: str) -> Callable[[Dataset], None]:
    """pydicom has no encoder for these; SimpleITK's file gives the pixels."""

    def compress(one: Dataset) -> None:
        import SimpleITK

        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(kind)
        with TemporaryDirectory() as folder:
            writer.SetFileName(f"{folder}/one.dcm")
            writer.Execute(SimpleITK.GetImageFromArray(one.pixel_array[None]))
            written = read(Path(folder) / "one.dcm")
        one.file_meta.TransferSyntaxUID = written.file_meta.TransferSyntaxUID
        one.PixelData = written.PixelData
        one["PixelData"].is_undefined_length = True

    return compress


def _by_pydicom(syntax: str) -> Callable[[Dataset], None]:
    return lambda one: one.compress(syntax, generate_instance_uid=False)


@pytest.mark.parametrize(
    ("compress", "syntax"),
    [
        (_by_pydicom(RLELossless), RLELossless),
        (_by_pydicom(JPEGLSLossless), JPEGLSLossless),
        (_by_gdcm("JPEG"), JPEGLosslessSV1),
        (_by_gdcm("JPEG2000"), JPEG2000Lossless),
    ],
    ids=["rle", "jpeg-ls", "jpeg", "jpeg2000"],
)
def test_compressed_series_are_read(
    compress: Callable[[Dataset], None],
    syntax: str,
    volume: _Volume,
    of_amos: dict[str, list[SliceRecord]],
    tmp_path: Path,
) -> None:
    found, _, label = volume
    labels = segmentation(found, label)
    for one in found:
        compress(one)
        assert one.file_meta.TransferSyntaxUID == syntax
    save(tmp_path / "data", [*found, labels])
    _assert_same(slices(tmp_path / "data", labels="amos"), of_amos["p1_1"])


def test_a_deflated_series_is_read(volume: _Volume, of_amos: dict[str, list[SliceRecord]], tmp_path: Path) -> None:
    found, _, label = volume
    labels = segmentation(found, label)
    for one in found:
        one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(tmp_path / "data", [*found, labels])
    _assert_same(slices(tmp_path / "data", labels="amos"), of_amos["p1_1"])


def test_an_enhanced_multi_frame_file_is_read(
    volume: _Volume, of_amos: dict[str, list[SliceRecord]], tmp_path: Path
) -> None:
    found, _, label = volume
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(found, generate_uid(), 3, generate_uid(), 1)
    labels = segmentation(found, label)  # names the frame of reference
    save(tmp_path / "data", [enhanced, labels])
    _assert_same(slices(tmp_path / "data", labels="amos"), of_amos["p1_1"])


@pytest.mark.parametrize(
    ("stored", "damaged"),
    [
        (b"\xe0\x7f\x10\x00OW\0\0", b"\xe0\x7f\x10\x00OW\0\0\xfe\xff\xff\x7f"),  # the length of PixelData
        (b"\x02\x00\x02\x00UI", b"\x02\x00\x02\x00UM"),  # GDCM reads the next eight bytes as its length
    ],
)
def test_a_length_beyond_the_file_takes_no_memory(
    volume: _Volume, tmp_path: Path, stored: bytes, damaged: bytes
) -> None:
    files = save(tmp_path / "data", [*volume[0], segmentation(volume[0], volume[2])])
    preparation = check(tmp_path / "data", tmp_path / "set", CONFIG)
    content = files[3].read_bytes()
    at = content.index(stored)
    files[3].write_bytes(content[:at] + damaged + content[at + len(damaged) :])
    (case,) = preparation.cases
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableVolume, match="slice 4 of 8 cannot be decoded: it declares more bytes"):
        list(slices_of(case, CONFIG, None, labelling=preparation.survey.labelling))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_damaged_file_fails_its_volume_without_naming_it(volume: _Volume, tmp_path: Path) -> None:
    files = save(tmp_path / "Mustermann", [*volume[0], segmentation(volume[0], volume[2])])
    preparation = check(tmp_path / "Mustermann", tmp_path / "set", CONFIG)
    data = read(files[3]).PixelData
    files[3].write_bytes(files[3].read_bytes()[: -len(data) // 2])
    (case,) = preparation.cases
    with pytest.raises(UnreadableVolume, match="slice 4 of 8 cannot be decoded") as raised:
        list(slices_of(case, CONFIG, None, [], preparation.survey.labelling))
    assert "Mustermann" not in str(raised.value)


def test_without_the_libraries_a_message_names_the_extra(
    volume: _Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "data", volume[0])
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert main(["prepare", str(tmp_path / "data"), str(tmp_path / "set")]) == 2
    assert 'pip install "segdiff-dist[dicom]"' in capsys.readouterr().err
