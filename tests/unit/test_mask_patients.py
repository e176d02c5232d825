"""Whose anatomy the masks of a folder show: by a table beside them, by a pattern, or by a guess that is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from evaluation_support import items_of
from PIL import Image

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.images.config import ImagesConfig
from segdiff_dist.evaluation.images.folder import ImageFolder
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.job import check_samples, export_samples
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.items import list_items_of
from segdiff_dist.sampling.mask_folder import MaskFolder
from segdiff_dist.sampling.mask_patients import MaskPatients, mask_patients
from segdiff_dist.sampling.store import SampleStore


def images_of(root: Path) -> ImageFolder:
    """Images and masks in a folder's `images` and `masks`, read as another system's."""
    return ImageFolder(ImagesConfig(root / "images", root / "masks", "CT"), AMOS, None)


def write_slices(root: Path, names: list[str], size: int = 16) -> Path:
    for folder, value in (("images", 80), ("masks", 6)):
        for name in names:
            file = root / folder / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((size, size), value, np.uint8)).save(file)
    return root


def patients_of(root: Path, pattern: str | None = None) -> MaskPatients:
    folder = images_of(root)
    return mask_patients(folder.items, folder.job, pattern)


def of_mask_folder(masks: Path, shards: ShardSet, pattern: str | None = None) -> MaskPatients:
    """As for samples of `segdiff sample --masks`."""
    config = SampleConfig(masks=masks, target_modality="CT")
    folder = MaskFolder(masks, shards, shards.size, config)
    items = list_items_of(folder.rows, np.arange(len(folder)), config)
    return mask_patients(items, {"masks": str(masks)}, pattern)


def sampled(run: Path, masks: Path, shards: ShardSet) -> Path:
    """A run whose finished samples are of these masks, two of each."""
    config = SampleConfig(masks=masks, target_modality="CT", samples_per_mask=2)
    folder = MaskFolder(masks, shards, shards.size, config)
    items = list_items_of(folder.rows, np.arange(len(folder)), config)
    job = {"weights": "w", "weights_digest": "1" * 64, "masks": str(masks), "masks_digest": "2" * 64}
    job |= {"region_size": 64, "diffusion": {}, "sample": {}, "masks_cut_like": {"size": shards.size}}
    job |= {"label_table": shards.label_table.described}
    mask_NHW = folder.read(np.arange(len(folder)))[items["row"].to_numpy()]
    SampleStore.create(run / "samples", job, items, shards.size).write_region(0, mask_NHW, mask_NHW)
    return run


def test_folds_of_an_export_keep_the_patients_of_a_folders_masks_together(tmp_path: Path, shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    write_slices(tmp_path / "data", ["p1_1", "p1_2", "p2_1", "p2_2"], shards.size)
    run = sampled(tmp_path / "run", tmp_path / "data" / "masks", shards)
    out = tmp_path / "Dataset701_Synthetic"
    export_samples(run, out, ExportConfig(patient="(p[0-9])_"))
    for fold in json.loads((out / "splits_final.json").read_text()):
        parts = [{name[:2] for name in fold[part]} for part in ("train", "val")]
        assert parts in ([{"p1"}, {"p2"}], [{"p2"}, {"p1"}])
    export_samples(run, tmp_path / "png", ExportConfig(format="png", patient="(p[0-9])_"))
    named = patients_of(tmp_path / "png")
    assert set(named.by_case.values()) == {"p1", "p2"}
    assert named.guess is None
    # An export without names of patients still says which images are of one mask, and no more.
    job = check_samples(run, tmp_path / "Dataset702_Synthetic", ExportConfig())
    assert "(here 2 patients)" in job.lines[0]
    export_samples(run, tmp_path / "plain", ExportConfig(format="png"))
    plain = patients_of(tmp_path / "plain")
    assert set(plain.by_case.values()) == {"p1_1", "p1_2", "p2_1", "p2_2"}
    assert plain.line is None
    assert "4 cases, 4 of them single slices, count as 4 patients" in str(plain.guess)
    assert set(patients_of(tmp_path / "plain", "(p[0-9])_").by_case.values()) == {"p1", "p2"}
    with pytest.raises(InputProblems, match=r"export.patient: '\(x\)' fits no case"):
        check_samples(run, tmp_path / "no", ExportConfig(format="png", patient="(x)"))


def test_own_exports_are_read_back_with_their_patients(tmp_path: Path, shapes: Path) -> None:
    """Two scans of one patient and several images of a mask: one patient, by images and by masks alone."""
    copied = tmp_path / "set"
    shutil.copytree(shapes, copied)
    rows = ShardSet.open(copied).select(split="test", modalities=["CT"]).tolist()
    cases = {ShardSet.open(copied).meta(row).case_id for row in rows}
    index = json.loads((copied / "index.json").read_text())
    for case in cases:
        index.setdefault("source", {})[case] = {"patient": "p7"}
    (copied / "index.json").write_text(json.dumps(index))
    shards = ShardSet.open(copied)
    items = items_of(shards, rows[:2] + rows[-2:], seeds=2)
    job = {"shards": str(copied), "shards_digest": shards.digest, "weights_digest": "", "region_size": len(items)}
    job |= {"diffusion": {}, "sample": {}}
    store = SampleStore.create(tmp_path / "run" / "samples", job, pa.Table.from_pylist(items), shards.size)
    records = [shards.read(item["row"]) for item in items]
    store.write_region(0, np.stack([r.image_uint8() for r in records]), np.stack([r.mask_HW for r in records]))
    out = tmp_path / "png"
    export_samples(tmp_path / "run", out, ExportConfig(format="png"))
    found = patients_of(out)
    assert len(found.by_case) == 4
    assert set(found.by_case.values()) == {"p7"}
    assert found.line == f"patients: 1 in 4 cases, by {out / 'items.csv'}"
    assert set(of_mask_folder(out / "masks", shards).by_case.values()) == {"p7"}
    (out / "items.csv").unlink()
    guessed = patients_of(out)
    assert not guessed.by_case
    assert "4 cases count as 4 patients" in str(guessed.guess)
    assert "(here 2 patients)" in str(guessed.guess)


def test_a_manifest_a_pattern_or_a_guess_says_whose_masks_they_are(tmp_path: Path, shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    root = write_slices(tmp_path, ["p1_1", "p1_2", "p2_1", "p2_2"], shards.size)
    guess = patients_of(root).guess
    assert guess == (
        "4 cases, 4 of them single slices, count as 4 patients, since no table or pattern names them: intervals are "
        "too narrow if several are of one patient. Then give --evaluate.patient '(.+)_' (here 2 patients): its first "
        "group is the patient"
    )
    by_pattern = patients_of(root, "(p[0-9])_")
    assert by_pattern.by_case == {"p1_1": "p1", "p1_2": "p1", "p2_1": "p2", "p2_2": "p2"}
    assert by_pattern.line == "patients: 2 in 4 cases, by --evaluate.patient"
    with pytest.raises(InputProblems, match=r"evaluate.patient: '\(x\)' fits no case, as p1_1"):
        patients_of(root, "(x)")
    # A manifest names some; the pattern the others.
    manifest = root / "manifest.csv"
    manifest.write_text(
        "image,label,patient\nimages/p1_1.png,masks/p1_1.png,anna\nimages/p1_2.png,masks\\p1_2.png,anna\n"
    )
    both = patients_of(root, "(p[0-9])_")
    assert both.by_case == {"p1_1": "anna", "p1_2": "anna", "p2_1": "p2", "p2_2": "p2"}
    assert both.line == f"patients: 2 in 4 cases, by {manifest} and --evaluate.patient"
    assert of_mask_folder(root / "masks", shards).by_case == {"p1_1": "anna", "p1_2": "anna"}
    manifest.write_text("image,label,patient\nimages/p1_1.png,masks/p1_1.png,anna\n,masks/p1_1.png,berta\n")
    with pytest.raises(InputProblems, match="p1_1 is of anna and berta"):
        of_mask_folder(root / "masks", shards)


def of_volumes(*cases: str) -> MaskPatients:
    items = {"case_id": [*cases] * 2, "key": [f"{case}{n}" for n in (1, 2) for case in cases]}
    return mask_patients(pa.table(items), {"masks": "gone"}, None)


def test_volumes_whose_names_are_alike_may_be_of_one_patient() -> None:
    assert of_volumes("amos_1", "amos_2") == MaskPatients()
    assert of_volumes("btcv_1", *(f"amos_{number}" for number in range(13))) == MaskPatients()
    guess = str(of_volumes("p1_1", "p1_2", "p2_1").guess)
    assert guess.startswith("3 cases count as 3 patients, since no table or pattern names them")
    assert "--evaluate.patient '(.+)_' (here 2 patients)" in guess


def test_files_of_one_folder_count_as_one_patient_and_a_line_says_so(tmp_path: Path) -> None:
    root = write_slices(tmp_path, ["site_a/p1", "site_a/p2", "site_b/p3"])
    guess = str(patients_of(root).guess)
    assert guess.startswith("files of one folder count as one patient, as 2 in site_a (patients: 2)")
    assert guess.endswith("name the patients by --evaluate.patient")
    assert patients_of(root, "(site_[ab])").guess is None, "the user names them"
    assert patients_of(write_slices(tmp_path / "keys", ["a/p1-axial-0001", "a/p1-axial-0002"])).guess is None
