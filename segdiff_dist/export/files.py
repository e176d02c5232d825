"""Samples as files: NIfTI or PNG pairs, and nnU-Net v2's raw data set.

Dimensions: H rows, W columns.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.ingest.dataset_json import DATASET_FILE
from data_shards.ingest.intensity import restore
from data_shards.ingest.itk_files import is_itk, write
from data_shards.ingest.layouts.nnunet import SPLITS_FILE
from data_shards.ingest.slices import VIEWS
from data_shards.labels import UNUSED, LabelTable
from data_shards.problems import Problem
from segdiff_dist.export.config import ExportConfig

if TYPE_CHECKING:
    from data_shards.records import SliceMeta, SliceRecord
    from segdiff_dist.export.merge import Merge
    from segdiff_dist.export.samples import FinishedSamples, Sample

# The number that nnU-Net makes itself.
_FOLDS = 5
# nnU-Net v2, documentation/dataset_format.md: "Dataset" and a three-digit id, then a name of one's own.
_NNUNET_NAME = re.compile(r"Dataset\d{3}_\w+")


def write_pairs(out: Path, samples: Iterable[Sample], ending: str) -> None:
    """OUT/images/NAME and OUT/masks/NAME, `.png` (grey values and ids) or of another ending (W x H x 1, stored values
    such as HU, in their place in the patient)."""
    for folder in ("images", "masks"):
        (out / folder).mkdir()
    for sample in samples:
        image, mask = (out / folder / f"{sample.name}{ending}" for folder in ("images", "masks"))
        record = sample.record
        if ending == ".png":
            _save_png(image, record.image_HW)
            _save_png(mask, record.mask_HW)
        else:
            affine, meta = slice_affine(record.meta, sample.knows_place), record.meta
            values = (meta.intensity_scale, meta.intensity_offset)
            _save_placed(image, record.image_HW.T[..., None], affine, values)
            _save_placed(mask, record.mask_HW.T[..., None], affine)


def write_manifest(out: Path, samples: FinishedSamples, ending: str) -> None:
    """OUT/manifest.csv and OUT/dataset.json with the labels: `segdiff prepare` reads the pairs by them."""
    with (out / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("case", "image", "label", "modality", "patient", "split"))
        for item in samples.items:
            name = item["name"]
            files = (f"images/{name}{ending}", f"masks/{name}{ending}")
            rows.writerow((name, *files, item["target_modality"], item["patient"], samples.stated_split(item)))
    names = enumerate(samples.label_table.names)
    content = {"labels": {str(number): name for number, name in names if name != UNUSED}}
    (out / "dataset.json").write_text(json.dumps(content, indent=2) + "\n")


def nnunet_problems(out: Path, samples: FinishedSamples) -> list[Problem]:
    """The reasons why the samples cannot be one nnU-Net data set called `out`."""
    problems = name_problems(out)
    if len(samples.modalities) > 1:
        remedy = "an nnU-Net channel is one modality: give --export.modality CT or MR, and make two data sets"
        problems.append(Problem(str(samples.store.path), "modalities", " and ".join(samples.modalities), remedy))
    return problems


def name_problems(out: Path) -> list[Problem]:
    """Whether `out` has a name as nnU-Net requires it."""
    if _NNUNET_NAME.fullmatch(out.name):
        return []
    remedy = "name it as nnU-Net does: Dataset, three digits, an underscore and a name, as in Dataset701_Synthetic"
    return [Problem(str(out), "output folder", out.name, remedy)]


def write_nnunet(
    out: Path,
    name: str,
    samples: FinishedSamples,
    iterated: Iterable[Sample],
    config: ExportConfig,
    merge: Merge | None = None,
) -> None:
    """A raw data set of nnU-Net v2 (documentation/dataset_format.md): imagesTr, labelsTr, dataset.json, and its folds,
    in each of which a patient's images are all for training or all for validation.

    Images are two-dimensional: NIfTI of stored values with the slice's spacing and, of axial slices, its place; or PNG
    of grey values. nnU-Net's labels must be consecutive, so unused ids are removed. `name`: of the data set. `merge`:
    real cases beside them, whose ids and folds are taken.
    """
    new_id_K, names = nnunet_labels(samples.label_table, keep_body=config.body_label)
    ending = config.file_ending
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir()
    if merge is not None:
        new_id_K = merge.ids
        merge.link(out)
    for sample in iterated:
        mask_HW = new_id_K[sample.record.mask_HW]
        save_case(out, sample.name, sample.record, mask_HW, ending, knows_place=sample.knows_place)
    # NibabelIO reads only three dimensions.
    reader = "NaturalImage2DIO" if ending == ".png" else "SimpleITKIO"
    if merge is not None:
        write_description(out, merge.description(name, reader), merge.folds())
        return
    description = nnunet_description(name, samples.modalities[0], names, len(samples), ending)
    folds = nnunet_folds({item["name"]: item["patient"] for item in samples.items})
    write_description(out, description | {"overwrite_image_reader_writer": reader}, folds)


def save_case(
    out: Path,
    name: str,
    record: SliceRecord,
    mask_HW: np.ndarray | None,
    ending: str,
    *,
    knows_place: bool = True,
    end: str = "Tr",
) -> None:
    """Image and label of a case of nnU-Net, two-dimensional; no label if it is None."""
    image, mask = out / f"images{end}" / f"{name}_0000{ending}", out / f"labels{end}" / f"{name}{ending}"
    meta = record.meta
    for file in (image, mask) if mask_HW is not None else (image,):
        file.parent.mkdir(exist_ok=True)
    affine = flat_affine(meta, knows_place)
    if ending == ".png":
        _save_png(image, record.image_HW)
    else:
        _save_placed(image, record.image_HW.T, affine, (meta.intensity_scale, meta.intensity_offset))
    if mask_HW is not None and ending == ".png":
        _save_png(mask, mask_HW)
    elif mask_HW is not None:
        _save_placed(mask, mask_HW.T, affine)


def nnunet_description(name: str, channel: str, names: Sequence[str], num_cases: int, ending: str) -> dict[str, Any]:
    """dataset.json of synthetic cases alone, without its reader."""
    return {
        "channel_names": {"0": channel},
        "labels": {organ: index for index, organ in enumerate(names)},
        "numTraining": num_cases,
        "file_ending": ending,
        "name": name,
        "description": "synthetic images by segmentation-guided diffusion; not for diagnosis",
    }


def write_description(out: Path, description: dict[str, Any], folds: list[dict[str, list[str]]]) -> None:
    """dataset.json, and splits_final.json if there are folds."""
    (out / DATASET_FILE).write_text(json.dumps(description, indent=2) + "\n")
    if folds:
        (out / SPLITS_FILE).write_text(json.dumps(folds, indent=2) + "\n")


def nnunet_folds(patient_of: Mapping[str, str]) -> list[dict[str, list[str]]]:
    """Names of the images of each fold: five folds, or as many as there are patients; none for a single patient.
    `patient_of`: the patient of each image, by its name. Patients are assigned to the folds in the order of their
    names' digests."""
    patients = sorted(set(patient_of.values()), key=lambda one: hashlib.sha256(one.encode()).hexdigest())
    number_of = {patient: number for number, patient in enumerate(patients)}
    num_folds = min(_FOLDS, len(patients)) if len(patients) > 1 else 0
    folds: list[dict[str, list[str]]] = []
    for fold in range(num_folds):
        is_val = {name: number_of[patient] % num_folds == fold for name, patient in patient_of.items()}
        names = sorted(is_val)
        folds.append({split: [n for n in names if is_val[n] == (split == "val")] for split in ("train", "val")})
    return folds


def fold_lines(out: Path, patients: Collection[str]) -> tuple[str, ...]:
    """What nnU-Net does without the folds of a data set of synthetic cases alone; `patients`: theirs, each once."""
    if len(patients) == 1:
        return ("all images are of one patient: there are no folds, and nnU-Net's validation is of this patient too",)
    return (copy_folds(out, "a patient trains and validates a fold"),)


def copy_folds(out: Path, otherwise: str) -> str:
    """A line that says where nnU-Net looks for the folds, and what happens where they are not there."""
    return f"before training copy {SPLITS_FILE} to nnUNet_preprocessed/{out.name}/: else {otherwise}"


def slice_affine(meta: SliceMeta, knows_place: bool) -> np.ndarray:
    """4x4 from NIfTI's (i, j, k, 1), which are column, row and 0 of the slice, to RAS mm.

    NIfTI's first index runs along a row of the picture, as SimpleITK and every viewer show it. If the position of a
    slice is not known, or does not fit its axis, the slice is put at the origin with the directions of its axis
    (docs/data.md 2).
    """
    affine = np.array(meta.affine).reshape(4, 4)[:, [1, 0, 2, 3]]
    through, row, column = VIEWS[meta.axis]
    step = np.linalg.norm(affine[:3, :2], axis=0)
    spacing = np.array(meta.spacing_mm)[::-1]
    if knows_place and np.allclose(step, spacing, rtol=0.01):
        nearest = np.abs(affine[:3, :2]).argmax(axis=0).tolist()
        if nearest == [column, row] and affine[column, 0] < 0 and affine[row, 1] < 0:
            return affine
    affine = np.zeros((4, 4))
    affine[column, 0], affine[row, 1], affine[through, 2], affine[3, 3] = -spacing[0], -spacing[1], 1.0, 1.0
    return affine


def flat_affine(meta: SliceMeta, knows_place: bool) -> np.ndarray:
    """The same for a two-dimensional file. Its readers assume that the image is in the axial plane. Other slices, and
    oblique ones, keep their spacing but not their position, and are oriented as in a picture."""
    affine = slice_affine(meta, knows_place)
    step = np.linalg.norm(affine[:3, :2], axis=0)
    directions = affine[:2, :2] / step
    if np.allclose(directions.T @ directions, np.eye(2), atol=1e-3):
        return affine
    return np.diag([-step[0], -step[1], 1.0, 1.0])


def nnunet_labels(table: LabelTable, *, keep_body: bool) -> tuple[np.ndarray, list[str]]:
    """uint8 [256] from the table's ids to consecutive ones, and the names of these. Without `body` it is background."""
    kept = [i for i, name in enumerate(table.names) if name != UNUSED and (keep_body or i != table.body_id)]
    new_id_K = np.zeros(256, np.uint8)
    new_id_K[kept] = np.arange(len(kept))
    return new_id_K, [table.names[i] for i in kept]


def _save_png(file: Path, pixels_HW: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(pixels_HW).save(file)


def _save_placed(file: Path, stored: np.ndarray, affine: np.ndarray, values: tuple[float, float] | None = None) -> None:
    """uint8 voxels as they are; `values`: slope and intercept in the header, by which readers restore HU. MetaImage and
    NRRD have no such fields: they get the values themselves, as float32."""
    import nibabel as nib

    if is_itk(file):
        voxels = stored if values is None else restore(stored, *values)
        write(file, voxels, affine)
        return
    image = nib.Nifti1Image(stored, affine)
    image.header.set_xyzt_units("mm")
    # Scanner coordinates, in both forms: some readers know only one of the two.
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    if values is not None:
        image.header.set_slope_inter(*values)
    nib.save(image, file)
