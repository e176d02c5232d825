"""A mask of label ids as DICOM SEG (PS3.3 A.51), by highdicom: one binary segment for each class that it shows.

Dimensions: S slices, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards import __version__
from data_shards.labels import UNUSED, LabelTable, shown_name
from segdiff_dist.export.dicom import MANUFACTURER, NO_DATE, NO_TIME, uid

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

# The scheme of classes for which we know no SNOMED code: the code is the name in the label table.
PRIVATE_SCHEME = "99SEGDIFF"
# pydicom's keywords of SNOMED CT, where they are not the name in camel case.
_KEYWORDS = {
    "urinary_bladder": "Bladder",
    "thyroid_gland": "Thyroid",
    "clavicula": "Clavicle",
}
# Names that have a keyword. Others may have a keyword by accident, of another meaning.
_IN_SNOMED = (
    *("spleen", "kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "inferior_vena_cava", "pancreas"),
    *("adrenal_gland", "duodenum", "urinary_bladder", "prostate", "trachea", "thyroid_gland", "sacrum", "heart"),
    *("pulmonary_vein", "brachiocephalic_trunk", "subclavian_artery", "common_carotid_artery", "brachiocephalic_vein"),
    *("superior_vena_cava", "iliac_artery", "humerus", "scapula", "clavicula", "femur", "spinal_cord", "sternum"),
)
_LONGEST = 64  # of DICOM's LO


def write_seg(
    file: Path, images: Sequence[Dataset], mask_SHW: np.ndarray, table: LabelTable, series: str, number: int
) -> None:
    """Write the mask of `images`, the slices of `series`, as the series `number` of their study. That of a mask without
    any class has an empty segment of the table's first class: without a SEG the image would have no known mask."""
    from highdicom.seg import Segmentation, SegmentationTypeValues

    ids = [int(i) for i in np.unique(mask_SHW) if i] or _first_class(table)
    if not ids:
        return
    segment_of = np.zeros(256, np.uint8)
    segment_of[ids] = np.arange(1, len(ids) + 1)
    seg = Segmentation(
        source_images=images,
        pixel_array=segment_of[mask_SHW],
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(number, i, table) for number, i in enumerate(ids, 1)],
        series_instance_uid=uid("mask series", series),
        series_number=number,
        sop_instance_uid=uid("mask", series),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=images[0].ManufacturerModelName,
        software_versions=__version__,
        device_serial_number="0",
        content_label="MASK",
        content_description="the mask that the synthetic image was made from",
        omit_empty_frames=bool(mask_SHW.any()),
        series_description=f"mask of synthetic series {images[0].SeriesNumber} (segdiff)",
    )
    for keyword in ("PatientIdentityRemoved", "DeidentificationMethod", "SyntheticData", "BodyPartExamined"):
        if keyword in images[0]:
            seg[keyword] = images[0][keyword]
    _make_reproducible(seg, uid("dimensions", series))
    seg.save_as(file, enforce_file_format=True)


def _first_class(table: LabelTable) -> list[int]:
    """The first id that is a class, an organ if there is one; none for a table without classes."""
    ids = [i for i, name in enumerate(table.names) if i and name != UNUSED]
    return sorted(ids, key=lambda i: (i == table.body_id, i))[:1]


def _segment(number: int, class_id: int, table: LabelTable) -> SegmentDescription:
    """The segment of a class; with its colour, if the table gives one."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes

    colour = None if table.colours is None else table.colours[class_id]
    name = table.names[class_id].replace("\\", "/")  # which separates values in DICOM
    stem, side = _without_side(name)
    segment = SegmentDescription(
        segment_number=number,
        segment_label=name if len(name) <= _LONGEST and name.isprintable() and name else shown_name(name),
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=_code(stem, name),
        algorithm_type=SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            "mask given to segdiff", codes.DCM.ManualProcessing, __version__
        ),
        display_color=None if colour is None else CIELabColor.from_rgb(*bytes.fromhex(colour)),
    )
    if stem in _IN_SNOMED and side:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(getattr(codes.SCT, side.title()))]
    return segment


def _code(stem: str, name: str) -> Any:
    """SNOMED's code of an organ, or a private one."""
    from pydicom.sr.codedict import codes

    if stem in _IN_SNOMED:
        keyword = _KEYWORDS.get(stem, "".join(word.title() for word in stem.split("_")))
        return _concept(getattr(codes.SCT, keyword))
    from highdicom.sr import CodedConcept

    return CodedConcept(name or shown_name(name), PRIVATE_SCHEME, shown_name(name))


def _concept(code: Any) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept.from_code(code)


def _without_side(name: str) -> tuple[str, str | None]:
    """kidney_right: kidney, right."""
    for side in ("left", "right"):
        if name.endswith(f"_{side}"):
            return name.removesuffix(f"_{side}"), side
    return name, None


def _make_reproducible(seg: Dataset, dimensions: str) -> None:
    """The library dates what it writes, and gives the dimensions a random UID."""
    for element in seg.iterall():
        if element.VR == "DA" and element.value:
            element.value = NO_DATE
        elif element.VR == "TM" and element.value:
            element.value = NO_TIME
        elif element.VR == "DT" and element.value:
            element.value = NO_DATE + NO_TIME
        elif element.keyword == "DimensionOrganizationUID":
            element.value = dimensions
