"""How many slices an archive will give, from its headers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_shards.ingest.cases import Case, read_header
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.volumes import num_resampled
from data_shards.problems import Problem

# Canonical dimension that runs through an axis' slices (data_shards.ingest.slices).
_THROUGH = {"sagittal": 0, "coronal": 1, "axial": 2}


def count_slices(cases: Iterable[Case], config: PrepareConfig) -> tuple[int, int]:
    """Volumes whose header can be read, and their slices along all axes, empty ones included."""
    import nibabel as nib

    problems: list[Problem] = []
    num_volumes = num_slices = 0
    for case in cases:
        header = read_header(case.image, problems, one_slice=case.is_flat)
        if header is None:
            continue
        num_volumes += 1
        shape, affine = header
        codes = nib.orientations.io_orientation(affine)[:, 0].astype(int)
        spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
        for axis in config.axes:
            stored = int(np.flatnonzero(codes == _THROUGH[axis])[0])
            num = num_resampled(shape[stored], config.spacing_mm / float(spacing_mm[stored]))
            num_slices += len(range(config.slice_stride // 2, num, config.slice_stride))
    return num_volumes, num_slices
