"""DICOM exports: pydicom, SimpleITK and highdicom find the pixels, the place and the mask of the NIfTI export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from sampling_support import make_here, write_weights
from tests_support import bytes_of, write_shapes

from data_shards.choices import Axis
from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.cases import Case
from data_shards.ingest.prepare import check
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.shard_writer import ShardWriter
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.export.config import ExportConfig, VolumeConfig
from segdiff_dist.export.dicom import SeriesNames, Stack, write_stack
from segdiff_dist.export.job import export_samples
from segdiff_dist.export.volume import make_volume
from segdiff_dist.sampling.store import SampleStore

sitk = pytest.importorskip("SimpleITK")
highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

SHAPE, LIVER, KIDNEY_RIGHT, PROSTATE_UTERUS = (30, 25, 20), 6, 2, 15
TURN = np.deg2rad(4)
# Stored to the left, the front and the head: left-handed. Off the origin, oblique, sides of three lengths.
AFFINE = np.array(
    [
        [-6.4 * np.cos(TURN), -6.0 * np.sin(TURN), 0, 90],
        [-6.4 * np.sin(TURN), 6.0 * np.cos(TURN), 0, -70],
        [0, 0, 8.0, -300],
        [0, 0, 0, 1],
    ]
)


def written(file: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, AFFINE), file)
    return file


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A volume without symmetry."""
    root = tmp_path_factory.mktemp("case")
    label = np.zeros(SHAPE, np.uint8)
    label[4:15, 4:10, 3:9], label[17:25, 13:21, 9:18], label[5:10, 15:20, 9:18] = LIVER, KIDNEY_RIGHT, PROSTATE_UTERUS
    image = np.full(SHAPE, -1000, np.int16)
    image[3:-3, 3:-3] = 50
    return Case("amos_0001", "CT", "test", written(root / "image.nii.gz", image), written(root / "label.nii.gz", label))


@pytest.fixture(scope="module")
def run(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CT and MR images for slices along each axis."""
    config = PrepareConfig(size=32, axes=("axial", "coronal", "sagittal"), spacing_mm=4.0, slice_stride=20)
    shards = tmp_path_factory.mktemp("set") / "shards"
    writer = ShardWriter(shards, config.format)
    for record in slices_of(case, config, None):
        writer.write(record)
    table = {"name": AMOS.name, "names": AMOS.names}
    writer.finish({"label_table": table, "preprocessing": config.result_settings()})
    folder = write_weights(tmp_path_factory.mktemp("run"))
    make_here(folder, shards, num=None, diverse_masks=0, cross_modality_masks=1)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's images as DICOM; nifti/ beside it has the same."""
    root = tmp_path_factory.mktemp("out")
    assert main(["export", str(root / "dicom"), "--run", str(run), "--format", "dicom"]) == 0
    export_samples(run, root / "nifti", ExportConfig("nifti"))
    return root / "dicom"


def series(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def assert_same_place(ours: sitk.Image, theirs: sitk.Image) -> None:
    """Every voxel of `theirs` is that of `ours` at the same point in the patient, also at the corners."""
    last = [n - 1 for n in theirs.GetSize()]
    for index in ([0, 0, 0], [last[0], 0, 0], [0, last[1], 0], last, [n // 3 for n in last]):
        point = theirs.TransformIndexToPhysicalPoint(index)
        there = ours.TransformPhysicalPointToContinuousIndex(point)
        np.testing.assert_allclose(there, np.rint(there), atol=1e-4)
        assert ours[tuple(int(n) for n in np.rint(there))] == pytest.approx(theirs[tuple(index)], abs=1e-3)


def errors_of_dciodvfy(file: Path) -> list[str]:
    """None without the program."""
    if shutil.which("dciodvfy") is None:
        return []
    said = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, timeout=60).stderr
    return [line for line in said.splitlines() if line.startswith("Error") and "0x001c" not in line]


def test_a_sample_is_where_its_nifti_is(exported: Path) -> None:
    """Pixels in HU, or grey values of MR, and their points in the patient."""
    seen = set()
    for file in sorted((exported / "images").iterdir()):
        ours = sitk.ReadImage(str(file))
        theirs = sitk.ReadImage(str(exported.parent / "nifti" / "images" / f"{file.stem}.nii.gz"))
        np.testing.assert_allclose(*map(sitk.GetArrayFromImage, (ours, theirs)), atol=1e-3)
        assert_same_place(ours, theirs)
        header = pydicom.dcmread(file, stop_before_pixels=True)
        seen.add((header.Modality, header.ImageType[2]))
        shown = header.WindowCenter - header.WindowWidth / 2, header.WindowCenter + header.WindowWidth / 2
        assert shown == pytest.approx((-256, 256) if header.Modality == "CT" else (0, 255), abs=1e-6)
    assert seen == {("CT", "AXIAL"), ("CT", "MPR"), ("MR", "OTHER")}


def test_a_seg_gives_the_mask_back(exported: Path) -> None:
    """highdicom aligns it with the series that it refers to; classes are SNOMED's, or ours by name."""
    codes = {}
    for file in sorted((exported / "masks").iterdir()):
        seg = highdicom.seg.segread(file)
        image = pydicom.dcmread(exported / "images" / file.name)
        [(study, of_series, of_image)] = seg.get_source_image_uids()
        assert (study, of_series) == (image.StudyInstanceUID, image.SeriesInstanceUID)
        assert (of_image, seg.FrameOfReferenceUID) == (image.SOPInstanceUID, image.FrameOfReferenceUID)
        names = {number: seg.get_segment_description(number).segment_label for number in seg.segment_numbers}
        planes = seg.get_pixels_by_source_instance([of_image], combine_segments=True, relabel=False)
        ids = np.zeros(len(names) + 1, np.uint8)
        for number, name in names.items():
            ids[number] = AMOS.names.index(name)
            kind = seg.get_segment_description(number).segmented_property_type
            codes[name] = (kind.scheme_designator, kind.meaning, kind.get("SegmentedPropertyTypeModifierCodeSequence"))
        nifti = exported.parent / "nifti" / "masks" / f"{file.stem}.nii.gz"
        np.testing.assert_array_equal(ids[planes[0]].T[..., None], np.asarray(nib.load(nifti).dataobj))
    assert codes["liver"][:2] == ("SCT", "Liver")
    assert codes["prostate_uterus"][:2] == ("99SEGDIFF", "prostate uterus")
    assert codes["kidney_right"][2][0].CodeMeaning == "Right"


def test_it_says_that_it_is_synthetic_and_whose_it_is_not(exported: Path) -> None:
    for file in sorted(exported.glob("*/*.dcm")):
        header = pydicom.dcmread(file, stop_before_pixels=True)
        assert header.PatientName == "SYNTHETIC^SEGDIFF"
        assert (header.PatientID, header.PatientIdentityRemoved, header.SyntheticData) == ("amos_0001", "YES", "YES")
        assert header.ImageType[0] == "DERIVED"
        assert "synthetic" in header.SeriesDescription
        assert not header.StudyDate
        assert not header.PatientBirthDate


def test_the_same_images_have_the_same_bytes_and_others_other_uids(exported: Path, run: Path, tmp_path: Path) -> None:
    export_samples(run, tmp_path / "again", ExportConfig("dicom"))
    assert bytes_of(tmp_path / "again") == bytes_of(exported)
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in exported.glob("*/*.dcm")]
    for name in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert len({header[name].value for header in headers}) == len(headers)
    assert len({header.StudyInstanceUID for header in headers}) == 1
    assert len({header.FrameOfReferenceUID for header in headers}) == 1
    assert all(header.SOPInstanceUID.is_valid and header.SOPInstanceUID.startswith("2.25.") for header in headers)


def test_another_seed_gives_other_uids(run: Path, exported: Path, tmp_path: Path) -> None:
    """Images of other noise are not the same instances, even though their names are the same."""
    other = shutil.copytree(run / "weights", tmp_path / "run" / "weights").parent
    shards = Path(SampleStore.open(run / "samples").job["shards"])
    make_here(other, shards, num=3, diverse_masks=0, cross_modality_masks=0, seed=5)
    export_samples(other, tmp_path / "out", ExportConfig("dicom"))
    names = {file.name for file in (tmp_path / "out" / "images").iterdir()}
    ours, theirs = (
        {pydicom.dcmread(folder / "images" / name).SOPInstanceUID for name in names}
        for folder in (tmp_path / "out", exported)
    )
    assert not ours & theirs


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    shards = ShardSet.open(write_shapes(tmp_path_factory.mktemp("shapes") / "shards", num_patients=1, held_out=1))
    shards.index["preprocessing"] |= {"spacing_mm": 4.0, "fit": "pad"}
    return shards


def bright(mask_SHW: np.ndarray, *_: object) -> np.ndarray:
    """Images whose grey values are the labels, ten times."""
    return (mask_SHW * 10).astype(np.uint8)


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_volume_is_the_same_in_every_kind_of_file(case: Case, shapes: ShardSet, axis: Axis, tmp_path: Path) -> None:
    for name in ("out.nii.gz", "out.mha", "out.nrrd", "out"):
        make_volume(case.label, tmp_path / name, bright, 32, shapes, VolumeConfig("CT", axis, probe_slices=0))
    nifti = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    for name in ("out.mha", "out.nrrd"):
        other = sitk.ReadImage(str(tmp_path / name))
        np.testing.assert_array_equal(*map(sitk.GetArrayFromImage, (other, nifti)))
        assert_same_place(other, nifti)
    image = series(tmp_path / "out" / "images")
    assert_same_place(image, nifti)
    onto = sitk.Resample(nifti, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkInt16)
    np.testing.assert_array_equal(*map(sitk.GetArrayFromImage, (onto, image)))

    seg = highdicom.seg.segread(tmp_path / "out" / "masks" / "mask.dcm")
    numbers = {seg.get_segment_description(n).segment_label: n for n in seg.segment_numbers}
    files = sorted((tmp_path / "out" / "images").iterdir())
    headers = [pydicom.dcmread(file) for file in files]
    planes = seg.get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in headers], combine_segments=True, relabel=False, skip_overlap_checks=True
    )
    label = sitk.Resample(sitk.ReadImage(str(case.label)), image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    np.testing.assert_array_equal(planes == numbers["liver"], sitk.GetArrayFromImage(label) == LIVER)


@pytest.mark.parametrize(
    ("modality", "kind", "unit"), [("PET", "PT", None), ("CBCT", "CT", "US"), ("T2-fs", "MR", None)]
)
def test_a_volume_of_another_modality(
    modality: str, kind: str, unit: str | None, case: Case, shapes: ShardSet, tmp_path: Path
) -> None:
    """PET has a class of its own, without an intercept; CBCT is CT without HU. `prepare` reads both again."""
    for name in ("out.nii.gz", "out"):
        make_volume(case.label, tmp_path / name, bright, 32, shapes, VolumeConfig(modality, probe_slices=0))
    assert_same_place(series(tmp_path / "out" / "images"), sitk.ReadImage(str(tmp_path / "out.nii.gz")))
    files = sorted((tmp_path / "out" / "images").iterdir())
    header = pydicom.dcmread(files[0], stop_before_pixels=True)
    assert (header.Modality, header.get("RescaleType")) == (kind, unit)
    assert modality in header.SeriesDescription
    stated = modality if kind != "PT" else None
    found = check(tmp_path / "out", tmp_path / "set", PrepareConfig(modality=stated, split=(1.0, 0.0, 0.0)))
    assert [one.modality for one in found.cases] == [modality]
    assert not errors_of_dciodvfy(files[0])


def test_values_below_zero_of_pet(tmp_path: Path) -> None:
    """A stored value has a slope and no intercept."""
    stored = np.arange(64 * 64, dtype=np.uint16).reshape(1, 64, 64) % 256
    stack = Stack(
        stored, np.ones_like(stored, np.uint8), np.eye(4), "PT", "axial", (-3.0, 634.5), 2.5, -3.0, name="PET"
    )
    write_stack([tmp_path / "a.dcm"], tmp_path / "m.dcm", stack, SeriesNames("p", "s", "f", "o"), AMOS)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.dcm")))
    np.testing.assert_allclose(found, stored * 2.5 - 3.0, atol=0.02)


def test_an_image_without_an_organ_does_not_name_a_part(tmp_path: Path) -> None:
    """Laterality is then there, and empty: dciodvfy counts its absence as an error."""
    body = np.full((1, 32, 32), AMOS.body_id, np.uint8)
    stack = Stack(body * 10, body, np.eye(4), "CT", "axial", (-256.0, 256.0), 2.0, -256.0)
    write_stack([tmp_path / "a.dcm"], tmp_path / "m.dcm", stack, SeriesNames("p", "s", "f", "o"), AMOS)
    header = pydicom.dcmread(tmp_path / "a.dcm")
    assert ("BodyPartExamined" in header, header.Laterality) == (False, "")
    assert not errors_of_dciodvfy(tmp_path / "a.dcm") + errors_of_dciodvfy(tmp_path / "m.dcm")


def test_a_mask_without_any_class_is_read_again(tmp_path: Path) -> None:
    """It had no SEG, so that `prepare` refused the folder: an image had no label."""
    mask = np.zeros((1, 32, 32), np.uint8)
    affine = np.diag([-4.0, -4.0, 4.0, 1.0])
    image = np.full_like(mask, 90)
    image[:, 6:26, 6:26] = 150
    stack = Stack(image, mask, affine, "CT", "axial", (-256.0, 256.0), 2.0, -256.0)
    (tmp_path / "out").mkdir()
    write_stack([tmp_path / "out" / "a.dcm"], tmp_path / "out" / "m.dcm", stack, SeriesNames("p", "s", "f", "o"), AMOS)
    config = PrepareConfig(size=32, labels="amos", split=(1.0, 0.0, 0.0), spacing_mm=4.0)
    found = check(tmp_path / "out", tmp_path / "set", config)
    [record] = slices_of(found.cases[0], config, None, [], found.survey.labelling)
    assert record.meta.labelled
    assert set(np.unique(record.mask_HW)) <= {0, AMOS.body_id}
    [segment] = highdicom.seg.segread(tmp_path / "out" / "m.dcm").SegmentSequence
    assert segment.SegmentLabel == "spleen"


def test_a_modality_without_a_class_of_dicom(case: Case, shapes: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(InputProblems, match="those of CT, MR and PET"):
        make_volume(case.label, tmp_path / "out", bright, 32, shapes, VolumeConfig("US"))


def test_a_table_s_colours_are_those_of_the_segments(case: Case, shapes: ShardSet, tmp_path: Path) -> None:
    shards = ShardSet.open(shapes.root)
    shards.index["preprocessing"] |= shapes.index["preprocessing"]
    shards.index["label_table"]["colours"] = ["b5533c" if name == "liver" else None for name in AMOS.names]
    make_volume(case.label, tmp_path / "out", bright, 32, shards, VolumeConfig("CT", probe_slices=0))
    segments = pydicom.dcmread(tmp_path / "out" / "masks" / "mask.dcm").SegmentSequence
    shown = {one.SegmentLabel: one.get("RecommendedDisplayCIELabValue") for one in segments}
    assert len(shown) > 1
    rgb = highdicom.color.CIELabColor.from_dicom_value(shown.pop("liver")).to_rgb()
    np.testing.assert_allclose(rgb, (0xB5, 0x53, 0x3C), atol=2)
    assert set(shown.values()) == {None}


def test_a_mask_in_metaimage_gives_the_same_volume(case: Case, shapes: ShardSet, tmp_path: Path) -> None:
    sitk.WriteImage(sitk.ReadImage(str(case.label)), str(tmp_path / "mask.mha"))
    made = []
    for mask in (case.label, tmp_path / "mask.mha"):
        out = tmp_path / f"{mask.name}.nii.gz"
        make_volume(mask, out, bright, 32, shapes, VolumeConfig("CT", probe_slices=0))
        made.append(nib.load(out))
    np.testing.assert_allclose(made[1].affine, made[0].affine, atol=1e-4)
    np.testing.assert_array_equal(made[1].get_fdata(), made[0].get_fdata())


def test_files_of_a_volume_that_cannot_be_written(case: Case, shapes: ShardSet, tmp_path: Path) -> None:
    for name in ("out.dcm", "out.niigz"):
        with pytest.raises(InputProblems, match=r"no name of a volume; let it end in \.nii\.gz.*DICOM.*has no ending"):
            make_volume(case.label, tmp_path / name, bright, 32, shapes, VolumeConfig())
    sheared = AFFINE.copy()
    sheared[2, 0] += 0.05
    nib.save(nib.Nifti1Image(np.full(SHAPE, LIVER, np.uint8), sheared), tmp_path / "sheared.nii.gz")
    with pytest.raises(InputProblems, match="right angles"):
        make_volume(tmp_path / "sheared.nii.gz", tmp_path / "out", bright, 32, shapes, VolumeConfig())


def test_without_the_extra(
    run: Path, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names it, before work."""
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert main(["export", str(tmp_path / "out"), "--run", str(run), "--format", "dicom"]) == 2
    assert "segdiff-dist[dicom]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy of dicom3tools")
def test_dciodvfy_finds_no_error(exported: Path) -> None:
    """Apart from Synthetic Data (0008,001C), which the standard has since 2023 and this program may not know."""
    for file in sorted(exported.glob("*/*.dcm")):
        assert not errors_of_dciodvfy(file), file
