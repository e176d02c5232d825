"""The number of slices of an archive, from its headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_shards.ingest.cases import Case
from data_shards.ingest.nifti import Geometry
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.volume_files import read_geometry
from data_shards.ingest.volumes import num_resampled
from data_shards.problems import InputProblems

# Canonical dimension that runs through an axis' slices (data_shards.ingest.slices).
_THROUGH = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass(frozen=True)
class Count:
    """The facts about an archive from headers. `flat`: images of one slice; `voxels`: of all images; `recognised`: by
    case id, texts about what was ignored, converted or guessed; cases without such are not in it."""

    volumes: int
    flat: int
    slices: int
    voxels: int
    recognised: dict[str, list[str]]


def count_slices(cases: Iterable[Case], config: PrepareConfig) -> Count:
    """Volumes whose header can be read, and their slices along all axes, empty ones included."""
    volumes = flat = slices = voxels = 0
    recognised = {}
    for case in cases:
        try:
            geometry = read_geometry(case.image, one_slice=case.is_flat, channel=case.channel, pixel=case.pixel)
        except InputProblems:  # the check or the list of skipped cases names it
            continue
        is_flat = geometry.is_flat or (case.is_flat and 1 in geometry.shape)
        volumes, flat = volumes + 1, flat + is_flat
        slices += 1 if is_flat else _num_slices(geometry, config)
        voxels += int(np.prod(geometry.shape, dtype=np.int64))
        if notes := [*case.notes, *geometry.notes]:
            recognised[case.case_id] = notes
    return Count(volumes, flat, slices, voxels, recognised)


def dimension_through(affine: np.ndarray, axis: str) -> int:
    """The dimension of a stored volume that runs through the slices of an axis."""
    import nibabel as nib

    codes = nib.orientations.io_orientation(affine)[:, 0].astype(int)
    return int(np.flatnonzero(codes == _THROUGH[axis])[0])


def _num_slices(geometry: Geometry, config: PrepareConfig) -> int:
    """Slices along all axes."""
    total = 0
    for axis in config.axes:
        stored = dimension_through(geometry.affine, axis)
        num = num_resampled(geometry.shape[stored], config.spacing_mm / float(geometry.spacing_mm[stored]))
        total += len(range(config.slice_stride // 2, num, config.slice_stride))
    return total
