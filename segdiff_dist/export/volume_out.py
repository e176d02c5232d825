"""A generated volume as a file: NIfTI, MetaImage or NRRD on the mask's voxels as they are stored, or a folder of DICOM.

Dimensions: I, J, K canonical (right, anterior, superior).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_shards.files import hidden_folder, new_folder
from data_shards.ingest import itk_files
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.slices import VIEWS
from data_shards.ingest.volume_files import read_geometry
from data_shards.ingest.volumes import Volume
from data_shards.labels import LabelTable
from data_shards.problems import InputProblems, Problem
from segdiff_dist.export.config import VolumeConfig
from segdiff_dist.export.dicom import Kind, SeriesNames, Stack, is_sheared, require_dicom, write_stack

ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd")


def is_dicom(out: Path) -> bool:
    """A name without an ending is that of a folder of DICOM files."""
    return not out.suffix


def kind_problems(out: Path, affine: np.ndarray | None, others: tuple[str, ...] = ()) -> list[Problem]:
    """Why the kind of file cannot be written; `affine`: of the mask, if it could be read; `others`: endings that the
    caller writes."""
    if not is_dicom(out) and not out.name.endswith(ENDINGS):
        remedy = f"let it end in {', '.join((*others, *ENDINGS))}; a folder of DICOM files has no ending"
        return [Problem(str(out), "output", f"no name of {'an image' if others else 'a volume'}", remedy)]
    try:
        if is_dicom(out):
            require_dicom(out)
        elif itk_files.is_itk(out):
            itk_files.simpleitk(out)
    except InputProblems as error:
        return list(error.problems)
    if is_dicom(out) and affine is not None and is_sheared(affine):
        remedy = "DICOM holds right angles alone: let OUT end in .nii.gz"
        return [Problem(str(out), "mask's affine", "its axes are not at right angles", remedy)]
    return []


def save_file(out: Path, values_IJK: np.ndarray, mask_file: Path) -> None:
    """Written in the mask's own orientation, to a hidden file that is then renamed."""
    geometry = read_geometry(mask_file)  # its affine is in mm, whatever unit the mask's header counts in
    header = None if itk_files.is_itk(mask_file) else geometry.header
    save_values(out, values_IJK, geometry.affine, header)


def save_values(
    out: Path, values_IJK: np.ndarray, affine: np.ndarray, header: Any = None, *, is_flat: bool = False
) -> None:
    """Canonical values on the stored voxels that `affine` places; `header`: a NIfTI header whose codes are kept;
    `is_flat`: the file has two dimensions."""
    from nibabel import orientations

    own = orientations.io_orientation(affine)
    canonical = np.stack((np.arange(3), np.ones(3)), axis=1)
    values = orientations.apply_orientation(values_IJK, orientations.ornt_transform(canonical, own))
    values = values[..., 0] if is_flat else values
    with hidden_folder(out) as folder:  # the libraries choose the format by the name
        if itk_files.is_itk(out):
            itk_files.write(folder / out.name, values, affine)
        else:
            _save_nifti(folder / out.name, values, affine, header)
        (folder / out.name).rename(out)


def save_dicom(
    out: Path,
    values_IJK: np.ndarray,
    labels: Volume,
    grey: GreyMap,
    config: VolumeConfig,
    table: LabelTable,
    kind: Kind,
    *,
    in_hu: bool,
) -> None:
    """A folder: images/0001.dcm and so on, the planes along `config.axis` as a viewer shows them; masks/mask.dcm.

    Images of one mask file share patient, study and frame of reference, so that a viewer can lay them over each other.
    """
    to_IJK = _as_shown(labels.voxels_IJK.shape, labels.affine, config.axis)
    ends = grey.offset, grey.offset + 255 * grey.scale
    stack = Stack(
        _ordered(values_IJK, to_IJK),
        _ordered(labels.voxels_IJK, to_IJK),
        labels.affine @ to_IJK,
        kind,
        config.axis,
        ends,
        name=config.modality,
        in_hu=in_hu,
    )
    case = f"mask_{labels.sha256[:16]}"
    origin = f"{case} volume {config.modality} {config.axis}"
    names = SeriesNames(case, case, case, origin, number=1 if config.modality == "CT" else 3)
    with new_folder(out) as folder:
        for name in ("images", "masks"):
            (folder / name).mkdir()
        files = [folder / "images" / f"{number + 1:04d}.dcm" for number in range(len(stack.stored_SHW))]
        write_stack(files, folder / "masks" / "mask.dcm", stack, names, table)


def _as_shown(shape: tuple[int, ...], affine: np.ndarray, axis: str) -> np.ndarray:
    """4x4 from (column, row, slice, 1) to (i, j, k, 1). Rows and columns run against their canonical dimensions, as in
    the set's slices. Slices follow each other along the normal of the image, as readers of DICOM sort them."""
    through, row, column = VIEWS[axis]
    to_IJK = np.zeros((4, 4))
    to_IJK[3, 3] = 1.0
    for number, dimension in enumerate((column, row)):
        to_IJK[dimension, number], to_IJK[dimension, 3] = -1.0, shape[dimension] - 1
    to_IJK[through, 2] = 1.0
    # RAS to LPS is a rotation: it keeps the hand.
    if np.linalg.det((affine @ to_IJK)[:3, :3]) < 0:
        to_IJK[through, 2], to_IJK[through, 3] = -1.0, shape[through] - 1
    return to_IJK


def _ordered(voxels_IJK: np.ndarray, to_IJK: np.ndarray) -> np.ndarray:
    """[slice, row, column] of the voxels."""
    dimensions = np.abs(to_IJK[:3, :3]).argmax(axis=0)[::-1]  # of slice, row, column
    backwards = [slice(None, None, int(to_IJK[d, 2 - n])) for n, d in enumerate(dimensions)]
    return np.ascontiguousarray(voxels_IJK.transpose(dimensions)[tuple(backwards)])


def _save_nifti(file: Path, values: np.ndarray, affine: np.ndarray, header: Any) -> None:
    """With the codes of the mask's header, if that is NIfTI too."""
    import nibabel as nib

    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    for name in ("qform", "sform"):
        code = 1 if header is None else int(header[f"{name}_code"]) or 1
        getattr(image, f"set_{name}")(affine, code)
    nib.save(image, file)
