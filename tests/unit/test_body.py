"""The body envelope: skin to skin, with what is hollow, without what is the scanner's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_shards.ingest.body import find_body
from data_shards.ingest.volumes import Volume, linear_weights, read_volume

AIR, FAT, LUNG, TABLE = -1000, -100, -850, -50
REAL = Path(__file__).parents[3] / "shared" / "data" / "amos22_real"


def _volume(voxels: np.ndarray, spacing_mm: tuple[float, float, float]) -> Volume:
    return Volume(voxels.astype(np.int16), 1.0, 0.0, np.diag([*spacing_mm, 1.0]), "")


def _inside(volume: Volume, modality: str) -> np.ndarray:
    """The envelope at every stored voxel, bool."""
    body = find_body(volume, modality)
    inside = body.inside_IJK
    for d, count in enumerate(volume.voxels_IJK.shape):
        weights = linear_weights(count, inside.shape[d], step=1 / body.steps[d]).toarray()
        inside = np.moveaxis(np.tensordot(weights, inside, (1, d)), 0, d)
    return inside >= 0.5


def _trunk(shape=(180, 140, 12), spacing=(2.0, 2.0, 5.0)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of body, lungs (in it) and table (under it), in mm: the body is 280 x 200, its back at y = 60."""
    x, y, _ = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    body = ((x - 180) / 140) ** 2 + ((y - 160) / 100) ** 2 < 1
    lungs = (np.abs(x - 180) < 90) & (np.abs(np.abs(x - 180) - 60) < 40) & (np.abs(y - 160) < 50)
    table = (np.abs(y - 54) < 4) & (np.abs(x - 180) < 170)
    return body, lungs, table


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_lungs_are_in_and_the_table_is_out() -> None:
    body, lungs, table = _trunk()
    voxels = np.where(body, FAT, np.where(table, TABLE, AIR))
    voxels[lungs] = LUNG
    noise = np.random.default_rng(0).normal(0, 20, voxels.shape)
    inside = _inside(_volume(voxels + noise, (2.0, 2.0, 5.0)), "CT")
    assert _dice(inside, body) > 0.985
    assert inside[lungs].all()
    assert inside[table & ~body].mean() < 0.15  # where the patient lies on it


def test_an_arm_beside_the_body_is_the_patient() -> None:
    body, _, _ = _trunk()
    x, y = (np.arange(n) * 2.0 for n in body.shape[:2])
    arm = np.broadcast_to((((x - 30)[:, None] ** 2 + (y - 60)[None, :] ** 2) < 25**2)[:, :, None], body.shape)
    inside = _inside(_volume(np.where(body | arm, FAT, AIR), (2.0, 2.0, 5.0)), "CT")
    assert _dice(inside, body | arm) > 0.98


def test_a_ct_cut_to_a_window_still_has_an_outside() -> None:
    body, lungs, _ = _trunk()
    voxels = np.clip(np.where(body & ~lungs, FAT, AIR), -160, 240)
    assert _dice(_inside(_volume(voxels, (2.0, 2.0, 5.0)), "CT"), body) > 0.98


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_mr_with_dark_parts_and_noise(scale: float) -> None:
    body, lungs, _ = _trunk()
    rng = np.random.default_rng(0)
    voxels = np.where(body, 180.0, 0.0)
    voxels[lungs] = 12.0
    noisy = np.abs(voxels + 5 * rng.normal(size=body.shape) + 5j * rng.normal(size=body.shape))
    assert _dice(_inside(_volume(noisy * scale, (2.0, 2.0, 5.0)), "MR"), body) > 0.97


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_outline_is_sharp(modality: str) -> None:
    """Between inside and outside there is a step or two of the grid: a soft mask's edge is to be an edge."""
    body, _, _ = _trunk()
    air, tissue = (AIR, FAT) if modality == "CT" else (3, 200)
    inside = find_body(_volume(np.where(body, tissue, air), (2.0, 2.0, 5.0)), modality).inside_IJK
    # Around an ellipse of 280 x 200 mm there are about 250 points of the 3 mm grid.
    assert np.count_nonzero((inside > 0.02) & (inside < 0.98)) / inside.shape[2] < 600


def test_nothing_but_air_has_no_body() -> None:
    body, _, _ = _trunk()
    assert not _inside(_volume(np.full(body.shape, AIR), (2.0, 2.0, 5.0)), "CT").any()
    for voxel in (0, 30_000):  # all padding, or all but one voxel
        mr = _volume(np.zeros(body.shape), (2.0, 2.0, 5.0))
        mr.voxels_IJK[0, 0, 0] = voxel
        assert find_body(mr, "MR", is_padded=True).inside_IJK.mean() < 0.01


@pytest.mark.skipif(not REAL.is_dir(), reason="the real cases are not beside this repository")
@pytest.mark.parametrize("case", ["Tr/amos_0018", "Tr/amos_0403", "Va/amos_0401", "Tr/amos_0551", "Va/amos_0560"])
def test_real_organs_lie_inside_the_body(case: str) -> None:
    image = read_volume(REAL / f"images{case}.nii.gz")
    organs = read_volume(REAL / f"labels{case}.nii.gz").voxels_IJK > 0
    inside = _inside(image, "CT" if int(case[-4:]) <= 500 else "MR")
    assert inside[organs].mean() > 0.995
    assert 0.1 < inside.mean() < 0.9
