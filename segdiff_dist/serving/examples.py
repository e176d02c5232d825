"""Masks to begin with: axial slices of the phantom by their position, and a coarse volume of its trunk.

They are in the package, in AMOS' ids; `python -m segdiff_dist.serving.examples` makes them again.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_shards.labels import AMOS, LabelTable
from segdiff_dist.painting.tables import LabelNames, OtherLabels, matched

FOLDER = Path(__file__).with_name("example_masks")
ENDING = ".nii.gz"
# Where the slices are: the organ of which they show most.
_AT = ("liver", "stomach", "pancreas", "kidney_left", "urinary_bladder")
_VOLUME = "trunk"
# Every so many voxels of the volume in a plane, and of its planes.
_COARSER = (2, 2, 3)


def example_names() -> list[str]:
    """From the liver down, then the volume."""
    return [*_AT, _VOLUME]


@lru_cache(maxsize=4)
def example_masks(table: LabelTable) -> dict[str, bytes]:
    """{name: .nii.gz}, uint8 in the table's ids. Classes that it does not have become its body."""
    import nibabel as nib

    from data_shards.phantom.case import nifti_gz

    others: OtherLabels = "background" if table.body_id is None else "body"
    new_of = matched(LabelNames(dict(enumerate(AMOS.names)), "the table 'amos'"), table, "phantom", others)
    look_up = np.array([new_of[i] for i in range(AMOS.num_classes)], np.uint8)
    found = {}
    for name in example_names():
        image = nib.Nifti1Image.from_bytes(gzip.decompress((FOLDER / f"{name}{ENDING}").read_bytes()))
        found[name] = nifti_gz(look_up[np.asarray(image.dataobj)], image.affine)
    return found


def make_examples() -> dict[str, bytes]:
    """The files: of the phantom's first patient of the test split."""
    import nibabel as nib
    from scipy import ndimage

    from data_shards.ingest.body import find_body
    from data_shards.ingest.volumes import Volume
    from data_shards.phantom.case import make_case, nifti_gz
    from data_shards.phantom.config import PhantomConfig, case_keys

    config = PhantomConfig(num_train=1, num_val=0, num_test=1, modalities=("CT",), matrix=(256, 256))
    case = make_case(next(key for key in case_keys(config) if key.split == "test"), config)
    image, drawn = (nib.as_closest_canonical(nib.Nifti1Image(one, case.affine)) for one in (case.image, case.labels))
    affine = np.asarray(image.affine)
    body = find_body(Volume(np.asarray(image.dataobj), 1.0, 0.0, affine, ""), "CT")
    to_coarse = np.diag(1.0 / body.steps)
    inside = ndimage.affine_transform(body.inside_IJK, to_coarse, output_shape=image.shape, order=1) > 0.5
    labels = np.where((drawn.dataobj == np.uint8(0)) & inside, np.uint8(AMOS.body_id or 0), drawn.dataobj)
    found = {}
    for organ in _AT:
        at = int((labels == AMOS.names.index(organ)).sum(axis=(0, 1)).argmax())
        placed = affine.copy()
        placed[:3, 3] += at * affine[:3, 2]
        found[organ] = nifti_gz(labels[..., at : at + 1], placed)
    i, j, k = _COARSER
    return found | {_VOLUME: nifti_gz(labels[::i, ::j, ::k], affine @ np.diag([i, j, k, 1.0]))}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in make_examples().items():
        (FOLDER / f"{name}{ENDING}").write_bytes(content)
