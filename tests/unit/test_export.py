"""`segdiff export` and `segdiff volume`: what other tools read of it is what was made, in the right place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from sampling_support import make_here, pixels_of, write_weights
from tests_support import bytes_of, write_shapes

from data_shards.labels import AMOS, MERGED
from data_shards.problems import InputProblems
from data_shards.store.inspect import inspect_shards
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.export.config import ExportConfig, VolumeConfig
from segdiff_dist.export.files import nnunet_labels
from segdiff_dist.export.job import export_samples
from segdiff_dist.export.volume import check_volume, make_volume
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.training.config import TrainConfig

LIVER, BODY = 6, AMOS.body_id


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shards")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A run with a finished store: 10 masks, two of them twice, two more in the other modality."""
    folder = write_weights(tmp_path_factory.mktemp("run"))
    make_here(folder, shapes)
    return folder


@pytest.fixture(scope="module")
def store(run: Path) -> SampleStore:
    return SampleStore.open(run / "samples")


@pytest.mark.parametrize("format", ["nnunet", "png", "shards"])
def test_the_time_is_known_before_and_nothing_is_written(
    run: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run", str(run), "--format", format, "--modality", "CT", "--dry-run"]
    assert main(["export", str(tmp_path / "Dataset700_New"), *flags]) == 0
    assert "# time: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_nnunet_raw_data_set(run: Path, store: SampleStore, tmp_path: Path) -> None:
    """The layout that nnU-Net's documentation gives, consecutive labels, HU by slope and intercept."""
    out = tmp_path / "Dataset701_Synthetic"
    assert main(["export", str(out), "--run", str(run), "--format", "nnunet", "--modality", "CT"]) == 0
    about = json.loads((out / "dataset.json").read_text())
    items = {row["item_id"]: row for row in store.items.to_pylist() if row["target_modality"] == "CT"}
    assert about["channel_names"] == {"0": "CT"}
    assert about["numTraining"] == len(items) == len(list((out / "imagesTr").iterdir()))
    assert list(about["labels"].values()) == list(range(16)), "without body"
    listed = [line.split(",") for line in (out / "items.csv").read_text().splitlines()]
    column = listed[0].index("item_id")
    for row in listed[1:]:
        item = int(row[column])
        image = nib.load(out / "imagesTr" / f"{row[0]}_0000.nii.gz")
        mask = np.asarray(nib.load(out / "labelsTr" / f"{row[0]}.nii.gz").dataobj)
        assert image.shape == mask.shape == (32, 32)
        assert image.header.get_zooms() == (6.0, 6.0)
        slope = 2.0 if items[item]["source_modality"] == "CT" else 512 / 255  # the mask's own slice's, or the window
        np.testing.assert_allclose(image.get_fdata().T, store.image[item] * slope - 256.0, atol=1e-3)
        np.testing.assert_array_equal(mask.T, np.where(store.mask[item] == BODY, 0, store.mask[item]))


def test_nnunet_labels_close_up_what_has_no_class() -> None:
    new_id, names = nnunet_labels(MERGED, keep_body=True)
    assert "unused" not in names
    assert names[-1] == "body"
    assert [names[new_id[i]] for i, name in enumerate(MERGED.names) if name != "unused"] == names


def test_png_and_nifti_pairs(run: Path, store: SampleStore, tmp_path: Path) -> None:
    images, masks = pixels_of(store)
    assert export_samples(run, tmp_path / "png", ExportConfig("png")) == len(store)
    assert export_samples(run, tmp_path / "nifti", ExportConfig("nifti")) == len(store)
    listed = [line.split(",") for line in (tmp_path / "png" / "items.csv").read_text().splitlines()]
    name, item = listed[1][0], int(listed[1][listed[0].index("item_id")])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "png" / "images" / f"{name}.png")), images[item])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "png" / "masks" / f"{name}.png")), masks[item])
    stored = nib.load(tmp_path / "nifti" / "masks" / f"{name}.nii.gz")
    np.testing.assert_array_equal(np.asarray(stored.dataobj)[..., 0].T, masks[item])
    assert json.loads((tmp_path / "png" / "provenance.json").read_text())["synthetic"] is True


def test_shards_are_read_beside_real_ones(run: Path, store: SampleStore, shapes: Path, tmp_path: Path) -> None:
    """Checksums hold, no patient crosses splits, the set can be mixed with the real one, and is marked as synthetic."""
    out = tmp_path / "synthetic"
    assert export_samples(run, out, ExportConfig("shards")) == len(store)
    assert inspect_shards(str(out)).ok
    shards = ShardSet.open(out, verify=True)
    assert shards.index["synthetic"]["weights_digest"] == store.job["weights_digest"]
    assert len(shards.select(split="test")) == len(store), "the split of their masks"
    of_masks = set(store.items["case_id"].to_pylist())
    assert set(shards.patients(range(len(shards)))) == of_masks, "several images of a patient's masks are one patient"
    assert len(ShardSet.open([shapes, out])) == len(ShardSet.open(shapes)) + len(store)
    images, masks = pixels_of(store)
    made = {(image.tobytes(), mask.tobytes()) for image, mask in zip(images, masks, strict=True)}
    records = [shards.read(row) for row in range(len(shards))]
    assert {(r.image_HW.tobytes(), r.mask_HW.tobytes()) for r in records} == made


def test_what_is_refused(run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputProblems, match="not empty"):
        export_samples(run, tmp_path / "full", ExportConfig("png"))
    with pytest.raises(InputProblems, match=r"Dataset, three digits.*\n.*one modality"):
        export_samples(run, tmp_path / "mine", ExportConfig("nnunet"))
    with pytest.raises(InputProblems, match="sample first"):
        export_samples(tmp_path, tmp_path / "new", ExportConfig("png"))
    nearly_full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("segdiff_dist.export.job.shutil.disk_usage", lambda _: nearly_full)
    with pytest.raises(InputProblems, match="disk space"):
        export_samples(run, tmp_path / "new", ExportConfig("png"))
    store = make_here(write_weights(tmp_path / "run"), shapes, num=2)
    store.unmark(0)
    with pytest.raises(InputProblems, match=r"of .* missing"):
        export_samples(tmp_path / "run", tmp_path / "new", ExportConfig("png"))
    assert not (tmp_path / "new").exists()


def test_another_set_in_place_of_the_one_sampled_from_is_refused(tmp_path: Path) -> None:
    """Its slices would lend their spacing, place and HU to images that are not theirs."""
    place = tmp_path / "set"
    run = write_weights(tmp_path / "run")
    make_here(run, write_shapes(place), num=2)
    shutil.rmtree(place)
    write_shapes(place, num_patients=2, slices=3)
    with pytest.raises(InputProblems, match="not the shard set sampled from"):
        export_samples(run, tmp_path / "out", ExportConfig("nifti"))
    shutil.rmtree(place)
    with pytest.raises(InputProblems, match=str(place)):
        export_samples(run, tmp_path / "out", ExportConfig("nifti"))
    assert not (tmp_path / "out").exists()


def masks_in(folder: Path, name: str) -> Path:
    """A folder with one mask of that name."""
    (folder / name).parent.mkdir(parents=True)
    mask = np.full((32, 32), LIVER, np.uint8)
    mask[:8] = BODY
    Image.fromarray(mask).save(folder / name)
    return folder


@pytest.mark.parametrize("name", [f"study_{'x' * 60}/série_{'é' * 40}/mask.png", "a b/mask 1.png"])
def test_any_name_of_a_mask_can_be_exported(name: str, shapes: Path, tmp_path: Path) -> None:
    """A tar's header takes 100 bytes of a name, DALI's index no space."""
    run = write_weights(tmp_path / "run")
    masks = masks_in(tmp_path / "masks", name)
    make_here(run, shapes, masks=masks, target_modality="CT", num=None, diverse_masks=None, cross_modality_masks=1)
    for form in ("shards", "nifti", "png"):
        assert export_samples(run, tmp_path / form, ExportConfig(form)) == 4
    assert inspect_shards(str(tmp_path / "shards")).ok
    [*keys] = ShardSet.open(tmp_path / "shards").samples["key"].to_pylist()
    assert len(set(keys)) == 4
    assert not [key for key in keys if " " in key or len(key.encode()) > 86]
    assert name in (tmp_path / "png" / "items.csv").read_text(), "which mask it is of"


def stretched(out: Path, modalities: tuple[str, ...] = ("CT", "MR")) -> Path:
    """A set as prepare.intensity paper makes it: each CT volume by percentiles of its own."""
    shards = ShardSet.open(write_shapes(out.with_name(f"{out.name} plain"), num_patients=3))
    writer = ShardWriter(out, set_format("webdataset", "raw", 10, size=32, bits=8, soft_edge=False))
    scale = {case: 1.0 + number / 10 for number, case in enumerate(sorted(set(shards.samples["case_id"].to_pylist())))}
    for row in range(len(shards)):
        record = shards.read(row)
        if record.meta.modality in modalities:
            meta = replace(record.meta, intensity_scale=scale[record.meta.case_id], intensity_offset=-200.0)
            writer.write(replace(record, meta=meta))
    preprocessing = shards.index["preprocessing"] | {"intensity": "paper"}
    writer.finish({"label_table": {"name": AMOS.name, "names": AMOS.names}, "preprocessing": preprocessing})
    return out


def test_hu_of_volumes_that_were_each_stretched(tmp_path: Path) -> None:
    """A mask's own CT slice says its HU; what is of none has the median's, and it is said."""
    shapes = stretched(tmp_path / "set")
    shards = ShardSet.open(shapes)
    scales = shards.samples["intensity_scale"].to_numpy()[shards.select(modalities=["CT"])]
    assert len(set(scales)) == 7
    run = write_weights(tmp_path / "run")
    store = make_here(run, shapes)
    items = {row["item_id"]: row for row in store.items.to_pylist() if row["target_modality"] == "CT"}
    assert {row["source_modality"] for row in items.values()} == {"CT", "MR"}
    with pytest.warns(UserWarning, match="median of the maps"):
        export_samples(run, tmp_path / "nifti", ExportConfig("nifti", modality="CT"))
    listed = [line.split(",") for line in (tmp_path / "nifti" / "items.csv").read_text().splitlines()]
    for name, item in ((row[0], int(row[listed[0].index("item_id")])) for row in listed[1:]):
        own = shards.meta(items[item]["row"])
        slope = own.intensity_scale if own.modality == "CT" else np.median(scales)
        hu = nib.load(tmp_path / "nifti" / "images" / f"{name}.nii.gz").get_fdata()[..., 0]
        np.testing.assert_allclose(hu.T, store.image[item] * slope - 200.0, atol=1e-3)
    assert "median" in json.loads((tmp_path / "nifti" / "provenance.json").read_text())["hu"]

    with pytest.warns(UserWarning, match="median of the maps"):
        generated = white_volume(tmp_path, shards)
    assert generated.max() == round(255 * float(np.median(scales)) - 200)


def white_volume(folder: Path, shards: ShardSet) -> np.ndarray:
    """A CT volume whose every slice is generated white."""
    mask, out = folder / "mask.nii.gz", folder / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.full((12, 12, 4), LIVER, np.uint8), np.diag([3.0, 3.0, 3.0, 1.0])), mask)
    make_volume(mask, out, lambda mask_SHW, *_: np.full_like(mask_SHW, 255), 32, shards, VolumeConfig("CT"))
    return np.asarray(nib.load(out).get_fdata())


def test_hu_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    mr = stretched(tmp_path / "mr", ("MR",))
    with pytest.raises(InputProblems, match="HU: not known"):
        white_volume(tmp_path, ShardSet.open(mr))
    run = write_weights(tmp_path / "run")
    masks = masks_in(tmp_path / "masks", "mask.png")
    make_here(run, stretched(tmp_path / "set"), masks=masks, target_modality="CT", cross_modality_masks=0)
    for form in ("nifti", "shards"):
        with pytest.raises(InputProblems, match=r"HU: not known.*--format png"):
            export_samples(run, tmp_path / "out", ExportConfig(form))
    assert export_samples(run, tmp_path / "out", ExportConfig("png")) == 2


def test_an_interrupted_export_leaves_no_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "png"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_samples(run, out, ExportConfig("png"))
    assert not out.exists()
    export_samples(run, out, ExportConfig("png"))
    export_samples(run, tmp_path / "again", ExportConfig("png"))
    assert bytes_of(out) == bytes_of(tmp_path / "again")


# Axes as stored, and whether the volume is oblique: what a viewer must put right with the affine alone.
AFFINES = {
    "RAS": np.diag([4.0, 4.0, 5.0, 1.0]),
    "LPS, off the origin": np.array([[-4.0, 0, 0, 90], [0, -4, 0, 70], [0, 0, 5, -300], [0, 0, 0, 1]]),
    "SLA": np.array([[0.0, -4, 0, 20], [0, 0, 4, -30], [5, 0, 0, 10], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("orientation", AFFINES)
def test_volume_is_where_the_mask_is(axis: str, orientation: str, shapes: Path, tmp_path: Path) -> None:
    """With a generator that returns the mask itself, every organ's bright voxels are the organ's."""
    affine = AFFINES[orientation]
    shape = tuple(int(n) for n in np.abs(np.linalg.inv(affine[:3, :3]) @ (96.0, 88.0, 60.0)).round())
    mask = np.full(shape, BODY, np.uint8)
    marker = tuple(slice(n // 5, n // 5 + max(3, n // 3)) for n in shape)  # off the middle: flips would show
    mask[marker] = LIVER
    file, out = tmp_path / "mask.nii.gz", tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(mask, affine), file)
    shards = ShardSet.open(shapes)
    shards.index["preprocessing"] |= {"spacing_mm": 2.0, "fit": "pad"}

    def generate(mask_SHW: np.ndarray, indices: list[int], shared: bool) -> np.ndarray:
        return np.where(mask_SHW == LIVER, 255, np.where(mask_SHW == BODY, 100, 0)).astype(np.uint8)

    report = make_volume(file, out, generate, shards.size, shards, VolumeConfig("CT", axis))
    image = nib.load(out)
    np.testing.assert_array_equal(image.affine, affine)
    assert image.shape == shape
    assert report.outside == 0.0
    job = check_volume(file, tmp_path / "other.nii.gz", shards, VolumeConfig("CT", axis))
    assert job.num_slices == report.num_slices
    hu = image.get_fdata()
    inside = np.zeros(shape, bool)
    inside[tuple(slice(s.start + 1, s.stop - 1) for s in marker)] = True
    around = np.ones(shape, bool)
    around[tuple(slice(s.start - 1, s.stop + 1) for s in marker)] = False
    assert (hu[inside] > 200).all()
    assert (hu[around] < 0).all()


def test_a_folder_of_masks_needs_the_format_of_a_set(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputProblems, match=r"mask: a folder; give one volume, or --volume.format nnunet"):
        check_volume(tmp_path, tmp_path / "image.nii.gz", ShardSet.open(shapes), VolumeConfig("CT"))


def test_a_volume_of_a_mask_in_micrometres_is_that_of_one_in_millimetres(shapes: Path, tmp_path: Path) -> None:
    """The image is written in millimetres, whatever the mask's header counts in."""
    mask = np.full((24, 22, 12), BODY, np.uint8)
    mask[5:12, 5:12, 3:9] = LIVER
    shards = ShardSet.open(shapes)
    made = []
    for unit, factor in (("mm", 1.0), ("micron", 1000.0), ("meter", 0.001)):
        image = nib.Nifti1Image(mask, np.diag([4 * factor, 4 * factor, 5 * factor, 1.0]))
        image.header.set_xyzt_units(unit)
        file, out = tmp_path / f"{unit}.nii.gz", tmp_path / f"image_{unit}.nii.gz"
        nib.save(image, file)
        make_volume(file, out, lambda mask_SHW, *_: 40 * mask_SHW, shards.size, shards, VolumeConfig("CT"))
        made.append(nib.load(out))
    for other in made[1:]:
        np.testing.assert_allclose(other.affine, made[0].affine, rtol=1e-6)
        assert other.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_array_equal(other.get_fdata(), made[0].get_fdata())


def test_volume_from_a_model(run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CT comes out in HU; where masks are alike, shared noise gives the same slice and independent noise does not."""
    shutil.copytree(run / "weights" / "ema", run / "weights" / TrainConfig().averages[0], dirs_exist_ok=True)
    mask = np.zeros((16, 16, 6), np.uint8)
    mask[2:14, 3:13] = BODY
    mask[4:8, 5:9] = LIVER
    nib.save(nib.Nifti1Image(mask, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "mask.nii.gz")
    out = tmp_path / "image.nii.gz"
    arguments = ["volume", str(tmp_path / "mask.nii.gz"), str(out), "--run", str(run), "--data", str(shapes)]
    assert main([*arguments, "--modality", "CT", "--dry-run"]) == 0
    assert "# images: 6\n# time: " in capsys.readouterr().out
    assert main([*arguments, "--modality", "CT", "--sample.sampler.num-steps", "2"]) == 0
    hu = nib.load(out).get_fdata()
    assert -256 <= hu.min() < hu.max() <= 256
    assert (hu == hu[..., :1]).all()
    said = capsys.readouterr().out
    assert "shared noise, 2 mm apart: 0.00 grey values" in said
    assert float(said.split("independent noise, 2 mm apart: ")[1].split()[0]) > 1
    assert "real slices, 2 mm apart" in said
    assert main([*arguments, "--modality", "CT"]) == 2, "the file is there already"


def test_volume_refuses_what_it_cannot_paint(run: Path, shapes: Path, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full((8, 8, 4), 99, np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    shards = ShardSet.open(shapes)
    with pytest.raises(InputProblems, match=r"label ids: \[99\]"):
        make_volume(tmp_path / "mask.nii.gz", tmp_path / "out.nii.gz", None, 32, shards, VolumeConfig())
    with pytest.raises(InputProblems, match="no name of a volume"):
        make_volume(tmp_path / "mask.nii.gz", tmp_path / "out.dcm", None, 32, shards, VolumeConfig())


def test_volume_finds_the_body_in_an_image(shapes: Path, tmp_path: Path) -> None:
    """A mask of organs alone is shown to the model with the patient's outline, as `prepare` would."""
    mask, hu = np.zeros((32, 32, 4), np.uint8), np.full((32, 32, 4), -1000, np.int16)
    hu[6:26, 8:24] = 40
    mask[12:16, 12:16] = LIVER
    for name, voxels in (("mask", mask), ("image", hu), ("other", hu[:-1])):
        nib.save(nib.Nifti1Image(voxels, np.diag([8.0, 8.0, 8.0, 1.0])), tmp_path / f"{name}.nii.gz")
    shards, seen = ShardSet.open(shapes), []
    shards.index["preprocessing"] |= {"spacing_mm": 8.0}

    def generate(mask_SHW: np.ndarray, indices: list[int], shared: bool) -> np.ndarray:
        seen.append(mask_SHW)
        return mask_SHW

    def make(body_image: Path | None) -> bool:
        config = VolumeConfig("CT", body_image=body_image, probe_slices=0)
        (tmp_path / "out.nii.gz").unlink(missing_ok=True)
        return make_volume(tmp_path / "mask.nii.gz", tmp_path / "out.nii.gz", generate, 32, shards, config).has_body

    def stopped(*_: object) -> np.ndarray:
        raise AssertionError("generated before the warning")

    with pytest.warns(UserWarning, match="--volume.body-image"), pytest.raises(AssertionError):  # before the work
        make_volume(tmp_path / "mask.nii.gz", tmp_path / "out.nii.gz", stopped, 32, shards, VolumeConfig("CT"))
    with pytest.warns(UserWarning, match="--volume.body-image"):
        assert not make(None)
    assert make(tmp_path / "image.nii.gz")
    assert set(np.unique(seen[0])) == {0, LIVER}
    assert (seen[1] == BODY).sum() == pytest.approx(4 * (20 * 16 - 16), rel=0.1)
    with pytest.raises(InputProblems, match="not those of the mask"):
        make(tmp_path / "other.nii.gz")
