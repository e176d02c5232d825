"""Whose images an export holds: DICOM's patients and studies, and the patients that `prepare` reads again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts_support import write_folder, write_set
from PIL import Image
from sampling_support import make_here, write_weights
from tests_support import write_shapes

from data_shards.ingest.prepare import check
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.export.config import ExportConfig, VolumeConfig
from segdiff_dist.export.job import check_samples, export_samples
from segdiff_dist.export.volume_set import check_volume_set

pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

PATTERN = "(p[0-9]+)_"
ALL: dict[str, Any] = {"num": None, "diverse_masks": 0, "cross_modality_masks": 0, "samples_per_mask": 1}


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight masks of two patients, a picture each."""
    folder = tmp_path_factory.mktemp("data") / "masks"
    folder.mkdir()
    for number in range(8):
        mask = np.full((32, 32), 6, np.uint8)
        mask[:8], mask[20:24, number : number + 5] = 0, 1
        Image.fromarray(mask).save(folder / f"p{number // 4}_slice{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def run_of_folder(masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    shapes = write_shapes(root / "shards", num_patients=2, slices=3)
    make_here(write_weights(root), shapes, masks=masks, target_modality="CT", **ALL)
    return root


@pytest.fixture(scope="module")
def run_of_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CT and MR images of volumes along two axes; p1_1 and p1_2 are scans of one patient."""
    root = tmp_path_factory.mktemp("scans")
    settings = write_folder(".nii")(root / "data")
    shards = write_set(root / "data", root / "shards", **settings, patient=PATTERN, slice_stride=12)
    run = write_weights(root / "run", table=ShardSet.open(shards).label_table)
    make_here(run, shards, split="train", **ALL | {"cross_modality_masks": 4})
    return run


def headers_in(out: Path) -> list[Any]:
    return [pydicom.dcmread(file, stop_before_pixels=True) for file in sorted(out.glob("*/*.dcm"))]


def grouped(headers: list[Any], by: str, of: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for header in headers:
        found.setdefault(str(header[by].value), set()).add(str(header[of].value))
    return found


def test_slices_of_a_named_patient_are_one_study(run_of_folder: Path, tmp_path: Path) -> None:
    """Each mask was a patient with a study; read again, a patient's slices went to several splits."""
    export_samples(run_of_folder, tmp_path / "out", ExportConfig("dicom", patient=PATTERN))
    headers = headers_in(tmp_path / "out")
    studies = grouped(headers, "PatientID", "StudyInstanceUID")
    assert [len(studies[patient]) for patient in ("p0", "p1")] == [1, 1]
    assert len(studies) == 2
    cases = check(tmp_path / "out", tmp_path / "set", PrepareConfig(size=32, labels="amos")).cases
    assert len({case.patient for case in cases}) == 2
    shown = [header.SeriesDescription for header in headers if header.Modality == "CT"]
    assert "synthetic CT, image 0, axial 0000 of p0_slice003 (segdiff)" in shown


def test_masks_of_no_named_patient_get_a_line_that_names_the_flag(run_of_folder: Path, tmp_path: Path) -> None:
    lines = " ".join(check_samples(run_of_folder, tmp_path / "out", ExportConfig("dicom")).lines)
    assert "8 cases, 8 of them single slices, count as 8 patients" in lines
    assert "DICOM makes two patients" in lines
    assert "--export.patient '(.+)_'" in lines


def test_a_volume_is_a_study_and_its_patient_has_the_name_of_the_set(run_of_scans: Path, tmp_path: Path) -> None:
    export_samples(run_of_scans, tmp_path / "out", ExportConfig("dicom"))
    headers = headers_in(tmp_path / "out")
    studies = grouped(headers, "PatientID", "StudyInstanceUID")
    assert {patient: len(found) for patient, found in studies.items()} == {"p1": 2}
    assert all(len(one) == 1 for one in grouped(headers, "StudyInstanceUID", "FrameOfReferenceUID").values())
    for series in grouped(headers, "StudyInstanceUID", "SeriesNumber").values():
        assert 1 in map(int, series)
        assert max(map(int, series)) <= 2 * len(series)


def test_series_of_a_study_follow_one_another_by_modality_image_axis_and_slice(
    run_of_scans: Path, tmp_path: Path
) -> None:
    export_samples(run_of_scans, tmp_path / "out", ExportConfig("dicom"))
    by_study: dict[str, list[Any]] = {}
    for header in (pydicom.dcmread(file) for file in (tmp_path / "out" / "images").iterdir()):
        by_study.setdefault(header.StudyInstanceUID, []).append(header)
    for headers in by_study.values():
        headers.sort(key=lambda one: one.SeriesNumber)
        shown = [(one.Modality, one.SeriesDescription) for one in headers]
        assert shown == sorted(shown)
        assert len(set(shown)) == len(shown)


def test_uids_do_not_depend_on_what_else_is_exported(run_of_scans: Path, run_of_folder: Path, tmp_path: Path) -> None:
    """CT and MR of a volume, exported one by one, are in one study; who names patients does not matter."""
    for name, modality in (("both", None), ("ct", "CT"), ("mr", "MR")):
        export_samples(run_of_scans, tmp_path / name, ExportConfig("dicom", modality=modality))
    both, ct, mr = (
        {(one.StudyInstanceUID, one.SOPInstanceUID) for one in headers_in(tmp_path / name)}
        for name in ("both", "ct", "mr")
    )
    assert both == ct | mr
    export_samples(run_of_folder, tmp_path / "one", ExportConfig("dicom", patient=PATTERN))
    export_samples(run_of_folder, tmp_path / "other", ExportConfig("dicom"))
    one, other = ({header.SOPInstanceUID for header in headers_in(tmp_path / out)} for out in ("one", "other"))
    assert one == other


def test_a_patient_s_name_fits_dicom(masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 64 characters without backslashes; names that would become equal stay two."""
    folder = tmp_path / "masks"
    folder.mkdir()
    patients = ["x" * 80 + "1", "x" * 80 + "2", "a\\b"]
    rows = [f"{name}.png,{patient}" for name, patient in zip("abc", patients, strict=True)]
    (folder / "manifest.csv").write_text("\n".join(["image,patient", *rows]))
    for name, mask in zip("abc", sorted(masks.iterdir()), strict=False):
        shutil.copy(mask, folder / f"{name}.png")
    run = write_weights(tmp_path / "run")
    shapes = write_shapes(tmp_path / "shards", num_patients=2, slices=3)
    make_here(run, shapes, masks=folder, target_modality="CT", **ALL)
    assert main(["export", str(tmp_path / "out"), "--run", str(run), "--format", "dicom"]) == 0
    names = {header.PatientID for header in headers_in(tmp_path / "out")}
    assert len(names) == 3
    assert all(len(name) <= 64 and "\\" not in name for name in names)


@pytest.mark.parametrize("form", ["nnunet", "nifti", "png", "dicom"])
def test_two_scans_of_a_patient_are_of_one_patient_when_they_are_read_again(
    form: str, run_of_scans: Path, tmp_path: Path
) -> None:
    """Names say the scan; of nnU-Net's folder each scan was a patient, and the two went to train and val."""
    out = tmp_path / "Dataset701_Again"
    export_samples(run_of_scans, out, ExportConfig(form, modality="CT"))
    labels = str(run_of_scans.parent / "data.yaml")
    config = PrepareConfig(size=32, labels=labels, axes=("axial", "sagittal"), on_bad_case="skip")
    cases = check(out, tmp_path / "set", config).cases
    assert len({case.patient for case in cases}) == 1
    assert len({case.split for case in cases}) == 1
    named = check(out, tmp_path / "set", PrepareConfig(**vars(config) | {"patient": "(p[0-9]_[0-9])"})).cases
    assert form != "nnunet" or {case.patient for case in named} == {"p1_1", "p1_2"}, "a pattern is the user's word"


def test_nnunet_s_own_folds_are_warned_of(run_of_scans: Path, run_of_folder: Path, tmp_path: Path) -> None:
    """It splits by image where it finds no splits_final.json."""
    out = tmp_path / "Dataset701_New"
    lines = check_samples(run_of_scans, out, ExportConfig(modality="CT")).lines
    assert lines == (
        "all images are of one patient: there are no folds, and nnU-Net's validation is of this patient too",
    )
    lines = check_samples(run_of_folder, out, ExportConfig(patient=PATTERN)).lines
    assert lines[-1].startswith("before training copy splits_final.json to nnUNet_preprocessed/Dataset701_New/")
    assert not check_samples(run_of_scans, tmp_path / "png", ExportConfig("png")).lines


def test_a_set_of_volumes_says_what_folds_are_for_and_whose_patients_are_a_guess(tmp_path: Path) -> None:
    settings = write_folder(".nii")(tmp_path / "data")
    for pattern in (None, PATTERN):
        shards = ShardSet.open(write_set(tmp_path / "data", tmp_path / f"{pattern}", **settings, patient=pattern))
        masks = tmp_path / "masks"
        masks.mkdir(exist_ok=True)
        for name in ("p8_1", "p8_2", "p9_1"):
            shutil.copy(tmp_path / "data/train/masks/p1_1_seg.nii", masks / f"{name}.nii")
        config = VolumeConfig(format="nnunet", modality="CT")
        *guess, line = check_volume_set(masks, tmp_path / "Dataset701_New", shards, config).lines
        assert line.startswith("before training copy splits_final.json to nnUNet_preprocessed/Dataset701_New/")
        assert len(guess) == (pattern is None)
        assert not guess or guess[0].startswith("3 masks count as 3 patients, since the set does not name theirs")
