"""Exports as other programs read them: SimpleITK, which nnU-Net reads with, Pillow, and `segdiff sample --masks`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from sampling_support import arguments, make_here, write_weights

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.cases import Case
from data_shards.ingest.dicom_series import DicomSeries
from data_shards.ingest.prepare import check
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.labels import AMOS, BACKGROUND
from data_shards.problems import InputProblems
from data_shards.records import AXES
from data_shards.store.shard_writer import ShardWriter
from data_shards.store.shards import ShardSet
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.files import nnunet_folds
from segdiff_dist.export.job import export_samples
from segdiff_dist.sampling.job import prepare_job
from segdiff_dist.sampling.store import SampleStore

sitk = pytest.importorskip("SimpleITK")

SHAPE, LIVER, BODY = (60, 50, 40), 6, AMOS.body_id
# Left, posterior, superior; off the origin, sides of three lengths, and 4 degrees about the long axis.
TURN = np.deg2rad(4)
AFFINE = np.array(
    [
        [-3.2 * np.cos(TURN), 3.0 * np.sin(TURN), 0, 90],
        [-3.2 * np.sin(TURN), -3.0 * np.cos(TURN), 0, 70],
        [0, 0, 4.0, -300],
        [0, 0, 0, 1],
    ]
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A CT without any symmetry, whose label says where each of its corners is."""
    root = tmp_path_factory.mktemp("case")
    label = np.zeros(SHAPE, np.uint8)
    label[8:30, 6:20, 5:14] = LIVER
    label[35:50, 25:42, 22:36] = 1
    label[10:20, 30:45, 5:36] = 2
    image = np.where(label > 0, 100, -50).astype(np.int16)
    image[:3], image[:, :3], image[-3:], image[:, -3:] = -1000, -1000, -1000, -1000
    for name, voxels in (("image", image), ("label", label)):
        nifti = nib.Nifti1Image(voxels, AFFINE)
        nifti.header.set_xyzt_units("mm")
        nib.save(nifti, root / f"{name}.nii.gz")
    return Case("amos_0001", "CT", "test", root / "image.nii.gz", root / "label.nii.gz")


@pytest.fixture(scope="module")
def shards(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = PrepareConfig(size=32, axes=AXES, spacing_mm=2.0, slice_stride=12)
    out = tmp_path_factory.mktemp("set") / "shards"
    writer = ShardWriter(out, config.format)
    for record in slices_of(case, config, None):
        writer.write(record)
    table = {"name": AMOS.name, "names": AMOS.names}
    writer.finish({"label_table": table, "preprocessing": config.result_settings()})
    return out


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_weights(tmp_path_factory.mktemp("run"))
    make_here(folder, shards, num=None, diverse_masks=0, cross_modality_masks=0)
    return folder


@pytest.mark.parametrize(
    ("form", "ending"),
    [
        ("nnunet", ".nii.gz"),
        ("nnunet", ".mha"),
        ("nifti", ".nii.gz"),
        ("nifti", ".nrrd"),
        ("dicom", ".nii.gz"),
        ("png", ".nii.gz"),
        ("nnunet", ".png"),
    ],
)
def test_an_export_is_prepared_again(run: Path, shards: Path, form: str, ending: str, tmp_path: Path) -> None:
    """Pixels, masks, axes and patients are those of the samples."""
    root = tmp_path / "Dataset701_again"
    rows = exported(run, root, format=form, body_label=True, file_ending=ending)
    source, store = ShardSet.open(shards), SampleStore.open(run / "samples")
    config = PrepareConfig(size=32, labels="amos", axes=AXES)
    preparation = check(root, tmp_path / "set", config)
    assert len(preparation.cases) == len(rows)
    patients = {(case.patient, case.split) for case in preparation.cases}
    assert len(patients) == 1
    assert form == "dicom" or patients == {("amos_0001", "train" if form == "nnunet" else "test")}
    mask_of = {(m.axis, m.slice_index): n for n, m in enumerate(map(source.meta, range(len(source))))}
    row_of = {row["name"]: row for row in rows}
    for case in preparation.cases:
        row = row_of[case.image.files[0].stem if isinstance(case.image, DicomSeries) else case.case_id]
        theirs = source.read(mask_of[row["axis"], int(row["slice_index"])])
        one_to_one = replace(config, spacing_mm=theirs.meta.spacing_mm[0])
        (record,) = slices_of(case, one_to_one, None, [], preparation.survey.labelling)
        assert (record.meta.axis, record.meta.modality) == (row["axis"], "CT")
        np.testing.assert_array_equal(record.image_HW, store.image[int(row["item_id"])])
        # The body is found in the image anew, and the net here makes noise.
        ours_HW, theirs_HW = (np.where(mask == BODY, 0, mask) for mask in (record.mask_HW, theirs.mask_HW))
        np.testing.assert_array_equal(ours_HW, theirs_HW)


def test_folds_keep_patients_together() -> None:
    patient_of = {f"p{p}-{n}": f"p{p}" for p in range(12) for n in range(3)}
    folds = nnunet_folds(patient_of)
    assert len(folds) == 5
    assert nnunet_folds(dict(list(patient_of.items())[:3])) == []  # of one patient
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(patient_of)
    for fold in folds:
        assert not {n.split("-")[0] for n in fold["train"]} & {n.split("-")[0] for n in fold["val"]}


def exported(run: Path, out: Path, **config: Any) -> list[dict[str, str]]:
    """The rows of items.csv of an export of the run."""
    export_samples(run, out, ExportConfig(**config))
    names, *rows = (line.split(",") for line in (out / "items.csv").read_text().splitlines())
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_nifti_pairs_are_where_the_patient_is(run: Path, case: Case, tmp_path: Path) -> None:
    """The real label, resampled by SimpleITK onto each exported slice, is the slice's mask; PNG shows the same."""
    label = sitk.ReadImage(str(case.label))
    rows = exported(run, tmp_path / "nifti", format="nifti")
    exported(run, tmp_path / "png", format="png")
    shown = dict.fromkeys(AXES, 0)
    for row in rows:
        mask = sitk.ReadImage(str(tmp_path / "nifti" / "masks" / f"{row['name']}.nii.gz"))
        image = sitk.ReadImage(str(tmp_path / "nifti" / "images" / f"{row['name']}.nii.gz"))
        assert mask.GetDirection() == image.GetDirection()
        onto = sitk.Resample(label, mask, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        theirs_HW, ours_HW = (sitk.GetArrayFromImage(one)[0] for one in (onto, mask))
        ours_HW = np.where(ours_HW == BODY, 0, ours_HW)
        assert (theirs_HW == ours_HW).mean() > 0.97, row["name"]
        shown[row["axis"]] += len(np.unique(ours_HW)) > 2
        png = np.asarray(Image.open(tmp_path / "png" / "masks" / f"{row['name']}.png"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(mask)[0], png)
        values = sitk.GetArrayFromImage(image)[0]
        grey = np.asarray(Image.open(tmp_path / "png" / "images" / f"{row['name']}.png"))
        assert np.corrcoef(values.ravel(), grey.ravel())[0, 1] > 0.9999
    assert all(shown.values()), "slices with two organs along each axis"


def test_nnunet_reads_what_the_picture_shows(run: Path, shards: Path, tmp_path: Path) -> None:
    """Rows are rows; spacing and direction are those of the real case's slice. Other planes have no place in two
    dimensions, and are read all the same."""
    rows = exported(run, tmp_path / "Dataset701_nifti", format="nnunet", body_label=True)
    exported(run, tmp_path / "Dataset702_png", format="nnunet", body_label=True, file_ending=".png")
    metas = {(meta.axis, meta.slice_index): meta for meta in map(ShardSet.open(shards).meta, range(len(rows)))}
    for row in rows:
        meta = metas[row["axis"], int(row["slice_index"])]
        for folder, name in (("imagesTr", f"{row['name']}_0000"), ("labelsTr", row["name"])):
            nifti = sitk.ReadImage(str(tmp_path / "Dataset701_nifti" / folder / f"{name}.nii.gz"))
            png = np.asarray(Image.open(tmp_path / "Dataset702_png" / folder / f"{name}.png"))
            pixels = sitk.GetArrayFromImage(nifti)
            assert pixels.shape == png.shape == (32, 32)
            assert np.corrcoef(pixels.ravel(), png.ravel())[0, 1] > 0.9999 or not png.any()
            np.testing.assert_allclose(nifti.GetSpacing(), meta.spacing_mm[::-1], rtol=1e-4)
        if row["axis"] == "axial":
            affine = np.array(meta.affine).reshape(4, 4)
            np.testing.assert_allclose(nifti.GetOrigin(), -affine[:2, 3], atol=1e-3)
            direction = np.array(nifti.GetDirection()).reshape(2, 2)
            np.testing.assert_allclose(direction, -affine[:2, [1, 0]] / nifti.GetSpacing(), atol=1e-3)


@pytest.mark.parametrize("form", ["nifti", "nnunet", "png"])
@pytest.mark.parametrize("axis", AXES)
def test_own_exports_are_read_back_as_masks(run: Path, shards: Path, tmp_path: Path, form: str, axis: str) -> None:
    out = tmp_path / "Dataset701_x"
    rows = exported(run, out, format=form, body_label=True)
    store, masks = SampleStore.open(run / "samples"), tmp_path / "masks"
    for row in rows:
        if row["axis"] == axis:
            [file] = (out / ("labelsTr" if form == "nnunet" else "masks")).glob(f"{row['name']}.*")
            masks.mkdir(exist_ok=True)
            shutil.copy(file, masks)
    settings: dict[str, Any] = {"masks": masks, "target_modality": "CT", "num": None, "masks_axis": axis}
    settings |= {"diverse_masks": 0, "cross_modality_masks": 0, "out": tmp_path / "out"}
    job = prepare_job(*arguments(run, shards, **settings))
    items = {item["case_id"]: item for item in job.items.to_pylist()}
    assert set(items) == {row["name"] for row in rows if row["axis"] == axis}
    for row in rows:
        if row["axis"] == axis:
            item = items[row["name"]]
            assert item["axis"] == axis
            expected = store.mask[int(row["item_id"])]
            np.testing.assert_array_equal(job.masks_MHW[item["row"]], expected)


def test_a_slice_of_a_volume_says_its_own_axis(run: Path, shards: Path, tmp_path: Path) -> None:
    rows = exported(run, tmp_path / "nifti", format="nifti")
    settings: dict[str, Any] = {"masks": tmp_path / "nifti" / "masks", "target_modality": "CT", "num": None}
    job = prepare_job(*arguments(run, shards, **settings, cross_modality_masks=0, out=tmp_path / "out"))
    axis_of = {item["case_id"]: item["axis"] for item in job.items.to_pylist()}
    assert axis_of == {row["name"]: row["axis"] for row in rows}


@pytest.mark.parametrize("kind", ["2d", "999", "oneslice"])
def test_slices_in_files_of_others(run: Path, shards: Path, tmp_path: Path, kind: str) -> None:
    """nnU-Net predicts in two dimensions; its first version gave a slice 999 mm."""
    mask = np.zeros((32, 32), np.uint8)
    mask[3:29, 4:28], mask[6:14, 8:16] = BODY, LIVER
    thick = {"2d": 1.0, "999": 999.0, "oneslice": 5.0}[kind]
    (tmp_path / "masks").mkdir()
    voxels = mask if kind == "2d" else mask[..., None]
    nib.save(nib.Nifti1Image(voxels, np.diag([12.0, 12.0, thick, 1.0])), tmp_path / "masks" / "a.nii.gz")
    settings: dict[str, Any] = {"masks": tmp_path / "masks", "target_modality": "CT", "out": tmp_path / "out"}
    job = prepare_job(*arguments(run, shards, **settings))
    np.testing.assert_array_equal(job.masks_MHW[0], mask.T[::-1, ::-1], "indices run to the right and to the front")


# --- the label table of another writer ---


def own_table(shards: Path, out: Path) -> Path:
    """The set with names of its own for the same ids."""
    names = [BACKGROUND, *(f"Klasse {i}" for i in range(1, 16)), "body"]
    shutil.copytree(shards, out)
    index = json.loads((out / "index.json").read_text())
    index["label_table"] = {"name": "amos", "names": names}
    del index["preprocessing"]["label_set"]
    (out / "index.json").write_text(json.dumps(index))
    return out


def folder_job(tmp_path: Path, shards: Path) -> Path:
    """A run with images of a folder of masks, whose set is gone since."""
    mask = np.full((32, 32), BODY, np.uint8)
    mask[4:9, 4:20] = LIVER
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    own = own_table(shards, tmp_path / "own")
    run = write_weights(tmp_path / "run", table=ShardSet.open(own).label_table)
    make_here(run, own, masks=tmp_path / "masks", target_modality="CT", cross_modality_masks=0, diverse_masks=0)
    shutil.rmtree(own)
    return run


@pytest.mark.parametrize("form", ["nnunet", "png", "shards"])
def test_names_of_another_writers_set_travel_with_the_job(shards: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "Dataset701_x"
    export_samples(folder_job(tmp_path, shards), out, ExportConfig(form))
    if form == "nnunet":
        names = list(json.loads((out / "dataset.json").read_text())["labels"])
    elif form == "png":
        names = json.loads((out / "provenance.json").read_text())["label_table"]
    else:
        names = list(ShardSet.open(out).label_table.names)
    assert names[6] == "Klasse 6"


def test_a_job_from_before_the_table_travelled(shards: Path, tmp_path: Path) -> None:
    """Its model knows the names; where that is gone as well nothing does, and AMOS' names are not taken for them."""
    run = folder_job(tmp_path, shards)
    file = run / "samples" / "job.json"
    job = json.loads(file.read_text())
    assert job.pop("label_table")["names"][6] == "Klasse 6"
    file.write_text(json.dumps(job))
    export_samples(run, tmp_path / "out", ExportConfig("png"))
    shutil.rmtree(run / "weights")
    with pytest.raises(
        InputProblems, match=r"job\.json: label_table: not there; start the same `segdiff sample` again"
    ):
        export_samples(run, tmp_path / "other", ExportConfig("png"))
    file.write_text(json.dumps(job | {"label_table": {"names": ["liver"]}}))
    with pytest.raises(InputProblems, match=r"job\.json: .*label_table"):
        export_samples(run, tmp_path / "other", ExportConfig("png"))
    assert not (tmp_path / "other").exists()
