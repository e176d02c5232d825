"""One case to its slices: image, mask and envelope read, grey values mapped, and cut along each axis."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_shards.ingest.cases import Case
from data_shards.ingest.label_tables import Labelling
from data_shards.ingest.pictures import VALUES_OF_A_PICTURE
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.slices import VIEWS, Cutting, cut
from data_shards.labels import BODY, LABEL_TABLES, LabelTable
from data_shards.modalities import grey_rule
from data_shards.records import LABEL_NOTE, SliceMeta, SliceRecord

if TYPE_CHECKING:
    from data_shards.ingest.body import BodyField
    from data_shards.ingest.grey_values import Padding
    from data_shards.ingest.intensity import GreyMap
    from data_shards.ingest.masks import CaseMask
    from data_shards.ingest.volumes import Volume


_AXIS_IN_NAME = re.compile(r"-(axial|coronal|sagittal)-[0-9]{4,}$")
# Dimensions of an axial slice that become I, J and K of a slice along another axis: columns and rows run against their
# dimensions in all of them (data_shards.ingest.slices).
_FLAT_ORDER = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (2, 0, 1)}


def slices_of(
    case: Case,
    config: PrepareConfig,
    wholebody: Path | None,
    notes: list[str] | None = None,
    labelling: Labelling | None = None,
) -> Iterator[SliceRecord]:
    """Every slice of a case, by axis and slice index, one at a time. `notes` receives texts about what was recognised:
    converted units, guessed orientation, padding, axes without a slice. `labelling`: the meaning of the ids in label
    files, if it is not that of the label set.

    Raises UnreadableVolume for voxels that cannot be used, before the first slice, so a case is complete or missing.
    """
    notes = [] if notes is None else notes
    labelling = labelling or Labelling(LABEL_TABLES[config.label_set])
    table = labelling.table
    assert table.body_id is not None
    read = _read(case, config, wholebody, notes, labelling)
    of_case = _meta_of_case(case, config, read, table)
    names = ("size", "spacing_mm", "slice_stride", "fit", "mask_resize", "soft_edge")
    geometry = {name: getattr(config, name) for name in names}
    shape = read.image.voxels_IJK.shape
    is_flat = case.is_flat and 1 in shape
    if is_flat:
        geometry["slice_stride"] = 1
    for axis in config.result_settings()["axes"]:
        if is_flat and shape[VIEWS[axis][0]] != 1:
            continue
        cutting = Cutting(axis=axis, body_id=table.body_id, **geometry)
        is_thin = True
        for one in cut(read.image, read.mask.volume, read.body, read.grey, cutting):
            is_thin = False
            pixels = np.bincount(one.mask_HW.ravel(), minlength=table.num_classes)
            if of_case["labelled"] and pixels[list(table.organ_ids)].sum() < config.min_labelled_pixels:
                continue
            present = tuple(int(i) for i in np.flatnonzero(pixels) if i != 0)
            meta = SliceMeta(
                axis=axis,
                slice_index=one.slice_index,
                spacing_mm=one.spacing_mm,
                affine=one.affine,
                labels_present=present,
                **of_case,
            )
            yield SliceRecord(one.image_HW, one.mask_HW, meta, one.edge_2HW)
        if is_thin:
            thin = f"no {axis} slice: the volume is thinner than half of slice_stride ({config.slice_stride})"
            notes.append(f"{thin}; lower --prepare.slice-stride, or leave the axis out of --prepare.axes")


def _meta_of_case(case: Case, config: PrepareConfig, read: _CaseVolumes, table: LabelTable) -> dict[str, Any]:
    """The metadata that all slices of a case share."""
    return {
        "case_id": case.case_id,
        "modality": case.modality,
        "split": case.split,
        "intensity_scale": read.grey.scale,
        "intensity_offset": read.grey.offset,
        "label_set": table.name,
        "labelled": read.mask.source != "none",
        "source_sha256": read.image.sha256,
        "mask_source": read.mask.source,
        "bits": config.bits,
    }


def _flat_axis(case_id: str) -> tuple[str, str]:
    """The axis of a two-dimensional image, whose file can only state the axial plane, and a note. `segdiff export` puts
    the axis into its names."""
    named = _AXIS_IN_NAME.search(case_id)
    if named is None:
        remedy = "if it is another, name the file as CASE-coronal-0001 or CASE-sagittal-0001"
        return "axial", f"a two-dimensional image is taken as an axial slice; {remedy}"
    return named[1], f"a two-dimensional image is taken as a slice of the axis in its name, {named[1]}; else rename it"


def _seen_along(flat: Volume, axis: str) -> Volume:
    """A flat volume whose rows and columns are those of a slice along `axis`; in its file they are those of an axial
    slice."""
    order = list(_FLAT_ORDER[axis])
    affine = np.diag([*flat.spacing_mm[order], 1.0]) if axis != "axial" else flat.affine
    return replace(flat, voxels_IJK=flat.voxels_IJK.transpose(order), affine=affine)


@dataclass(frozen=True)
class _CaseVolumes:
    """The volumes from which a case's slices are cut."""

    image: Volume
    mask: CaseMask
    grey: GreyMap
    body: BodyField


def _read(
    case: Case, config: PrepareConfig, wholebody: Path | None, notes: list[str], labelling: Labelling
) -> _CaseVolumes:
    """Image, mask, grey values and envelope of a case; notes and errors as of slices_of."""
    from data_shards.ingest.body import find_body
    from data_shards.ingest.intensity import grey_map
    from data_shards.ingest.volumes import UnreadableVolume

    image, mask = _read_volumes(case, config, wholebody, notes, labelling)
    rule = grey_rule(case.modality, config.intensities)
    like: Literal["CT", "MR"] = "CT" if rule.kind == "hu" else "MR"  # whose values they are like
    padding, doubts = _settle_air(case, config, image, like)
    notes += dict.fromkeys((*case.notes, *image.notes, *_notes_on_mask(mask, image), *padding.notes))
    notes += doubts
    try:
        grey = grey_map(
            image,
            rule,
            intensity=config.intensity,
            hu_window=config.hu_window,
            mr_percentiles=config.mr_percentiles,
            bits=config.bits,
            num_padding=padding.num_voxels,
        )
    except ValueError as error:
        raise UnreadableVolume(str(case.image), str(error)) from error
    body = find_body(image, like, is_padded=padding.num_voxels > 0)
    if not (body.inside_IJK > 0.5).any():
        notes.append(f"no outline of the patient was found, so no pixel is `{BODY}`; draw a class {BODY} in its label")
    return _CaseVolumes(image, mask, grey, body)


def _read_volumes(
    case: Case, config: PrepareConfig, wholebody: Path | None, notes: list[str], labelling: Labelling
) -> tuple[Volume, CaseMask]:
    """Image and mask as stored; those of a two-dimensional file as a slice of its axis."""
    from data_shards.ingest.masks import read_case_mask
    from data_shards.ingest.volumes import UnreadableVolume, read_volume

    image = read_volume(case.image, one_slice=case.is_flat, channel=case.channel, pixel=case.pixel)
    mask = read_case_mask(case, image, config.label_set, wholebody, labelling)
    if case.is_flat and isinstance(case.image, Path) and image.voxels_IJK.shape[2] == 1:
        axis, note = _flat_axis(case.case_id)
        notes.append(note)
        image = _seen_along(image, axis)
        mask = replace(mask, volume=None if mask.volume is None else _seen_along(mask.volume, axis))
    if image.voxels_IJK.min() == image.voxels_IJK.max():
        raise UnreadableVolume(str(case.image), f"every voxel is {image.voxels_IJK.flat[0]}: the image is empty")
    return image, mask


def _settle_air(
    case: Case, config: PrepareConfig, image: Volume, like: Literal["CT", "MR"]
) -> tuple[Padding, list[str]]:
    """Take padding, and the lower end of a CT that was cut to a window, as air, in place.

    Returns the padding, and doubts about the values. UnreadableVolume if they cannot be those of the modality.
    """
    from data_shards.ingest.grey_values import (
        doubt_about_values,
        problem_with_values,
        take_padding_as_air,
        take_window_end_as_air,
    )
    from data_shards.ingest.volumes import UnreadableVolume

    padding = take_padding_as_air(image, like)
    is_stated = config.modality is not None or case.modality in config.intensities
    wrong = problem_with_values(image, like, padding.num_voxels, is_stated, case.modality)
    if wrong is not None and case.pixel is not None and not case.pixel.has_values:
        wrong += f"; for a picture, say what its grey values are: {VALUES_OF_A_PICTURE.format(modality=case.modality)}"
    if wrong is not None:
        raise UnreadableVolume(str(case.image), wrong)
    doubts = (doubt_about_values(image, like, padding.num_voxels), take_window_end_as_air(image, like))
    return padding, [doubt for doubt in doubts if doubt]


def _notes_on_mask(mask: CaseMask, image: Volume) -> list[str]:
    """What is to be said of the mask's file, and not of the image's already."""
    if mask.volume is None:
        return []
    notes = list(mask.volume.notes)
    if not mask.volume.voxels_IJK.any():
        notes.append("no voxel has a class; take the case out if that is wrong")
    return [f"{LABEL_NOTE}{note}" for note in notes if note not in image.notes]
