"""`evaluate` of images whose masks are of no real image: samples of a mask folder, and images of other systems."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.evaluation.images.check import check_images
from segdiff_dist.evaluation.images.config import ImagesConfig
from segdiff_dist.evaluation.images.folder import ImageFolder
from segdiff_dist.evaluation.measure.checks import check
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.job import measure
from segdiff_dist.evaluation.measure.subject import hu_scales
from segdiff_dist.evaluation.report.figures import draw_figures
from segdiff_dist.sampling.items import NO_MODALITY
from segdiff_dist.sampling.store import SampleStore

QUICK: dict[str, Any] = {"bootstrap_samples": 50, "batch_size": 7, "device": "cpu", "num_workers": 1}


def write_segmenter(weights: Path) -> Path:
    """An untrained segmenter: its labels mean nothing, but are the same every time."""
    import torch

    from segdiff_dist.segmentation.config import SegmenterConfig
    from segdiff_dist.segmentation.network import SegmenterNet
    from segdiff_dist.segmentation.segmenter import save_segmenter

    config = SegmenterConfig(channels=(8, 8, 8))
    torch.manual_seed(0)
    save_segmenter(weights, SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    return weights


@pytest.fixture
def run(tmp_path: Path, shapes: Path) -> Path:
    """Samples of a folder of masks: the CT slices of the set's test split, as they are."""
    import pyarrow as pa

    write_segmenter(tmp_path / "segmenter" / "weights")
    shards = ShardSet.open(shapes)
    records = [shards.read(int(row)) for row in shards.select(split="test", modalities=["CT"])]
    items = [
        {"item_id": i, "row": i, "key": r.meta.key, "case_id": r.meta.case_id, "source_modality": NO_MODALITY}
        | {"target_modality": "CT", "axis": "axial", "slice_index": r.meta.slice_index, "seed_index": 0}
        for i, r in enumerate(records)
    ]
    table = {"name": shards.label_table.name, "names": list(shards.label_table.names)}
    job = {"weights": "w", "weights_digest": "1" * 64, "masks": "m", "masks_digest": "2" * 64, "region_size": 64}
    job |= {"label_table": table, "masks_cut_like": {"size": shards.size}}
    store = SampleStore.create(tmp_path / "samples", job, pa.Table.from_pylist(items), shards.size)
    store.write_region(0, np.stack([r.image_uint8() for r in records]), np.stack([r.mask_HW for r in records]))
    return tmp_path


def test_real_images_among_themselves_are_as_good_as_real_ones(run: Path, shapes: Path) -> None:
    config = EvaluateConfig(real=str(shapes), spacing_mm=6.0, memorisation=True, **QUICK)
    summary = measure(run, config, progress=False)
    metrics = summary["metrics"]
    assert summary["num_samples"] == summary["provenance"]["num_real_alone"] == 12
    for kind in ("dice_either", "dice", "surface_dice", "area_error", "false_positive_area_mm2", "legacy_dice"):
        assert metrics[f"{kind}_mask_gen"]["value"] == metrics[f"{kind}_mask_real"]["value"], kind
    liver = summary["by_modality_organ"]["CT"]["liver"]
    assert liver["dice_mask_gen"]["value"] == liver["dice_mask_real"]["value"]
    assert liver["volume_error_mask_gen"]["value"] == liver["volume_error_mask_real"]["value"]
    assert metrics["sharpness"]["value"] == pytest.approx(1) == liver["texture"]["value"]
    for kind in ("noise_std", "air_mean", "air_lattice", "patient_lattice"):
        assert metrics[f"{kind}_gen"]["value"] == metrics[f"{kind}_real"]["value"], kind
    for kind in ("grey_mean", "grey_std", "noise_std"):
        assert liver[f"{kind}_gen"]["value"] == liver[f"{kind}_real"]["value"], kind
    assert metrics["segmenter_frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["segmenter_precision"]["value"] == 1 == metrics["segmenter_recall"]["value"]
    assert not {"psnr_db", "ssim", "dice_real_gen"} & set(metrics)
    assert "of no real image" in summary["not_available"]["psnr_db"]
    assert "leakage" not in summary["trust"]
    memorised = summary["trust"]["memorisation"]
    assert memorised["num_images"] == memorised["num_unseen"] == 12
    assert memorised["nearer"]["pixels"] == 1


def test_real_images_that_cannot_be_compared_are_refused(run: Path, shapes: Path, tmp_path: Path) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(InputProblems) as caught:
            check(run, EvaluateConfig(**QUICK, **settings))
        return str(caught.value)

    assert "memorisation: there are no real images" in refused(memorisation=True)
    assert str(tmp_path / "none") in refused(real=str(tmp_path / "none"))
    assert "frd_images" in refused(frd_images=10)


def write_pairs(folder: Path, shapes: Path, save_image: Any, ending: str = ".png") -> dict[str, str]:
    """Images and masks of the set's CT test slices, by the slices' keys; the flags that name them."""
    shards = ShardSet.open(shapes)
    for row in shards.select(split="test", modalities=["CT"]).tolist():
        record = shards.read(row)
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        save_image(folder / "images" / f"{record.meta.key}{ending}", record.image_HW)
        Image.fromarray(record.mask_HW).save(folder / "masks" / f"{record.meta.key}.png")
    return {"--images": str(folder / "images"), "--masks": str(folder / "masks"), "--modality": "CT"}


def save_png(file: Path, image_HW: np.ndarray) -> None:
    Image.fromarray(image_HW).save(file)


def save_png_16(file: Path, image_HW: np.ndarray) -> None:
    Image.fromarray(image_HW.astype(np.uint16) * 257).save(file)


def save_blurred(file: Path, image_HW: np.ndarray) -> None:
    Image.fromarray(image_HW).filter(ImageFilter.GaussianBlur(1)).save(file)


def save_nifti(file: Path, image_HW: np.ndarray) -> None:
    """HU, in RAS order."""
    hu_HW = image_HW.astype(np.float32) * (512 / 255) - 256
    nib.save(nib.Nifti1Image(hu_HW[::-1, ::-1].T, np.diag([6.0, 6.0, 1.0, 1.0])), file)


def save_dicom(file: Path, image_HW: np.ndarray) -> None:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.rint(image_HW * (512 / 255) - 256).astype(np.int16))
    image.SetSpacing((6.0, 6.0))
    image.SetMetaData("0008|0060", "CT")
    SimpleITK.WriteImage(image, str(file))


class ByBrightness(nn.Module):
    """Scores of background, liver and spleen."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([120 - x, torch.zeros_like(x), 2 * (x - 180)], 1)


def folder_of(flags: dict[str, str], **settings: Any) -> ImageFolder:
    images = ImagesConfig(Path(flags["--images"]), Path(flags["--masks"]), "CT", **settings)
    return ImageFolder(images, AMOS, None)


def test_images_of_another_system_are_evaluated(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = write_pairs(tmp_path, shapes, save_blurred)
    flags |= {"--evaluate.segmenter": str(write_segmenter(tmp_path / "weights")), "--real": str(shapes)}
    flags |= {"--out": str(tmp_path / "out"), "--evaluate.device": "cpu", "--evaluate.num-workers": "1"}
    command = ["evaluate", *(text for pair in flags.items() for text in pair), "--tracking.no-enabled"]
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert "images: 12" in capsys.readouterr().out
    assert main(command) == 0
    summary = json.loads((tmp_path / "out" / "evaluation" / "summary.json").read_text())
    assert summary["num_samples"] == 12
    assert summary["num_patients"] == 2
    assert summary["metrics"]["sharpness"]["value"] < 0.5
    assert summary["metrics"]["segmenter_frechet"]["value"] > 0
    assert "next: " not in capsys.readouterr().out
    html = (tmp_path / "out" / "evaluation" / "report.html").read_text()
    assert "nothing says whether their patients are in the train split" in html
    assert "All are compared with 12 real slices together." in html
    assert "gallery_ct.png" in (tmp_path / "out" / "evaluation" / "figures" / "index.json").read_text()
    # The result is a run folder: the same images are measured again, others are not taken for them.
    assert main(["evaluate", "--run", str(tmp_path / "out"), *command[7:9], "--dry-run"]) == 0
    save_png(next((tmp_path / "images").iterdir()), np.zeros((32, 32), np.uint8))
    capsys.readouterr()
    assert main(command) == 2
    assert "images_digest: the samples here were made with" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "png"), "--run", str(tmp_path / "out"), "--format", "png"]) == 2
    assert "another system's, read from" in capsys.readouterr().err


def test_frd_of_images_without_counterparts(tmp_path: Path, shapes: Path) -> None:
    pytest.importorskip("frd_score")
    flags = write_pairs(tmp_path, shapes, save_blurred)
    config = EvaluateConfig(segmenter=write_segmenter(tmp_path / "weights"), real=str(shapes), frd_images=6, **QUICK)
    folder = check_images(tmp_path / "out", ImagesConfig(Path(flags["--images"]), Path(flags["--masks"]), "CT"), config)
    folder.store(tmp_path / "out" / "samples")
    frd = measure(tmp_path / "out", config, progress=False)["metrics"]["frd"]
    assert (frd["n"], frd["num_real"]) == (6, 6)
    assert np.isfinite(frd["value"])


def test_a_network_of_another_project_segments(tmp_path: Path, shapes: Path) -> None:
    """By brightness alone: in these CT images it finds what their masks hold."""
    file = tmp_path / "segmenter.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(ByBrightness()).save(str(file))
    file.with_suffix(".yaml").write_text("names: {0: background, 1: liver, 2: spleen}\nrange: [0, 255]\n")
    label_map = tmp_path / "map.yaml"
    label_map.write_text("1: spleen\n6: liver\n16: background\n")
    images = write_pairs(tmp_path, shapes, save_png)
    config = EvaluateConfig(segmenter=file, patient="(amos)_", **QUICK)
    with pytest.raises(InputProblems, match=r"label ids: \[6, 16\]"):
        check_images(tmp_path / "out", ImagesConfig(Path(images["--images"]), Path(images["--masks"]), "CT"), config)
    folder = check_images(
        tmp_path / "out",
        ImagesConfig(Path(images["--images"]), Path(images["--masks"]), "CT", label_map=label_map),
        config,
    )
    (tmp_path / "out").mkdir()
    folder.store(tmp_path / "out" / "samples")
    summary = measure(tmp_path / "out", config, progress=False)
    assert summary["by_organ"]["liver"]["dice_mask_gen"]["value"] > 0.98
    assert summary["num_patients"] == 1, "by the pattern"
    assert summary["provenance"]["patients"] == "patients: 1 in 2 cases, by --evaluate.patient"
    assert set(pq.read_table(tmp_path / "out" / "evaluation" / "samples.parquet")["patient"].to_pylist()) == {"amos"}
    assert summary["metrics"]["dice_either_mask_gen"]["value"] > 0.98
    missing = summary["not_available"]
    for name in ("segmenter_frechet", "sharpness", "dice_either_mask_real"):
        assert "name a shard set" in missing[name], name
    for name in ("surface_dice_mask_gen", "false_positive_area_mm2_mask_gen"):
        assert "how wide a pixel is" in missing[name], name
    assert "area_error_mask_gen" in summary["metrics"]
    assert not any("volume_error_mask_gen" in entries for entries in summary["by_organ"].values())
    assert summary["grey_values"] == {}
    assert summary["body"] == {}, "the segmenter does not know the body"
    titles = [figure.title for figure in draw_figures(tmp_path / "out")]
    assert any(title.endswith("inside each organ, generated") for title in titles), "there are no real images"


@pytest.mark.parametrize(
    ("save_image", "ending"), [(save_png_16, ".png"), (save_nifti, ".nii.gz"), (save_dicom, ".dcm")]
)
def test_every_format_gives_the_same_pixels(tmp_path: Path, shapes: Path, save_image: Any, ending: str) -> None:
    expected = folder_of(write_pairs(tmp_path / "8", shapes, save_png))
    one = folder_of(write_pairs(tmp_path / "other", shapes, save_image, ending))
    stores = [folder.store(tmp_path / name) for name, folder in (("a", expected), ("b", one))]
    np.testing.assert_array_equal(np.asarray(stores[0].image[:]), np.asarray(stores[1].image[:]))
    np.testing.assert_array_equal(np.asarray(stores[0].mask[:]), np.asarray(stores[1].mask[:]))
    assert stores[0].items["key"].equals(stores[1].items["key"])
    known = one.items["row_spacing_mm"].to_pylist()
    assert np.isnan(known).all() if ending == ".png" else known == [6.0] * 12
    # A PNG file says nothing of HU.
    hu = [np.nan, np.nan] if ending == ".png" else [-256, 512 / 255]
    np.testing.assert_allclose(hu_scales(stores[1], None), [hu] * 12)


def test_volumes_are_cut_and_images_of_another_size_resampled(tmp_path: Path, shapes: Path) -> None:
    voxels = np.random.default_rng(0).integers(-200, 200, (20, 20, 4)).astype(np.int16)
    for name, values in (("images", voxels), ("masks", (voxels > 0).astype(np.uint8) * 6)):
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / name / "patient.nii.gz")
    cut = folder_of({"--images": str(tmp_path / "images"), "--masks": str(tmp_path / "masks")}, size=20)
    assert cut.items["slice_index"].to_pylist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.asarray(cut.store(tmp_path / "a").mask[1]) == 6, (voxels > 0)[::-1, ::-1, 1].T)

    flags = write_pairs(tmp_path / "png", shapes, save_png)
    half = folder_of(flags, size=16)
    first = np.asarray(Image.open(sorted(Path(flags["--images"]).iterdir())[0])).astype(float)
    means = first.reshape(16, 2, 16, 2).mean(axis=(1, 3))
    assert np.abs(np.asarray(half.store(tmp_path / "b").image[0]) - means).max() <= 0.5


def test_folders_that_are_no_pairs_are_refused(tmp_path: Path, shapes: Path) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(InputProblems) as caught:
            folder_of(flags, **settings)
        assert all(len(str(one).splitlines()) == 1 for one in caught.value.problems)
        return str(caught.value)

    flags = write_pairs(tmp_path, shapes, save_png)
    images, masks = sorted((tmp_path / "images").iterdir()), sorted((tmp_path / "masks").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:60])
    save_png(masks[1], np.full((32, 32), 77, np.uint8))
    save_png(masks[2], np.zeros((24, 24), np.uint8))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(images[3])
    text = refused()
    assert f"{images[0]}: PNG: cannot be read" in text
    assert f"{masks[1]}: label ids: [77]" in text
    assert "--images.label-map" in text
    assert f"{masks[2]}: size: 24x24 pixels, the image 32x32" in text
    assert f"{images[3]}: PNG: RGB pixels" in text

    for file in (images[0], masks[1], masks[2], images[3]):
        file.unlink()
    text = refused()
    assert "2 of 10 have no mask of the same name" in text
    assert images[1].stem in text
    for file in (images[1], images[2], masks[0], masks[3]):
        file.unlink()
    assert len(folder_of(flags)) == 8
    assert "DARK" not in folder_of(flags).words()
    for file in (images[5], masks[5]):
        save_png(file, np.zeros((16, 12), np.uint8))
    assert f"{images[5]}: size: 12x16 pixels; make image and mask square" in refused()
    save_png(images[5], np.zeros((16, 16), np.uint8))
    save_png(masks[5], np.zeros((16, 16), np.uint8))
    assert "sizes: 16x16" in refused()
    assert folder_of(flags, size=32).size == 32
    for file in (tmp_path / "masks").iterdir():
        file.unlink()
    assert "no PNG, NIfTI or DICOM file" in refused()

    nib.save(nib.Nifti1Image(np.full((8, 8), 200.0, np.float32), np.eye(4)), tmp_path / "images" / "x.nii")
    save_png(tmp_path / "masks" / "x.png", np.zeros((8, 8), np.uint8))
    for file in (tmp_path / "images").glob("*.png"):
        file.unlink()
    assert "are no HU; say which values are black and white" in refused()
    assert len(folder_of(flags, value_range=(0.0, 255.0))) == 1
    assert "ALL ARE DARK: no grey value is above 51 of 255" in folder_of(flags, value_range=(0.0, 1000.0)).words()


def test_flags_that_do_not_go_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    assert main(["evaluate", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert "--masks: None; give the folder" in text
    assert "--modality: None; no file says it for sure: give CT, MR or another name" in text
    assert main(["evaluate", "--images", str(tmp_path / "images")]) == 2
    assert "--out: not given; name a new folder" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(tmp_path), "--modality", "CT"]) == 2
    assert "name that by --images FOLDER" in capsys.readouterr().err
