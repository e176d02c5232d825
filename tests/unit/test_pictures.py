"""Pictures as a data set: exports of PNG, folders of others, and what is refused or said."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.layouts.find import recognise
from data_shards.ingest.png_files import read_png_grey
from data_shards.ingest.prepare import Preparation, PrepareConfig, check
from data_shards.ingest.volumes import UnreadableVolume
from data_shards.problems import InputProblems
from data_shards.records import SliceRecord

CONFIG = PrepareConfig(
    size=32, spacing_mm=2.0, axes=("axial",), modality="US", pixel_mm=2.0, intensities={"US": "values 0 255"}
)
NAMES = ("a1", "b1", "c1", "d1")


def picture(number: int = 0) -> np.ndarray:
    """uint8 [32, 32], every pixel another value, from 0 to 255."""
    return np.roll(np.linspace(0, 255, 1024).astype(np.uint8), 7 * number).reshape(32, 32)


def with_transparent(grey_HW: np.ndarray) -> Image.Image:
    """Black is transparent, by a tRNS chunk."""
    found = Image.fromarray(grey_HW)
    found.info["transparency"] = 0
    return found


def mask() -> np.ndarray:
    ids = np.zeros((32, 32), np.uint8)
    ids[4:10, 6:20], ids[20:28, 3:9] = 1, 2
    return ids


def save(file: Path, pixels: Any, **how: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, **how)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """images/ and masks/, with the names of the classes."""
    root = tmp_path / "data"
    for number, name in enumerate(NAMES):
        save(root / f"images/{name}.png", picture(number))
        save(root / f"masks/{name}.png", mask())
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "cyst": 1, "wall": 2}}))
    return root


def checked(root: Path, **changes: Any) -> Preparation:
    return check(root, root.parent / "set", replace(CONFIG, **changes))


def cut(root: Path, case_id: str = "a1", notes: list[str] | None = None, **changes: Any) -> SliceRecord:
    found = checked(root, **changes)
    case = next(case for case in found.cases if case.case_id == case_id)
    (record,) = slices_of(case, replace(CONFIG, **changes), None, notes, found.survey.labelling)
    return record


def as_own_export(root: Path, names: tuple[str, ...] = NAMES, **changes: str | None) -> None:
    """The records of `segdiff export --format png`; None takes a column away."""
    (root / "dataset.json").unlink()
    record = {"made_by": "segdiff sample", "label_table": ["background", "cyst", "wall", "body"]}
    record["label_colours"] = [None, "ff0000", "no colour", None]
    (root / "provenance.json").write_text(json.dumps(record))
    row = {"target_modality": "CT", "case_id": "p", "spacing_mm": "2 2", "scale": "2.0", "offset": "-256.0"}
    row = {name: value for name, value in (row | changes).items() if value is not None}
    with (root / "items.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", *row])
        rows.writerows([name, *row.values()] for name in names)


def plain(mask_HW: np.ndarray) -> np.ndarray:
    """Without `body`, which is found in the image."""
    return np.where(mask_HW == 3, 0, mask_HW)


@pytest.mark.parametrize("ending", [".png", ".tif", ".TIFF"])
def test_pairs_are_read_pixel_by_pixel(root: Path, ending: str) -> None:
    for name in (*NAMES,) if ending != ".png" else ():
        for folder in ("images", "masks"):
            with Image.open(root / f"{folder}/{name}.png") as one:
                one.save(root / f"{folder}/{name}{ending}", format="TIFF")
            (root / f"{folder}/{name}.png").unlink()
    assert recognise(root).layout.name == "pictures"
    record = cut(root)
    np.testing.assert_array_equal(record.image_HW, picture())
    np.testing.assert_array_equal(plain(record.mask_HW), mask())
    assert record.meta.spacing_mm == (2.0, 2.0)


def test_other_depths_and_grey_colours(root: Path) -> None:
    save(root / "images/a1.png", picture().astype(np.uint16) * 257)
    sixteen = cut(root, intensities={"US": "values 0 65535"}, bits=16)
    np.testing.assert_array_equal(sixteen.image_HW, picture().astype(np.uint16) * 257)
    save(root / "images/a1.png", Image.fromarray(picture()).convert("RGBA"))
    np.testing.assert_array_equal(cut(root).image_HW, picture())
    save(root / "images/a1.png", picture() > 127)  # one bit a pixel
    np.testing.assert_array_equal(read_png_grey(root / "images/a1.png"), np.where(picture() > 127, 255, 0))
    (root / "images/a1.png").unlink()
    save(root / "images/a1.jpg", Image.fromarray(picture()).convert("RGB"), quality=95)
    notes: list[str] = []
    assert np.abs(cut(root, notes=notes).image_HW.astype(int) - picture()).mean() < 10
    assert any("JPEG" in note for note in notes)


def test_an_export_says_what_its_pictures_do_not(root: Path) -> None:
    """HU, spacing, modality and patient; all images of a patient are in one split."""
    as_own_export(root, split="test")
    stated: dict[str, Any] = {"modality": None, "pixel_mm": None, "intensities": {}, "hu_window": (-256.0, 254.0)}
    found = checked(root, **stated)
    assert {(one.modality, one.patient, one.split) for one in found.cases} == {("CT", "p", "test")}
    assert "items.csv" in found.survey.described
    assert found.survey.labelling.table.colours == (None, "ff0000", None, None)
    assert any("no case is in split train" in note for note in found.survey.notes)
    record = cut(root, **stated)
    np.testing.assert_array_equal(record.image_HW, picture())
    np.testing.assert_array_equal(plain(record.mask_HW), mask())


def test_any_name_of_a_modality_comes_back(root: Path) -> None:
    """A manifest's `T2-fs` of other people is T2."""
    for file, name in (("images", "a1_0000"), ("labels", "a1")):
        save(root / f"{file}Tr/{name}.png", picture() if file == "images" else mask())
    content = {"channel_names": {"0": "T2-fs"}, "file_ending": ".png", "labels": {"background": 0, "a": 1, "b": 2}}
    as_own_export(root, ("a1",), target_modality="T2-fs", scale="", offset="")
    (root / "dataset.json").write_text(json.dumps(content))
    found = checked(root, modality=None, pixel_mm=None)
    assert (found.survey.layout, [one.modality for one in found.cases]) == ("nnunet", ["T2-fs"])


def test_pictures_beside_volumes_are_named(root: Path) -> None:
    from layouts_support import save as save_volume
    from layouts_support import volumes

    _, _, image, label = next(volumes())
    save_volume(root / "images/v.nii.gz", image)
    save_volume(root / "masks/v.nii.gz", np.minimum(label, 2))
    found = checked(root, modality="CT", intensities={})
    assert [one.case_id for one in found.cases] == ["v"]
    assert any("4 pictures with masks" in note for note in found.survey.notes)


def test_a_manifest_says_it_too(root: Path) -> None:
    text = "image,label,modality,spacing_mm,scale,offset\nimages/a1.png,masks/a1.png,CT,2 2,2,-256\n"
    (root / "manifest.csv").write_text(text)
    record = cut(root, modality=None, pixel_mm=None, intensities={}, hu_window=(-256.0, 254.0))
    np.testing.assert_array_equal(record.image_HW, picture())


def write(text: str) -> Callable[[Path], Any]:
    return lambda root: (root / "manifest.csv").write_text(text)


def spoiled_export(**changes: str | None) -> Callable[[Path], Any]:
    return lambda root: as_own_export(root, **changes)


def without(file: str) -> Callable[[Path], Any]:
    def spoil(root: Path) -> None:
        as_own_export(root)
        (root / file).unlink()

    return spoil


def renamed(folder: Path, name: str = "{} x") -> None:
    for file in sorted(folder.iterdir()):
        file.rename(file.with_stem(name.format(file.stem)))


HEAD = "image,label,modality,spacing_mm,scale,offset\nimages/a1.png,masks/a1.png,US"
UNSTATED: dict[str, Any] = {"modality": None, "pixel_mm": None, "intensities": {}}


@pytest.mark.parametrize(
    ("spoil", "changes", "words"),
    [
        (lambda _: None, {"pixel_mm": None}, "spacing.*--prepare.pixel-mm"),
        (lambda _: None, {"modality": None}, "modality"),
        (lambda _: None, {"modality": "CT", "intensities": {}}, 'do not say which HU.*values 0 255'),
        (lambda root: save(root / "masks/a1.png", Image.fromarray(mask()).convert("RGB")), {}, "RGB pixels"),
        (lambda root: save(root / "masks/a1.png", mask()[:30]), {}, "shape"),
        (lambda root: (root / "masks/a1.png").unlink(), {}, "label.*there is none"),
        (lambda root: save(root / "images/a1.tif", picture()), {}, "both a1.png and a1.tif"),
        (lambda root: save(root / "images/a1.png", picture(), format="JPEG"), {}, "JPEG by its bytes"),
        (lambda root: (root / "masks/a1.png").rename(root / "masks/z.png"), {}, "without an image: z"),
        (lambda root: renamed(root / "masks", "of {}"), {}, "none was recognised.*4 without an image.*manifest.csv"),
        (lambda root: (renamed(root / "images"), renamed(root / "masks")), {}, "'a1 x'.*1 more such.*manifest.csv"),
        (write(f"{HEAD},2 2 2,,"), UNSTATED, "spacing_mm.*'2 2 2'"),
        (write(f"{HEAD},-2,,"), UNSTATED, "line 2: spacing_mm: -2; pixels are"),
        (write(f"{HEAD},2,0,"), UNSTATED, "scale.*other number than 0"),
        (write(f"{HEAD},2,nan,"), UNSTATED, "scale"),
        (write("image,modality,scale\na.nii.gz,CT,2"), UNSTATED, "a.nii.gz states it itself"),
        (spoiled_export(spacing_mm=None), UNSTATED, "spacing.*--prepare.pixel-mm.*items.csv"),
        (spoiled_export(scale=None, offset=None), UNSTATED, 'do not say which HU.*values 0 255'),
        (spoiled_export(spacing_mm="0.001"), UNSTATED, "spacing"),
        (spoiled_export(split="other"), UNSTATED, "split.*'other'"),
        (lambda root: as_own_export(root, (*NAMES, "a1")), UNSTATED, "a1 comes 2 times"),
        (lambda root: as_own_export(root, NAMES[1:]), UNSTATED, "a1.png is not there"),
        (spoiled_export(target_modality="M R"), UNSTATED, "target_modality.*'M R'"),
        (without("masks/a1.png"), UNSTATED, "masks.*missing: a1"),
        (without("images/a1.png"), UNSTATED, "missing: a1|without an image: a1"),
    ],
)  # fmt: skip
def test_what_nobody_says_is_refused(
    root: Path, spoil: Callable[[Path], Any], changes: dict[str, Any], words: str
) -> None:
    spoil(root)
    with pytest.raises(InputProblems, match=f"(?s){words}"):
        checked(root, **changes)


@pytest.mark.parametrize(
    ("file", "pixels", "words"),
    [
        ("images/a1.png", np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8), "colours"),
        ("images/a1.png", Image.fromarray(picture()).convert("P"), "palette"),
        ("images/a1.png", Image.fromarray(np.dstack([picture(), picture()]), "LA"), "transparent"),
        ("images/a1.png", with_transparent(picture()), "transparent colour"),
        ("masks/a1.png", np.where(mask(), 255, 0).astype(np.uint8), "label id 255 is not among"),
        ("masks/a1.png", Image.fromarray(mask()).convert("RGB").quantize(3), "palette holds only"),
    ],
)
def test_what_only_pixels_show_fails_its_case(root: Path, file: str, pixels: Any, words: str) -> None:
    save(root / file, pixels)
    with pytest.raises(UnreadableVolume, match=words):
        cut(root)


def test_pages_are_refused(root: Path) -> None:
    (root / "images/a1.png").unlink()
    page = Image.fromarray(picture())
    save(root / "images/a1.tif", page, save_all=True, append_images=[page])
    with pytest.raises(InputProblems, match="2 pages"):
        checked(root)


def test_a_tiff_whose_0_is_white_is_refused(root: Path) -> None:
    """Pillow turns those of 8 bits alone, and viewers all."""
    (root / "images/a1.png").unlink()
    save(root / "images/a1.tif", Image.fromarray(picture().astype(np.uint16) * 257))
    content = (root / "images/a1.tif").read_bytes()
    is_black = b"\x06\x01\x03\x00\x01\x00\x00\x00\x01\x00"  # PhotometricInterpretation, one short number
    assert content.count(is_black) == 1
    (root / "images/a1.tif").write_bytes(content.replace(is_black, is_black[:-2] + b"\0\0"))
    with pytest.raises(InputProblems, match="0 is white"):
        checked(root)
