"""The same small volumes in every layout that `prepare` reads, written in a blink."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.prepare import PrepareConfig, check
from data_shards.records import SPLITS, SliceRecord
from data_shards.store.shard_writer import ShardWriter

CONFIG = PrepareConfig(size=32, spacing_mm=4.0, axes=("axial", "sagittal"), num_workers=1)
# Case, split, where its liver is.
CASES = (("p1_1", "train", 9), ("p1_2", "train", 12), ("p2_1", "val", 15), ("p3_1", "test", 20))
LIVER, SPLEEN = 6, 1
AFFINE = np.diag([4.0, 4.0, 6.0, 1.0]) + np.array([[0, 0, 0, -64.0], [0, 0, 0, -64], [0, 0, 0, -20], [0, 0, 0, 0]])


def volumes() -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Case, split, CT and label in AMOS' ids, both [32, 32, 8]."""
    for number, (case, split, at) in enumerate(CASES):
        rng = np.random.default_rng(number)
        i, j, _ = np.indices((32, 32, 8))
        label = np.zeros((32, 32, 8), np.uint8)
        label[at : at + 4, 12:18, 2:6] = LIVER
        label[14:18, 20:24, 3:7] = SPLEEN
        inside = ((i - 16) / 13) ** 2 + ((j - 16) / 11) ** 2 < 1
        image = np.where(inside, 20.0, -1000.0) + 50.0 * (label > 0) + rng.normal(0, 5, label.shape)
        yield case, split, image.round().astype(np.int16), label


def save(file: Path, voxels: np.ndarray) -> None:
    """NIfTI by nibabel; other formats by SimpleITK, which counts to the left and the back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in file.name:
        nib.save(nib.Nifti1Image(voxels, AFFINE), file)
        return
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing((4.0, 4.0, 6.0))
    image.SetOrigin((64.0, 64.0, -20.0))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(file))


def write_amos(root: Path) -> dict[str, Any]:
    lists: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for case, split, image, label in volumes():
        save(root / f"images/{case}.nii.gz", image)
        save(root / f"labels{'Ts' if split == 'test' else ''}/{case}.nii.gz", label)
        entry = {"image": f"./images/{case}.nii.gz", "label": f"./labels/{case}.nii.gz"}
        lists[split].append(entry["image"] if split == "test" else entry)
    names = {"training": lists["train"], "validation": lists["val"], "test": lists["test"]}
    (root / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, **names}))
    return {}


def write_nnunet(root: Path) -> dict[str, Any]:
    """Two channels, ids of its own, a BOM, and splits in splits_final.json and the folders."""
    renumbered = np.zeros(7, np.uint8)
    renumbered[[LIVER, SPLEEN]] = 1, 2
    fold: dict[str, list[str]] = {"train": [], "val": []}
    for case, split, image, label in volumes():
        end = "Ts" if split == "test" else "Tr"
        save(root / f"images{end}/{case}_0000.nii.gz", np.zeros_like(image))
        save(root / f"images{end}/{case}_0001.nii.gz", image)
        save(root / f"labels{end}/{case}.nii.gz", renumbered[label])
        fold.get(split, []).append(case)
    content = {
        "channel_names": {"0": "PET", "1": "CT"},
        "labels": {"background": 0, "Liver": 1, "spleen": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8-sig")
    (root / "splits_final.json").write_text(json.dumps([{"train": [], "val": []}, fold]))
    return {"channel": 1, "fold": 1, "labels": "amos"}


def write_msd(root: Path) -> dict[str, Any]:
    """Paths with backslashes, and `labels` as id: name."""
    write_amos(root)
    content = json.loads((root / "dataset.json").read_text())
    text = json.dumps(content | {"labels": {"0": "background", "1": "Spleen", "6": "LIVER"}})
    (root / "dataset.json").write_text(text.replace("./images/", r".\\images\\"))
    return {"layout": "msd", "labels": "amos"}


def write_folder(ending: str) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        for case, split, image, label in volumes():
            save(root / split / "images" / f"{case}{ending}", image)
            save(root / split / "masks" / f"{case}_seg{ending}", label)
        return {"modality": "CT", "labels": table(root.with_suffix(".yaml"))}

    return write


def write_folder_of_both(root: Path) -> dict[str, Any]:
    for case, split, image, label in volumes():
        save(root / split / f"{case}.nii.gz", image)
        save(root / split / f"{case}_label.nii.gz", label)
    return {"modality": "CT", "labels": table(root.with_suffix(".yaml"))}


def write_manifest(root: Path) -> dict[str, Any]:
    with_split = []
    for case, split, image, label in volumes():
        save(root / f"ct/{case}.mha", image)
        save(root / f"drawn/{case}.nrrd", label)
        with_split.append([f"ct\\{case}.mha", f"drawn/{case}.nrrd", "ct", case[:2], split])
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([["Image", "Label", "Modality", "Patient", "Split"], *with_split])
    return {"labels": table(root.with_suffix(".yaml"))}


def write_totalsegmentator(root: Path) -> dict[str, Any]:
    rows = ["image_id;age;split"]
    for case, split, image, label in volumes():
        save(root / case / "ct.nii.gz", image)
        save(root / case / "segmentations" / "liver.nii.gz", (label == LIVER).astype(np.uint8))
        save(root / case / "segmentations" / "spleen.nii.gz", (label == SPLEEN).astype(np.uint8))
        rows.append(f"{case};60;{split}")
    (root / "meta.csv").write_text("\n".join(rows))
    return {"labels": "amos"}


def table(file: Path) -> str:
    """AMOS' liver and spleen under a table of one's own, whose ids are those of AMOS, so that masks can be compared."""
    names = ["spleen", "a", "b", "c", "d", "liver", "e", "f", "g", "h", "i", "j", "k", "l", "m"]
    file.write_text(f"name: mine\nnames: {{{', '.join(f'{i}: {name}' for i, name in enumerate(names, 1))}}}\n")
    return str(file)


LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "nnunet": write_nnunet,
    "msd": write_msd,
    "totalsegmentator": write_totalsegmentator,
    "manifest": write_manifest,
    **{f"folder{ending}": write_folder(ending) for ending in (".nii", ".mha", ".mhd", ".nrrd")},
    "folder.nii.gz": write_folder_of_both,
}


def edit(root: Path, **changes: Any) -> dict[str, Any]:
    """Change keys of dataset.json."""
    content = json.loads((root / "dataset.json").read_text(encoding="utf-8-sig"))
    (root / "dataset.json").write_text(json.dumps(content | changes))
    return {}


def slices(root: Path, **settings: Any) -> list[SliceRecord]:
    """What `prepare` would write of a folder, by split and case, without Ray."""
    config = PrepareConfig(**{**vars(CONFIG), **settings})
    preparation = check(root, root.parent / "set", config)
    cases = sorted(preparation.cases, key=lambda case: (case.split, case.case_id))
    labelling = preparation.survey.labelling
    return [record for case in cases for record in slices_of(case, config, None, [], labelling)]


def write_set(root: Path, out: Path, **settings: Any) -> Path:
    """The shard set that `prepare` would make of a folder, without Ray."""
    config = PrepareConfig(**{**vars(CONFIG), **settings})
    preparation = check(root, out, config)
    labelling, writer = preparation.survey.labelling, ShardWriter(out, config.format)
    for case in sorted(preparation.cases, key=lambda case: (SPLITS.index(case.split), case.case_id)):
        for record in slices_of(case, config, None, [], labelling):
            writer.write(record)
    writer.finish({**preparation.header, "label_table": labelling.table.described})
    return out
