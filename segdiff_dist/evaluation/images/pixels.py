"""Pixels of images that other systems made: files of one slice, and volumes. Unusable files are refused by name.

Dimensions: H rows, W columns; I, J, K as in data_shards.ingest.volumes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.itk_files import simpleitk
from data_shards.ingest.slices import VIEWS
from data_shards.ingest.volumes import UnreadableVolume, Volume, linear_weights, read_volume
from data_shards.modalities import OF_MR
from data_shards.problems import problem
from segdiff_dist.sampling.mask_folder import axis_of

_LARGEST_SIDE = 4096
# Air is -1000 HU and fat -100. If all values are above this, they are not HU of a slice through a body.
_LEAST_OF_NO_HU = -10.0
_WRITE_AGAIN = "write it again"
Spacing = tuple[float, float]
UNKNOWN: Spacing = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Flat:
    """An image of one slice: uint8 grey values, and the distances between rows and columns. `volume`: for NIfTI, its
    position in space."""

    image_HW: np.ndarray
    spacing_mm: Spacing = UNKNOWN
    volume: Volume | None = None
    axis: str | None = None


@dataclass(frozen=True)
class Grey:
    """The map from values of NIfTI and DICOM to grey values: of `modality`, between the ends of `window`; None: not
    known."""

    modality: str
    window: tuple[float, float] | None
    is_given: bool

    def map_of(self, file: Path, values: np.ndarray) -> GreyMap:
        """The map for these values. Raises InputProblems if it is not known, or if the values are not HU."""
        low, high = float(values.min()), float(values.max())
        remedy = f"say which values are black and white: --images.value-range {low:g} {high:g}, for example"
        if self.window is None:
            value = (
                f"{self.modality} has no unit"
                if self.modality != "CT"
                else "the real CT images have no common HU window"
            )
            raise problem(file, "values", value, remedy)
        if self.modality == "CT" and not self.is_given and low > _LEAST_OF_NO_HU:
            raise problem(file, "values", f"{low:g} to {high:g} are no HU", remedy)
        return GreyMap.between(*self.window, 8)

    def flat(self, file: Path, values_HW: np.ndarray) -> np.ndarray:
        """uint8 grey values."""
        grey = self.map_of(file, values_HW)
        return grey.to_grey(values_HW.astype(np.float32) - np.float32(grey.offset))


def read_png_image(file: Path) -> Flat:
    """A grey PNG of 8 or 16 bits, whose whole range counts. Raises InputProblems."""
    from PIL import Image

    with file.open("rb") as stream:
        start = stream.read(24)
    if max(int.from_bytes(start[at : at + 4], "big") for at in (16, 20)) > _LARGEST_SIDE:
        raise problem(file, "PNG", f"more than {_LARGEST_SIDE} pixels a side", _WRITE_AGAIN)
    try:
        with Image.open(io.BytesIO(file.read_bytes()), formats=["PNG"]) as picture:
            mode, frames = picture.mode, getattr(picture, "n_frames", 1)
            values = np.asarray(picture)
    except Exception as error:  # Pillow may raise any error on such bytes
        reason = " ".join(str(error).split())[:120]
        raise problem(file, "PNG", f"cannot be read ({reason})", _WRITE_AGAIN) from error
    if frames != 1:
        raise problem(file, "PNG", f"{frames} frames", "save one picture a file")
    if mode in ("RGB", "RGBA", "LA") and (values[..., :1] == values[..., : values.shape[-1] - (mode != "RGB")]).all():
        values, mode = values[..., 0], "L"  # grey, saved as colours
    if mode == "L":
        return Flat(values)
    if mode in ("I;16", "I;16B", "I"):
        return Flat(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    raise problem(file, "PNG", f"{mode} pixels", "save one grey value of 8 or 16 bits a pixel")


def read_nifti(file: Path) -> Volume:
    """A volume, or a slice as a volume of one plane. Raises InputProblems."""
    try:
        return read_volume(file, one_slice=True)
    except UnreadableVolume as error:
        raise problem(file, "voxels", error.reason, "restore the file") from error


def axis_of_flat(volume: Volume, axis: str) -> str | None:
    """The axis of a volume that is one slice; None for others."""
    along = axis_of(volume.voxels_IJK.shape, axis)
    return along if volume.voxels_IJK.shape[VIEWS[along][0]] == 1 else None


def plane_of(voxels_IJK: np.ndarray, along: str) -> np.ndarray:
    """The only plane [H, W] of a volume, as slices are shown (data_shards.ingest.slices)."""
    plane: np.ndarray = voxels_IJK.transpose(VIEWS[along])[0, ::-1, ::-1]
    return plane


def flat_of(file: Path, volume: Volume, along: str, axis: str, grey: Grey) -> Flat:
    """A NIfTI file of one slice. A two-dimensional file does not hold its axis, so `axis` is used."""
    _, row, column = VIEWS[along]
    spacing = (float(volume.spacing_mm[row]), float(volume.spacing_mm[column]))
    image_HW = grey.flat(file, volume.values(plane_of(volume.voxels_IJK, along)))
    return Flat(image_HW, spacing, volume, axis if along == "axial" else along)


def read_dicom(file: Path, grey: Grey) -> Flat:
    """A DICOM file of one slice, in rows and columns as stored. Raises InputProblems, also without SimpleITK."""
    sitk = simpleitk(file)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.SetImageIO("GDCMImageIO")
        reader.ReadImageInformation()
        tags = {
            key: reader.GetMetaData(key).strip() for key in ("0008|0060", "0028|0004") if reader.HasMetaDataKey(key)
        }
        _refuse_dicom(file, reader, tags, grey.modality)
        image = reader.Execute()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-120:]
        raise problem(file, "DICOM", f"cannot be read ({reason})", "restore the file") from error
    values_HW = sitk.GetArrayFromImage(image).reshape(image.GetSize()[1::-1]).astype(np.float32)
    column_mm, row_mm = image.GetSpacing()[:2]
    return Flat(grey.flat(file, values_HW), (float(row_mm), float(column_mm)))


def _refuse_dicom(file: Path, reader: Any, tags: dict[str, str], modality: str) -> None:
    size, kind = reader.GetSize(), tags.get("0008|0060", "")
    if max(size[:2]) > _LARGEST_SIDE or any(n != 1 for n in size[2:]) or reader.GetNumberOfComponents() != 1:
        raise problem(file, "DICOM", f"{tuple(size)} pixels", "give one grey slice a file")
    of_mr = ("MR", *OF_MR)
    if (kind == "CT" and modality in of_mr) or (kind == "MR" and modality in ("CT", "CBCT", "PET", "SPECT")):
        raise problem(file, "DICOM", f"Modality {kind}", f"--modality is {modality}: leave other images out")
    if tags.get("0028|0004") == "MONOCHROME1":
        raise problem(file, "DICOM", "MONOCHROME1: high values are dark", "save it as MONOCHROME2")


def resampled(image_HW: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size] of a square image: means of pixels if it becomes smaller, else linear."""
    step = len(image_HW) / size
    weights = linear_weights(size, len(image_HW), step=step, start=(step - 1) / 2)
    values = weights @ image_HW.astype(np.float32) @ weights.T
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def resampled_ids(mask_HW: np.ndarray, size: int) -> np.ndarray:
    """The same for label ids: those of the nearest pixels."""
    nearest = np.minimum(((np.arange(size) + 0.5) * len(mask_HW) / size).astype(np.int64), len(mask_HW) - 1)
    return mask_HW[np.ix_(nearest, nearest)]


def refuse_unlike(file: Path, mask: Path, image: Flat, mask_shape: tuple[int, ...]) -> None:
    """Refuse a pair of different shapes (rows, columns), or of images that are not square."""
    height, width = image.image_HW.shape
    if mask_shape != (height, width):
        value = f"{mask_shape[1]}x{mask_shape[0]} pixels, the image {width}x{height}"
        raise problem(mask, "size", value, f"give the mask that {file.name} was made from")
    if height != width:
        raise problem(file, "size", f"{width}x{height} pixels", "make image and mask square, by a border for example")


def refuse_elsewhere(file: Path, mask: Path, image: Volume, labels: Volume) -> None:
    """Refuse volumes of different shapes or at different places."""
    if image.voxels_IJK.shape != labels.voxels_IJK.shape:
        value = f"{labels.voxels_IJK.shape} voxels, the image {image.voxels_IJK.shape}"
        raise problem(mask, "size", value, f"give the mask that {file.name} was made from")
    if not np.allclose(image.affine, labels.affine, atol=0.01):
        remedy = "copy the image's affine to the mask, if they belong together"
        raise problem(mask, "place", "its affine is not the image's", remedy)
