"""What people give that is no data: a message says what it is and what to do."""

from __future__ import annotations

import gzip
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from layouts_support import AFFINE, CONFIG, save, volumes, write_folder

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.layouts.find import recognise
from data_shards.ingest.prepare import PrepareConfig, check, find_problems
from data_shards.ingest.volumes import UnreadableVolume
from data_shards.problems import InputProblems


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "data")


def _with(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"x")

    return write


NO_DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tar": (_tar, "an archive; unpack it, and give the folder that comes out"),
    "nothing": (lambda _: None, "there is nothing"),
    "an empty folder": (lambda path: path.mkdir(), "there is no file in it"),
    "zips": (_with("a.zip", "b/c.tar.gz"), "1 files of .zip are archives: unpack them"),
    "arrays": (_with("train_npz/case0005_slice001.npz"), ".npz are arrays, which state no spacing: give the volumes"),
    "two files a volume": (
        _with("p1.hdr", "p1.img"),
        "1 files of .img are halves of volumes, header and voxels: write",
    ),
    "no label": (
        _with("ct/p1.nii", "lung/p1_lung.nii"),
        "no image of 2 volumes or pictures, as ct/p1.nii, has a label",
    ),
}


@pytest.mark.parametrize("name", NO_DATA)
def test_what_is_no_data_is_said(name: str, tmp_path: Path) -> None:
    write, words = NO_DATA[name]
    write(tmp_path / "data")
    with pytest.raises(InputProblems, match=re.escape(words)):
        recognise(tmp_path / "data")


def test_a_volume_instead_of_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "p1.nii.gz", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(InputProblems, match="one file; give the folder of all images and labels"):
        recognise(tmp_path / "p1.nii.gz")


FOREIGN = {
    b"": "an empty file); download it again",
    b"\n<!DOCTYPE html><html>Log in</html>": "a web page, which was saved in its place); download it again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "a pointer of Git LFS); fetch the file itself",
    b"/annex/objects/MD5E-s1--0.nii.gz": "a pointer of git-annex); fetch the file itself: git annex get",
    b"PK\x03\x04": "a zip); unpack it",
    gzip.compress(gzip.compress(b"x")): "packed by gzip, perhaps twice); unpack it once",
    b"\0" * 400: "zeros alone); download it again",
    b"\0" * 128 + b"DICM": "DICOM); give the folder of the series",
    b"x" * 400: "its first bytes are not a NIfTI header); restore the file",
}


@pytest.mark.parametrize("content", FOREIGN, ids=[words[:14] for words in FOREIGN.values()])
def test_what_a_download_left_is_said(content: bytes, tmp_path: Path) -> None:
    settings = write_folder(".nii")(tmp_path / "data")
    (tmp_path / "data/train/images/p1_1.nii").write_bytes(content)
    (found, *_) = find_problems(tmp_path / "data", tmp_path / "set", PrepareConfig(**{**vars(CONFIG), **settings}))
    assert FOREIGN[content] in str(found)


def test_one_hot_labels_are_refused_with_what_to_write(tmp_path: Path) -> None:
    settings = write_folder(".nii.gz")(tmp_path / "data")
    file = tmp_path / "data/train/masks/p1_1_seg.nii.gz"
    label = np.asarray(nib.load(file).dataobj)
    nib.save(nib.Nifti1Image(np.stack([label == 1, label == 6], -1).astype(np.uint8), AFFINE), file)
    (found, *_) = find_problems(tmp_path / "data", tmp_path / "set", PrepareConfig(**{**vars(CONFIG), **settings}))
    assert "of one-hot labels the number of each voxel's class" in found.remedy


def test_ignored_voxels_of_minus_one_can_be_mapped(tmp_path: Path) -> None:
    settings = write_folder(".nii.gz")(tmp_path / "data")
    for file in (tmp_path / "data").glob("*/masks/*.nii.gz"):
        label = np.asarray(nib.load(file).dataobj).astype(np.int16)
        label[:2] = -1
        nib.save(nib.Nifti1Image(label, AFFINE), file)
    config = PrepareConfig(**{**vars(CONFIG), **settings})
    found = check(tmp_path / "data", tmp_path / "set", config)
    with pytest.raises(UnreadableVolume, match=r"label id -1 is not among .* label_map: \{-1: background\}"):
        next(slices_of(found.cases[0], config, None, None, found.survey.labelling))
    file = Path(settings["labels"])
    file.write_text(f"{file.read_text()}label_map: {{-1: background}}\n")
    found = check(tmp_path / "data", tmp_path / "set", config)
    masks = [one.mask_HW for one in slices_of(found.cases[0], config, None, None, found.survey.labelling)]
    assert len(np.unique(masks)) > 2


def test_pictures_beside_dicom_files_are_said(tmp_path: Path) -> None:
    """CHAOS: series of DICOM, and their labels as PNG."""
    pytest.importorskip("highdicom")
    for name in ("DICOM_anon/0.dcm", "Ground/liver_GT_000.png"):
        (tmp_path / "data/1" / name).parent.mkdir(parents=True)
        (tmp_path / "data/1" / name).write_bytes(bytes(128) + b"DICM")
    found = find_problems(tmp_path / "data", tmp_path / "set", CONFIG)
    assert "1 files of .png beside the DICOM files; if they are the labels of the series, write" in found[-1].remedy


def test_labels_with_another_word_before_the_number_are_those_that_dataset_json_lists(tmp_path: Path) -> None:
    root = tmp_path / "data"
    pairs = [(f"images/im{n}.nii.gz", f"labels/lb{n}.nii.gz") for n in range(3)]
    for (image, label), (_, _, voxels, drawn) in zip(pairs, volumes(), strict=False):
        save(root / image, voxels)
        save(root / label, drawn)
    content = {"modality": "CT", "labels": {"1": "x", "6": "y"}}
    content["training"] = [{"image": image, "label": label} for image, label in pairs]
    (root / "dataset.json").write_text(json.dumps(content))
    found = check(root, tmp_path / "set", CONFIG)
    assert [one.case_id for one in found.cases] == ["im0", "im1", "im2"]
    assert found.cases[0].files[1].name == "lb0.nii.gz"
    content["training"][0]["label"] = pairs[1][1]
    (root / "dataset.json").write_text(json.dumps(content))
    (wrong, *_) = find_problems(root, tmp_path / "set", CONFIG)
    assert "im0.nii.gz is labelled by labels/lb1.nii.gz" in wrong.value
