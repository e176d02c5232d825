"""The volumes of layouts_support as DICOM: series in files of meaningless names, with SEG or RTSTRUCT as labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from layouts_support import AFFINE, LIVER, SPLEEN, volumes
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, RTStructureSetStorage, generate_uid

# Must not be found in any set.
SECRETS = (b"Mustermann", b"ID-4711", b"19630517")
CLASSES = ((SPLEEN, "spleen"), (LIVER, "liver"))


def series(image: np.ndarray, case: str, *, patient: str = "ID-4711", modality: str = "CT") -> list[Dataset]:
    """The slices of a volume in AFFINE, a data set each. Values are stored with a slope and intercept of the slice."""
    uids = {name: generate_uid(entropy_srcs=[case, name]) for name in ("series", "study", "frame")}
    return [_slice(image[:, :, k], k, uids, patient, modality) for k in range(image.shape[2])]


def _slice(plane: np.ndarray, k: int, uids: dict[str, str], patient: str, modality: str) -> Dataset:
    data = Dataset()
    data.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    data.SOPInstanceUID = generate_uid(entropy_srcs=[uids["series"], str(k)])
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = (
        data.SOPClassUID,
        data.SOPInstanceUID,
    )
    data.SeriesInstanceUID, data.StudyInstanceUID = uids["series"], uids["study"]
    data.FrameOfReferenceUID = uids["frame"]
    data.PatientName, data.PatientID, data.PatientBirthDate = "Mustermann^Erika", patient, "19630517"
    data.StudyDate = data.AcquisitionDate = "19630517"
    data.PatientSex = data.AccessionNumber = data.StudyID = data.StudyTime = data.ReferringPhysicianName = ""
    data.Modality, data.SeriesNumber, data.InstanceNumber = modality, 1, 99 - k
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.Rows, data.Columns = plane.shape[1], plane.shape[0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    # AFFINE runs to the right and the front; DICOM's numbers run to the left and the back.
    data.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    data.ImagePositionPatient = [-AFFINE[0, 3], -AFFINE[1, 3], AFFINE[2, 3] + AFFINE[2, 2] * k]
    data.PixelSpacing, data.SliceThickness = [AFFINE[1, 1], AFFINE[0, 0]], AFFINE[2, 2]
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, -1024 - k, "HU"
    data.PixelData = (plane.T + 1024 + k).astype("<i2").tobytes()
    return data


def segmentation(slices: Sequence[Dataset], label: np.ndarray, kind: str = "BINARY") -> Dataset:
    """A SEG of the classes; `label` [I, J, K], or [K, J, I, segment] where segments overlap."""
    described = [
        SegmentDescription(
            number,
            name,
            codes.SCT.Organ,
            codes.SCT.Organ,
            SegmentAlgorithmTypeValues.MANUAL,
            tracking_id=name,
            tracking_uid=generate_uid(),
        )
        for number, (_, name) in enumerate(CLASSES, 1)
    ]
    stored = label
    if label.ndim == 3:
        stored = np.stack([(label == value).T for value, _ in CLASSES], axis=-1)
    return highdicom.seg.Segmentation(
        source_images=list(slices),
        pixel_array=stored.astype(np.uint8),
        segmentation_type=SegmentationTypeValues[kind],
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="1",
        device_serial_number="1",
        omit_empty_frames=True,
    )


def structure_set(
    slices: Sequence[Dataset], boxes: dict[str, list[tuple[float, ...]]], names_slices: bool = False
) -> Dataset:
    """An RTSTRUCT; a box is its ends in I and J, in voxels, and its slice K. `names_slices`: by their UIDs."""
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.PatientName, data.PatientID, data.Modality = "Mustermann^Erika", "ID-4711", "RTSTRUCT"
    data.SeriesInstanceUID, data.StudyInstanceUID = generate_uid(), slices[0].StudyInstanceUID
    frame = _with(FrameOfReferenceUID=slices[0].FrameOfReferenceUID)
    if names_slices:
        images = [_with(ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in slices]
        named = _with(SeriesInstanceUID=slices[0].SeriesInstanceUID, ContourImageSequence=images)
        frame.RTReferencedStudySequence = [_with(RTReferencedSeriesSequence=[named])]
    data.ReferencedFrameOfReferenceSequence = [frame]
    data.StructureSetROISequence = [
        _with(ROINumber=n, ROIName=name, ReferencedFrameOfReferenceUID=slices[0].FrameOfReferenceUID)
        for n, name in enumerate(boxes, 1)
    ]
    data.ROIContourSequence = [
        _with(ReferencedROINumber=n, ContourSequence=[_contour(slices, box) for box in found])
        for n, found in enumerate(boxes.values(), 1)
    ]
    return data


def _contour(slices: Sequence[Dataset], box: tuple[float, ...]) -> Dataset:
    i0, i1, j0, j1, k = box
    corners = np.array([[i, j, k, 1] for i, j in ((i0, j0), (i1, j0), (i1, j1), (i0, j1))])
    points = (corners @ AFFINE.T)[:, :3] * (-1, -1, 1)
    numbers = [float(one) for one in points.ravel()]
    return _with(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4, ContourData=numbers)


def _with(**values: Any) -> Dataset:
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return data


def save(root: Path, objects: Sequence[Dataset], first: int = 0) -> list[Path]:
    """Files whose names say nothing, in an order that is not that of the slices."""
    root.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(len(objects)).permutation(len(objects)).tolist()
    files = [root / f"{first + number:04d}" for number in order]
    for file, data in zip(files, objects, strict=True):
        data.save_as(file, enforce_file_format=True)
    return files


def write_dicom(root: Path, kind: str = "BINARY") -> list[str]:
    """Every volume of layouts_support with its SEG in one tree; the series' UIDs."""
    uids = []
    for case, _, image, label in volumes():
        slices = series(image, case, patient=f"ID-4711-{case[:2]}")
        save(root / "Mustermann" / case, [*slices, segmentation(slices, label, kind)])
        uids.append(str(slices[0].SeriesInstanceUID))
    return uids


def read(file: Path) -> Dataset:
    return pydicom.dcmread(file)
