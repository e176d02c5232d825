"""Samples as DICOM: an image and its SEG for each, in the studies of their patients."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segdiff_dist.export.dicom import SeriesNames, Stack, dicom_kind, is_sheared, write_stack
from segdiff_dist.export.files import slice_affine
from segdiff_dist.export.samples import plain_case

if TYPE_CHECKING:
    from segdiff_dist.export.samples import FinishedSamples, Sample


def write_dicom_pairs(out: Path, samples: FinishedSamples, iterated: Iterable[Sample]) -> None:
    """OUT/images/NAME.dcm and OUT/masks/NAME.dcm: a series of one slice for each sample, in the study of its volume.

    Samples of a volume are no volume: each has its own noise, and they are not neighbours. So a viewer must not stack
    them, and `prepare` reads each of them as a slice; a viewer shows where they cross each other.
    """
    for folder in ("images", "masks"):
        (out / folder).mkdir()
    table, made_by = samples.label_table, _made_by(samples)
    num_slices = _num_slices(samples)
    num_series = Counter[str]()
    for item, sample in zip(samples.items, iterated, strict=True):
        stack, is_placed = _stack(samples, sample)
        study, part = _study(item, is_volume=num_slices.get(item["case_id"], 1) > 1)
        # Series follow one another by modality, number of the image, axis and slice, as `samples.items` does.
        number = 2 * num_series[study] + 1
        num_series[study] += 1
        frame = plain_case(item["case_id"]) if is_placed else sample.name
        names = SeriesNames(
            item["patient"],
            f"{made_by} {study}",
            f"{made_by} {frame}",
            f"{made_by} {sample.name}",
            number,
            part,
            sample.name,
        )
        files = [out / folder / f"{sample.name}.dcm" for folder in ("images", "masks")]
        write_stack(files[:1], files[1], stack, names, table)


def _made_by(samples: FinishedSamples) -> str:
    """What made the images: the same for each modality and each place of the files, so that their UIDs are, too."""
    return json.dumps(samples.origin, sort_keys=True)


def _num_slices(samples: FinishedSamples) -> Counter[str]:
    """The slices of each case of a set; none for masks of a folder."""
    return Counter() if samples.shards is None else Counter(samples.shards.samples["case_id"].to_pylist())


def _study(item: dict[str, Any], *, is_volume: bool) -> tuple[str, str]:
    """The name of an image's study, and of what it shows of it: a slice of a volume, or one of a patient's slices, each
    of which is a case."""
    image, at = f"image {item['case'].rsplit('_', 1)[1]}", f"{item['axis']} {item['slice_index']:04d}"
    if is_volume:
        return f"case {item['case_id']}", f"{image}, {at}"
    return f"patient {item['patient']}", f"{image}, {at} of {item['case_id']}"


def _stack(samples: FinishedSamples, sample: Sample) -> tuple[Stack, bool]:
    """A sample as a series, and whether its place in the patient is known."""
    meta = sample.record.meta
    affine = slice_affine(meta, sample.knows_place)
    if is_sheared(affine):
        affine = slice_affine(meta, False)
    is_placed = sample.knows_place and np.array_equal(affine, np.array(meta.affine).reshape(4, 4)[:, [1, 0, 2, 3]])
    in_hu = samples.in_hu(meta.modality)
    stack = Stack(
        sample.record.image_HW[None],
        sample.record.mask_HW[None],
        affine,
        dicom_kind(meta.modality, in_hu) or "MR",
        meta.axis,
        (meta.intensity_offset, meta.intensity_offset + 255 * meta.intensity_scale),
        meta.intensity_scale,
        meta.intensity_offset,
        name=meta.modality,
        in_hu=in_hu,
    )
    return stack, is_placed
