"""Headers of DICOM files: the attributes that pixels and labels need, and no other.

Names, birth dates and dates are never read. PatientID and UIDs are read and become digests. Libraries write file names
and faulty values into their warnings, and both may identify a person, so `quiet` stops these.
pydicom, highdicom and SimpleITK are the extra `dicom`; nothing imports them until a DICOM file is read.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_shards.problems import problem

# A DICOM file (PS3.10) has any 128 bytes, and then this.
_MAGIC_AT, _MAGIC = 128, b"DICM"
# If images are at one position, these say what they differ in. Times are compared, and never shown.
_DISTINGUISHING = (
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "EchoNumbers",
    "EchoTime",
    "DiffusionBValue",
    "TriggerTime",
    "ImageType",
    "AcquisitionTime",
)
# SeriesInstanceUID in any transfer syntax but deflated: tag, 4 bytes of VR and length, digits and dots.
_SERIES_UID = re.compile(rb"(?:\x20\x00\x0e\x00|\x00\x20\x00\x0e).{4}([0-9.]{1,64})", re.DOTALL)
# Headers are a few kilobytes; private attributes may be longer.
_HEAD_BYTES = 2**18
_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "IssuerOfPatientID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "SliceThickness",
    "ModalityLUTSequence",
    "SyntheticData",
    "LossyImageCompression",
    *_DISTINGUISHING,
)
# Storage classes of labels (PS3.4 B.5): Segmentation, Label Map Segmentation, RT Structure Set.
SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
# 48 bits: two of a million series have one digest with a probability of 0.2 %, and that is refused as a case id twice.
_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Header:
    """A file's attributes. `uid`: of this image alone. `has_table`: a look-up table gives its values. `states_rescale`:
    slope and intercept are there; else `rescale` has 1 and 0. `is_lossy`: its pixels were compressed with loss.
    `distinguishing`: values of _DISTINGUISHING, as text."""

    file: Path
    kind: str
    uid: str
    series_uid: str
    study_uid: str
    frame_uid: str
    patient: str
    modality: str
    shape: tuple[int, int]
    num_frames: int
    is_grey: bool
    has_table: bool
    is_localiser: bool
    spacing: tuple[float, ...]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    rescale: tuple[float, float]
    states_rescale: tuple[bool, bool]
    rescale_type: str
    thickness: float
    is_synthetic: bool
    is_lossy: bool
    distinguishing: tuple[str, ...]


def differing(headers: list[Header]) -> list[str]:
    """The names of attributes in which these differ."""
    columns = zip(*(one.distinguishing for one in headers), strict=True)
    return [name for name, values in zip(_DISTINGUISHING, columns, strict=True) if len(set(values)) > 1]


def alternating(ordered: list[Header]) -> str | None:
    """An attribute whose few values take turns along a stack, as where two scans have one SeriesInstanceUID. Parts of a
    stack that follow one another do not count, and neither do times, which each slice has for itself."""
    for at, name in enumerate(_DISTINGUISHING):
        values = [one.distinguishing[at] for one in ordered]
        num_changes = sum(before != after for before, after in pairwise(values))
        if "Time" not in name.replace("EchoTime", "") and num_changes >= len(set(values)) <= len(values) / 2:
            return name
    return None


def is_dicom(file: Path) -> bool:
    """Whether the first bytes are a DICOM file's, whatever its name is."""
    try:
        with file.open("rb") as stream:
            return stream.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC
    except OSError:
        return False


def is_bare_dicom(file: Path) -> bool:
    """Whether a file seems to be DICOM without the preamble that PS3.10 requires: its first element is of group 2 or 8,
    as in every such file."""
    try:
        with file.open("rb") as stream:
            head = stream.read(4)
    except OSError:
        return False
    return head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:] == b"\x00"


def read_header(file: Path) -> Header | None:
    """The attributes; None if the file cannot be read as DICOM."""
    pydicom = library("pydicom", file.parent)
    try:
        with quiet():
            data = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
            return _header(file, data)
    except Exception:  # pydicom raises whatever the bytes lead it to
        return None


def named_series(file: Path) -> set[str]:
    """Every SeriesInstanceUID at the beginning of a file, its own and those that it refers to, however damaged it
    is."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        return set()
    return {uid.decode() for uid in _SERIES_UID.findall(head)}


def _header(file: Path, data: Any) -> Header:
    def numbers(name: str) -> tuple[float, ...]:
        value = data.get(name)
        return () if value is None or value == "" else tuple(float(one) for one in value)

    image_type = [str(one).upper() for one in data.get("ImageType") or ()]
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    return Header(
        file,
        kind=str(data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID", "")),
        uid=str(data.get("SOPInstanceUID", "")),
        series_uid=str(data.get("SeriesInstanceUID", "")),
        study_uid=str(data.get("StudyInstanceUID", "")),
        frame_uid=str(data.get("FrameOfReferenceUID", "")),
        patient="|".join(str(data.get(name) or "").strip() for name in ("PatientID", "IssuerOfPatientID")),
        modality=str(data.get("Modality", "")).strip(),
        shape=(int(data.get("Rows") or 0), int(data.get("Columns") or 0)),
        num_frames=int(data.get("NumberOfFrames") or 1),
        is_grey=int(data.get("SamplesPerPixel") or 1) == 1 and data.get("PhotometricInterpretation") == "MONOCHROME2",
        has_table=bool(data.get("ModalityLUTSequence")),
        is_localiser=any(word in one for one in image_type for word in ("LOCALIZER", "SCOUT")),
        spacing=numbers("PixelSpacing"),
        position=numbers("ImagePositionPatient"),
        orientation=numbers("ImageOrientationPatient"),
        rescale=(1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)),
        states_rescale=(slope is not None, intercept is not None),
        rescale_type=str(data.get("RescaleType") or ""),
        thickness=float(data.get("SliceThickness") or 0.0),
        is_synthetic=data.get("SyntheticData") == "YES",
        is_lossy=data.get("LossyImageCompression") == "01",
        distinguishing=tuple(str(data.get(name)) for name in _DISTINGUISHING),
    )


def digest(text: str) -> str:
    """A short sha256: the same text has the same digest, and the digest does not show the text."""
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def library(name: str, where: object) -> Any:
    """pydicom, highdicom or SimpleITK. Raises InputProblems if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = 'pip install "segdiff-dist[dicom]"'
        raise problem(where, name, "is not installed, and reads DICOM", remedy) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the libraries."""
    import pydicom

    settings, logger = pydicom.config.settings, logging.getLogger("pydicom")
    mode, was = settings.reading_validation_mode, logger.disabled
    settings.reading_validation_mode, logger.disabled = pydicom.config.IGNORE, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.reading_validation_mode, logger.disabled = mode, was
