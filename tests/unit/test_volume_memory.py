"""How much memory a volume takes on its way to slices, as a multiple of its voxels."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_shards.ingest.body import find_body
from data_shards.ingest.intensity import grey_map
from data_shards.ingest.slices import Cutting, cut
from data_shards.ingest.volumes import read_labels, read_volume
from data_shards.records import AXES

SHAPE = (256, 256, 80)
SPACING_MM = (1.25, 1.25, 3.0)
# Of the largest volume, the whole of preparing a case included: the slices' consumer needs some of it too.
MOST = 4.0


def _write(folder: Path, modality: str, label_dtype: type) -> tuple[Path, Path, int]:
    """An ellipse of a patient with 15 balls in it; both files, and the bytes of the image's voxels."""
    rng = np.random.default_rng(0)
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij", sparse=True)
    body = (i / 0.8) ** 2 + (j / 0.6) ** 2 + 0 * k < 1
    air, tissue = (-1000, 20) if modality == "CT" else (3, 200)
    image = (np.where(body, tissue, air) + rng.integers(0, 15, SHAPE)).astype(np.int16)
    labels = np.zeros(SHAPE, label_dtype)
    for label_id in range(1, 16):
        centre, radius = rng.uniform(-0.5, 0.5, 3), rng.uniform(0.1, 0.3)
        labels[sum((x - c) ** 2 for x, c in zip((i, j, k), centre, strict=True)) < radius**2] = label_id
    files = folder / "image.nii.gz", folder / "label.nii.gz"
    for file, voxels in zip(files, (image, labels), strict=True):
        nib.save(nib.Nifti1Image(voxels, np.diag([*SPACING_MM, 1.0])), file)
    return *files, image.nbytes


@pytest.mark.parametrize(
    ("modality", "intensity", "label_dtype"), [("CT", "paper", np.float64), ("MR", "window", np.uint8)]
)
def test_a_case_takes_less_than_four_times_its_volume(
    tmp_path: Path, modality: str, intensity: str, label_dtype: type
) -> None:
    image_file, label_file, volume_bytes = _write(tmp_path, modality, label_dtype)
    peaks = {}
    tracemalloc.start()
    try:
        volume = read_volume(image_file)
        labels = read_labels(label_file, 16)
        peaks["read"] = tracemalloc.get_traced_memory()[1] / volume_bytes
        window = {"hu_window": (-256.0, 256.0), "mr_percentiles": (1.0, 99.0)}
        grey = grey_map(volume, modality, intensity=intensity, bits=8, **window)
        body = find_body(volume, modality)
        for axis in AXES:
            options = {"size": 256, "spacing_mm": 1.0, "slice_stride": 4, "fit": "auto", "body_id": 16}
            slices = cut(volume, labels, body, grey, Cutting(axis=axis, mask_resize="soft", soft_edge=True, **options))
            assert sum(1 for _ in slices) > 50
        peaks["all"] = tracemalloc.get_traced_memory()[1] / volume_bytes
    finally:
        tracemalloc.stop()
    # Image and uint8 labels, and a plane or two on the way.
    assert peaks["read"] < 1.8
    assert peaks["all"] < MOST
