"""Volume files, by the ending of their name: NIfTI is read by this project, pictures by Pillow, other formats by
SimpleITK."""

from __future__ import annotations

from pathlib import Path

from data_shards.ingest import dicom_series, itk_files, nifti, pictures
from data_shards.ingest.dicom_series import DicomSeries
from data_shards.ingest.nifti import Geometry
from data_shards.ingest.pictures import Pixel
from data_shards.problems import problem

ENDINGS = (".nii.gz", ".nii", *itk_files.ENDINGS)


def stem(name: str) -> str | None:
    """The name without its ending; None if it is not a volume's, or a hidden file's (a Mac creates forks called
    ._NAME)."""
    ending = next((one for one in ENDINGS if name.lower().endswith(one)), None)
    return None if ending is None or name.startswith(".") else name[: -len(ending)]


def read_geometry(
    file: Path | DicomSeries, *, one_slice: bool = False, channel: int | None = None, pixel: Pixel | None = None
) -> Geometry:
    """The position of the volume, from its header alone; errors and parameters as of nifti.read_geometry. Channels are
    read from NIfTI alone. `pixel`: of a picture, what is said of it elsewhere."""
    if isinstance(file, DicomSeries):
        return dicom_series.read_geometry(file)
    if pixel is not None and pictures.is_picture(file):
        return pictures.read_geometry(file, pixel)
    if not itk_files.is_itk(file):
        return nifti.read_geometry(file, one_slice=one_slice, channel=channel)
    if channel is not None:
        raise problem(file, "channel", str(channel), "channels of one file are read from NIfTI alone: convert it")
    return itk_files.read_geometry(file, one_slice=one_slice)
