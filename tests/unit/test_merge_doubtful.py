"""Real and synthetic cases in one data set whose names, labels or pixels do not mean the same."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from layouts_support import AFFINE, write_set
from merge_support import LABELS, PATTERN, write_real
from PIL import Image
from sampling_support import make_here, write_weights
from tests_support import bytes_of

from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.job import check_samples, export_samples
from segdiff_dist.export.merge import Merge, Patients
from segdiff_dist.export.real_set import RealSet

KIND = ("CT", ".nii.gz", 3)
ALL: dict[str, Any] = {"num": None, "diverse_masks": 0, "cross_modality_masks": 0, "samples_per_mask": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The shards of write_real's volumes."""
    root = tmp_path_factory.mktemp("set")
    table = root / "table.yaml"
    table.write_text("name: mine\nnames: [liver, spleen]\n")
    write_real(root / "data", flat=False)
    settings: dict[str, Any] = {"labels": str(table), "patient": PATTERN, "axes": ("axial",), "slice_stride": 6}
    return ShardSet.open(write_set(root / "data", root / "shards", **settings))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_file_says_more_than_a_name(ending: str, tmp_path: Path) -> None:
    """A set that numbers its cases anew has other patients under the same names: a fold trained on whom it validated.
    Files of one size differ by their bytes."""
    real = write_real(tmp_path / "data", flat=False, ending=ending)
    (tmp_path / "table.yaml").write_text("name: mine\nnames: [liver, spleen]\n")
    settings: dict[str, Any] = {"labels": str(tmp_path / "table.yaml"), "patient": PATTERN, "slice_stride": 6}
    shards = ShardSet.open(write_set(real, tmp_path / "shards", **settings))
    renumbered = shutil.copytree(real, tmp_path / "real")
    patients = Patients(shards)
    assert patients.of_real(patients.same_files(RealSet.read(real))) == {
        "p1_1": "p1",
        "p1_2": "p1",
        "p2_1": "p2",
        "p3_1": "p3",
    }
    for folder, end in (("images", f"_0000{ending}"), ("labels", ending)):
        one, other = (renumbered / f"{folder}Tr" / f"{case}{end}" for case in ("p1_2", "p2_1"))
        one.rename(tmp_path / "held")
        other.rename(one)
        (tmp_path / "held").rename(other)
    found = RealSet.read(renumbered)
    assert patients.of_real(patients.same_files(found)) == {"p1_1": "p1", "p1_2": "p2", "p2_1": "p1", "p3_1": "p3"}
    merge = Merge.of(
        renumbered, ("CT", ending, 3), shards.label_table, {"a": "p2_1"}, keep_body=False, patients=Patients(shards)
    )
    assert [("a" in fold["train"]) for fold in merge.folds()] == ["p1_2" not in fold["val"] for fold in merge.folds()]


def test_another_volume_under_the_name_of_a_case_is_said(source: ShardSet, tmp_path: Path) -> None:
    """It counts as the same patient, which leaks nothing; but it may be another one."""
    real = write_real(tmp_path / "real", flat=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Merge.of(real, KIND, source.label_table, {"a": "p2_1"}, keep_body=False, patients=Patients(source))
    file = real / "imagesTr" / "p2_1_0000.nii.gz"
    nib.save(nib.Nifti1Image(np.arange(32 * 32 * 8, dtype=np.int16).reshape(32, 32, 8), AFFINE), file)
    with pytest.warns(UserWarning, match=r"1 case of .* \(p2_1\) has the name of a case of the shard set, but another"):
        merge = Merge.of(real, KIND, source.label_table, {"a": "p2_1"}, keep_body=False, patients=Patients(source))
    assert not any("a" in fold["train"] for fold in merge.folds() if "p2_1" in fold["val"])


def test_label_values_that_are_no_ids_are_refused(source: ShardSet, tmp_path: Path) -> None:
    real = write_real(tmp_path / "real", flat=False)
    content = json.loads((real / "dataset.json").read_text())
    for wrong in (300, -1):
        (real / "dataset.json").write_text(json.dumps(content | {"labels": {**LABELS, "Liver": wrong}}))
        with pytest.raises(InputProblems, match=rf"labels: Liver: {wrong}; give whole numbers from 0 to 255"):
            RealSet.read(real)


# --- masks of a folder beside real slices ---


@pytest.fixture(scope="module")
def run(source: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an image of each of four masks of two patients."""
    root = tmp_path_factory.mktemp("run")
    (root / "masks").mkdir()
    for number in range(4):
        mask = np.full((32, 32), 1, np.uint8)
        mask[:8], mask[20:24, number : number + 5] = 0, 2
        Image.fromarray(mask).save(root / "masks" / f"p{1 + number // 2}_slice{number:03d}.png")
    write_weights(root, table=source.label_table)
    make_here(root, source.root, masks=root / "masks", target_modality="CT", **ALL)
    return root


def write_slices(root: Path, spacing_mm: float, ending: str = ".nii.gz") -> Path:
    """Slices of two patients, three each, of which none is among the masks."""
    for case in (f"p{1 + number // 3}_slice{100 + number}" for number in range(6)):
        image, label = np.full((32, 32), 60, np.uint8), np.full((32, 32), 1, np.uint8)
        label[4:9, 4:9] = 2
        for folder, name, pixels in (("imagesTr", f"{case}_0000", image), ("labelsTr", case, label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            if ending == ".png":
                Image.fromarray(pixels).save(root / folder / f"{name}.png")
            else:
                affine = np.diag([-spacing_mm, -spacing_mm, 1.0, 1.0])
                nib.save(nib.Nifti1Image(pixels, affine), root / folder / f"{name}{ending}")
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 6, "file_ending": ending}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_a_pattern_names_the_patients_of_masks_and_of_real_cases(run: Path, tmp_path: Path) -> None:
    """Each slice counted as a patient: a fold trained on a patient's images and validated the patient's slices."""
    real, out = write_slices(tmp_path / "Dataset008_Flat", 1.0), tmp_path / "Dataset701_Both"
    export_samples(run, out, ExportConfig(merge_with=real, patient=PATTERN))
    folds = json.loads((out / "splits_final.json").read_text())
    assert [{name[:2] for name in fold["val"]} for fold in folds] in ([{"p1"}, {"p2"}], [{"p2"}, {"p1"}])
    for fold in folds:
        assert not {name[:2] for name in fold["train"]} & {name[:2] for name in fold["val"]}
        assert len(fold["train"]) == 3 + 2


def test_masks_of_an_own_export_are_of_the_patients_of_real_cases() -> None:
    """Its items.csv says p1; the real case p1_1, which its masks are of, is then of p1 too."""
    patients = Patients(None, named={"p1_1_ct_0-axial-0003": "p1"})
    assert patients.of("p1_1_ct_0-axial-0003") == patients.of("p1_1") == "p1"
    assert patients.of("p2_1_ct_0-axial-0003") == patients.of("p2_1") == "p2_1"
    assert Patients(None, "(p[0-9])_").of("p2_1_ct_0-axial-0003") == "p2"


@pytest.mark.filterwarnings("ignore:4 of 4 synthetic cases")
def test_without_a_pattern_a_line_says_that_slices_count_as_patients(run: Path, tmp_path: Path) -> None:
    real = write_slices(tmp_path / "Dataset008_Flat", 1.0)
    lines = " ".join(check_samples(run, tmp_path / "Dataset701_Both", ExportConfig(merge_with=real)).lines)
    assert "--export.patient '(.+)_'" in lines


@pytest.mark.filterwarnings("ignore:4 of 4 synthetic cases")
def test_images_of_unknown_spacing_are_not_put_beside_slices_that_have_one(run: Path, tmp_path: Path) -> None:
    """They are written with 1 mm, and nnU-Net resamples by it: organs would have a quarter of their size."""
    for spacing_mm, is_refused in ((4.0, True), (1.0, False)):
        real = write_slices(tmp_path / f"Dataset00{int(spacing_mm)}_Flat", spacing_mm)
        job = ExportConfig(merge_with=real)
        if is_refused:
            with pytest.raises(InputProblems, match=r"spacing: 4 x 4 mm.*--export.file-ending .png"):
                check_samples(run, tmp_path / "Dataset701_Both", job)
        else:
            check_samples(run, tmp_path / "Dataset701_Both", job)
    real = write_slices(tmp_path / "Dataset009_Png", 4.0, ".png")
    check_samples(run, tmp_path / "Dataset701_Both", ExportConfig(merge_with=real, file_ending=".png"))


@pytest.mark.filterwarnings("ignore:4 of 4 synthetic cases")
def test_a_real_image_without_a_label_is_not_written_over(run: Path, tmp_path: Path) -> None:
    """Real files are hard links, so that the data set itself would have changed."""
    real = write_slices(tmp_path / "Dataset008_Flat", 1.0)
    name = check_samples(run, tmp_path / "Dataset700_New", ExportConfig()).samples.items[0]["name"]
    shutil.copy(real / "imagesTr" / "p1_slice100_0000.nii.gz", real / "imagesTr" / f"{name}_0000.nii.gz")
    before = bytes_of(real)
    with pytest.raises(InputProblems, match=f"case {name}: is the name of a synthetic case too"):
        export_samples(run, tmp_path / "Dataset701_Both", ExportConfig(merge_with=real))
    assert bytes_of(real) == before
