"""A finished image as the bytes of an answer: PNG, NIfTI, a zip of DICOM, or JSON with the segmenter's labels."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_shards.ingest.volumes import Volume
from data_shards.ray_session import scratch_folder
from segdiff_dist.evaluation.metrics.overlaps import confusion, dice_per_class
from segdiff_dist.export.slicewise import CutMask
from segdiff_dist.export.volume_out import save_values
from segdiff_dist.painting.job import Painting
from segdiff_dist.painting.masks import picture_of_IJK
from segdiff_dist.segmentation.segmenter import Segmenter
from segdiff_dist.serving.messages import Form


@dataclass(frozen=True)
class Segmented:
    """Labels of the generated image by the segmenter, [I, J, K] canonical, and Dice with the mask of each organ in
    it."""

    labels_IJK: np.ndarray
    dice: dict[str, float]


def file_of(made: Painting, form: Form) -> bytes:
    """The bytes of the image's file; PNG: of one axial plane."""
    if form == "png":
        from PIL import Image

        stream = io.BytesIO()
        picture_HW = picture_of_IJK(np.rint(made.grey_IJK).astype(np.uint8))
        Image.fromarray(np.ascontiguousarray(picture_HW)).save(stream, format="PNG")
        return stream.getvalue()
    with TemporaryDirectory(prefix="segdiff-", dir=scratch_folder()) as folder:
        if form == "dicom":
            made.save(Path(folder) / "dicom")
            return _zipped(Path(folder) / "dicom")
        made.save(Path(folder) / "image.nii.gz")
        return (Path(folder) / "image.nii.gz").read_bytes()


def is_one_plane(shape: tuple[int, ...]) -> bool:
    """Whether a mask of this shape is one axial plane, which a picture can show."""
    return len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)


def json_of(made: Painting, segmented: Segmented | None) -> dict[str, Any]:
    """The image and what the segmenter sees in it."""
    prediction = None if segmented is None else text_of(labels_file(made, segmented.labels_IJK))
    return {
        "image": text_of(file_of(made, "nifti")),
        "modality": made.modality,
        "hu": made.model.is_in_hu(made.modality),
        "dice": None if segmented is None else segmented.dice,
        "prediction": prediction,
        "notes": list(made.notes),
    }


def segment_and_score(segmenter: Segmenter, made: Painting, cut_mask: CutMask, image_SHW: np.ndarray) -> Segmented:
    """What the segmenter sees in generated slices, uint8 [S, H, W], on the mask's voxels. Dice is over all slices, of
    each organ that the mask shows."""
    import torch

    modality_S = torch.full((len(image_SHW),), segmenter.modalities.index(made.modality))
    predicted_SHW = segmenter.predict(torch.from_numpy(image_SHW), modality_S).cpu().numpy()
    table = segmenter.label_table
    counts_1KK = confusion(cut_mask.mask_SHW, predicted_SHW, table.num_classes).sum(axis=0, keepdims=True)
    dice_K = dice_per_class(counts_1KK)[0]
    dice = {table.names[i]: round(float(dice_K[i]), 4) for i in table.organ_ids if np.isfinite(dice_K[i])}
    return Segmented(cut_mask.labels_back(predicted_SHW), dice)


def labels_file(made: Painting, labels_IJK: np.ndarray) -> bytes:
    """Label ids as NIfTI, uint8, gzipped, on the voxels of the mask that was given."""
    is_flat = made.mask.kind == "volume" and made.mask.is_flat
    affine = made.labels.affine if made.mask.affine is None else made.mask.affine
    return nifti_gz(labels_IJK, affine, made.mask.header, is_flat=is_flat)


def mask_file(labels: Volume) -> bytes:
    """A mask in the model's ids as NIfTI, uint8, gzipped, in canonical orientation."""
    return nifti_gz(labels.voxels_IJK, labels.affine)


def nifti_gz(values_IJK: np.ndarray, affine: np.ndarray, header: Any = None, *, is_flat: bool = False) -> bytes:
    """The bytes of a .nii.gz of canonical values."""
    with TemporaryDirectory(prefix="segdiff-", dir=scratch_folder()) as folder:
        file = Path(folder) / "labels.nii.gz"
        save_values(file, values_IJK, affine, header, is_flat=is_flat)
        return file.read_bytes()


def text_of(content: bytes) -> str:
    """Base64, for JSON."""
    return base64.b64encode(content).decode("ascii")


def _zipped(folder: Path) -> bytes:
    """images/*.dcm and masks/mask.dcm. Nothing is dated: the same image gives the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(one for one in folder.rglob("*") if one.is_file()):
            archive.writestr(
                zipfile.ZipInfo(file.relative_to(folder).as_posix()), file.read_bytes(), zipfile.ZIP_DEFLATED
            )
    return stream.getvalue()
