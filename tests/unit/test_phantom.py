"""The embedded data: same seed, same bytes; every organ in its place; an archive laid out as AMOS is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from data_shards.ingest.archive import read_archive
from data_shards.ingest.masks import annotation_record, find_wholebody_problems
from data_shards.labels import AMOS, AMOS_TO_WHOLEBODY, WHOLEBODY
from data_shards.phantom import PhantomConfig, write_phantom
from data_shards.phantom.case import ORIENTATIONS, make_case
from data_shards.phantom.config import CaseKey
from data_shards.problems import InputProblems

TINY = PhantomConfig(
    seed=3, num_train=2, num_val=1, num_test=1, matrix=(80, 96), slice_thickness_mm=(5.0, 7.0), missing_rate=0.0
)
ORGAN = {name: AMOS.names.index(name) for name in AMOS.names}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def volumes(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Of every case: name, image and labels in RAS order, affine of that."""
    found = []
    for path in sorted(folder.glob("images*/*.nii.gz")):
        label_path = path.parent.with_name(path.parent.name.replace("images", "labels")) / path.name
        image, labels = (nibabel.as_closest_canonical(nibabel.load(p)) for p in (path, label_path))
        assert np.array_equal(image.affine, labels.affine)
        found.append((path.name[:9], np.asarray(image.dataobj), np.asarray(labels.dataobj), image.affine))
    return found


def centre_mm(labels: np.ndarray, affine: np.ndarray, organ: str) -> np.ndarray:
    """Centre of an organ in RAS mm."""
    return affine[:3, :3] @ np.argwhere(labels == ORGAN[organ]).mean(0) + affine[:3, 3]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "archive"
    write_phantom(out, TINY)
    return out


def test_same_seed_same_bytes_and_the_same_command_again_does_nothing(archive: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "again", TINY)
    before = digests(archive)
    assert digests(tmp_path / "again") == before
    times = {p: p.stat().st_mtime_ns for p in archive.rglob("*")}
    write_phantom(archive, TINY)
    assert {p: p.stat().st_mtime_ns for p in archive.rglob("*")} == times
    key = CaseKey("CT", "train", 0, 1)
    other = make_case(key, replace(TINY, seed=4))
    assert not np.array_equal(other.labels, make_case(key, TINY).labels)


def test_an_interrupted_archive_is_finished_to_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    whole = digests(archive)
    part = tmp_path / "part"
    write_phantom(part, TINY)
    for name in ("dataset.json", "imagesTr/amos_0002.nii.gz", "imagesTs/amos_0510.nii.gz"):
        (part / name).unlink()
    (part / "labelsTs/amos_0510.nii.gz").write_bytes(b"half a file")
    kept = (part / "imagesTr/amos_0001.nii.gz").stat().st_mtime_ns
    write_phantom(part, TINY)
    assert digests(part) == whole
    assert (part / "imagesTr/amos_0001.nii.gz").stat().st_mtime_ns == kept


def test_a_patient_does_not_depend_on_how_many_others_there_are() -> None:
    key = CaseKey("MR", "val", 1, 510)
    alone, among_many = make_case(key, TINY), make_case(replace(key, number=600), replace(TINY, num_train=9))
    assert np.array_equal(alone.image, among_many.image)


def test_layout_and_dataset_json_are_those_of_amos(archive: Path) -> None:
    dataset = json.loads((archive / "dataset.json").read_text())
    assert dataset["modality"] == {"0": "CT"}
    assert dataset["labels"]["8"] == "arota"
    assert dataset["labels"]["9"] == "postcava"
    assert len(dataset["labels"]) == 16
    assert (dataset["numTraining"], dataset["numTest"]) == (4, 2)
    train = [entry["image"] for entry in dataset["training"]]
    assert train == [f"./imagesTr/amos_{n:04d}.nii.gz" for n in (1, 2, 507, 508)]
    assert [set(entry) for entry in dataset["test"]] == [{"image"}] * 2
    named = {
        path for split in ("training", "validation", "test") for entry in dataset[split] for path in entry.values()
    }
    on_disk = {f"./{p.relative_to(archive)}" for p in archive.rglob("*.nii.gz")}
    assert on_disk - named == {f"./labelsTs/amos_{n:04d}.nii.gz" for n in (4, 510)}
    assert named <= on_disk


def test_headers_differ_as_in_real_archives(archive: Path) -> None:
    headers = [nibabel.load(p) for p in archive.glob("images*/*.nii.gz")]
    assert {"".join(nibabel.aff2axcodes(h.affine)) for h in headers} <= set(ORIENTATIONS)
    assert len({nibabel.aff2axcodes(h.affine) for h in headers}) >= 3
    assert len({h.header.get_zooms() for h in headers}) >= 4
    for header in headers:
        assert header.get_data_dtype() == np.int16
        field_of_view = header.shape[0] * header.header.get_zooms()[0]
        assert 355.0 <= field_of_view <= 425.0


def test_every_organ_is_there_and_in_one_piece_of_a_fair_size(archive: Path) -> None:
    for name, _, labels, affine in volumes(archive):
        voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000.0
        millilitres = np.bincount(labels.ravel(), minlength=16) * voxel_ml
        assert labels.max() == 15, name
        assert (millilitres[1:] > 6.0).all(), (name, millilitres)
        assert np.argmax(millilitres[1:]) + 1 == ORGAN["liver"], name
        ends = labels[[0, -1]].any() or labels[:, [0, -1]].any()
        assert not ends, f"{name}: an organ leaves the field of view sideways"


def test_organs_lie_where_they_belong(archive: Path) -> None:
    right, anterior, superior = 0, 1, 2
    order = [
        ("liver", "spleen", right), ("kidney_right", "kidney_left", right), ("gallbladder", "stomach", right),
        ("inferior_vena_cava", "aorta", right), ("adrenal_gland_right", "adrenal_gland_left", right),
        ("duodenum", "pancreas", right), ("stomach", "kidney_left", anterior), ("stomach", "spleen", anterior),
        ("pancreas", "aorta", anterior), ("gallbladder", "kidney_right", anterior), ("bladder", "prostate", anterior),
        ("kidney_left", "urinary_bladder", superior), ("liver", "gallbladder", superior),
        ("adrenal_gland_right", "kidney_right", superior), ("adrenal_gland_left", "kidney_left", superior),
        ("esophagus", "stomach", superior), ("kidney_right", "prostate_uterus", superior),
    ]  # fmt: skip
    short = {"bladder": "urinary_bladder", "prostate": "prostate_uterus"}
    for name, _, labels, affine in volumes(archive):
        for more, less, axis in order:
            a, b = (centre_mm(labels, affine, short.get(organ, organ))[axis] for organ in (more, less))
            assert a > b, f"{name}: {more} against {less} along axis {axis}"


def test_ct_is_in_hounsfield_units(archive: Path) -> None:
    ranges = {
        "liver": (85, 125), "spleen": (95, 150), "kidney_left": (150, 230), "gallbladder": (-20, 30),
        "aorta": (125, 190), "inferior_vena_cava": (105, 170), "pancreas": (55, 105), "urinary_bladder": (-15, 45),
        "esophagus": (10, 60),
    }  # fmt: skip
    for name, image, labels, _ in volumes(archive):
        if int(name[-4:]) > 500:
            continue
        for organ, (low, high) in ranges.items():
            assert low < np.median(image[labels == ORGAN[organ]]) < high, (name, organ)
        assert image.min() >= -1024
        assert np.median(image[:, -3:]) == pytest.approx(-1000, abs=15)
        assert 5 < image[:, -3:].std() < 20, "air carries scanner noise"
        assert (image[labels == 0] > 250).sum() > 1000, "bones"
        assert ((image > -130) & (image < -75) & (labels == 0)).mean() > 0.05, "fat"


def test_mr_has_its_own_scale_bias_and_noise(archive: Path) -> None:
    cases = [(n, i, m) for n, i, m, _ in volumes(archive) if int(n[-4:]) > 500]
    tops = [int(image.max()) for _, image, _ in cases]
    assert len(set(tops)) == len(tops)
    assert min(tops) >= 400
    assert max(tops) <= 3000
    for name, image, labels in cases:
        medians = {organ: float(np.median(image[labels == ORGAN[organ]])) for organ in ("liver", "spleen", "aorta")}
        assert medians["aorta"] < medians["liver"] < medians["spleen"], name
        assert 0.0 < np.median(image[:, -3:]) < 0.1 * image.max(), "Rician background"


def test_missing_organs_are_rare_and_never_those_of_a_first_patient() -> None:
    config = replace(TINY, missing_rate=0.5, matrix=(48, 48), slice_thickness_mm=(9.0, 9.0))
    lacking = set()
    for index in range(6):
        case = make_case(CaseKey("CT", "train", index, index + 1), config)
        absent = set(range(1, 16)) - set(np.unique(case.labels).tolist())
        if index == 0:
            assert not absent
        lacking |= {AMOS.names[i] for i in absent}
    assert lacking
    assert lacking <= {"gallbladder", "kidney_left", "kidney_right", "urinary_bladder", "prostate_uterus"}


@pytest.fixture(scope="module")
def with_wholebody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "with"
    write_phantom(out, replace(TINY, wholebody=True))
    return out


def test_wholebody_masks_change_nothing_else(archive: Path, with_wholebody: Path) -> None:
    before, after = digests(archive), digests(with_wholebody)
    added = {name for name in after if name.startswith("wholebody/")}
    assert {name: digest for name, digest in after.items() if name not in added | {"phantom.json"}} == {
        name: digest for name, digest in before.items() if name != "phantom.json"
    }
    cases = read_archive(with_wholebody)
    assert added == {"wholebody/annotations.json", *(f"wholebody/{case.case_id}.nii.gz" for case in cases)}
    assert find_wholebody_problems(cases, "merged", with_wholebody / "wholebody") == []
    assert annotation_record(with_wholebody / "wholebody")["tool"] == "phantom"
    entry = json.loads((with_wholebody / "wholebody/annotations.json").read_text())["cases"]["amos_0001"]
    assert entry["image_sha256"] == after["imagesTr/amos_0001.nii.gz"]
    assert entry["mask_sha256"] == after["wholebody/amos_0001.nii.gz"]
    # An archive without the masks is another one, and says so.
    with pytest.raises(InputProblems, match="wholebody: False there, True asked for"):
        write_phantom(archive, replace(TINY, wholebody=True))


def test_every_voxel_of_the_patient_has_a_class(with_wholebody: Path) -> None:
    to_wholebody = np.array(AMOS_TO_WHOLEBODY)
    names = set()
    for name, image, labels, affine in volumes(with_wholebody):
        stored = nibabel.as_closest_canonical(nibabel.load(with_wholebody / "wholebody" / f"{name}.nii.gz"))
        assert np.array_equal(stored.affine, affine)
        mask = np.asarray(stored.dataobj)
        assert mask.dtype == np.uint8
        organs = (labels > 0) & (labels != ORGAN["prostate_uterus"])
        assert np.array_equal(mask[organs], to_wholebody[labels[organs]])
        holes = ndimage.binary_fill_holes(mask.any(axis=2)) & ~mask.any(axis=2)
        assert not holes.any()
        assert all(np.array_equal(ndimage.binary_fill_holes(plane), plane) for plane in (mask > 0).transpose(2, 0, 1))
        if int(name[-4:]) <= 500:
            assert (image[mask == 0] < -100).mean() > 0.99
            assert (image[mask == 0] < -100).sum() > mask.size / 3
        names |= {WHOLEBODY.names[i] for i in np.unique(mask)}
        check_sides(mask)
    assert len(names) > 40
    assert not names & {"unused", "body"}


def check_sides(mask: np.ndarray) -> None:
    """Right is at larger x in RAS order, in this phantom's world as in the organs' test."""
    for pair in ("hip", "autochthon", "iliopsoas", "lung_lower_lobe", "iliac_artery", "femur"):
        right, left = (np.argwhere(mask == WHOLEBODY.names.index(f"{pair}_{side}")) for side in ("right", "left"))
        if len(right) and len(left):
            assert right[:, 0].mean() > left[:, 0].mean(), pair


def test_refusals_name_all_that_is_wrong(tmp_path: Path, archive: Path) -> None:
    bad = PhantomConfig(seed=-1, num_train=0, modalities=("CT", "PET"), matrix=(160, 128), missing_rate=2.0)
    with pytest.raises(InputProblems) as refusal:
        write_phantom(tmp_path / "new", bad)
    assert {p.field for p in refusal.value.problems} == {"seed", "num_train", "modalities", "matrix", "missing_rate"}
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputProblems, match="leaves room for 500"):
        write_phantom(tmp_path / "new", PhantomConfig(num_train=500))
    before = digests(archive)
    with pytest.raises(InputProblems, match="seed: 3 there, 4 asked for"):
        write_phantom(archive, replace(TINY, seed=4))
    assert digests(archive) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputProblems, match="other things in it"):
        write_phantom(tmp_path, TINY)
    with pytest.raises(InputProblems, match="not a folder"):
        write_phantom(tmp_path / "notes.txt", TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
