"""Synthetic images as DICOM series (PS3.3, CT, MR and PET Image), and their masks as DICOM SEG.

pydicom and highdicom are the extra `dicom`; nothing imports them until DICOM is written. The same input gives the same
bytes: UIDs are UUIDs of names (PS3.5 B.2, root 2.25), and nothing is dated.

Dimensions: S slices, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_shards import __version__
from data_shards.labels import LabelTable
from data_shards.modalities import OF_MR
from data_shards.problems import Problem, problem

if TYPE_CHECKING:
    from pydicom import Dataset

MANUFACTURER = "segdiff"
# The namespace of our UIDs: an arbitrary constant.
_NAMESPACE = uuid.UUID("6f0b6f3e-6f0c-5d0f-9c2e-2f1a3d1b7c55")
_SOP_CLASS = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
Kind = Literal["CT", "MR", "PT"]
# A date that PET and SEG require; nothing is dated.
NO_DATE, NO_TIME = "19000101", "000000"
_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
# DICOM counts to the left, the back and the head; NIfTI to the right, the front and the head.
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# A series counts as one of the abdomen if its mask shows one of these.
_IN_ABDOMEN = ("spleen", "kidney", "gallbladder", "liver", "stomach", "pancreas", "adrenal_gland", "duodenum")
_LONGEST = 64  # of DICOM's LO
_BY = " (segdiff)"
_LARGEST_COSINE = 2e-3


@dataclass(frozen=True)
class Stack:
    """Parallel slices of one synthetic image, as a viewer shows them, and their mask of label ids.

    affine: 4x4 from (column, row, slice, 1) to RAS mm. modality: CT, MR or PT (PET); `name`: what the set calls it.
    value = stored * slope + intercept, in HU if `in_hu`. shown: the values that a viewer shows as black and as
    white."""

    stored_SHW: np.ndarray
    mask_SHW: np.ndarray
    affine: np.ndarray
    modality: str
    axis: str
    shown: tuple[float, float]
    slope: float = 1.0
    intercept: float = 0.0
    name: str | None = None
    in_hu: bool = True

    @property
    def digest(self) -> str:
        """The digest of its pixels, mask and place."""
        digest = hashlib.sha256(self.stored_SHW.tobytes())
        digest.update(self.mask_SHW.tobytes())
        digest.update(self.affine.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class SeriesNames:
    """What a series belongs to. `origin`: distinguishes this series from others of the same pixels. `frame`: of the
    coordinates that the affine leads to; series of one frame can be laid over each other. `number`: of the series in
    its study, odd; that of the mask is the next. `part`: what of the study it shows. `file`: the name of its file."""

    patient: str
    study: str
    frame: str
    origin: str
    number: int = 1
    part: str | None = None
    file: str | None = None


def require_dicom(where: object) -> None:
    """Raise InputProblems that names the extra, if a library is not installed."""
    try:
        import highdicom  # noqa: F401
        import pydicom  # noqa: F401
    except ImportError as error:
        remedy = 'pip install "segdiff-dist[dicom]"'
        raise problem(where, str(error.name), "is not installed, and writes DICOM", remedy) from error


def uid(*parts: str) -> str:
    """The UID of what the parts name: a UUID as an integer under 2.25."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(parts)).int}"


def dicom_kind(modality: str, in_hu: bool) -> Kind | None:
    """The kind of DICOM images for a modality: CT for values in HU and for CBCT, MR for its contrasts (also T2-fs),
    PT for PET; None for others."""
    if in_hu or modality == "CBCT":
        return "CT"
    return "PT" if modality == "PET" else "MR" if modality.split("-")[0] in ("MR", *OF_MR) else None


def problems_without_kind(out: Path, without: Sequence[str]) -> list[Problem]:
    """Modalities that have no kind."""
    reason = (
        "DICOM's classes of slices with a place are those of CT, MR and PET (NM needs detectors and energy windows, US "
        "has no place); write NIfTI, or choose with --modality"
    )
    return [Problem(str(out), "modality", one, reason) for one in without]


def is_sheared(affine: np.ndarray) -> bool:
    """Whether the axes are more than about 0.1 degrees off right angles, which an image of DICOM has."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > _LARGEST_COSINE)


def write_stack(files: Sequence[Path], mask_file: Path, stack: Stack, names: SeriesNames, table: LabelTable) -> None:
    """A series with a file for each slice, and the SEG of its mask."""
    from segdiff_dist.export.dicom_seg import write_seg

    series = uid("series", names.origin, stack.digest)
    images = [_image(stack, names, table, series, number) for number in range(len(stack.stored_SHW))]
    for file, image in zip(files, images, strict=True):
        image.save_as(file, enforce_file_format=True)
    write_seg(mask_file, images, stack.mask_SHW, table, series, names.number + 1)


def _image(stack: Stack, names: SeriesNames, table: LabelTable, series: str, number: int) -> Dataset:
    """One slice."""
    image = _described(stack, names, table)
    image.SeriesInstanceUID, image.SeriesNumber = series, names.number
    image.SOPInstanceUID, image.InstanceNumber = uid("image", series, str(number)), number + 1
    _place(image, stack.affine, number)
    _set_pixels(image, stack, number)
    {"CT": _set_ct, "MR": _set_mr, "PT": _set_pt}[stack.modality](image, stack)
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    return image


def _described(stack: Stack, names: SeriesNames, table: LabelTable) -> Dataset:
    """What all slices of a series have in common: whose image it is, and that it is no one's."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset

    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = _EXPLICIT_LITTLE_ENDIAN
    image.SpecificCharacterSet = "ISO_IR 192"
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = _SOP_CLASS[stack.modality]
    image.Modality = stack.modality
    image.StudyInstanceUID = uid("study", names.study)
    image.FrameOfReferenceUID = uid("frame", names.frame)
    for keyword, value in _IDENTITY.items():
        setattr(image, keyword, value)
    image.PatientID = _patient_id(names.patient)
    series = f"synthetic {stack.name or stack.modality}, {names.part or stack.axis}"
    image.SeriesDescription = f"{series[: _LONGEST - len(_BY)]}{_BY}"
    if names.file is not None:
        image.ImageComments += f"; {names.file}"
    image.SoftwareVersions = __version__
    kind = "OTHER" if stack.modality != "CT" else "AXIAL" if stack.axis == "axial" else "MPR"
    image.ImageType = ["DERIVED", "SECONDARY", kind]
    if body_part := _body_part(stack.mask_SHW, table):
        image.BodyPartExamined = body_part
    else:  # type 2C (PS3.3 C.7.3.1): empty, since the part, which may be one of a pair, is not known
        image.Laterality = ""
    return image


def _patient_id(patient: str) -> str:
    """The name in the characters and the length of DICOM's LO. A digest distinguishes names that would become equal."""
    plain = "".join(one if one.isprintable() and one != "\\" else "_" for one in patient).strip()
    if plain == patient and len(plain) <= _LONGEST:
        return plain
    return f"{plain[: _LONGEST - 9]}_{hashlib.sha256(patient.encode()).hexdigest()[:8]}"


# Types 1 and 2 of the modules Patient, General Study, General Series, Frame of Reference, General Equipment and General
# Image (PS3.3 A.3 and A.4), without what a slice or a series has of its own; and what says that there is no patient.
_IDENTITY: dict[str, Any] = {
    "PatientName": "SYNTHETIC^SEGDIFF",
    "PatientBirthDate": "",
    "PatientSex": "",
    "PatientIdentityRemoved": "YES",
    "DeidentificationMethod": "no patient: generated by segdiff from a mask of labels",
    "StudyDate": "",
    "StudyTime": "",
    "StudyID": "",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "StudyDescription": "synthetic images (segdiff), not for diagnosis",
    "PatientPosition": "",
    "PositionReferenceIndicator": "",
    "Manufacturer": MANUFACTURER,
    "ManufacturerModelName": "segmentation-guided diffusion",
    "AcquisitionNumber": None,
    "DerivationDescription": "synthetic: generated by a diffusion model from a mask of labels",
    "ImageComments": "synthetic image, not for diagnosis",
    "BurnedInAnnotation": "NO",
    "LossyImageCompression": "00",
    "SyntheticData": "YES",
}


def _place(image: Dataset, affine: np.ndarray, number: int) -> None:
    """The modules Image Plane and Frame of Reference, in DICOM's directions."""
    to_lps = _RAS_TO_LPS @ affine
    step = np.linalg.norm(to_lps[:3, :3], axis=0)
    along_row, along_column = (to_lps[:3, :3] / step).T[:2]
    along_column = along_column - (along_column @ along_row) * along_row
    along_column /= np.linalg.norm(along_column)
    image.PixelSpacing = _decimals([step[1], step[0]])  # between rows first
    image.ImageOrientationPatient = _decimals([*along_row, *along_column])
    image.ImagePositionPatient = _decimals(to_lps[:3, 3] + number * to_lps[:3, 2])
    image.SliceThickness = image.SpacingBetweenSlices = _decimals([step[2]])[0]


def _set_pixels(image: Dataset, stack: Stack, number: int) -> None:
    pixels_HW = stack.stored_SHW[number]
    if stack.modality == "PT":
        pixels_HW = np.rint(_values(stack, pixels_HW) / _pt_slope(stack)).astype(np.int16)
    is_signed = bool(np.issubdtype(pixels_HW.dtype, np.signedinteger))
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = pixels_HW.shape
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, int(is_signed)
    image.PixelData = pixels_HW.astype("<i2" if is_signed else "<u2").tobytes()
    # The window is of stored values, where there is no rescale.
    low, high = (0, 255) if stack.modality == "MR" else stack.shown
    image.WindowCenter, image.WindowWidth = _decimals([(low + high) / 2, max(high - low, 1.0)])


def _set_ct(image: Dataset, stack: Stack) -> None:
    """The module CT Image."""
    image.RescaleSlope, image.RescaleIntercept = _decimals([stack.slope, stack.intercept])
    image.RescaleType = "HU" if stack.in_hu else "US"  # unspecified
    image.KVP = None


def _values(stack: Stack, stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.float64) * stack.slope + stack.intercept


def _pt_slope(stack: Stack) -> float:
    """PET has no intercept (C.8.9.4.1.2), so values are stored anew, in steps of 1/32767 of the largest."""
    ends = _values(stack, np.array([stack.stored_SHW.min(), stack.stored_SHW.max()]))
    return max(float(np.abs(ends).max()), 1e-6) / 32767


def _set_pt(image: Dataset, stack: Stack) -> None:
    """The modules PET Series, PET Isotope, PET Image and NM/PET Patient Orientation: nothing was measured."""
    image.SeriesDate, image.SeriesTime, image.AcquisitionDate, image.AcquisitionTime = NO_DATE, NO_TIME, "", ""
    image.Units, image.CountsSource, image.SeriesType = "NONE", "EMISSION", ["STATIC", "IMAGE"]
    image.NumberOfSlices, image.ImageIndex = len(stack.stored_SHW), image.InstanceNumber
    image.CorrectedImage, image.DecayCorrection, image.CollimatorType = "", "NONE", ""
    image.FrameReferenceTime, image.ActualFrameDuration = 0, None
    image.RescaleSlope, image.RescaleIntercept = _decimals([_pt_slope(stack), 0.0])
    image.RadiopharmaceuticalInformationSequence = []
    image.ImageType = ["DERIVED", "PRIMARY"]  # the only word that C.8.9.4.1.1 has there
    del image.PatientPosition  # the sequences say it
    image.PatientOrientationCodeSequence = image.PatientGantryRelationshipCodeSequence = []


def _set_mr(image: Dataset, stack: Stack) -> None:
    """The module MR Image: no sequence was played. It has no rescale; the meaning of stored values is a mapping."""
    image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "RM", "NONE", ""
    image.MRAcquisitionType = "2D"
    image.RepetitionTime = image.EchoTime = image.EchoTrainLength = None
    if (stack.slope, stack.intercept) != (1.0, 0.0):
        image.RealWorldValueMappingSequence = [_mapping(stack)]


def _mapping(stack: Stack) -> Dataset:
    """The values of stored numbers, of no unit (C.7.6.16.2.11)."""
    from pydicom import Dataset
    from pydicom.sr.codedict import codes

    mapping, unit = Dataset(), Dataset()
    mapping.RealWorldValueFirstValueMapped, mapping.RealWorldValueLastValueMapped = 0, 255
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = stack.slope, stack.intercept
    mapping.LUTExplanation, mapping.LUTLabel = "values of the volumes trained on", "VALUES"
    code = codes.UCUM.NoUnits
    unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = code.value, code.scheme_designator, code.meaning
    mapping.MeasurementUnitsCodeSequence = [unit]
    return mapping


def _decimals(values: Iterable[float]) -> list[Any]:
    """Decimals of at most 16 characters, as DICOM's DS has them."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(float(value) + 0.0, auto_format=True) for value in values]


def _body_part(mask_SHW: np.ndarray, table: LabelTable) -> str | None:
    shown = [table.names[i] for i in np.unique(mask_SHW)]
    return "ABDOMEN" if any(name.startswith(_IN_ABDOMEN) for name in shown) else None
