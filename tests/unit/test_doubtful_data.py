"""What people's data hold beside the usual: read right, said, or refused with field and value; never passed over."""

from __future__ import annotations

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
    table,
    write_amos,
    write_folder,
    write_manifest,
    write_msd,
    write_nnunet,
    write_totalsegmentator,
)

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.layouts.find import recognise
from data_shards.ingest.prepare import Preparation, PrepareConfig, check, find_problems
from data_shards.ingest.volumes import UnreadableVolume
from data_shards.problems import InputProblems

pytest.importorskip("SimpleITK")


def _manifest(root: Path, change: Callable[[str], str | bytes], name: str = "manifest.csv") -> dict[str, Any]:
    """manifest.csv, changed; with commas, since Excel chooses semicolons or commas by the country."""
    settings = write_manifest(root)
    text = (root / "manifest.csv").read_text(encoding="utf-8-sig").replace(";", ",")
    changed = change(text)
    (root / name).write_bytes(changed.encode() if isinstance(changed, str) else changed)
    return settings


def _check(root: Path, settings: dict[str, Any]) -> Preparation:
    return check(root, root.parent / "set", PrepareConfig(**{**vars(CONFIG), **settings}))


READ: dict[str, Callable[[Path], dict[str, Any]]] = {
    "a table in UTF-16": lambda root: _manifest(root, lambda text: text.encode("utf-16")),
    "Excel's line of the separator": lambda root: _manifest(root, lambda text: f"sep=,\r\n{text}"),
    "folders in capitals, and valid": lambda root: _renamed(root, write_folder(".nii"), "val", "Valid", "Images"),
    "Slicer's name of a label": lambda root: _renamed(root, write_folder(".nrrd"), "_seg.nrrd", ".seg.nrrd"),
    "capitals of TotalSegmentator": lambda root: _renamed(root, write_totalsegmentator, "ct.nii.gz", "CT.NII.GZ"),
    "capitals of AMOS": lambda root: _renamed(root, write_amos, ".nii.gz", ".NII.GZ"),
    "MetaImage in capitals": lambda root: _renamed(root, write_folder(".mha"), ".mha", ".MHA"),
    "modality in place of channel_names": lambda root: _with_modality(root),
}


def _renamed(root: Path, write: Any, old: str, new: str, images: str = "") -> dict[str, Any]:
    """`old` in all names of files and folders, and in dataset.json, becomes `new`; folders `images` are called so."""
    settings: dict[str, Any] = write(root)
    for file in sorted(root.rglob("*"), key=lambda one: -len(one.parts)):
        name = images if images and file.name == images.lower() else file.name.replace(old, new)
        file.rename(file.with_name(name))
    if (file := root / "dataset.json").is_file():
        file.write_text(file.read_text().replace(old, new))
    return settings


def _with_modality(root: Path) -> dict[str, Any]:
    settings = write_nnunet(root)
    edit(root, modality={"0": "PET", "1": "CT"}, channel_names={})
    return settings


@pytest.mark.parametrize("name", READ)
def test_what_others_write_is_read(name: str, tmp_path: Path) -> None:
    found = _check(tmp_path / "data", READ[name](tmp_path / "data"))
    assert [(case.case_id, case.modality, case.split) for case in found.cases] == [
        *(("p1_1", "CT", "train"), ("p1_2", "CT", "train"), ("p2_1", "CT", "val"), ("p3_1", "CT", "test"))
    ]
    assert not [note for note in found.survey.notes if "fold" not in note]


def _classes(root: Path) -> dict[str, Any]:
    return write_nnunet(root) | edit(root, labels={"background": 0, "liver": 1, "Liver": 2}) | {"labels": None}


def _two_images(root: Path) -> dict[str, Any]:
    settings = write_totalsegmentator(root)
    (root / "p1_1/mri.nii.gz").write_bytes((root / "p1_1/ct.nii.gz").read_bytes())
    return settings


def _ignored(root: Path) -> dict[str, Any]:
    settings = write_nnunet(root) | {"labels": None}
    return settings | edit(root, labels={"background": 0, "liver": 1, "Ignore": 2})


def _background_elsewhere(root: Path) -> dict[str, Any]:
    settings = write_nnunet(root) | {"labels": None}
    return settings | edit(root, labels={"spleen": 0, "liver": 1, "Background": 2})


def _turned_table(root: Path) -> dict[str, Any]:
    file = root.with_suffix(".yaml")
    file.write_text("name: mine\nnames: {1: spleen, 2: liver}\n")
    return write_nnunet(root) | {"labels": str(file)}


def _named_otherwise(root: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Labels as 3D Slicer writes them, whose headers name their segments; in the last file as given."""
    write_folder(".nrrd")(root)
    for file in sorted(root.glob("*/masks/*.nrrd")):
        used = names if file.name == "p3_1_seg.nrrd" else ("spleen", "liver")
        of_id = zip((SPLEEN, LIVER), used, strict=True)
        lines = [f"Segment{n}_LabelValue:={value}\nSegment{n}_Name:={name}" for n, (value, name) in enumerate(of_id)]
        head, voxels = file.read_bytes().split(b"\n\n", 1)
        file.write_bytes(head + b"\n" + "\n".join(lines).encode() + b"\n\n" + voxels)
    return {"modality": "CT"}


def _segmentation(root: Path, is_cropped: bool) -> dict[str, Any]:
    """A label as 3D Slicer saves it with "Crop to minimum extent", or of segments that overlap, in two layers."""
    import SimpleITK as sitk

    settings = _named_otherwise(root, ("spleen", "liver"))
    file = root / "test/masks/p3_1_seg.nrrd"
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    image = sitk.GetImageFromArray(label[1:] if is_cropped else np.stack([label] * 2, axis=-1), isVector=not is_cropped)
    image.SetMetaData("Segment0_LabelValue", "1")
    image.SetMetaData("Segmentation_ReferenceImageExtentOffset", "0 0 1")
    sitk.WriteImage(image, str(file))
    head = file.read_bytes()
    file.write_bytes(head.replace(b"kinds: vector", b"kinds: list"))
    return settings


def _of_four_phases(root: Path) -> dict[str, Any]:
    settings = write_msd(root) | {"labels": None, "channel": 0}
    edit(root, modality={"0": "T1", "1": "T2"})
    for file in (root / "images").iterdir():
        phases = np.stack([np.asarray(nib.load(file).dataobj)] * 4, axis=-1)
        nib.save(nib.Nifti1Image(phases, AFFINE), file)
    return settings


def _with_slope(root: Path) -> dict[str, Any]:
    settings = write_folder(".mha")(root)
    file = root / "train/images/p1_1.mha"
    slope = b"ElementToIntensityFunctionSlope = 2\nElementDataFile"
    file.write_bytes(file.read_bytes().replace(b"ElementDataFile", slope, 1))
    return settings


def _two_sessions(root: Path) -> dict[str, Any]:
    """BIDS: two sessions of a subject, in two splits."""
    return _renamed(root, _renamed_first, "p2_1", "sub-07_ses-2_ct")


def _renamed_first(root: Path) -> dict[str, Any]:
    return _renamed(root, write_folder(".nii"), "p1_1", "sub-07_ses-1_ct")


def _other_side(root: Path) -> dict[str, Any]:
    """sform and qform of an image disagree, and its label has the qform alone, as after a program that prefers it."""
    settings = write_nnunet(root)
    flipped = AFFINE.copy()
    flipped[0] = -AFFINE[0] - [0, 0, 0, 4]  # the same corners
    for name, is_image in (("imagesTr/p1_1_0001", True), ("labelsTr/p1_1", False)):
        file = root / f"{name}.nii.gz"
        volume = nib.Nifti1Image(np.asarray(nib.load(file).dataobj), AFFINE if is_image else flipped)
        volume.header.set_qform(flipped, 1)
        volume.header.set_sform(AFFINE if is_image else flipped, int(is_image))
        nib.save(volume, file)
    return settings


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str, str]] = {
    "a drive": (lambda root: _manifest(root, lambda text: text.replace(r"ct\p1_1", r"D:\ct\p1_1")), "image", "'D:"),
    "a server": (lambda root: _manifest(root, lambda text: text.replace(r"ct\p1_1", r"\\a\p1_1")), "image", r"'\\\\a"),
    "a path with two slashes": (
        lambda root: _manifest(root, lambda text: text.replace(r"ct\p1", "//p1")),
        "image",
        "/",
    ),
    "a comma in a value": (lambda root: _manifest(root, lambda text: text.replace("p1,", "P,1,")), "line 2", "values"),
    "a column twice": (lambda root: _manifest(root, lambda t: t.replace("Split", "Label")), "columns", "label comes"),
    "two tables": (lambda root: _manifest(root, str, "manifest.tsv"), "files", "manifest.csv and manifest.tsv"),
    "names that differ in capitals": (_classes, "names", "'liver' and 'Liver'"),
    "a label that may be mirrored": (_other_side, "orientation", "LAS, its image RAS, and which side is left is a"),
    "nnU-Net's ignore in capitals": (_ignored, "labels", "a class `Ignore`"),
    "background at another id": (_background_elsewhere, "names", "'Background' for another id than 0"),
    "a table that turns two classes": (_turned_table, "names.1", "'spleen', and 'Liver' by the data"),
    "segments of other numbers": (lambda root: _named_otherwise(root, ("liver", "spleen")), "segments", "is 'liver'"),
    "a segment of another name": (lambda root: _named_otherwise(root, ("lesion", "liver")), "segments", "'lesion'"),
    "segments in layers": (lambda root: _segmentation(root, is_cropped=False), "segments", "in 2 layers, as 3D Slicer"),
    "four phases, two channels": (_of_four_phases, "channels", "4 in the file, 2 in dataset.json"),
    "a slope that is not applied": (_with_slope, "ElementToIntensityFunctionSlope", "2"),
    "sessions of a subject in two splits": (_two_sessions, "patient sub-07", "train and val"),
    "two images of a case": (_two_images, "files", "both ct.nii.gz and mri.nii.gz"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_misread_is_refused(name: str, tmp_path: Path) -> None:
    write, field, value = REFUSED[name]
    settings = write(tmp_path / "data")
    found = find_problems(tmp_path / "data", tmp_path / "set", PrepareConfig(**{**vars(CONFIG), **settings}))
    assert field in found[0].field
    assert value in found[0].value


def test_a_segmentation_that_3d_slicer_cropped_is_named_as_one(tmp_path: Path) -> None:
    settings = _segmentation(tmp_path / "data", is_cropped=True)
    config = PrepareConfig(**{**vars(CONFIG), **settings})
    (found,) = find_problems(tmp_path / "data", tmp_path / "set", config)
    assert (found.field, found.value) == ("shape", "(32, 32, 7), its image has (32, 32, 8)")
    assert 'without the option "Crop to minimum extent"' in found.remedy


def test_a_folder_above_is_refused_with_the_one_that_is_meant(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "Dataset001_abdomen")
    with pytest.raises(InputProblems, match="Dataset001_abdomen in it is of layout nnunet: give that folder"):
        recognise(tmp_path)


def test_segments_that_a_label_names_itself_are_its_classes(tmp_path: Path) -> None:
    settings = _named_otherwise(tmp_path / "data", ("spleen", "liver"))
    labelling = _check(tmp_path / "data", settings).survey.labelling
    assert labelling.table.names == ("background", "spleen", "liver", "body")
    assert labelling.ids == {0: 0, SPLEEN: 1, LIVER: 2}


def _no_organ(root: Path) -> dict[str, Any]:
    settings = write_totalsegmentator(root)
    (root / "p1_1/segmentations/spleen.nii.gz").unlink()
    return settings


def _meta(root: Path) -> dict[str, Any]:
    settings = write_totalsegmentator(root)
    file = root / "meta.csv"
    file.write_text(file.read_text().replace("p2_1", "s9"))
    return settings


def _unread(root: Path) -> dict[str, Any]:
    settings = write_folder(".nii")(root)
    (root / "val").rename(root / "held_out")
    return settings


def _zero(root: Path) -> dict[str, Any]:
    settings = write_nnunet(root) | {"labels": None}
    return settings | edit(root, labels={"tumour": 0, "liver": 1, "spleen": 2})


def _more_channels(root: Path) -> dict[str, Any]:
    return write_nnunet(root) | {"channel": 0} | edit(root, channel_names={"0": "CT"})


SAID: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "an organ without a file": (_no_organ, ["1 of 4 cases have no file of some organs that others have, as p1_1: spl"]),
    "meta.csv of other cases": (_meta, ["meta.csv names 1 cases that are not here, as s9", "state no split of 1 of 4"]),
    "a folder of another name": (
        _unread,
        ["2 volumes are not read, since nothing in their folders is used: held_out/"],
    ),
    "patients who differ in capitals": (
        lambda root: _manifest(root, lambda text: text.replace("ct,p1", "ct,P2", 1)),
        ["P2 and p2 count as two patients"],
    ),
    "a class at id 0": (_zero, ["id 0 is called 'tumour', and counts as background"]),
    "a channel without a name": (_more_channels, ["imagesTr has files of channel 1, which channel_names does not"]),
    "a label of two images": (
        lambda root: _manifest(root, lambda text: text.replace("drawn/p1_2", "drawn/p1_1")),
        ["p1_1, p1_2 have one label, drawn/p1_1.nrrd"],
    ),
    "a table beside nnU-Net's": (lambda root: _beside(root), ["manifest.csv is not read; --prepare.layout folder"]),
}


def _beside(root: Path) -> dict[str, Any]:
    settings = write_nnunet(root)
    (root / "manifest.csv").write_text("image\n")
    return settings


@pytest.mark.parametrize("write", [write_manifest, write_totalsegmentator])
def test_a_setting_against_the_modality_of_a_table_or_name_is_said(
    write: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    settings = write(tmp_path / "data") | {"modality": "MR"}
    said = "taken as MR as stated, against CT by its table or name; else leave --prepare.modality out"
    assert {case.notes for case in _check(tmp_path / "data", settings).cases} == {(said,)}


@pytest.mark.parametrize("name", SAID)
def test_what_is_doubtful_is_said(name: str, tmp_path: Path) -> None:
    write, words = SAID[name]
    notes = [note for note in _check(tmp_path / "data", write(tmp_path / "data")).survey.notes if "fold " not in note]
    assert len(notes) == len(words)
    for note, word in zip(notes, words, strict=True):
        assert word in note


def test_a_ct_of_ten_times_its_values_and_an_empty_label(tmp_path: Path) -> None:
    settings = write_amos(tmp_path / "data")
    file = tmp_path / "data/images/p1_1.nii.gz"
    voxels = np.asarray(nib.load(file).dataobj)
    nib.save(nib.Nifti1Image(voxels.astype(np.int32) * 10, AFFINE), file)
    nib.save(nib.Nifti1Image(np.zeros((32, 32, 8), np.uint8), AFFINE), tmp_path / "data/labels/p1_2.nii.gz")
    found = {case.case_id: case for case in _check(tmp_path / "data", settings).cases}
    with pytest.raises(UnreadableVolume, match="below -4100: these are not HU"):
        next(slices_of(found["p1_1"], CONFIG, None))
    notes: list[str] = []
    next(slices_of(found["p1_2"], CONFIG, None, notes))
    assert notes == ["its label: no voxel has a class; take the case out if that is wrong"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda hu: hu.clip(-57, 164), "neither air nor fat is in this CT, whose values begin at -57"),
        (lambda hu: np.where(hu < -500, hu + 1000, hu + 200), "neither air nor fat is in this CT, whose values begin"),
        (lambda hu: hu.astype(np.uint16), "numbers below 0 were stored without their sign"),
        (lambda hu: np.where(hu < -900, np.nan, hu).astype(np.float32), "NaN or infinite: write numbers there"),
        (lambda hu: (4 * hu).clip(0, 400), "if it was cut to a window, give it before that"),
    ],
    ids=["a window without air", "MR called CT", "without sign", "NaN", "a window above 0"],
)
def test_a_ct_of_doubtful_values(values: Callable[[np.ndarray], np.ndarray], words: str, tmp_path: Path) -> None:
    settings = write_amos(tmp_path / "data")
    file = tmp_path / "data/images/p1_1.nii.gz"
    nib.save(nib.Nifti1Image(values(np.asarray(nib.load(file).dataobj)), AFFINE), file)
    case = next(one for one in _check(tmp_path / "data", settings).cases if one.case_id == "p1_1")
    said: list[str] = []
    try:
        next(slices_of(case, CONFIG, None, said))
    except UnreadableVolume as failed:
        said = [failed.reason]
    assert [words in one for one in said] == [True]


def test_a_table_with_two_spellings_of_a_class_is_refused(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "data")
    file = Path(table(tmp_path / "t.yaml"))
    file.write_text("name: mine\nnames: [kidney left, Kidney_Left]\n")
    config = replace(CONFIG, labels=str(file), channel=1, fold=1)
    (found, *_) = find_problems(tmp_path / "data", tmp_path / "set", config)
    assert found.value == "'kidney left' and 'Kidney_Left'"
