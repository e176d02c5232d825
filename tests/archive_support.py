"""Small AMOS folders, written in a blink: an ellipse of a patient with a liver and a spleen, in CT and in MR."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (24, 20, 10)
SPACING_MM = (4.0, 4.0, 5.0)
LIVER, SPLEEN = 6, 1


def patient(modality: str, seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Image (int16: HU, or MR of arbitrary scale) and label ids (uint8) in RAS order."""
    rng = np.random.default_rng(seed)
    i, j, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    body = (i / 0.8) ** 2 + (j / 0.7) ** 2 < 1
    label = np.zeros(shape, np.uint8)
    label[(i - 0.35) ** 2 + j**2 < 0.08] = LIVER
    label[(i + 0.4) ** 2 + j**2 < 0.05] = SPLEEN
    air, tissue, liver, spleen = (-1000, 20, 70, 120) if modality == "CT" else (3, 200, 120, 320)
    image = np.where(body, tissue, air)
    image[label == LIVER], image[label == SPLEEN] = liver, spleen
    return (image + rng.normal(0, 2, shape)).astype(np.int16), label


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write a NIfTI file with the voxels' own type."""
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([*SPACING_MM, 1.0]) if affine is None else affine), path)


def write_archive(root: Path) -> Path:
    """An AMOS folder: in each split a CT and an MR, the test cases without labels, but for amos_0504."""
    lists: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    for name, end, numbers in (("training", "Tr", (1, 501)), ("validation", "Va", (2, 502)), ("test", "Ts", (3, 504))):
        for number in numbers:
            image, label = patient("CT" if number <= 500 else "MR", number)
            file = f"amos_{number:04d}.nii.gz"
            save(root / f"images{end}" / file, image)
            if number != 3:
                save(root / f"labels{end}" / file, label)
            entry = {"image": f"./images{end}/{file}"}
            lists[name].append(entry if name == "test" else entry | {"label": f"./labels{end}/{file}"})
    organs = {"0": "background", "1": "spleen", "6": "liver", "8": "arota", "9": "postcava", "15": "prostate/uterus"}
    (root / "dataset.json").write_text(json.dumps({"name": "AMOS", "modality": {"0": "CT"}, "labels": organs, **lists}))
    return root


class Archive:
    """An AMOS folder with the tools to spoil it."""

    shape, spacing_mm = SHAPE, SPACING_MM

    def __init__(self, root: Path) -> None:
        self.root = write_archive(root)

    save = staticmethod(save)
    patient = staticmethod(patient)

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change dataset.json."""
        content = json.loads((self.root / "dataset.json").read_text())
        change(content)
        (self.root / "dataset.json").write_text(json.dumps(content))
