"""Folders as public data sets are downloaded: image and label of a case have names that differ in words for either."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts_support import CONFIG, save, table, volumes
from PIL import Image

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.layouts.find import recognise
from data_shards.ingest.prepare import Preparation, PrepareConfig, check
from data_shards.problems import InputProblems

_KITS = "case_0000{n}/imaging", "case_0000{n}/segmentation"
_VOLUMES = tuple(volumes())
# By data set: images and labels of cases 0 to 2, and the names that the cases get.
PAIRS = {
    "KiTS": (*_KITS, "case_0000{n}"),
    "LiTS": ("Training Batch {n}/volume-{n}", "Training Batch {n}/segmentation-{n}", "volume-{n}"),
    "CT-ORG": ("volumes 0-49/volume-{n}", "labels and README/labels-{n}", "volume-{n}"),
    "BTCV": ("RawData/Training/img/img000{n}", "RawData/Training/label/label000{n}", "img000{n}"),
    "FLARE21": ("TrainingImg/train_00{n}_0000", "TrainingMask/train_00{n}", "train_00{n}"),
    "AbdomenCT-1K": ("AbdomenCT-1K-ImagePart{n}/Case_0{n}_0000", "Mask/Case_0{n}", "Case_0{n}"),
    "SegTHOR": ("train/Patient_0{n}/Patient_0{n}", "train/Patient_0{n}/GT", "Patient_0{n}"),
    "StructSeg": ("HaN_OAR/{n}/data", "HaN_OAR/{n}/label", "{n}"),
    "PROMISE12": ("Part{n}/Case0{n}", "Part{n}/Case0{n}_segmentation", "Case0{n}"),
    "BIDS": ("sub-0{n}/anat/sub-0{n}_x", "derivatives/labels/sub-0{n}/anat/sub-0{n}_x_seg", "sub-0{n}_x"),
}


def _write(root: Path, image: str, label: str | None, number: int = 0) -> None:
    _, _, voxels, drawn = _VOLUMES[number]
    for name, one in ((image, voxels), (label, drawn)):
        if name is not None:
            save(root / f"{name.format(n=number)}.nii.gz", one)


def _check(root: Path, **changes: Any) -> Preparation:
    settings = {"labels": table(root.with_suffix(".yaml")), **changes}
    return check(root, root.parent / "set", PrepareConfig(**{**vars(CONFIG), **settings}))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_public_data_sets_are_found(name: str, tmp_path: Path) -> None:
    image, label, case_id = PAIRS[name]
    for number in range(3):
        _write(tmp_path / "data", image, label, number)
    found = _check(tmp_path / "data", modality="CT")
    below = [tuple(file.relative_to(tmp_path / "data").as_posix() for file in case.files) for case in found.cases]
    assert below == [(f"{image.format(n=n)}.nii.gz", f"{label.format(n=n)}.nii.gz") for n in range(3)]
    assert [case.case_id for case in found.cases] == [case_id.format(n=n) for n in range(3)]
    assert {case.split for case in found.cases} == {"train", "val", "test"}
    assert found.survey.layout == "folder"
    assert "3 images have a label by their names, as " in found.survey.described


def test_pairs_are_cut_as_those_of_a_plain_folder(tmp_path: Path) -> None:
    for root, names in ((tmp_path / "kits", _KITS), (tmp_path / "plain", ("images/c{n}", "labels/c{n}"))):
        for number in range(3):
            _write(root, *names, number)
    masks = []
    for root in (tmp_path / "kits", tmp_path / "plain"):
        found = _check(root, modality="CT")
        cut = [list(slices_of(case, found.config, None, None, found.survey.labelling)) for case in found.cases]
        masks.append(np.array([one.mask_HW for records in cut for one in records]))
    np.testing.assert_array_equal(*masks)
    assert len(np.unique(masks[0])) > 2


def test_images_of_several_modalities_have_one_label_and_one_patient(tmp_path: Path) -> None:
    for number, case in enumerate(("BraTS-0001-000", "BraTS-0001-100", "BraTS-0002-000")):
        for suffix in ("t1c", "t2f", "seg"):
            _, _, voxels, drawn = _VOLUMES[number]
            save(tmp_path / f"data/{case}/{case}-{suffix}.nii.gz", drawn if suffix == "seg" else np.abs(voxels))
    found = _check(tmp_path / "data")
    assert [(one.case_id, one.modality, one.patient) for one in found.cases][:2] == [
        ("BraTS-0001-000-FLAIR", "FLAIR", "BraTS-0001-000"),
        ("BraTS-0001-000-T1ce", "T1ce", "BraTS-0001-000"),
    ]
    assert (
        found.survey.notes[0]
        == ("modality by the names of the images: T1ce, FLAIR; --prepare.modalities takes some of them")
        or "FLAIR, T1ce" in found.survey.notes[0]
    )
    # Two times of a patient: said, and put right by the pattern that is named.
    assert "--prepare.patient '(.+)[_-]' keeps them in one split" in found.survey.notes[-1]
    (note,) = _check(tmp_path / "data", patient="(.+)[_-]").survey.notes
    assert "modality" in note
    assert {one.modality for one in _check(tmp_path / "data", modalities=("T1ce",)).cases} == {"T1ce"}


def test_splits_and_patients_by_folders(tmp_path: Path) -> None:
    """ACDC: two times of each patient, and a film of it."""
    for number, (split, patient) in enumerate((("training", "001"), ("training", "002"), ("testing", "101"))):
        name = f"{split}/patient{patient}/patient{patient}"
        for frame in ("01", "12"):
            _write(tmp_path / "data", f"{name}_frame{frame}", f"{name}_frame{frame}_gt", number)
        _write(tmp_path / "data", f"{name}_4d", None, number)
    found = _check(tmp_path / "data", modality="CT")
    assert [(one.case_id, one.patient, one.split) for one in found.cases][1:3] == [
        ("patient001_frame12", "patient001", "train"),
        ("patient002_frame01", "patient002", "train"),
    ]
    assert [one.split for one in found.cases] == ["train"] * 4 + ["test"] * 2
    assert found.survey.notes[0].startswith(
        "3 files are not read, since no label is named like them: testing/patient101"
    )


def test_folders_of_files_with_the_same_names_are_patients(tmp_path: Path) -> None:
    for number in range(3):
        for name in ("early", "late"):
            _write(tmp_path / "data", f"p{{n}}/{name}", f"p{{n}}/{name}_seg", number)
    found = _check(tmp_path / "data", modality="CT")
    assert [(one.case_id, one.patient) for one in found.cases][:2] == [("p0_early", "p0"), ("p0_late", "p0")]
    assert len({(one.patient, one.split) for one in found.cases}) == 3
    assert found.survey.notes[0].startswith("the files of each of 3 folders count as one patient's, as those of p0; ")


def test_images_without_labels_are_cases_where_they_are_wanted(tmp_path: Path) -> None:
    for number in range(3):
        _write(tmp_path / "data", _KITS[0], _KITS[1] if number else None, number)
    found = _check(tmp_path / "data", modality="CT")
    assert [one.case_id for one in found.cases] == ["case_00001", "case_00002"]
    assert found.survey.notes[0] == "1 volumes are not read, since nothing in their folders is used: case_00000"
    found = _check(tmp_path / "data", modality="CT", unlabelled="train")
    assert [(one.case_id, one.is_labelled) for one in found.cases][:2] == [("case_00000", False), ("case_00001", True)]
    assert not found.survey.notes


def test_names_that_say_no_pair_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for number in range(2):
        _write(root, *_KITS, number)
    shutil.copy(root / "case_00000/segmentation.nii.gz", root / "case_00000/mask.nii.gz")
    with pytest.raises(InputProblems, match=r"mask\.nii\.gz and .*segmentation.nii.gz are of one case by their names"):
        _check(root, modality="CT")
    (root / "case_00000/mask.nii.gz").rename(root / "case_00000/lesion_mask.nii.gz")
    with pytest.raises(
        InputProblems, match=r"1 without an image: case_00000/lesion_mask\.nii.gz.*merge a second label"
    ):
        _check(root, modality="CT")


def test_a_described_folder_further_down_is_the_one_that_is_meant(tmp_path: Path) -> None:
    for number in range(2):
        _write(tmp_path / "a/raw/Dataset1", "imagesTr/c{n}_0000", "labelsTr/c{n}", number)
    (tmp_path / "a/raw/Dataset1/dataset.json").write_text('{"channel_names": {"0": "CT"}, "labels": {"liver": 1}}')
    with pytest.raises(InputProblems, match=r"a/raw/Dataset1 has a dataset\.json: give that folder"):
        recognise(tmp_path)


def test_pictures_with_masks_of_other_folders_and_names(tmp_path: Path) -> None:
    """Breast ultrasound as BUSI has it: blanks and brackets in names, a word for labels in the folder of all files."""
    for kind in ("benign", "malignant"):
        for number in (1, 2):
            file = tmp_path / f"Dataset_with_GT/{kind}/{kind} ({number})"
            file.parent.mkdir(parents=True, exist_ok=True)
            grey = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32) * (number + len(kind)) % 250
            Image.fromarray(grey.astype(np.uint8)).save(f"{file}.png")
            Image.fromarray(np.uint8(grey > 100)).save(f"{file}_mask.png")
    found = _check(tmp_path, modality="US", pixel_mm=2.0, labels=table(tmp_path.with_suffix(".yaml")))
    assert [one.case_id for one in found.cases] == ["benign-1", "benign-2", "malignant-1", "malignant-2"]
    assert found.survey.notes[0] == "case ids have - for other characters, as benign-1 for 'benign (1)'"


def test_a_case_whose_number_looks_like_a_channel_keeps_it(tmp_path: Path) -> None:
    """WORD's first case is word_0000, image and label."""
    for number in range(2):
        _write(tmp_path / "data", "imagesTr/word_000{n}", "labelsTr/word_000{n}", number)
    assert [one.case_id for one in _check(tmp_path / "data", modality="CT").cases] == ["word_0000", "word_0001"]


def test_everything_that_nothing_states_is_said_at_once(tmp_path: Path) -> None:
    """Modality, classes, and of pictures the spacing: a newcomer gives all of them in the second attempt."""
    for number in range(2):
        _write(tmp_path / "kits", *_KITS, number)
        grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
        for name, pixels in (("images", grey), ("masks", np.uint8(grey > 100))):
            (tmp_path / "png" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / f"png/{name}/p{number}.png")
    for root, fields in (
        (tmp_path / "kits", ["modality", "names"]),
        (tmp_path / "png", ["spacing", "modality", "names"]),
    ):
        with pytest.raises(InputProblems) as refused:
            _check(root, labels=None)
        assert [one.field for one in refused.value.problems] == fields
