"""Data as other people have them: what would be misread is refused or said, and what can be read is read right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from layouts_support import (
    AFFINE,
    CONFIG,
    LIVER,
    SPLEEN,
    edit,
    save,
    slices,
    table,
    volumes,
    write_amos,
    write_folder,
    write_manifest,
    write_msd,
    write_nnunet,
    write_set,
    write_totalsegmentator,
)

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.layouts.find import recognise
from data_shards.ingest.prepare import check, find_problems
from data_shards.ingest.volume_files import read_geometry
from data_shards.problems import InputProblems
from data_shards.records import SliceRecord
from data_shards.store.inspect import format_report, inspect_shards
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.export.config import VolumeConfig
from segdiff_dist.export.volume import make_volume

pytest.importorskip("SimpleITK")


@pytest.fixture(scope="module")
def of_amos(tmp_path_factory: pytest.TempPathFactory) -> list[SliceRecord]:
    root = tmp_path_factory.mktemp("amos") / "data"
    return slices(root, **write_amos(root))


def _assert_same(root: Path, settings: dict[str, Any], wanted: list[SliceRecord]) -> None:
    for ours, theirs in zip(slices(root, **settings), wanted, strict=True):
        np.testing.assert_array_equal(ours.image_HW, theirs.image_HW)
        np.testing.assert_array_equal(ours.mask_HW, theirs.mask_HW)


def _labels_turned(root: Path) -> None:
    """Voxels in another order, at the same places: as a tool that saves LPS does."""
    for file in root.glob("labelsT*/*.nii.gz"):
        label = nib.load(file)
        turned = label.as_reoriented(np.array([[2, 1], [0, -1], [1, -1]]))
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj, np.int64), turned.affine, dtype=np.int64), file)


def _upper_case(root: Path) -> None:
    for file in root.rglob("*.nii.gz"):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))


def _links(root: Path) -> None:
    (root.parent / "store").mkdir()
    for number, file in enumerate(sorted(root.rglob("*.nii.gz"))):
        kept = file.rename(root.parent / "store" / f"{number}.blob")
        file.symlink_to(kept)


def _nrrd(root: Path) -> None:
    for file in list(root.rglob("*.nii.gz")):
        save(file.with_name(file.name.replace(".nii.gz", ".nrrd")), np.asarray(nib.load(file).dataobj))
        file.unlink()
    edit(root, file_ending=".nrrd")


def _utf_16(root: Path) -> None:
    file = root / "dataset.json"
    file.write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-16")


@pytest.mark.parametrize("spoil", [_labels_turned, _upper_case, _links, _nrrd, _utf_16])
def test_nnu_net_s_folder_as_others_write_it(
    spoil: Callable[[Path], None], of_amos: list[SliceRecord], tmp_path: Path
) -> None:
    settings = write_nnunet(tmp_path / "data")
    spoil(tmp_path / "data")
    _assert_same(tmp_path / "data", settings, of_amos)


@pytest.mark.parametrize("layout", ["totalsegmentator", "dicom"])
def test_a_table_s_numbers_are_none_of_data_that_name_their_classes_alone(
    layout: str, of_amos: list[SliceRecord], tmp_path: Path
) -> None:
    """Files and segments have names; our own numbers for them met those of the table, and turned the classes."""
    if layout == "dicom":
        pytest.importorskip("highdicom")
        from dicom_support import write_dicom

        write_dicom(tmp_path / "data")
    else:
        write_totalsegmentator(tmp_path / "data")
    settings = {"labels": table(tmp_path / "t.yaml")}
    pixels = [
        sorted(
            np.bincount(one.mask_HW.ravel(), minlength=17).tolist() for one in records
        )  # DICOM has cases of other names
        for records in (slices(tmp_path / "data", **settings), of_amos)
    ]
    assert pixels[0] == pixels[1]
    (tmp_path / "t.yaml").write_text("name: mine\nnames: [liver]\nlabel_map: {1: background}\n")
    (found, *_) = find_problems(tmp_path / "data", tmp_path / "set", replace(CONFIG, **settings))
    assert found.field == "label_map.1"


def _broken_link(root: Path) -> str:
    for name in ("imagesTr/p1_1_0001", "labelsTr/p1_1"):
        (root / f"{name}.nii.gz").unlink()
        (root / f"{name}.nii.gz").symlink_to(root / "gone")
    return "a link to a file that is not there"


def _no_image(root: Path) -> str:
    (root / "imagesTr/p1_1_0001.nii.gz").unlink()
    return "1 without an image of channel 1: p1_1"


def _pictures(root: Path) -> str:
    for file in root.rglob("*.nii.gz"):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".png")))
    edit(root, file_ending=".png")
    return "pictures do not state it"


def _half_a_voxel(root: Path) -> str:
    moved = AFFINE.copy()
    moved[0, 3] += 2.0
    label = np.asarray(nib.load(root / "labelsTr/p1_1.nii.gz").dataobj)
    nib.save(nib.Nifti1Image(label, moved), root / "labelsTr/p1_1.nii.gz")
    return "off by 0.5 voxels"


@pytest.mark.parametrize("spoil", [_broken_link, _no_image, _pictures, _half_a_voxel])
def test_what_is_missing_in_nnu_net_s_folder_is_named(spoil: Callable[[Path], str], tmp_path: Path) -> None:
    settings = write_nnunet(tmp_path / "data")
    value = spoil(tmp_path / "data")
    found = find_problems(tmp_path / "data", tmp_path / "set", replace(CONFIG, **settings))
    assert any(value in one.value for one in found)


def test_of_nnu_net_s_folder_the_files_of_its_ending_are_read(tmp_path: Path) -> None:
    """nnU-Net ignores others: an older version of a file, a file converted by hand, a picture for a look."""
    root = tmp_path / "data"
    settings = write_nnunet(root)
    for name in ("imagesTr/p1_1_0001.nii", "imagesTr/p9_1_0001.nii", "labelsTr/p1_1.png", "imagesTs/p3_1_0001.mha"):
        (root / name).write_bytes(b"not read")
    (root / "labelsTr/notes.txt").write_text("no volume")
    found = check(root, tmp_path / "set", replace(CONFIG, **settings))
    assert [case.case_id for case in found.cases] == ["p1_1", "p1_2", "p2_1", "p3_1"]
    notes = [note for note in found.survey.notes if "another ending" in note]
    assert [note.split("; ")[0] for note in notes] == [
        "2 files in imagesTr of another ending than .nii.gz: p1_1_0001.nii, p9_1_0001.nii",
        "1 file in labelsTr of another ending than .nii.gz: p1_1.png",
        "1 file in imagesTs of another ending than .nii.gz: p3_1_0001.mha",
    ]
    edit(root, file_ending=".nrrd")
    problems = find_problems(root, tmp_path / "set", replace(CONFIG, **settings))
    assert [(one.field, one.value.split(": ")[0]) for one in problems] == [
        ("file_ending", ".nrrd, and no file in imagesTr ends so"),
        ("file_ending", ".nrrd, and no file in labelsTr ends so"),
    ]


def test_nnu_net_s_own_list_of_cases_counts(tmp_path: Path) -> None:
    """`dataset` of dataset.json, which nnU-Net takes in place of what is in the folders."""
    settings = write_nnunet(tmp_path / "data") | {"fold": 0}
    (tmp_path / "data/splits_final.json").unlink()
    listed = {
        case: {"images": [f"imagesTr/{case}_000{n}.nii.gz" for n in (0, 1)], "label": f"labelsTr\\{case}.nii.gz"}
        for case in ("p1_1", "p2_1")
    }
    edit(tmp_path / "data", dataset=listed)
    found = check(tmp_path / "data", tmp_path / "set", replace(CONFIG, **settings))
    assert [case.case_id for case in found.cases] == ["p1_1", "p2_1", "p3_1"]
    assert "1 cases of imagesTr are left out" in found.survey.notes[0]
    assert "numTraining 3, and there are 2 training cases" in found.survey.notes[1]
    listed["p1_1"]["label"] = "labelsTr_corrected/p1_1.nii.gz"
    edit(tmp_path / "data", dataset=listed)
    (problem,) = find_problems(tmp_path / "data", tmp_path / "set", replace(CONFIG, **settings))
    assert problem.value == "1 with files that are not in imagesTr and labelsTr: p1_1"


def test_two_labels_of_one_case_are_refused(tmp_path: Path) -> None:
    """Which of CASE_seg and CASE_mask is meant cannot be known."""
    settings = write_folder(".nii")(tmp_path / "data")
    _, _, _, label = next(volumes())
    save(tmp_path / "data/train/masks/p1_1_mask.nii", label)
    (found,) = find_problems(tmp_path / "data", tmp_path / "set", replace(CONFIG, **settings))
    assert found.value == "both p1_1_mask.nii and p1_1_seg.nii"


def test_columns_of_a_manifest_that_are_not_used_are_said(tmp_path: Path) -> None:
    """In index.json, and by inspect."""
    settings = write_manifest(tmp_path / "data")
    file = tmp_path / "data/manifest.csv"
    file.write_text(file.read_text(encoding="utf-8-sig").replace("Split", "Split;Mask").replace("train", "train;x"))
    shards = write_set(tmp_path / "data", tmp_path / "set", axes=("axial",), **settings)
    said = "manifest.csv: columns that are not used: mask; known are image, label, modality, patient, split, case, "
    said += "spacing_mm, scale, offset"
    assert json.loads((shards / "index.json").read_text())["notes"] == [said]
    assert said in format_report(inspect_shards(shards))


def test_organs_that_share_voxels_are_said(tmp_path: Path) -> None:
    settings = write_totalsegmentator(tmp_path / "data")
    for name in ("kidney_left", "liver"):
        organ = np.zeros((32, 32, 8), np.uint8)
        organ[9:13, 12:18, 2:6] = 1
        save(tmp_path / "data/p1_1/segmentations" / f"{name}.nii.gz", organ)
    preparation = check(tmp_path / "data", tmp_path / "set", replace(CONFIG, **settings))
    (case,) = (one for one in preparation.cases if one.case_id == "p1_1")
    notes: list[str] = []
    present = {
        i for one in slices_of(case, CONFIG, None, notes, preparation.survey.labelling) for i in one.meta.labels_present
    }
    assert notes == [
        "its label: 96 voxels are in several organs, and belong to the last of them by name; correct their files"
    ]
    assert LIVER in present


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
@pytest.mark.filterwarnings("ignore:no voxel shows")
def test_volumes_of_our_own_come_in_again(ending: str, tmp_path: Path) -> None:
    """Beside their masks, as a plain folder; where a slice is a stored plane, it has the generated grey values."""
    write_nnunet(tmp_path / "real")
    shards = ShardSet.open(write_set(tmp_path / "real", tmp_path / "first", channel=1, fold=1, axes=("axial",)))
    (tmp_path / "data/images").mkdir(parents=True)
    for case, _, _, label in volumes():
        mask = tmp_path / f"data/labels/{case}{ending}"
        save(mask, np.select([label == LIVER, label == SPLEEN], [1, 2], 0).astype(np.uint8))
        out, config = tmp_path / f"data/images/{case}{ending}", VolumeConfig("CT", probe_slices=0)
        make_volume(mask, out, lambda mask_SHW, *_: (mask_SHW * 40).astype(np.uint8), 32, shards, config)
    (tmp_path / "data/dataset.json").write_text('{"modality": "CT", "labels": {"0": "background", "1": "a", "2": "b"}}')
    found = slices(tmp_path / "data", axes=("axial",), split=(1.0, 0.0, 0.0))
    in_planes = [one for one in found if one.meta.slice_index % 3 == 0]  # of 4 mm, in planes of 6 mm
    assert len(in_planes) > 8
    for one in in_planes:
        organs = np.where(one.mask_HW == 3, 0, one.mask_HW)
        np.testing.assert_allclose(one.image_HW, organs * 40, atol=1)


def test_a_view_without_air_has_no_outline_and_says_so(tmp_path: Path) -> None:
    """A view of 8 mm, in which nothing is as thick as a body; so is a view inside a breast (pyradiomics)."""
    rng = np.random.default_rng(0)
    save(tmp_path / "data/images/p1.nii.gz", rng.normal(60, 20, (2, 20, 2)).clip(6).astype(np.int16))
    save(tmp_path / "data/labels/p1.nii.gz", (np.indices((2, 20, 2))[0] > 0).astype(np.uint8))
    (tmp_path / "data/dataset.json").write_text('{"labels": {"0": "background", "1": "lesion"}}')
    config = replace(CONFIG, modality="MR", split=(1.0, 0.0, 0.0))
    preparation = check(tmp_path / "data", tmp_path / "set", config)
    notes: list[str] = []
    (case,) = preparation.cases
    list(slices_of(case, config, None, notes, preparation.survey.labelling))
    assert ["no outline of the patient was found" in note for note in notes] == [True]


def test_classes_that_are_some_of_amos_s_are_said_and_others_are_msd_s(tmp_path: Path) -> None:
    """MSD's task of the spleen has it at AMOS' id; a tumour beside it is no organ of AMOS."""
    write_msd(tmp_path / "data")
    edit(tmp_path / "data", labels={"0": "background", "1": "Spleen", "6": "liver"})
    found = check(tmp_path / "data", tmp_path / "set", CONFIG).survey
    assert found.layout == "amos"
    assert "names 2 of AMOS' 15 organs" in found.notes[0]
    edit(tmp_path / "data", labels={"0": "background", "1": "Spleen", "6": "tumour"})
    assert recognise(tmp_path / "data").layout.name == "msd"


@pytest.mark.parametrize(
    ("ending", "before", "after", "note", "field"),
    [
        (".mha", b"TransformMatrix = -1 0 0 0 -1 0 0 0 1\n", b"", "has no TransformMatrix", None),
        (".nrrd", b"left-posterior-superior", b"scanner-xyz", "has no anatomical space", None),
        (".mha", b"ElementSpacing", b"DistanceUnits = cm\nElementSpacing", None, "unit"),
        (".nrrd", b"endian: ", b'space units: "cm" "cm" "cm"\nendian: ', None, "unit"),
        (".nrrd", b"endian: ", b'space units: "mm" "mm" "mm"\nendian: ', None, None),
    ],
)
def test_headers_of_metaimage_and_nrrd_that_are_doubtful(
    ending: str, before: bytes, after: bytes, note: str | None, field: str | None, tmp_path: Path
) -> None:
    _, _, image, _ = next(volumes())
    file = tmp_path / f"p1_1{ending}"
    save(file, image)
    assert before in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(before, after, 1))
    if field is None:
        notes = read_geometry(file).notes
        assert (note is None and not notes) or (note is not None and note in notes[0])
        return
    with pytest.raises(InputProblems) as refused:
        read_geometry(file)
    assert [one.field for one in refused.value.problems] == [field]


def test_a_size_that_no_network_takes_is_said_before_the_slices_are_cut(tmp_path: Path) -> None:
    write_amos(tmp_path / "data")
    prepare = ["prepare", str(tmp_path / "data"), str(tmp_path / "set"), "--config", "smoke", "--dry-run"]
    with pytest.warns(UserWarning, match="take multiples of 4 pixels.*; give 60 or 64"):
        assert main([*prepare, "--prepare.size", "63"]) == 0
