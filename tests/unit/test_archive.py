"""The AMOS folder: its cases, and every way it can be wrong that headers and names show."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_shards.ingest.archive import find_problems, read_archive
from data_shards.problems import InputProblems


def test_cases_have_modality_by_number_and_split_by_list(archive) -> None:
    found = [(c.case_id, c.modality, c.split, c.label is not None) for c in read_archive(archive.root)]
    assert found == [
        ("amos_0001", "CT", "train", True),
        ("amos_0002", "CT", "val", True),
        ("amos_0003", "CT", "test", False),
        ("amos_0501", "MR", "train", True),
        ("amos_0502", "MR", "val", True),
        ("amos_0504", "MR", "test", True),  # labelsTs holds a file of its name
    ]
    assert find_problems(archive.root) == []
    assert {c.modality for c in read_archive(archive.root, ("MR",))} == {"MR"}


def test_case_500_is_ct(archive) -> None:
    image, _ = archive.patient("CT", 500)
    archive.save(archive.root / "imagesTs/amos_0500.nii.gz", image)
    archive.edit(lambda d: d["test"].append("imagesTs/amos_0500.nii.gz"))
    assert {c.case_id: c.modality for c in read_archive(archive.root)}["amos_0500"] == "CT"


def test_files_that_are_not_listed_are_ignored(archive) -> None:
    (archive.root / "labelsTr" / "amos_0099.nii.gz").write_bytes(b"nothing refers to this")
    assert find_problems(archive.root) == []


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"training": 3}'])
def test_no_dataset_or_a_broken_one_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    (found,) = find_problems(tmp_path)
    assert "dataset.json" in str(found)
    with pytest.raises(InputProblems):
        read_archive(tmp_path)


def test_not_a_folder_is_refused(tmp_path: Path) -> None:
    (found,) = find_problems(tmp_path / "nowhere")
    assert found.value == "not a folder"


def test_an_empty_list_of_cases_is_refused(archive) -> None:
    archive.edit(lambda d: d.update(training=[], validation=[], test=[]))
    (found,) = find_problems(archive.root)
    assert "no case" in found.value


def _spoil_missing(archive) -> None:
    (archive.root / "imagesTr/amos_0001.nii.gz").unlink()


def _spoil_label_missing(archive) -> None:
    (archive.root / "labelsVa/amos_0502.nii.gz").unlink()


def _spoil_unlabelled(archive) -> None:
    archive.edit(lambda d: d["training"][0].pop("label"))


def _spoil_header(archive) -> None:
    (archive.root / "imagesTr/amos_0501.nii.gz").write_bytes(gzip.compress(b"not a header" * 100))


def _spoil_not_gzip(archive) -> None:
    (archive.root / "imagesTr/amos_0501.nii.gz").write_bytes(b"not a gzip file at all")


def _spoil_four_d(archive) -> None:
    archive.save(archive.root / "imagesVa/amos_0002.nii.gz", np.zeros((*archive.shape, 2), np.int16))


def _spoil_empty(archive) -> None:
    archive.save(archive.root / "imagesTs/amos_0003.nii.gz", np.zeros((4, 0, 4), np.int16))


def _spoil_complex(archive) -> None:
    archive.save(archive.root / "imagesTs/amos_0003.nii.gz", np.zeros((4, 4, 4), np.complex64))


def _spoil_shape(archive) -> None:
    archive.save(archive.root / "labelsTr/amos_0001.nii.gz", np.zeros((24, 20, 9), np.uint8))


def _spoil_affine(archive) -> None:
    affine = np.diag([*archive.spacing_mm, 1.0])
    affine[0, 3] = 3.0
    archive.save(archive.root / "labelsTr/amos_0001.nii.gz", np.zeros(archive.shape, np.uint8), affine)


def _spoil_flat_affine(archive) -> None:
    affine = np.diag([4.0, 4.0, 0.0, 1.0])
    image = nib.Nifti1Image(np.zeros(archive.shape, np.int16), None)
    image.set_sform(affine, code=1)
    nib.save(image, archive.root / "imagesTs/amos_0003.nii.gz")


def _spoil_twice(archive) -> None:
    archive.edit(lambda d: d["validation"].append(d["training"][0]))


def _spoil_twice_in_other_folders(archive) -> None:
    """Two patients' files with the same id, each listed."""
    image, label = archive.patient("CT", 8)
    archive.save(archive.root / "imagesVa/amos_0001.nii.gz", image)
    archive.save(archive.root / "labelsVa/amos_0001.nii.gz", label)
    entry = {"image": "./imagesVa/amos_0001.nii.gz", "label": "./labelsVa/amos_0001.nii.gz"}
    archive.edit(lambda d: d["validation"].append(entry))


def _spoil_twice_in_other_formats(archive) -> None:
    """The .nii of a listed .nii.gz beside it, which need not hold the same."""
    image, _ = archive.patient("CT", 8)
    archive.save(archive.root / "imagesTr/amos_0001.nii", image)


def _spoil_twice_among_labels(archive) -> None:
    _, label = archive.patient("MR", 8)
    archive.save(archive.root / "labelsTs/amos_0504.nii", label)


def _spoil_organ(archive) -> None:
    archive.edit(lambda d: d["labels"].update({"6": "spleen"}))


def _spoil_extra_organ(archive) -> None:
    archive.edit(lambda d: d["labels"].update({"16": "colon"}))


def _spoil_entry(archive) -> None:
    archive.edit(lambda d: d["training"].append(7))


def _spoil_name(archive) -> None:
    archive.edit(lambda d: d["test"].append({"image": "imagesTs/Mr. Smith.nii.gz"}))


def _spoil_mixed_up(archive) -> None:
    archive.edit(lambda d: d["training"][0].update(label="labelsTr/amos_0501.nii.gz"))


SPOILT = [
    (_spoil_missing, "imagesTr/amos_0001.nii.gz", "file", "missing"),
    (_spoil_label_missing, "labelsVa/amos_0502.nii.gz", "file", "missing"),
    (_spoil_unlabelled, "dataset.json", "train", "has no label"),
    (_spoil_header, "imagesTr/amos_0501.nii.gz", "header", "not NIfTI"),
    (_spoil_not_gzip, "imagesTr/amos_0501.nii.gz", "header", "not NIfTI"),
    (_spoil_four_d, "imagesVa/amos_0002.nii.gz", "dimensions", "4-D"),
    (_spoil_empty, "imagesTs/amos_0003.nii.gz", "shape", "empty"),
    (_spoil_complex, "imagesTs/amos_0003.nii.gz", "data type", "complex64"),
    (_spoil_shape, "labelsTr/amos_0001.nii.gz", "shape", "(24, 20, 9)"),
    (_spoil_affine, "labelsTr/amos_0001.nii.gz", "affine", "0.75 voxels"),
    (_spoil_flat_affine, "imagesTs/amos_0003.nii.gz", "affine", "0.0"),
    (_spoil_twice, "dataset.json", "case id amos_0001", "train: "),
    (_spoil_twice_in_other_folders, "dataset.json", "case id amos_0001", "val: ./imagesVa/amos_0001.nii.gz"),
    (_spoil_twice_in_other_formats, "imagesTr", "case id amos_0001", "both amos_0001.nii.gz and amos_0001.nii"),
    (_spoil_twice_among_labels, "labelsTs", "case id amos_0504", "both amos_0504.nii.gz and amos_0504.nii"),
    (_spoil_organ, "dataset.json", "labels.6", "spleen"),
    (_spoil_extra_organ, "dataset.json", "labels.16", "colon"),
    (_spoil_entry, "dataset.json", "train", "7"),
    (_spoil_name, "dataset.json", "test", "Mr. Smith"),
    (_spoil_mixed_up, "dataset.json", "train", "amos_0501"),
]


@pytest.mark.parametrize(("spoil", "where", "field", "value"), SPOILT, ids=lambda v: getattr(v, "__name__", None))
def test_each_fault_is_named(archive, spoil, where: str, field: str, value: str) -> None:
    spoil(archive)
    (found,) = [p for p in find_problems(archive.root) if p.field == field]
    assert found.where.endswith(where)
    assert value in found.value
    assert found.remedy


def test_a_test_label_is_found_in_either_format(archive) -> None:
    _, label = archive.patient("CT", 3)
    archive.save(archive.root / "labelsTs/amos_0003.nii", label)
    (case,) = (case for case in read_archive(archive.root) if case.case_id == "amos_0003")
    assert case.label == archive.root / "labelsTs/amos_0003.nii"
    assert find_problems(archive.root) == []


def test_all_faults_are_found_at_once(archive) -> None:
    for spoil in (_spoil_missing, _spoil_label_missing, _spoil_header, _spoil_four_d, _spoil_empty, _spoil_organ):
        spoil(archive)
    # The 4-D image also differs from its label, which is not reported twice.
    assert len(find_problems(archive.root)) == 6


def test_the_other_modality_is_not_looked_at(archive) -> None:
    _spoil_header(archive)
    assert find_problems(archive.root, ("CT",)) == []


def test_a_label_may_differ_by_rounding(archive) -> None:
    affine = np.diag([*archive.spacing_mm, 1.0])
    affine[:3, 3] += 1e-4
    archive.save(archive.root / "labelsTr/amos_0001.nii.gz", np.zeros(archive.shape, np.uint8), affine)
    assert find_problems(archive.root) == []


def test_a_case_id_too_long_for_a_shard_s_members_is_refused(archive) -> None:
    name = f"{'a' * 61}_0001"
    archive.edit(
        lambda d: d["training"][0].update(image=f"./imagesTr/{name}.nii.gz", label=f"./labelsTr/{name}.nii.gz")
    )
    assert "at most 64 characters" in "\n".join(map(str, find_problems(archive.root)))
