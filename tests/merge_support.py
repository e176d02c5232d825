"""A raw data set of nnU-Net with the volumes of layouts_support as real cases."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from layouts_support import LIVER, SPLEEN, save, volumes

LABELS = {"background": 0, "spleen": 1, "Liver": 2}
PATTERN = "(p[0-9]+)_"


def write_real(root: Path, *, flat: bool, ending: str = ".nii.gz", tests: tuple[str, ...] = ("p3_1",)) -> Path:
    """A raw data set of CT: p1_1, p1_2 and p2_1 for training, p3_1 for tests; of volumes, or of one slice of each."""
    for case, _, image, label in volumes():
        renumbered = np.select([label == SPLEEN, label == LIVER], [1, 2], 0).astype(np.uint8)
        end = "Ts" if case in tests else "Tr"
        for kind, voxels, name in (("images", image, f"{case}_0000"), ("labels", renumbered, case)):
            file = root / f"{kind}{end}" / f"{name}{ending}"
            save(file, voxels)
            if flat:
                nib.save(nib.Nifti1Image(voxels[:, :, 4], np.diag([-4.0, -4.0, 1.0, 1.0])), file)
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 3, "file_ending": ending}
    (root / "dataset.json").write_text(json.dumps(content))
    return root
