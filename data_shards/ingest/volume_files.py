"""Volume files, by the ending of their name: NIfTI is read by this project, other formats by SimpleITK."""

from __future__ import annotations

from pathlib import Path

from data_shards.ingest import dicom_series, itk_files, nifti
from data_shards.ingest.dicom_series import DicomSeries
from data_shards.ingest.nifti import Geometry

ENDINGS = (".nii.gz", ".nii", *itk_files.ENDINGS)


def stem(name: str) -> str | None:
    """The name without its ending; None if it is not a volume's, or a hidden file's (a Mac creates forks called
    ._NAME)."""
    ending = next((one for one in ENDINGS if name.lower().endswith(one)), None)
    return None if ending is None or name.startswith(".") else name[: -len(ending)]


def read_geometry(file: Path | DicomSeries, *, one_slice: bool = False) -> Geometry:
    """The position of the volume, from its header alone; errors and `one_slice` as of nifti.read_geometry."""
    if isinstance(file, DicomSeries):
        return dicom_series.read_geometry(file)
    reader = itk_files if itk_files.is_itk(file) else nifti
    return reader.read_geometry(file, one_slice=one_slice)
