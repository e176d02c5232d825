"""One case from its key: patient, grid, image and labels, and how the archive stores them."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass

import numpy as np

from data_shards.phantom.canvas import Canvas
from data_shards.phantom.config import CaseKey, PhantomConfig
from data_shards.phantom.organs import paint_organs
from data_shards.phantom.patient import Grid, Patient
from data_shards.phantom.scanner import ct_tissues, mr_tissues, scan_ct, scan_mr
from data_shards.phantom.trunk import half_width_mm, paint_trunk
from data_shards.records import MODALITIES, SPLITS

# Stored orientations: the three that AMOS-like archives hold most, and one that is upside down.
ORIENTATIONS = ("LAS", "RAS", "LPS", "RPI")
# Level 1 takes a third of the time of level 6 and gives files that are 4 % larger on noisy CT.
_GZIP_LEVEL = 1


@dataclass(frozen=True)
class Case:
    """image int16 and labels uint8, [X, Y, Z] in stored orientation; affine [4, 4] from voxels to RAS mm; wholebody, if
    the config asks for it, as labels but in the whole-body table's ids."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    patient: Patient
    wholebody: np.ndarray | None = None


def make_case(key: CaseKey, config: PhantomConfig) -> Case:
    """Draw, scan and store one patient; depends on config.seed, the key and the grid settings alone."""
    modality, split = MODALITIES.index(key.modality), SPLITS.index(key.split)
    seeds = np.random.SeedSequence([config.seed, modality, split, key.index]).spawn(2)
    rng, noise_rng = (np.random.Generator(np.random.Philox(seed)) for seed in seeds)
    patient = Patient.draw(rng, config, complete=key.index == 0)
    grid = Grid.draw(rng, config, patient, half_width_mm(patient.fat_mm))
    world_shift_mm = np.round(rng.uniform(-40.0, 40.0, 3), 2)
    is_ct = key.modality == "CT"
    canvas = Canvas(grid, patient, ct_tissues(rng) if is_ct else mr_tissues(rng), wholebody=config.wholebody)
    paint_organs(canvas, paint_trunk(canvas))
    image = scan_ct(canvas, noise_rng) if is_ct else scan_mr(canvas, noise_rng)
    orientation = ORIENTATIONS[(key.index + split + modality) % len(ORIENTATIONS)]
    return _stored(image, canvas, world_shift_mm, orientation)


def nifti_gz(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """A gzipped NIfTI-1 file, sform set as in AMOS (qform code 0), without time stamp: same voxels, same bytes."""
    import nibabel

    volume = nibabel.nifti1.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    volume.header.set_xyzt_units("mm", "sec")
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=buffer, mtime=0) as stream:
        stream.write(volume.to_bytes())
    return buffer.getvalue()


def _stored(image: np.ndarray, canvas: Canvas, shift_mm: np.ndarray, orientation: str) -> Case:
    """Flip RAS voxels to `orientation`; the affine keeps every voxel where it was in the world."""
    affine = np.diag([*canvas.grid.spacing_mm, 1.0])
    affine[:3, 3] = shift_mm + canvas.grid.origin_mm
    flipped = tuple(axis for axis in range(3) if orientation[axis] != "RAS"[axis])
    for axis in flipped:
        affine[:3, 3] += affine[:3, axis] * (image.shape[axis] - 1)
        affine[:3, axis] *= -1.0
    image, labels = (np.ascontiguousarray(np.flip(voxels, flipped)) for voxels in (image, canvas.labels))
    wholebody = None if canvas.wholebody is None else np.ascontiguousarray(np.flip(canvas.wholebody, flipped))
    return Case(image, labels, affine, canvas.patient, wholebody)
