"""Intensities before and after clipping: from the archive's volumes, or from the stored slices where they are gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tests_support import write_shapes

from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.metrics.densities import clipping_of

CASES = ("amos_0001", "amos_0002", "amos_0003")
# The window of the shapes set: stored value * 2 - 256.
WINDOW = (-256.0, 254.0)


@pytest.fixture
def archived(shapes: Path, tmp_path: Path) -> ShardSet:
    """The shapes set with three CT volumes behind it: the first is broken, the others reach from -1000 to 1000."""
    source = {}
    for case in CASES:
        file = tmp_path / f"{case}.nii.gz"
        voxels = np.linspace(-1000, 1000, 4000, dtype=np.int16).reshape(20, 20, 10)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
        source[case] = {"image": [file.name, file.stat().st_size]}
    (tmp_path / "amos_0001.nii.gz").write_bytes(b"broken")
    shards = ShardSet.open(shapes)
    (member,) = shards.members
    return ShardSet((replace(member, index=member.index | {"source": source}),), shards.samples)


def test_volumes_show_what_is_outside_the_window(archived: ShardSet, tmp_path: Path) -> None:
    found = clipping_of(archived, "CT", tmp_path)
    assert found is not None
    assert found.from_volumes
    assert found.case_ids == CASES[1:]
    assert found.window == WINDOW
    outside = found.before.edges[:-1] < WINDOW[0]
    assert found.before.values[outside].sum() > 0


@pytest.mark.parametrize("root", [None, Path("gone")])
def test_without_the_archive_the_stored_slices_are_mapped_back(archived: ShardSet, root: Path | None) -> None:
    found = clipping_of(archived, "CT", root)
    assert found is not None
    assert not found.from_volumes
    assert found.before.edges[0] >= WINDOW[0]
    assert found.before.edges[-1] <= WINDOW[1]


def test_sixteen_bits_are_mapped_back_by_their_own_depth(tmp_path: Path) -> None:
    shards = ShardSet.open(write_shapes(tmp_path / "shapes", bits=16))
    found = clipping_of(shards, "CT", None)
    assert found is not None
    meta = shards.meta(0)
    assert found.window == pytest.approx((meta.intensity_offset, meta.intensity_offset + 65535 * meta.intensity_scale))
    assert found.before.edges[-1] <= found.window[1]
    # The ellipse and its discs have grey values around 90, 150 and 210 of 255.
    share = found.after.values * np.diff(found.after.edges)
    assert share[20:60].sum() == pytest.approx(0.5, abs=0.2)


def test_densities_have_unit_area(archived: ShardSet, tmp_path: Path) -> None:
    for modality in ("CT", "MR"):
        found = clipping_of(archived, modality, tmp_path)
        assert found is not None
        for density in (found.before, found.after):
            assert (density.values * np.diff(density.edges)).sum() == pytest.approx(1)
