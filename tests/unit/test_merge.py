"""Real and synthetic cases in one nnU-Net data set: labels by name, no leakage between folds, real files untouched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from layouts_support import AFFINE, CONFIG, save, slices, write_set
from merge_support import LABELS, PATTERN, write_real
from sampling_support import make_here, write_weights
from tests_support import bytes_of

from data_shards.ingest.prepare import check
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.job import check_samples, export_samples
from segdiff_dist.export.merge import Merge, Patients
from segdiff_dist.export.real_set import RealSet
from segdiff_dist.training.config import TrainConfig

sitk = pytest.importorskip("SimpleITK")


@pytest.fixture(scope="module")
def volumes_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that the model's shards come from."""
    return write_real(tmp_path_factory.mktemp("real") / "Dataset007_Mine", flat=False)


@pytest.fixture(scope="module")
def shards(volumes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shards, in which the classes have other ids: liver is 1."""
    table = tmp_path_factory.mktemp("table") / "table.yaml"
    table.write_text("name: mine\nnames: [liver, spleen]\ncolours: {liver: '#b5533c'}\n")
    root = tmp_path_factory.mktemp("set") / "data"
    shutil.copytree(volumes_set, root)
    fold = [{"train": ["p1_1", "p1_2", "p2_1"], "val": []}]
    (root / "splits_final.json").write_text(json.dumps(fold))
    return write_set(root, root.with_name("shards"), labels=str(table), patient=PATTERN, axes=("axial",))


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an image of each mask of the training split."""
    folder = write_weights(tmp_path_factory.mktemp("run"), table=ShardSet.open(shards).label_table)
    shutil.copytree(folder / "weights" / "ema", folder / "weights" / TrainConfig().averages[0])
    make_here(folder, shards, split="train", num=None, diverse_masks=0, cross_modality_masks=0, samples_per_mask=1)
    return folder


def test_synthetic_slices_beside_real_ones(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, out = write_real(tmp_path / "Dataset008_Flat", flat=True), tmp_path / "Dataset701_Both"
    before = bytes_of(real)
    assert main(["export", str(out), "--run", str(run), "--format", "nnunet", "--merge-with", str(real)]) == 0
    said = capsys.readouterr().out
    assert bytes_of(real) == before
    merged = bytes_of(out)
    for name, content in before.items():
        if name != "dataset.json":
            assert merged[name] == content
            assert (out / name).samefile(real / name)
    about = json.loads(merged["dataset.json"])
    assert (about["labels"], about["channel_names"]) == (LABELS, {"0": "CT"})
    synthetic = set(json.loads(merged["provenance.json"])["synthetic_cases"])
    assert about["numTraining"] == len(list((out / "imagesTr").iterdir())) == 3 + len(synthetic)
    folds = json.loads(merged["splits_final.json"])
    assert sorted(len(fold["val"]) for fold in folds) == [1, 2], "p1 has two scans"
    for fold in folds:
        assert not synthetic & set(fold["val"])
        patients = {case.split("_")[0] for case in fold["val"]}
        assert not {case.split("_")[0] for case in fold["train"]} & patients
        assert synthetic & set(fold["train"])
    assert "trained on the patients of" in said
    assert "nnUNet_preprocessed/Dataset701_Both/" in said


def test_real_volumes_are_cut_beside_synthetic_slices(
    run: Path, shards: Path, volumes_set: Path, tmp_path: Path
) -> None:
    """To the pixels of the set's slices, with the volume's own values and ids; a patient's slices are in one part."""
    out, source = tmp_path / "Dataset703_Cut", ShardSet.open(shards)
    job = check_samples(run, out, ExportConfig(merge_with=volumes_set))
    job.write()
    assert any("cut into" in line for line in job.lines)
    num = 0
    for row in source.select(labelled_only=False).tolist():
        record = source.read(row)
        end = "Ts" if record.meta.split == "test" else "Tr"
        name = f"{record.meta.case_id}_ct_real-axial-{record.meta.slice_index:04d}"
        image, label = (
            sitk.ReadImage(str(out / f"{kind}{end}" / f"{name}{suffix}.nii.gz"))
            for kind, suffix in (("images", "_0000"), ("labels", ""))
        )
        np.testing.assert_array_equal(sitk.GetArrayFromImage(label), np.array([0, 2, 1, 0])[record.mask_HW])
        hu = record.image_HW * record.meta.intensity_scale + record.meta.intensity_offset
        np.testing.assert_allclose(np.clip(sitk.GetArrayFromImage(image), -256, 256), hu, atol=1.1)
        assert image.GetSpacing() == pytest.approx(record.meta.spacing_mm[::-1])
        num += end == "Tr"
    synthetic = json.loads((out / "provenance.json").read_text())["synthetic_cases"]
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == num + len(synthetic)
    for fold in json.loads((out / "splits_final.json").read_text()):
        patients = [{name.split("_")[0] for name in fold[split]} for split in ("train", "val")]
        assert not patients[0] & patients[1]
        assert not set(synthetic) & set(fold["val"])
    cases = check(out, tmp_path / "again", replace(CONFIG, axes=("axial",))).cases
    assert {case.patient for case in cases} == {"p1_1", "p1_2", "p2_1", "p3_1"}


def test_labels_are_mapped_by_name(run: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "Dataset701_Both"
    real = write_real(tmp_path / "Dataset008_Flat", flat=True)
    export_samples(run, out, ExportConfig(merge_with=real))
    source, shown = ShardSet.open(shards), 0
    for row in source.select(split="train").tolist():
        record = source.read(row)
        name = f"{record.meta.case_id}_ct_0-axial-{record.meta.slice_index:04d}"
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "labelsTr" / f"{name}.nii.gz")))
        np.testing.assert_array_equal(label, np.array([0, 2, 1, 0])[record.mask_HW])
        shown += len(np.unique(label)) == 3
    assert shown


def test_colours_travel_with_the_classes(run: Path, tmp_path: Path) -> None:
    export_samples(run, tmp_path / "shards", ExportConfig("shards"))
    weights = next((run / "weights").iterdir())
    described = json.loads((weights / "segdiff.json").read_text())
    for one in (described, ShardSet.open(tmp_path / "shards").index):
        assert one["label_table"]["colours"] == [None, "b5533c", None, None]


def _ending(root: Path) -> Path:
    write_real(root, flat=False, ending=".nrrd")
    for file in root.glob("*/*.nrrd"):
        sitk.WriteImage(sitk.ReadImage(str(file))[:, :, 4], str(file))
    return root


def _edited(**changes: Any) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        write_real(root, flat=True)
        content = json.loads((root / "dataset.json").read_text()) | changes
        (root / "dataset.json").write_text(json.dumps(content))
        return root

    return write


def _synthetic(root: Path) -> Path:
    write_real(root, flat=True)
    (root / "provenance.json").write_text('{"synthetic": true}')
    return root


def _named_alike(root: Path) -> Path:
    write_real(root, flat=True)
    for kind, name in (("images", "p1_2_0000"), ("labels", "p1_2")):
        file = root / f"{kind}Tr" / f"{name}.nii.gz"
        file.rename(file.with_name(file.name.replace("p1_2", "p1_1_ct_0-axial-0003")))
    return root


def _one_patient(root: Path) -> Path:
    return write_real(root, flat=True, tests=("p2_1", "p3_1"))


def _all_tested(root: Path) -> Path:
    write_real(root, flat=True, tests=("p1_1", "p2_1"))
    return root


@pytest.mark.parametrize(
    ("write", "field", "value"),
    [
        (_ending, "file_ending", ".nrrd"),
        (_edited(channel_names={"0": "T2"}), "channel_names", "T2"),
        (_edited(channel_names={"0": "CT", "1": "CT"}), "channel_names", "2 channels"),
        (_edited(labels={**LABELS, "kidney": 3}), "labels", "kidney: not in label table 'mine'"),
        (_edited(labels={"background": 0, "Liver": 1}), "labels", "not there: spleen of label table 'mine'"),
        (_edited(labels={"background": 0, "both": [1, 2]}), "labels", "regions"),
        (_synthetic, "synthetic", "true"),
        (_named_alike, "case p1_1_ct_0-axial-0003", "is the name of a synthetic case too"),
        (_one_patient, "patients", "one alone"),
        (_all_tested, "imagesTs", "has the patients of all masks"),
    ],
)
def test_what_does_not_go_together_is_refused(
    write: Callable[[Path], Path], field: str, value: str, run: Path, tmp_path: Path
) -> None:
    real = write(tmp_path / "Dataset008_Real")
    with pytest.raises(InputProblems) as refused:
        export_samples(run, tmp_path / "Dataset701_Both", ExportConfig(merge_with=real))
    assert [(one.field, one.value) for one in refused.value.problems] == [(field, value)]
    assert not (tmp_path / "Dataset701_Both").exists()


@pytest.mark.filterwarnings("ignore:images of")
def test_images_of_test_patients_are_left_out(run: Path, tmp_path: Path) -> None:
    real = write_real(tmp_path / "Dataset008_Flat", flat=True, tests=("p2_1",))
    export_samples(run, tmp_path / "Dataset701_Both", ExportConfig(merge_with=real))
    names = [file.name for file in (tmp_path / "Dataset701_Both" / "imagesTr").iterdir()]
    assert any(name.startswith("p1_1_ct") for name in names)
    assert not any(name.startswith("p2_1_ct") for name in names)


def test_a_real_case_is_known_by_its_file_too(volumes_set: Path, shards: Path, tmp_path: Path) -> None:
    """Under another name, the same image is the same patient; a patient who is not there gets a warning."""
    for kind in ("images", "labels"):
        for file in (volumes_set / f"{kind}Tr").iterdir():
            (tmp_path / f"real/{kind}Tr").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / f"real/{kind}Tr" / file.name.replace("p", "x"))
    shutil.copy(volumes_set / "dataset.json", tmp_path / "real")
    source = ShardSet.open(shards)
    patients = Patients(source)
    assert patients.of_real(patients.same_files(RealSet.read(tmp_path / "real"))) == {
        "x1_1": "p1",
        "x1_2": "p1",
        "x2_1": "p2",
    }
    kind = ("CT", ".nii.gz", 3)
    entries = {"a": "p2_1", "b": "someone"}
    with pytest.warns(UserWarning, match=r"1 of 2 synthetic cases \(b\)"):
        merge = Merge.of(
            tmp_path / "real", kind, source.label_table, entries, keep_body=False, patients=Patients(source)
        )
    trained = [sorted(set(fold["train"]) & {"a", "b"}) for fold in merge.folds()]
    assert sorted(trained) == [["a", "b"], ["b"]]


@pytest.mark.filterwarnings("ignore:no voxel shows")
def test_volumes_are_cases_beside_real_volumes(
    run: Path, shards: Path, volumes_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the place of their masks, as SimpleITK reads them; a folder of the patients' images gives the outlines."""
    masks, out, table = tmp_path / "masks", tmp_path / "Dataset702_Both", ShardSet.open(shards).label_table
    of_name = {name.lower(): number for name, number in LABELS.items()}
    for file in (volumes_set / "labelsTr").iterdir():
        theirs = np.asarray(nib.load(file).dataobj)
        ours = np.zeros_like(theirs)
        for name in ("liver", "spleen"):
            ours[theirs == of_name[name]] = table.names.index(name)
        save(masks / file.name, ours)
    line = ["volume", str(masks), str(out), "--run", str(run), "--data", str(shards), "--modality", "CT"]
    line += ["--volume.format", "nnunet", "--volume.body-image", str(volumes_set / "imagesTr")]
    line += ["--volume.probe-slices", "0", "--sample.device", "cpu", "--sample.sampler.num-steps", "2"]
    assert main([*line, "--volume.merge-with", str(volumes_set)]) == 0
    for case in ("p1_1", "p1_2", "p2_1"):
        real = sitk.ReadImage(str(out / f"labelsTr/{case}.nii.gz"))
        image = sitk.ReadImage(str(out / f"imagesTr/{case}_ct_0-volume_0000.nii.gz"))
        label = sitk.ReadImage(str(out / f"labelsTr/{case}_ct_0-volume.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(label), sitk.GetArrayFromImage(real))
        for one in (image, label):
            assert one.GetSize() == real.GetSize()
            np.testing.assert_allclose(one.GetSpacing(), np.diag(AFFINE)[:3], atol=1e-5)
            np.testing.assert_allclose(one.GetOrigin(), real.GetOrigin(), atol=1e-5)
            np.testing.assert_allclose(one.GetDirection(), real.GetDirection(), atol=1e-5)
    folds = json.loads((out / "splits_final.json").read_text())
    assert {tuple(fold["val"]) for fold in folds} == {("p1_1", "p1_2"), ("p2_1",)}
    trained = {tuple(name for name in fold["train"] if name.endswith("volume")) for fold in folds}
    assert trained == {("p2_1_ct_0-volume",), ("p1_1_ct_0-volume", "p1_2_ct_0-volume")}
    alone = tmp_path / "Dataset703_Alone"
    assert main([*line[:2], str(alone), *line[3:]]) == 0
    assert f"before training copy splits_final.json to nnUNet_preprocessed/{alone.name}/" in capsys.readouterr().out
    folds = json.loads((alone / "splits_final.json").read_text())
    parts = {("p1_1_ct_0-volume", "p1_2_ct_0-volume"), ("p2_1_ct_0-volume",)}
    assert {tuple(fold["val"]) for fold in folds} == parts, "two scans of a patient are in one fold"
    for case, number in (("p1_2", 77), ("p2_1", 78)):
        save(masks / f"{case}.nii.gz", np.full_like(ours, number))
    assert main([*line[:2], str(tmp_path / "Dataset704_None"), *line[3:]]) == 2
    assert "77" in (said := capsys.readouterr().err)
    assert "78" in said, "all masks are read before the first image is made"
    _assert_it_comes_in_again(out, volumes_set)
    drawn = check(out, tmp_path / "again", replace(CONFIG, patient=PATTERN, split=(0.5, 0.5, 0.0)))
    assert "splits_final.json is not used: --prepare.split draws the splits" in drawn.survey.notes
    (out / "splits_final.json").unlink()
    cases = check(out, tmp_path / "again", replace(CONFIG, patient=PATTERN)).cases
    assert {case.case_id for case in cases} == {case.case_id for case in drawn.cases}
    assert {case.case_id: case.patient for case in cases}["p2_1_ct_0-volume"] == "p2"
    assert len({case.split for case in cases if case.patient == "p1"}) == 1


def _assert_it_comes_in_again(out: Path, real: Path) -> None:
    """By each fold of its splits_final.json; the volume of a mask has the mask's slices, and grey values of a CT."""
    masks_of = {one.meta.key: one.mask_HW for one in slices(real, axes=("axial",), split=(1.0, 0.0, 0.0))}
    folds = json.loads((out / "splits_final.json").read_text())
    for number, fold in enumerate(folds):
        found = check(out, out.with_name("again"), replace(CONFIG, fold=number, patient=PATTERN))
        splits = {case.case_id: case.split for case in found.cases if case.split != "test"}
        assert splits == {name: split for split, names in fold.items() for name in names}
        left_out = 3 - sum(name.endswith("volume") for name in splits)
        assert found.survey.notes == (
            f"fold {number} of 2 in splits_final.json: {len(fold['train'])} train, {len(fold['val'])} val; "
            "--prepare.fold takes another",
            f"{left_out} synthetic cases are left out: fold {number} validates their masks' patients",
        )
        assert found.header["notes"] == list(found.survey.notes)
    for one in slices(out, axes=("axial",), patient=PATTERN):
        case, synthetic, rest = one.meta.key.partition("_ct_0-volume")
        if synthetic:
            organs = [np.where(mask == 3, 0, mask) for mask in (one.mask_HW, masks_of[case + rest])]
            np.testing.assert_array_equal(*organs)
            assert one.image_HW.max() > 0
