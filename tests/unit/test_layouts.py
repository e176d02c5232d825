"""The same volumes in every layout give the same slices: pixels, masks, splits and modality are those of AMOS'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from layouts_support import (
    AFFINE,
    CONFIG,
    LAYOUTS,
    LIVER,
    SPLEEN,
    edit,
    save,
    slices,
    write_amos,
    write_manifest,
    write_nnunet,
)

from data_shards.ingest.layouts.find import recognise
from data_shards.ingest.prepare import PrepareConfig, find_problems, prepare
from data_shards.problems import InputProblems
from data_shards.records import SliceRecord
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main

pytest.importorskip("SimpleITK")


@pytest.fixture(scope="module")
def of_amos(tmp_path_factory: pytest.TempPathFactory) -> list[SliceRecord]:
    root = tmp_path_factory.mktemp("amos") / "data"
    return slices(root, **write_amos(root))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_slices_of_the_same_volumes_in_amos_layout(
    name: str, of_amos: list[SliceRecord], tmp_path: Path
) -> None:
    settings = LAYOUTS[name](tmp_path / "data")
    layout = name.split(".")[0].replace("manifest", "folder")
    assert settings.get("layout", recognise(tmp_path / "data").layout.name) == layout
    for ours, theirs in zip(slices(tmp_path / "data", **settings), of_amos, strict=True):
        np.testing.assert_array_equal(ours.image_HW, theirs.image_HW)
        np.testing.assert_array_equal(ours.mask_HW, theirs.mask_HW)
        for field in ("case_id", "modality", "split", "axis", "slice_index", "labelled", "intensity_scale"):
            assert getattr(ours.meta, field) == getattr(theirs.meta, field)
        assert ours.meta.affine == pytest.approx(theirs.meta.affine, abs=1e-4)
    assert {LIVER, SPLEEN} <= {i for one in of_amos for i in one.meta.labels_present}


def test_an_amos_folder_with_nnu_net_s_dataset_json_is_not_taken_for_one(tmp_path: Path) -> None:
    """The number behind amos_ is no channel."""
    write_nnunet(tmp_path / "data")
    for kind in ("images", "labels"):
        files = sorted((tmp_path / "data" / f"{kind}Tr").iterdir())
        for number, file in enumerate(files):
            file.rename(file.with_name(f"amos_{number:04d}.nii.gz"))
    (found,) = find_problems(tmp_path / "data", tmp_path / "set", CONFIG)
    assert "is nnU-Net's and lists no cases" in found.value


def test_a_folder_of_no_layout_is_refused_with_the_layouts(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").touch()
    for root, field in ((tmp_path, "layout"), (tmp_path / "gone", "data folder")):
        with pytest.raises(InputProblems, match="TotalSegmentator") as refused:
            recognise(root)
        assert [one.field for one in refused.value.problems] == [field]


def test_images_beside_dicom_files_are_said_with_the_setting_that_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    for name in ("a", "b"):
        save(tmp_path / f"data/{name}.nii.gz", np.zeros((4, 4, 4), np.int16))
    (tmp_path / "data/0.dcm").write_bytes(bytes(128) + b"DICM")
    found = find_problems(tmp_path / "data", tmp_path / "set", CONFIG)
    assert "dicom was recognised" in found[-1].value
    assert "2 files of .nii.gz beside the DICOM files; --prepare.layout folder" in found[-1].remedy
    found = find_problems(tmp_path / "data", tmp_path / "set", replace(CONFIG, layout="folder"))
    (modality,) = (one for one in found if one.field == "modality")
    assert "dataset.json" not in str(modality)
    assert "manifest.csv" in modality.remedy


def _channels(root: Path) -> dict[str, Any]:
    return {"channel": None}


def _regions(root: Path) -> dict[str, Any]:
    return edit(root, labels={"background": 0, "whole": [1, 2], "core": 2})


def _ignore(root: Path) -> dict[str, Any]:
    return {"labels": None} | edit(root, labels={"background": 0, "liver": 1, "spleen": 2, "ignore": 3})


def _fold(root: Path) -> dict[str, Any]:
    return {"fold": 2}


def _not_in_the_fold(root: Path) -> dict[str, Any]:
    return {"fold": 0}


def _unknown_organ(root: Path) -> dict[str, Any]:
    return edit(root, labels={"background": 0, "liver": 1, "brain": 2})


def _no_label(root: Path) -> dict[str, Any]:
    (root / "labelsTr/p1_1.nii.gz").unlink()
    return {}


def _other_grid(root: Path) -> dict[str, Any]:
    moved = AFFINE.copy()
    moved[0, 3] += 1.0
    label = nib.load(root / "labelsTr/p1_1.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), moved), root / "labelsTr/p1_1.nii.gz")
    return {}


@pytest.mark.parametrize(
    ("spoil", "field", "value"),
    [
        (_channels, "channel_names", "2 channels (0 PET, 1 CT)"),
        (_regions, "labels", "regions (whole)"),
        (_ignore, "labels", "ignore"),
        (_fold, "fold", "2"),
        (_not_in_the_fold, "fold 0", "3 of imagesTr that it does not name: p1_1, p1_2, p2_1"),
        (_unknown_organ, "names", "2 'brain'"),
        (_no_label, "label", "there is none"),
        (_other_grid, "affine", "off by 0.25 voxels"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_is_doubtful_is_refused(spoil: Any, field: str, value: str, tmp_path: Path) -> None:
    settings = write_nnunet(tmp_path / "data")
    settings |= spoil(tmp_path / "data")
    found = find_problems(tmp_path / "data", tmp_path / "set", PrepareConfig(**{**vars(CONFIG), **settings}))
    assert [one.field for one in found] == [field]
    assert value in found[0].value
    assert found[0].remedy


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        ("../ct/p1_1.mha;;CT", "image", "'../ct/p1_1.mha'"),
        ("/etc/p1_1.mha;;CT", "image", "'/etc/p1_1.mha'"),
        ("ct/p1_1.mha;;PET/CT", "modality", "'PET/CT'"),
        ("ct/p1_1.mha;;my scan", "modality", "'my scan'"),
        ("ct/p1_1.txt;;CT", "image", "'ct/p1_1.txt'"),
        (";;CT", "image", "empty"),
    ],
)
def test_a_manifest_leads_to_volumes_below_its_folder_alone(row: str, field: str, value: str, tmp_path: Path) -> None:
    settings = write_manifest(tmp_path / "data")
    (tmp_path / "data/manifest.csv").write_text(f"image;label;modality\n{row}\n")
    found = find_problems(tmp_path / "data", tmp_path / "set", PrepareConfig(**{**vars(CONFIG), **settings}))
    assert [(one.field, one.value) for one in found] == [(f"line 2: {field}", value)]


def test_a_dry_run_says_what_headers_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layout, classes, cases, slices, bytes, time, guesses, and the case that would be left out; nothing is written."""
    write_nnunet(tmp_path / "data")
    (tmp_path / "data/labelsTr/p1_1.nii.gz").unlink()
    guess = nib.Nifti1Image(np.zeros((32, 32, 8), np.int16), None)
    guess.header["sform_code"] = guess.header["qform_code"] = 0
    for file in ("imagesTr/p2_1_0001.nii.gz", "labelsTr/p2_1.nii.gz"):
        nib.save(guess, tmp_path / "data" / file)
    settings = "--prepare.channel 1 --prepare.fold 1 --prepare.on-bad-case skip --prepare.axes axial --dry-run"
    assert main(["prepare", str(tmp_path / "data"), str(tmp_path / "set"), *settings.split()]) == 0
    printed = capsys.readouterr().out
    for words in (
        "layout: nnunet (dataset.json has channel_names",
        "2 classes: ",
        "cases: 1 train, 1 val, 1 test",
        "images: 94",  # two of 43 mm, and eight of 1 mm
        "time: ",
        "which side is left is a guess (columns are taken to run left, front, up); look at",
        "failed: p1_1: imagesTr/p1_1_0001.nii.gz: label: there is none",
    ):
        assert words in printed
    assert not (tmp_path / "set").exists()


def test_a_bad_case_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    """And the set of the others names it; a second call finds all done, one with the case put right adds it alone. Two
    cases with the same images are said."""
    settings = write_nnunet(tmp_path / "data") | {"labels": None, "axes": ("axial",)}
    label = tmp_path / "data/labelsTr/p1_1.nii.gz"
    label.rename(tmp_path / "kept.nii.gz")
    config = PrepareConfig(**{**vars(CONFIG), **settings, "on_bad_case": "skip"})
    for is_done in (False, True):
        report = prepare(tmp_path / "data", tmp_path / "set", config)
        assert [case for case, _, _ in report.failed] == ["p1_1"]
        assert "label: there is none" in report.failed[0][2]
        assert report.skipped_done == is_done
    shards = ShardSet.open(tmp_path / "set", verify=True)
    assert set(shards.samples["case_id"].to_pylist()) == {"p1_2", "p2_1", "p3_1"}
    assert shards.label_table.names == ("background", "Liver", "spleen", "body")
    assert [entry["case_id"] for entry in shards.index["failed"]] == ["p1_1"]
    assert (tmp_path / "set/.partial/p1_2.json").is_file()
    (tmp_path / "kept.nii.gz").rename(label)
    # The same scan under another name and split, saved by another program.
    copied = np.asarray(nib.load(tmp_path / "data/imagesTr/p1_2_0001.nii.gz").dataobj, np.float32)
    save(tmp_path / "data/imagesTr/p1_1_0001.nii.gz", copied)
    report = prepare(tmp_path / "data", tmp_path / "set", config)
    assert (report.num_cases, report.failed) == (4, ())
    assert "p1_1 (train) and p1_2 (train) have the same images" in report.notes[-1]
    assert not (tmp_path / "set/.partial").exists()
    assert shards.index["preprocessing"]["layout"] == "nnunet"
