"""The same volumes in every layout give the same slices: pixels, masks, splits and modality are those of AMOS'."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.cases import Case
from data_shards.ingest.layouts.find import recognise
from data_shards.ingest.prepare import PrepareConfig, check, find_problems, prepare
from data_shards.ingest.splits import with_splits
from data_shards.ingest.volume_files import read_geometry
from data_shards.ingest.volumes import UnreadableVolume, read_volume
from data_shards.problems import InputProblems
from data_shards.records import SliceRecord
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main

sitk = pytest.importorskip("SimpleITK")

CONFIG = PrepareConfig(size=32, spacing_mm=4.0, axes=("axial", "sagittal"), num_workers=1)
# Case, split, where its liver is.
CASES = (("p1_1", "train", 9), ("p1_2", "train", 12), ("p2_1", "val", 15), ("p3_1", "test", 20))
LIVER, SPLEEN = 6, 1
AFFINE = np.diag([4.0, 4.0, 6.0, 1.0]) + np.array([[0, 0, 0, -64.0], [0, 0, 0, -64], [0, 0, 0, -20], [0, 0, 0, 0]])


def volumes() -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Case, split, CT and label in AMOS' ids, both [32, 32, 8]."""
    for number, (case, split, at) in enumerate(CASES):
        rng = np.random.default_rng(number)
        i, j, _ = np.indices((32, 32, 8))
        label = np.zeros((32, 32, 8), np.uint8)
        label[at : at + 4, 12:18, 2:6] = LIVER
        label[14:18, 20:24, 3:7] = SPLEEN
        inside = ((i - 16) / 13) ** 2 + ((j - 16) / 11) ** 2 < 1
        image = np.where(inside, 20.0, -1000.0) + 50.0 * (label > 0) + rng.normal(0, 5, label.shape)
        yield case, split, image.round().astype(np.int16), label


def save(file: Path, voxels: np.ndarray) -> None:
    """NIfTI by nibabel; other formats by SimpleITK, which counts to the left and the back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in file.name:
        nib.save(nib.Nifti1Image(voxels, AFFINE), file)
        return
    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing((4.0, 4.0, 6.0))
    image.SetOrigin((64.0, 64.0, -20.0))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(file))


def write_amos(root: Path) -> dict[str, Any]:
    lists: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for case, split, image, label in volumes():
        save(root / f"images/{case}.nii.gz", image)
        save(root / f"labels{'Ts' if split == 'test' else ''}/{case}.nii.gz", label)
        entry = {"image": f"./images/{case}.nii.gz", "label": f"./labels/{case}.nii.gz"}
        lists[split].append(entry["image"] if split == "test" else entry)
    names = {"training": lists["train"], "validation": lists["val"], "test": lists["test"]}
    (root / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, **names}))
    return {}


def write_nnunet(root: Path) -> dict[str, Any]:
    """Two channels, ids of its own, a BOM, and splits in splits_final.json and the folders."""
    renumbered = np.zeros(7, np.uint8)
    renumbered[[LIVER, SPLEEN]] = 1, 2
    fold: dict[str, list[str]] = {"train": [], "val": []}
    for case, split, image, label in volumes():
        end = "Ts" if split == "test" else "Tr"
        save(root / f"images{end}/{case}_0000.nii.gz", np.zeros_like(image))
        save(root / f"images{end}/{case}_0001.nii.gz", image)
        save(root / f"labels{end}/{case}.nii.gz", renumbered[label])
        fold.get(split, []).append(case)
    content = {
        "channel_names": {"0": "PET", "1": "CT"},
        "labels": {"background": 0, "Liver": 1, "spleen": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8-sig")
    (root / "splits_final.json").write_text(json.dumps([{"train": [], "val": []}, fold]))
    return {"channel": 1, "fold": 1, "labels": "amos"}


def write_msd(root: Path) -> dict[str, Any]:
    """Paths with backslashes, and `labels` as id: name."""
    write_amos(root)
    content = json.loads((root / "dataset.json").read_text())
    text = json.dumps(content | {"labels": {"0": "background", "1": "Spleen", "6": "LIVER"}})
    (root / "dataset.json").write_text(text.replace("./images/", r".\\images\\"))
    return {"layout": "msd", "labels": "amos"}


def write_folder(ending: str) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        for case, split, image, label in volumes():
            save(root / split / "images" / f"{case}{ending}", image)
            save(root / split / "masks" / f"{case}_seg{ending}", label)
        return {"modality": "CT", "labels": table(root.with_suffix(".yaml"))}

    return write


def write_manifest(root: Path) -> dict[str, Any]:
    with_split = []
    for case, split, image, label in volumes():
        save(root / f"ct/{case}.mha", image)
        save(root / f"drawn/{case}.nrrd", label)
        with_split.append([f"ct\\{case}.mha", f"drawn/{case}.nrrd", "ct", case[:2], split])
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([["Image", "Label", "Modality", "Patient", "Split"], *with_split])
    return {"labels": table(root.with_suffix(".yaml"))}


def write_totalsegmentator(root: Path) -> dict[str, Any]:
    rows = ["image_id;age;split"]
    for case, split, image, label in volumes():
        save(root / case / "ct.nii.gz", image)
        save(root / case / "segmentations" / "liver.nii.gz", (label == LIVER).astype(np.uint8))
        save(root / case / "segmentations" / "spleen.nii.gz", (label == SPLEEN).astype(np.uint8))
        rows.append(f"{case};60;{split}")
    (root / "meta.csv").write_text("\n".join(rows))
    return {"labels": "amos"}


def table(file: Path) -> str:
    """AMOS' liver and spleen under a table of one's own, whose ids are those of AMOS, so that masks can be compared."""
    names = ["spleen", "a", "b", "c", "d", "liver", "e", "f", "g", "h", "i", "j", "k", "l", "m"]
    file.write_text(f"name: mine\nnames: {{{', '.join(f'{i}: {name}' for i, name in enumerate(names, 1))}}}\n")
    return str(file)


LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "nnunet": write_nnunet,
    "msd": write_msd,
    "totalsegmentator": write_totalsegmentator,
    "manifest": write_manifest,
    **{f"folder{ending}": write_folder(ending) for ending in (".nii", ".mha", ".mhd", ".nrrd")},
}


def slices(root: Path, **settings: Any) -> list[SliceRecord]:
    """What `prepare` would write of a folder, by split and case, without Ray."""
    config = PrepareConfig(**{**vars(CONFIG), **settings})
    preparation = check(root, root.parent / "set", config)
    cases = sorted(preparation.cases, key=lambda case: (case.split, case.case_id))
    labelling = preparation.survey.labelling
    return [record for case in cases for record in slices_of(case, config, None, [], labelling)]


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


def test_classes_that_the_data_name_are_the_set_s_table(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "Dataset007_Mine")
    preparation = check(tmp_path / "Dataset007_Mine", tmp_path / "set", replace(CONFIG, channel=1, fold=1))
    labelling = preparation.survey.labelling
    assert labelling.table.names == ("background", "Liver", "spleen", "body")
    assert labelling.table.name == "Dataset007_Mine"
    records = slices(tmp_path / "Dataset007_Mine", channel=1, fold=1)
    assert {i for one in records for i in one.meta.labels_present} == {1, 2, 3}
    assert preparation.header["preprocessing"]["label_set"] == "Dataset007_Mine"


def test_a_label_map_puts_classes_together(tmp_path: Path, of_amos: list[SliceRecord]) -> None:
    write_nnunet(tmp_path / "data")
    (tmp_path / "large.yaml").write_text("name: large\nnames: [trunk]\nlabel_map: {liver: trunk, 2: trunk}\n")
    records = slices(tmp_path / "data", channel=1, fold=1, labels=str(tmp_path / "large.yaml"))
    for ours, theirs in zip(records, of_amos, strict=True):
        np.testing.assert_array_equal(ours.mask_HW == 1, np.isin(theirs.mask_HW, (LIVER, SPLEEN)))


def test_patients_are_drawn_whole_and_the_same_each_time() -> None:
    cases = [Case(f"p{n // 2}_{n}", "CT", "", Path(), Path(), patient=f"p{n // 2}") for n in range(40)]
    drawn = with_splits(cases, (0.7, 0.1, 0.2), 3)
    assert drawn == with_splits(cases, (0.7, 0.1, 0.2), 3) != with_splits(cases, (0.7, 0.1, 0.2), 4)
    split_of = {case.patient: case.split for case in drawn}
    assert all(split_of[case.patient] == case.split for case in drawn)
    assert [sum(s == split for s in split_of.values()) for split in ("train", "val", "test")] == [14, 2, 4]


def test_a_stated_split_stays_and_others_are_drawn_around_it() -> None:
    cases = [Case(f"c{n}", "CT", "test" if n == 0 else "", Path(), Path()) for n in range(9)]
    splits = [case.split for case in with_splits(cases, None, 0)]
    assert splits[0] == "test"
    assert splits.count("test") == 1
    assert splits.count("val") == 1


def test_a_patient_pattern_keeps_scans_together(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "data")
    (tmp_path / "data" / "splits_final.json").unlink()
    config = replace(CONFIG, channel=1, patient="(p[0-9]+)_", split=(0.5, 0.25, 0.25))
    cases = check(tmp_path / "data", tmp_path / "set", config).cases
    assert {case.patient for case in cases} == {"p1", "p2", "p3"}
    assert len({case.split for case in cases if case.patient == "p1"}) == 1


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


def edit(root: Path, **changes: Any) -> dict[str, Any]:
    content = json.loads((root / "dataset.json").read_text(encoding="utf-8-sig"))
    (root / "dataset.json").write_text(json.dumps(content | changes))
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
        ("ct/p1_1.mha;;PET", "modality", "'PET'"),
        ("ct/p1_1.txt;;CT", "image", "'ct/p1_1.txt'"),
        (";;CT", "image", "empty"),
    ],
)
def test_a_manifest_leads_to_volumes_below_its_folder_alone(row: str, field: str, value: str, tmp_path: Path) -> None:
    settings = write_manifest(tmp_path / "data")
    (tmp_path / "data/manifest.csv").write_text(f"image;label;modality\n{row}\n")
    found = find_problems(tmp_path / "data", tmp_path / "set", PrepareConfig(**{**vars(CONFIG), **settings}))
    assert [(one.field, one.value) for one in found] == [(f"line 2: {field}", value)]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-400])


def _elsewhere(file: Path) -> None:
    file.write_text(file.read_text().replace("p1_1.raw", "../../p1_1.raw"))


def _listed_data(file: Path) -> None:
    file.write_text(file.read_text().replace("p1_1.raw", "LIST"))


def _metres(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"ElementSpacing = 4 4 6", b"ElementSpacing = 4000 4000 6000"))


@pytest.mark.parametrize(
    ("ending", "spoil", "field"),
    [
        (".mha", _cut, "shape"),
        (".nrrd", _cut, "shape"),
        (".mha", _metres, "spacing"),
        (".mhd", _elsewhere, "data file"),
        (".mhd", _listed_data, "data file"),
    ],
)
def test_files_of_other_formats_are_checked_like_nifti(
    ending: str, spoil: Callable[[Path], None], field: str, tmp_path: Path
) -> None:
    _, _, image, _ = next(volumes())
    file = tmp_path / f"p1_1{ending}"
    save(file, image)
    spoil(file)
    with pytest.raises(InputProblems) as found:
        read_geometry(file)
    assert [one.field for one in found.value.problems] == [field]


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
        "2 classes of data; cases: 1 train, 1 val, 1 test",
        "images: 94",  # two of 43 mm, and eight of 1 mm
        "time: ",
        "which side is left is a guess (columns are taken to run left, front, up): 1 volume (p2_1)",
        "failed: p1_1: imagesTr/p1_1_0001.nii.gz: label: there is none",
    ):
        assert words in printed
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_a_damaged_packed_file_is_refused(ending: str, tmp_path: Path) -> None:
    """Its header is whole, so that only the voxels' checksum shows it."""
    _, _, image, _ = next(volumes())
    file = tmp_path / f"p1_1{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(image.T), str(file), True)
    assert read_volume(file).voxels_IJK.shape == image.shape
    content = bytearray(file.read_bytes())
    content[-3000] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(UnreadableVolume, match="damaged"):
        read_volume(file)


def test_a_bad_case_is_left_out_where_that_is_asked_for(tmp_path: Path, ray: None) -> None:
    """And the set of the others names it, with a second call that finds all done."""
    settings = write_nnunet(tmp_path / "data") | {"labels": None, "axes": ("axial",)}
    (tmp_path / "data/labelsTr/p1_1.nii.gz").unlink()
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
    assert shards.index["preprocessing"]["layout"] == "nnunet"
